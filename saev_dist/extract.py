"""Job 1: stream the activations through the SAE, accumulate, merge, write the artifacts.

    plan -> each rank's share: read -> encode -> accumulate, spill rows -> exchange and merge -> rank 0 writes

Run by `saev-dist extract`; see `config.Extract` for what a user can set.
"""

import hashlib
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saev_dist import __version__
from saev_dist.accumulators import rows
from saev_dist.accumulators.base import Codes
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.saev_percentile import SaevPercentile
from saev_dist.accumulators.topk import TopK
from saev_dist.config import Extract
from saev_dist.data.reader import Reader, find_bad_value
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError
from saev_dist.estimate import check_fits, estimate
from saev_dist.plan import Batch, Intervals, Plan, complement
from saev_dist.progress import Progress
from saev_dist.report import describe_plan, summary
from saev_dist.sae.model import ActivationOverflow, Encoder, Sae, batch_threads
from saev_dist.sae.saev import load_saev
from saev_dist.spill import Spill, read_columns, write_csr
from saev_dist.store import Run
from saev_dist.world import World

# Fields of the config that change no byte of any artifact.
INERT = {
    "shards",
    "sae",
    "out",
    "config",
    "layer",
    "pre_bias",
    "device",
    "read_ahead",
    "timeout_s",
    "dry_run",
    "force",
    "progress",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run works on: the config with everything that it names opened and checked."""

    cfg: Extract
    shards: Shards
    sae: Sae
    plan: Plan
    device: torch.device
    identity: dict[str, Any]
    """What the bytes of the artifacts depend on; JSON."""


def run(cfg: Extract) -> None:
    """Do the job in this process, as one rank of its world.

    Raises:
        SaevDistError: anything a user can mend; on every rank of the world.
    """
    with World(cfg.timeout_s) as world:
        job = open_job(cfg, world)
        store = Run(cfg.out)
        finished = world.tell(world.rank == 0 and store.is_finished(job.identity, force=cfg.force))
        if finished:
            if world.rank == 0:
                print(f"{cfg.out} holds this run, finished: nothing to do. (--force computes it again.)")
            return
        need = estimate(cfg, job.shards, job.sae, job.plan, job.device)
        check_fits(need, cfg.out, world, job.device)
        if cfg.dry_run:
            if world.rank == 0:
                print(describe_plan(cfg, job.shards, job.sae, job.plan, need, world.size))
            return
        if world.rank == 0:
            job.shards.check_files()
            store.begin(job.identity)
        world.wait()
        try:
            _extract(job, store, world)
        except (MemoryError, torch.OutOfMemoryError) as err:
            first = str(err).splitlines()[0]
            raise ConfigError(f"out of memory on {job.device} ({first}); lower --batch-tokens or --top-k.") from None


def open_job(cfg: Extract, world: World) -> Job:
    """Open and check what the config names."""
    shards = Shards.open(cfg.shards, cfg.layer)
    sae = load_saev(cfg.sae, pre_bias=cfg.pre_bias)
    if sae.d_model != shards.d_model:
        raise ConfigError(
            f"{cfg.sae} takes activations of width {sae.d_model}; {cfg.shards} holds width {shards.d_model}. "
            "Use the SAE that was trained on this model's activations."
        )
    device = world.device(cfg.device)
    if cfg.precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"--precision tf32 needs a CUDA device; this run is on {device.type}. Use fp32 or bf16.")
    if cfg.percentile_estimator == "saev" and world.size > 1:
        raise ConfigError(
            f"--percentile-estimator saev depends on the order of all tokens, so it runs in one process; "
            f"there are {world.size}. Use the histogram, which merges."
        )
    settings = {name: value for name, value in asdict(cfg).items() if name not in INERT}
    identity = settings | {
        "layer": shards.layer,
        "pre_bias": sae.pre_bias,
        "device": device.type,
        "shards_sha256": shards.fingerprint(),
        "sae_sha256": _sha256(cfg.sae),
    }
    plan = Plan(shards.examples, min(max(1, cfg.batch_tokens // shards.n_patches), max(shards.examples)))
    return Job(cfg=cfg, shards=shards, sae=sae, plan=plan, device=device, identity=identity)


def _extract(job: Job, store: Run, world: World) -> None:
    cfg = job.cfg
    clock = Clock()
    todo = job.plan.deal(complement((), job.plan.n_batches), world.size)[world.rank]
    with clock("stream"):
        bundle, saev_percentile, report = _stream(job, store, world, todo)
        reports = world.collect(report)
    with clock("merge"):
        whole = _merge(bundle, world)
        world.wait()
    if world.rank == 0:
        with clock("write"):
            names, metrics = _write(job, store, world, whole, saev_percentile)
        manifest = _manifest(job, world, reports, clock.seconds, metrics)
        store.publish(names, manifest)
        print(summary(cfg.out, manifest))
    world.wait()


def _stream(job: Job, store: Run, world: World, todo: Intervals) -> tuple[Bundle, SaevPercentile | None, dict[str, Any]]:
    """Encode this rank's batches; return its state and its report."""
    cfg, shards = job.cfg, job.shards
    bundle = make_bundle(job)
    saev_percentile = None
    if cfg.percentile_estimator == "saev":
        saev_percentile = SaevPercentile(job.sae.d_sae, cfg.percentile, shards.n_tokens)
    stride = rows.sample_stride(shards.n_tokens, cfg.max_distribution_samples)
    reader = Reader(shards, job.plan, todo, depth=cfg.read_ahead, pin=job.device.type == "cuda")
    n_tokens = job.plan.n_examples_in(todo) * shards.n_patches
    progress = Progress("extract", n_tokens, shards.d_model * 4, rank=world.rank, size=world.size, enabled=cfg.progress)
    clock = Clock()
    began = time.perf_counter()
    with ExitStack() as files:
        spills = {name: files.enter_context(store.spill(name, world.rank)) for name in _spill_names(cfg)}
        files.callback(progress.close)
        n_threads = batch_threads(job.plan.examples_per_batch * shards.n_patches, job.sae.d_sae, job.device)
        encoder = files.enter_context(Encoder(job.sae, job.device, cfg.precision, n_threads))
        for codes in _encoded(reader, encoder, shards, clock):
            world.check()
            with clock("accumulate"):
                bundle.update(codes)
                if saev_percentile is not None:
                    saev_percentile.update(codes)
            with clock("rows"):
                _spill_rows(codes, cfg, job.sae.d_sae, stride, spills)
            progress.advance(codes.n_tokens)
    bundle.flush()
    seconds = max(time.perf_counter() - began, 1e-9)
    report = {
        "rank": world.rank,
        "host": platform.node(),
        "n_batches": sum(stop - first for first, stop in todo),
        "n_tokens": n_tokens,
        "stream_s": seconds,
        "tokens_per_s": n_tokens / seconds,
        "read_gb_per_s": reader.n_bytes / seconds / 1e9,
        "read_wait_s": reader.wait_s,
        **{f"{stage}_s": value for stage, value in clock.seconds.items()},
    }
    return bundle, saev_percentile, report


def _encoded(reader: Reader, encoder: Encoder, shards: Shards, clock: "Clock") -> Iterator[Codes]:
    """The codes of each batch. The batch after it is being encoded while the caller works on them."""

    def finish(batch: Batch, acts_bd: Tensor, codes: Callable[[], Codes]) -> Codes:
        with clock("encode"):
            try:
                return codes()
            except ActivationOverflow as err:
                raise find_bad_value(acts_bd, batch, shards, err.limit) from None

    ahead: tuple[Batch, Tensor, Callable[[], Codes]] | None = None
    for batch, acts_bd in reader:
        task = (batch, acts_bd, encoder.submit(acts_bd, img_i=batch.img_i, n_patches=shards.n_patches))
        if ahead is not None:
            yield finish(*ahead)
        ahead = task
    if ahead is not None:
        yield finish(*ahead)


def make_bundle(job: Job) -> Bundle:
    """The empty state of all of a run's accumulators."""
    cfg, d_sae = job.cfg, job.sae.d_sae
    bundle = Bundle(
        {
            "topk": TopK(d_sae, cfg.top_k, job.shards.n_patches, cfg.rank_by),
            "moments": Moments(d_sae),
            "histogram": Histogram(d_sae, cfg.percentile),
        }
    )
    if cfg.metrics:
        bundle.parts["reconstruction"] = Reconstruction(job.sae.w_dec_sd, job.sae.b_dec_d)
    return bundle


def _spill_names(cfg: Extract) -> list[str]:
    names = ["img_acts_counts", "img_acts_indices", "img_acts_data"] if cfg.img_acts else []
    return names + (["distributions"] if cfg.n_distributions else [])


def _spill_rows(codes: Codes, cfg: Extract, d_sae: int, stride: int, spills: dict[str, Spill]) -> None:
    if cfg.img_acts:
        counts_e, indices_v, means_v = rows.image_means(codes, d_sae)
        spills["img_acts_counts"].append(counts_e)
        spills["img_acts_indices"].append(indices_v)
        spills["img_acts_data"].append(means_v)
    if cfg.n_distributions:
        spills["distributions"].append(rows.sampled_values(codes, min(cfg.n_distributions, d_sae), stride))


def _merge(bundle: Bundle, world: World) -> Bundle:
    """Merge the ranks' states by slices; the whole is on rank 0."""
    n_rows = {name: len(tensor) for name, tensor in bundle.state_dict().items()}
    merged: Bundle | None = None
    for state in world.exchange(bundle.state_dict()):
        part = bundle.like(state)
        merged = part if merged is None else merged.merge(part)
    assert merged is not None
    return bundle.like(world.gather(merged.state_dict(), n_rows))


def _write(
    job: Job, store: Run, world: World, whole: Bundle, saev_percentile: SaevPercentile | None
) -> tuple[list[str], dict[str, Any]]:
    """Stage all artifacts; return their names and the metrics."""
    cfg, shards, d_sae = job.cfg, job.shards, job.sae.d_sae
    artifacts = whole.finalize(shards.n_tokens)
    metrics = artifacts.pop("metrics")
    if saev_percentile is not None:
        artifacts[f"percentiles_p{cfg.percentile:.10g}"] = saev_percentile.estimate_s
    for stem, content in artifacts.items():
        store.stage_tensors(f"{stem}.pt", content)
    names = [f"{stem}.pt" for stem in artifacts]

    spills = {name: [store.spill(name, rank) for rank in range(world.size)] for name in _spill_names(cfg)}
    n_features = min(cfg.n_distributions, d_sae)
    n_samples = rows.n_samples(shards.n_tokens, cfg.max_distribution_samples)
    store.stage_tensors(
        "distributions.pt", torch.from_numpy(read_columns(spills.get("distributions", []), n_features, n_samples))
    )
    names.append("distributions.pt")
    if cfg.img_acts:
        with store.stage("img_acts.npz") as file:
            counts, indices, data = (spills[f"img_acts_{name}"] for name in ("counts", "indices", "data"))
            write_csr(file, (shards.n_examples, d_sae), counts, indices, data)
        names.append("img_acts.npz")
    store.stage_json("metrics.json", metrics)
    return [*names, "metrics.json"], metrics


def _manifest(
    job: Job, world: World, reports: list[dict[str, Any]], seconds: dict[str, float], metrics: dict[str, Any]
) -> dict[str, Any]:
    cfg, shards, sae = job.cfg, job.shards, job.sae
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    return {
        "identity": job.identity,
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(cfg).items()},
        "shards": {
            "path": str(cfg.shards.absolute()),
            "family": shards.family,
            "ckpt": shards.ckpt,
            "layer": shards.layer,
            "n_examples": shards.n_examples,
            "n_patches": shards.n_patches,
            "d_model": shards.d_model,
            "dataset": shards.dataset,
        },
        "sae": {"path": str(cfg.sae.absolute()), "source": sae.source, "d_sae": sae.d_sae, "pre_bias": sae.pre_bias},
        "plan": {"n_batches": job.plan.n_batches, "images_per_batch": job.plan.examples_per_batch},
        "metrics": metrics,
        "versions": {
            "saev_dist": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": job.device.type, "gpu": gpu, "n_threads": torch.get_num_threads()},
        "world_size": world.size,
        "wall_s": seconds,
        "ranks": reports,
    }


class Clock:
    """Seconds spent, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def _sha256(fpath: Path) -> str:
    with open(fpath, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
