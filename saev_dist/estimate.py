"""What a run will need, before it starts: host memory, device memory, disk. Stated by --dry-run, refused if too much."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from saev_dist.accumulators.rows import GROUPS_ON_DEVICE, n_samples
from saev_dist.config import Extract
from saev_dist.csr import MAX_INT32
from saev_dist.data.reader import buffer_examples, most_buffers
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, RunError, warn
from saev_dist.files import free_disk
from saev_dist.job import Job
from saev_dist.machine import available_memory
from saev_dist.output import gb
from saev_dist.partials import newest
from saev_dist.plan import Plan
from saev_dist.sae.model import ConstantNorm, GroupMax, LayerNorm, Sae, TopK
from saev_dist.sae.pieces import batches_ahead, block_shape, count_pieces, piece_images
from saev_dist.spill import MAX_WAITING
from saev_dist.statistics import brings_codes_to_the_cpu, state_bytes
from saev_dist.world import World

CODE_BYTES = 120
"""A code (20 bytes) and the temporaries that order and count it: added up from the code, not measured."""
DEVICE_CODE_BYTES = 280
"""Device memory for each code of a batch: 20 in each of three batches, and what selects, sorts and counts; added up too."""
DEVICE_SLOT_BYTES = 150
"""Device memory for each slot while it and half a candidate are sorted."""
DEVICE_GROUP_BYTES = 50
"""Device memory for each image and feature whose mean is taken."""
LIBRARY_BYTES = 2**29
"""What CUDA's libraries take on a GPU: a guess."""
ALLOCATOR_SHARE = 0.6
"""What torch keeps on a GPU beside what is in use, over that: on an H100 it had 5.1 to 5.9 GB where 3.8 add up."""
CANDIDATE_BYTES = 70
CANDIDATES_PER_CODE = 3
"""Entries that --screen makes again, for each code: 1.4 to 3 were measured; `recomputed_per_token` in manifest.json tells."""
ASSUMED_DENSITY = 0.02
"""Share of nonzero codes where the activation does not fix it."""


@dataclass(frozen=True)
class Estimate:
    """Bytes. Host and device per rank; disk in all."""

    n_threads: int
    """That encode side by side: host memory grows with them."""
    host: dict[str, int]
    device: dict[str, int]
    partial: int
    """A rank's partial on the disk, without its spilled rows, which are as large as the artifacts made of them."""
    artifacts: int
    """All but img_acts.npz."""
    img_acts: int
    """Most that img_acts.npz can take where the activation bounds it, or its size at the assumed density."""

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def device_total(self) -> int:
        return sum(self.device.values())


def estimate(cfg: Extract, shards: Shards, sae: Sae, plan: Plan, device: torch.device, n_threads: int) -> Estimate:
    """What `cfg` needs on this rank and on the disk, where at most `n_threads` encode; no more than there are pieces do."""
    batch_tokens = plan.largest_batch * shards.n_patches
    per_token = sae.activation.k if isinstance(sae.activation, TopK | GroupMax) else round(ASSUMED_DENSITY * sae.d_sae) + 1
    weights = 4 * (2 * sae.d_model * sae.d_sae + sae.d_sae + sae.d_model)
    shapes = shards.n_patches, sae.activation, sae.d_sae, device
    sizes = plan.sizes()
    n_threads = min(n_threads, max(1, count_pieces(sizes, *shapes)))
    n_ahead = batches_ahead(sizes, *shapes, n_threads)
    piece = piece_images(plan.largest_batch, *shapes) * shards.n_patches
    block_tokens, block_features, _ = block_shape(piece, sae.activation, sae.d_sae, device)
    block = block_tokens * n_threads
    entry = 2 if "bf16" in (cfg.precision, cfg.screen) else 4
    dense = block * block_features * (entry + 1)  # and a mask
    if isinstance(sae.input_norm, LayerNorm | ConstantNorm):  # float64 copies of the tokens under way
        dense += 3 * 8 * sae.d_model * block
    n_entries = min(sae.d_sae, shards.n_patches * per_token)  # of an image, in img_acts.npz
    row = 8 * n_entries + 8 if cfg.img_acts else 0
    is_wide = shards.n_examples * n_entries > MAX_INT32  # there the indices in the file are int64
    n_sampled = n_samples(shards.n_tokens, cfg.max_distribution_samples)
    state = state_bytes(cfg, sae, shards)
    samples = 4 * min(cfg.n_distributions, sae.d_sae) * n_sampled
    buffer = buffer_examples(plan, shards) * shards.content_bytes
    if device.type == "cuda":  # torch rounds page-locked memory up to powers of two
        buffer = 1 << (buffer - 1).bit_length()
    host = {
        "weights": weights,
        "read buffers": most_buffers(plan, shards, cfg.read_ahead, n_ahead) * buffer,
        # the exchange, the last sort of the slots, and going on from several partials hold the state a second and a third time
        "accumulators and their merge": 3 * state,
        "distributions, when written": samples,
        "rows to be written": (MAX_WAITING + 1) * plan.largest_batch * row,
    }
    codes = batch_tokens * per_token * CODE_BYTES
    if device.type == "cpu":
        host["codes of batches under way"] = min(n_ahead + 1, plan.n_batches) * codes
        host["dense codes"] = dense
        if cfg.metrics:  # in float32 the sums and a part of them; or one, and two in float64 for `undo_norm`
            host["reconstruction"] = (4 + 2 * 8) * sae.d_model * piece
        if cfg.precision == "fp32" and cfg.screen == "none":  # on some processors, maybe not on the one that asks
            host["weights and tokens, as NumPy multiplies them"] = 4 * (sae.d_model + 1) * (sae.d_sae + block)
        on_device = {}
    else:
        batch = batch_tokens * sae.d_model * 4
        merging = sae.d_sae * cfg.top_k * DEVICE_SLOT_BYTES
        if cfg.img_acts:
            merging += min(plan.largest_batch * sae.d_sae, max(GROUPS_ON_DEVICE, sae.d_sae)) * DEVICE_GROUP_BYTES
        on_device = {
            "weights": weights if cfg.metrics or cfg.self_check != "off" else weights // 2,
            "batches": (n_threads + (6 if cfg.metrics else 1)) * batch,
            "dense codes": dense,
            "codes": batch_tokens * per_token * DEVICE_CODE_BYTES,
            "statistics": state + 20 * sae.d_sae + merging,  # the moments' sums are in more parts there
        }
        on_device["allocator"] = round(ALLOCATOR_SHARE * sum(on_device.values()))
        on_device["libraries"] = LIBRARY_BYTES
        if brings_codes_to_the_cpu(cfg, sae, shards):
            host["codes"] = codes
    if cfg.screen == "bf16":
        host["weights to screen by"] = (4 + 2) * sae.d_model * sae.d_sae
        host["candidates"] = block * CANDIDATES_PER_CODE * per_token * CANDIDATE_BYTES
    return Estimate(
        n_threads=n_threads,
        host=host,
        device=on_device,
        partial=state,
        artifacts=state + sae.d_sae * cfg.top_k * 8 + samples,  # images and patches, of one place; the other files are smaller
        img_acts=shards.n_examples * (row + (4 * n_entries if is_wide and cfg.img_acts else 0)),
    )


