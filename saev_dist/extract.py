"""Job 1: stream the activations through the SAE, accumulate, merge, write the artifacts.

    plan, less what partials cover -> each rank's share: read -> encode -> accumulate, spill rows, snapshot
                                   -> exchange and merge -> rank 0 writes

Run by `saev-dist extract`; see `config.Extract` for what a user can set, `job` for what is opened before the stream,
`artifacts` for what is written after it, and `partials` for why it may die at any time.
"""

import platform
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import islice
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from saev_dist import artifacts, partials
from saev_dist.accumulators import rows
from saev_dist.accumulators.base import Codes, DeviceCodes, to_cpu
from saev_dist.accumulators.bundle import Bundle
from saev_dist.config import Extract
from saev_dist.data.reader import Reader, explain_overflow, find_bad_value
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, DataError, MergeError, RunError, SaevDistError, warn
from saev_dist.estimate import fit
from saev_dist.fields import Fields
from saev_dist.job import Job, as_json, open_job
from saev_dist.machine import allocating
from saev_dist.partials import Keeper, Partial
from saev_dist.plan import Batch, Intervals, Plan, complement, subtract
from saev_dist.progress import Progress
from saev_dist.report import already_done, describe_plan, summary
from saev_dist.sae import screen
from saev_dist.sae.encoder import ActivationOverflow, Encoder
from saev_dist.sae.pieces import batches_ahead
from saev_dist.sae.product import arithmetic
from saev_dist.selfcheck import Report, check
from saev_dist.spill import Segment, Spill, covered
from saev_dist.statistics import make_bundle
from saev_dist.store import Run
from saev_dist.world import World

PARTS_FOR_GPU = 3
"""Parts of a buffer that are read side by side: one thread is slower than a GPU."""


def run(cfg: Extract) -> None:
    """Do the job in this process, as one rank of its world.

    Raises:
        SaevDistError: anything a user can mend; on every rank of the world.
    """
    # The lock is held until the others have left too: a rank that is still at work may write.
    with ExitStack() as held, World(cfg.timeout_s) as world, world.obeying_signals(cfg.out / "partials"):
        job = open_job(cfg, world)
        world.agree(
            job.identity,
            would="compute something else",
            advice="Name an SAE and shards that all nodes share, and compute on one kind of device (--device cpu, or GPUs).",
        )
        if cfg.precision == "tf32" and job.device.type != "cuda":
            raise ConfigError(f"--precision tf32 needs a CUDA device; this run is on {job.device.type}. Use fp32 or bf16.")
        if cfg.screen != "none" and job.device.type != "cpu":
            raise ConfigError(f"--screen {cfg.screen} is for the CPU; this run is on {job.device.type}. Leave it out.")
        store = Run(cfg.out)
        # Slurm and torchrun give a restarted job the flags of its first start: --force must not undo what that did.
        force = cfg.force and not (world.restarted and world.rank == 0 and store.is_of_job(world.job_id, job.identity))
        if world.rank == 0:
            store.refuse_others(job.identity, force=force)
        if world.tell(world.rank == 0 and not force and store.is_finished()):
            if world.rank == 0:
                store.tidy()
                print(already_done(store))
            return
        planned = replace(job, cfg=replace(cfg, force=force))
        need = fit(planned, world)
        job = replace(job, n_threads=need.n_threads)
        if world.rank == 0:
            _warn_of(cfg, job, store)
        if cfg.dry_run:
            if world.rank == 0:
                print(describe_plan(planned, need, world.size))
            return
        begun = None
        if world.rank == 0:
            if not world.patience_s:
                store.lock.refuse_held()  # before the self-check takes its time
            job = _inputs_checked(job, None if force else store.under_way(), world)
            held.enter_context(store.lock.hold(patience_s=world.patience_s, check=world.check))
            begun = store.begin(job.identity, _note(job), afresh=force)
        if world.tell(begun is None):  # finished by another process, while this one checked its inputs or waited
            if world.rank == 0:
                print(already_done(store))
            return
        work(replace(job, identity=begun or job.identity), store, world)


def _inputs_checked(job: Job, earlier: Fields | None, world: World) -> Job:
    """The job with what the self-check says, which an earlier attempt's run.json may hold; the shards have their sizes."""
    if not job.cfg.skip_bad_shards:
        job.shards.check_files()
    known = Report.from_json(earlier.obj.get("self_check")) if earlier else None
    skip_bad = job.cfg.skip_bad_shards
    found = check(job.sae, job.shards, job.device, job.cfg.self_check, known=known, skip_bad=skip_bad, look=world.check)
    return replace(job, self_check=found or known)