def within(job: Job, room: float) -> tuple[Estimate, Estimate]:
    """What it needs with its threads, and with as many of them as `room` bytes of host memory suffice for, at least one."""
    of_job = job.cfg, job.shards, job.sae, job.plan, job.device
    wanted = need = estimate(*of_job, job.n_threads)
    while need.host_total > room and need.n_threads > 1:
        need = estimate(*of_job, need.n_threads - 1)
    return wanted, need


def fit(job: Job, world: World) -> Estimate:
    """What it needs on this rank, with as many threads as host memory has room for. Refuse what cannot fit.

    Raises:
        ConfigError: host memory of this machine's ranks, device memory, or the disk is too small; of the disk rank 0 says so.
    """
    available = available_memory()
    wanted, need = within(job, available / world.local_size)
    if need.host_total * world.local_size > available:
        raise ConfigError(
            f"this run needs about {gb(need.host_total)} of host memory{_of_each(world)}; "
            f"{gb(available)} are available. Lower --batch-tokens, --top-k or --read-ahead, or start fewer ranks."
        )
    if need.n_threads < wanted.n_threads and world.local_rank == 0:
        warn(
            f"{need.n_threads} of {wanted.n_threads} threads encode: all of them would need about {gb(wanted.host_total)} of "
            f"host memory{_of_each(world)}, and {gb(available)} are available."
        )
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(job.device)
        free += torch.cuda.memory_reserved(job.device) - torch.cuda.memory_allocated(job.device)  # kept, for this process
        if need.device_total > free:
            raise ConfigError(
                f"this run needs about {gb(need.device_total)} of device memory; {gb(free)} are free on {job.device}. "
                "Lower --batch-tokens."
            )
    if world.rank == 0:
        _fit_disk(job.cfg, job.plan, need, world.size)
    return need


def _of_each(world: World) -> str:
    return f" for each of {world.local_size} ranks here" if world.local_size > 1 else ""


def _fit_disk(cfg: Extract, plan: Plan, need: Estimate, n_ranks: int) -> None:
    free = free_disk(cfg.out)
    one_each = need.partial * n_ranks
    held = _size(cfg.out / "partials", "*.partial")
    partials = max(one_each, 2 * one_each - held)  # a first one, then another while that is there
    if need.artifacts + partials > free and not cfg.force:
        with suppress(RunError):  # a damaged one: its batches are to be done again
            if sum(partial.n_batches for partial in newest(cfg.out / "partials")) == plan.n_batches:
                partials = 0  # what is left is to merge them
    if need.artifacts + partials > free:
        raise ConfigError(
            f"the artifacts need {gb(need.artifacts)} of disk, and snapshots {gb(partials)}; {gb(free)} are free at "
            f"{cfg.out}. Free some there, choose another --out, or lower --top-k or --max-distribution-samples."
        )
    spare = free - need.artifacts - partials + _size(cfg.out / "partials", "img_acts*")
    if 2 * need.img_acts > spare:
        warn(
            f"img_acts.npz may take about {gb(need.img_acts)}, twice that while it is put together; {gb(spare)} are free "
            f"for it at {cfg.out}. --no-img-acts leaves it out."
        )


def _size(dpath: Path, pattern: str) -> int:
    """Bytes of files that an earlier attempt left. Partials go once new ones stand for them (a damaged one stays)."""
    sizes: dict[int, int] = {}
    for fpath in dpath.glob(pattern):
        with suppress(OSError):  # another process may be at work there
            found = fpath.stat()
            sizes[found.st_ino] = found.st_size  # one file may have two names
    return sum(sizes.values())