def _warn_of(cfg: Extract, job: Job, store: Run) -> None:
    """Tell of what is allowed, and seldom meant."""
    if strangers := store.strangers():
        more = f" and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
        warn(f"{cfg.out} holds {strangers[0]}{more}, which no run made; the artifacts will lie beside that.")
    if 0 < cfg.percentile < 1:
        meant = f"{100 * cfg.percentile:g}"
        warn(f"--percentile {cfg.percentile:g} is below the 1st percentile; for the {meant}th write {meant}.")
    if cfg.screen == "bf16" and (rate := screen.speedup(job.sae.d_model)) < screen.PAYS:
        warn(
            f"--screen bf16: this machine makes a product in bfloat16 {rate:.2g} times as fast as in fp32, which does not "
            "pay. Leave it out here."
        )


def _note(job: Job) -> dict[str, Any]:
    """What run.json holds besides the identity."""
    report = job.self_check.to_json() if job.self_check else None
    return {"config": as_json(job.cfg), "n_batches": job.plan.n_batches, "self_check": report}


def work(job: Job, store: Run, world: World, *, encode: bool = True) -> None:
    """Do what is left of a run, and write its artifacts. Rank 0 must hold the lock.

    Args:
        encode: False when all batches should be done already.
    """
    advice = "start over (--force) with a smaller --batch-tokens or --top-k"
    if job.device.type == "cpu":
        advice = f"lower --read-ahead, or {advice}"
    with allocating(job.device, advice=advice):
        _extract(job, store, world, encode=encode)


def _extract(job: Job, store: Run, world: World, *, encode: bool) -> None:
    cfg = job.cfg
    clock = Clock()
    with clock("resume"):
        share = _take_share(job, store, world, goes_on=encode)
        if not encode and share.todo:
            missing = ", ".join(f"{first} to {stop - 1}" for first, stop in share.todo)
            raise RunError(f"{store.dpath}: batches {missing} of {job.plan.n_batches} are not done. Run extract again.")
    with clock("stream"):
        bundle, report = _stream(job, store, world, share)
        reports = world.collect(report)
    with clock("merge"):
        whole = _merge(bundle, world)
        world.wait()
    if world.rank == 0:
        with clock("write"):
            segments = [Segment.from_json(obj) for report in reports for obj in report.pop("segments")]
            why = {int(batch_i): reason for report in reports for batch_i, reason in report.pop("left_out").items()}
            left_out = artifacts.find_left_out(job, segments, why)
            owners = [report.pop("owner") for report in reports]
            names, metrics = artifacts.write(job, store, world, segments, owners[0], whole)
        manifest = artifacts.make_manifest(job, world, reports, clock.seconds, metrics, left_out)
        store.publish(names, manifest)
    world.finish()
    if world.rank == 0:
        print(summary(cfg.out, manifest))


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank starts from, and what it has to do."""

    bundle: Bundle
    absorbed: list[Partial]
    """Partials that the state holds."""
    fingerprint: str
    """Of the run."""
    arithmetic: str
    """Of this rank, as the function of that name has it."""
    todo: Intervals
    bad: dict[int, str]
    """On rank 0: batches whose shard is known to be bad, and why; they are in nobody's share."""


def _take_share(job: Job, store: Run, world: World, *, goes_on: bool) -> Share:
    """Look at what earlier attempts did, and deal it and the rest to the ranks; say so if the run `goes_on`."""
    cfg, dpath, plan = job.cfg, store.partials_dpath, job.plan
    first_rank = world.rank == 0
    found = world.tell(partials.names(dpath) if first_rank else None)
    mine = found[world.rank :: world.size]
    faults = {name: what for name in mine if (what := partials.fault(dpath / name, world.check))}
    own = arithmetic(job.device, cfg.precision, screen=cfg.screen != "none")
    looks = world.collect({"faults": faults, "arithmetic": own})
    live: list[Partial] = []
    fingerprint = partials.fingerprint(job.identity)
    if first_rank:
        known = {name: what for look in looks for name, what in look["faults"].items()}
        live = partials.settle(dpath, known, fingerprint)
        if live and goes_on:
            n_done = plan.n_examples_in(_done(live))
            share = f"{n_done:,} of {plan.n_examples:,} images ({n_done / plan.n_examples:.1%})"
            print(f"{store.dpath} holds {share} of this run: going on.", flush=True)
    bad_files = job.shards.bad_files() if first_rank and cfg.skip_bad_shards else {}
    news = world.tell(
        {
            "live": [partial.name for partial in live],
            "done": _done(live),
            "bad": list(bad_files),
            "fingerprint": fingerprint,  # only rank 0 knows what the run began with
        }
    )

    bundle = make_bundle(cfg, job.sae, job.shards)
    absorbed: list[Partial] = []
    for name in news["live"][world.rank :: world.size]:
        world.check()
        partial, state = partials.load(dpath / name)
        bundle = bundle.merge(bundle.like(state)) if absorbed else bundle.like(state)
        absorbed.append(partial)

    left = complement(tuple(map(tuple, news["done"])), plan.n_batches)
    bad_intervals = tuple(sorted(plan.shard_batches(shard_i) for shard_i in news["bad"]))
    shares = plan.deal(subtract(left, bad_intervals), world.size)
    if first_rank and goes_on:
        kinds = {look["arithmetic"] for look, todo in zip(looks, shares, strict=True) if todo}
        kinds = kinds.union(*(partial.arithmetic for partial in live))
        if len(kinds) > 1:
            warn(
                f"this run is computed on {' and on '.join(sorted(kinds))}, which may differ in a score's last bits: "
                "other ranks or attempts may give other bytes."
            )
    return Share(
        bundle=bundle,
        absorbed=absorbed,
        fingerprint=news["fingerprint"],
        arithmetic=own,
        todo=shares[world.rank],
        bad={i: reason for shard_i, reason in bad_files.items() for i in range(*plan.shard_batches(shard_i))},
    )


def _done(live: list[Partial]) -> Intervals:
    return covered(segment for partial in live for segment in partial.segments)


def _stream(job: Job, store: Run, world: World, share: Share) -> tuple[Bundle, dict[str, Any]]:
    """Encode this rank's batches; return its state and its report."""
    cfg, shards, sae, bundle = job.cfg, job.shards, job.sae, share.bundle
    stride = rows.sample_stride(shards.n_tokens, cfg.max_distribution_samples)
    n_tokens = job.plan.n_examples_in(share.todo) * shards.n_patches
    n_before = job.plan.n_examples_in(_done(share.absorbed)) * shards.n_patches
    progress = Progress(
        "extract",
        n_before + n_tokens,
        shards.d_model * 4,
        rank=world.rank,
        size=world.size,
        enabled=cfg.progress,
        n_done=n_before,
    )
    clock = Clock()
    began, n_done = time.perf_counter(), 0

    with ExitStack() as stack:
        spill = stack.enter_context(Spill(store.partials_dpath, partials.new_owner(world.rank), artifacts.row_kinds(cfg)))
        keeper = stack.enter_context(Keeper(spill, share.fingerprint, share.absorbed, share.arithmetic, cfg.snapshot_every))
        stack.callback(progress.close)
        shapes = shards.n_patches, sae.activation, sae.d_sae, job.device
        n_ahead = batches_ahead(job.plan.sizes(), *shapes, job.n_threads)
        screened = cfg.screen == "bf16" and bool(share.todo)
        encoder = stack.enter_context(Encoder(sae, job.device, cfg.precision, job.n_threads, screen=screened))
        reader = Reader(
            shards,
            job.plan,
            share.todo,
            depth=cfg.read_ahead,
            hold=n_ahead,
            pin=job.device.type == "cuda",
            n_parts=PARTS_FOR_GPU if job.device.type == "cuda" else 1,
            skip_bad=cfg.skip_bad_shards,
            check=world.check,
        )
        stack.enter_context(encoder.beside())
        stream = stack.enter_context(closing(_encoded(reader, encoder, shards, n_ahead, clock)))
        while True:
            try:
                world.check()
                batch, pieces = next(stream, (None, []))
            except (SaevDistError, MemoryError, RuntimeError):  # the last is torch's, also where memory runs out
                # Here the state covers whole batches, so they need not be done again.
                is_saved = False
                with suppress(MergeError, MemoryError, RuntimeError):  # of the state: what ended the stream is told
                    is_saved = keeper.save(bundle.state_dict())
                if not is_saved:
                    world.note_loss()
                raise
            if batch is None:
                break
            with clock("accumulate"):
                for codes in pieces:
                    try:
                        bundle.add(codes)
                    except MergeError as err:
                        first = Plan(shards.examples, 1)[codes.img_i]
                        raise explain_overflow(codes.acts_bd, first, shards, err) from None
            with clock("rows"):
                parts = [_rows(codes, cfg, sae.d_sae, stride) for codes in pieces]
                spill.append(batch.index, parts)
            encoder.wait()
            del codes, pieces, parts  # a GPU's memory
            with clock("snapshot"):
                keeper.save_if_due(bundle.state_dict)
            progress.advance(batch.n_examples * shards.n_patches, reader.n_left_out * shards.n_patches)
            n_done += batch.n_examples * shards.n_patches
        if reader.n_left_out:  # maybe the last ones
            progress.advance(0, reader.n_left_out * shards.n_patches)
        with clock("snapshot"):
            if not keeper.save(bundle.state_dict()):
                world.note_loss()
    seconds = max(time.perf_counter() - began, 1e-9)
    report = {
        "rank": world.rank,
        "host": platform.node(),
        "product": encoder.product,
        "arithmetic": keeper.arithmetic,
        "n_batches": sum(stop - first for first, stop in share.todo),
        "n_tokens": n_done,
        "n_tokens_before": n_before,
        "stream_s": seconds,
        "tokens_per_s": n_done / seconds,
        "read_gb_per_s": reader.n_bytes / seconds / 1e9,
        "read_wait_s": reader.wait_s,
        "recomputed_per_token": encoder.recomputed_per_token,
        **{f"{stage}_s": value for stage, value in clock.seconds.items()},
        "owner": spill.owner,
        "segments": [asdict(segment) for segment in keeper.segments],
        "left_out": share.bad | reader.left_out,
    }
    return bundle, report


Pieces = list[Codes] | list[DeviceCodes]


def _encoded(
    reader: Reader, encoder: Encoder, shards: Shards, n_ahead: int, clock: "Clock"
) -> Generator[tuple[Batch, Pieces], None, None]:
    """Each batch with the codes of its pieces. About one piece of a later batch for each thread is under way meanwhile; fewer
    where batches are small.

    The error of a batch that cannot be read is raised after those before it have been yielded. An encoded batch waits for at
    most one read.

    Args:
        n_ahead: most batches that are under way beside the one that the caller works on.
    """

    def finish(batch: Batch, acts_bd: Tensor, pieces: list[Future[Any]]) -> tuple[Batch, Pieces]:
        with clock("encode"):
            try:
                return batch, [codes.result() for codes in pieces]
            except ActivationOverflow as err:
                raise find_bad_value(acts_bd, batch, shards, err.limit) from None

    def is_short() -> bool:
        """Whether another batch should be begun before the first one is handed over."""
        n_behind = sum(len(pieces) for _, _, pieces in islice(under_way, 1, None))
        if n_behind >= encoder.n_threads or len(under_way) > n_ahead:
            return False
        return not under_way or reader.is_ready or not all(codes.done() for codes in under_way[0][2])

    under_way: deque[tuple[Batch, Tensor, list[Future[Any]]]] = deque()
    bad: DataError | None = None
    with closing(iter(reader)) as batches:
        is_last = False
        while under_way or not is_last:
            if is_last or not is_short():
                yield finish(*under_way.popleft())
                continue
            try:
                batch, acts_bd = next(batches)
            except StopIteration:
                is_last = True
            except DataError as err:
                is_last, bad = True, err
            else:
                pieces = encoder.submit_batch(acts_bd, img_i=batch.img_i, n_patches=shards.n_patches)
                under_way.append((batch, acts_bd, list(pieces)))
    if bad:
        raise bad


def _rows(codes: Codes | DeviceCodes, cfg: Extract, d_sae: int, stride: int) -> Mapping[str, NDArray[Any]]:
    """A piece's rows, by kind."""
    made: dict[str, Tensor] = {}
    if cfg.n_distributions:
        made["distributions"] = rows.sampled_values(codes, min(cfg.n_distributions, d_sae), stride)
    if cfg.img_acts:
        counts_e, indices_v, means_v = rows.image_means(codes, d_sae)
        made |= {"img_acts_counts": counts_e, "img_acts_indices": indices_v, "img_acts_data": means_v}
    return {kind: tensor.numpy() for kind, tensor in zip(made, to_cpu(*made.values()), strict=True)}


def _merge(bundle: Bundle, world: World) -> Bundle:
    """The ranks' states as one, on rank 0."""

    def merge(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return reduce(Bundle.merge, map(bundle.like, states)).state_dict()

    return bundle.like(world.merge(bundle.state_dict(), merge))


class Clock:
    """Seconds spent, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began
