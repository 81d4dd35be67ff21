"""What a run will need, before it starts: host memory, device memory, disk. Stated by --dry-run, refused if too much."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from saev_dist.accumulators.histogram import N_BINS
from saev_dist.accumulators.rows import GROUPS_ON_DEVICE, n_samples
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError
from saev_dist.plan import Plan
from saev_dist.sae.encoder import LANES, batch_threads, batches_ahead, block_shape, piece_images
from saev_dist.sae.model import ConstantNorm, GroupMax, LayerNorm, Sae, TopK
from saev_dist.spill import MAX_WAITING
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


def estimate(cfg: Extract, shards: Shards, sae: Sae, plan: Plan, device: torch.device) -> Estimate:
    """What `cfg` needs on this rank and on the disk."""
    batch_tokens = plan.examples_per_batch * shards.n_patches
    per_token = sae.activation.k if isinstance(sae.activation, TopK | GroupMax) else round(ASSUMED_DENSITY * sae.d_sae) + 1
    weights = 4 * (2 * sae.d_model * sae.d_sae + sae.d_sae + sae.d_model)
    shapes = plan.examples_per_batch, shards.n_patches, sae.activation, sae.d_sae, device
    piece, n_threads, n_ahead = piece_images(*shapes) * shards.n_patches, batch_threads(device), batches_ahead(*shapes)
    block_tokens, block_features, _ = block_shape(piece, sae.activation, sae.d_sae, device)
    block = block_tokens * n_threads
    entry = 2 if "bf16" in (cfg.precision, cfg.screen) else 4
    dense = block * block_features * (entry + 1)  # and a mask
    if isinstance(sae.input_norm, LayerNorm | ConstantNorm):  # float64 copies of the tokens under way
        dense += 3 * 8 * sae.d_model * block
    row = 8 * min(sae.d_sae, shards.n_patches * per_token) + 8 if cfg.img_acts else 0
    n_sampled = n_samples(shards.n_tokens, cfg.max_distribution_samples)
    slots = sae.d_sae * cfg.top_k * 12
    state = slots + sae.d_sae * (8 * N_BINS + 24)
    samples = 4 * min(cfg.n_distributions, sae.d_sae) * n_sampled
    host = {
        "weights": weights,
        "read buffers": (cfg.read_ahead + n_ahead + 1) * batch_tokens * sae.d_model * 4,
        # the exchange and the last sort of the slots each hold the state a second and a third time
        "accumulators and their merge": 3 * state,
        "codes of batches under way": (n_ahead + 1) * batch_tokens * per_token * CODE_BYTES,
        "distributions, when written": samples,
        "rows to be written": (MAX_WAITING + 1) * plan.examples_per_batch * row,
    }
    if device.type == "cpu":
        host["dense codes"] = dense
        on_device = {}
    else:
        batch = batch_tokens * sae.d_model * 4
        merging = sae.d_sae * cfg.top_k * DEVICE_SLOT_BYTES
        if cfg.img_acts:
            merging += min(plan.examples_per_batch * sae.d_sae, max(GROUPS_ON_DEVICE, sae.d_sae)) * DEVICE_GROUP_BYTES
        on_device = {
            "weights": weights if cfg.metrics or cfg.self_check != "off" else weights // 2,
            "batches": (LANES + (6 if cfg.metrics else 1)) * batch,
            "dense codes": dense,
            "codes": batch_tokens * per_token * DEVICE_CODE_BYTES,
            "statistics": sae.d_sae * (8 * N_BINS + 44) + slots + merging,
        }
        on_device["allocator"] = round(ALLOCATOR_SHARE * sum(on_device.values()))
        on_device["libraries"] = LIBRARY_BYTES
    if cfg.screen == "bf16":
        host["weights to screen by"] = (4 + 2) * sae.d_model * sae.d_sae
        host["candidates"] = block * CANDIDATES_PER_CODE * per_token * CANDIDATE_BYTES
    return Estimate(
        host=host,
        device=on_device,
        partial=state,
        artifacts=sae.d_sae * (cfg.top_k * 20 + 8 * N_BINS + 12) + samples,
        img_acts=shards.n_examples * row,
    )


def check_fits(need: Estimate, out_dpath: Path, world: World, device: torch.device) -> None:
    """Refuse what cannot fit.

    Raises:
        ConfigError: host memory of this machine's ranks, device memory, or the disk is too small.
    """
    available = _available_host_bytes()
    if need.host_total * world.local_size > available:
        raise ConfigError(
            f"this run needs about {gb(need.host_total)} of host memory for each of {world.local_size} ranks here; "
            f"{gb(available)} are available. Lower --batch-tokens, --top-k or --read-ahead, or start fewer ranks."
        )
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if need.device_total > free:
            raise ConfigError(
                f"this run needs about {gb(need.device_total)} of device memory; {gb(free)} are free on {device}. "
                "Lower --batch-tokens."
            )
    free = free_disk(out_dpath)
    partials = 2 * need.partial * world.size
    if need.artifacts + partials > free:
        raise ConfigError(
            f"the artifacts need {gb(need.artifacts)} of disk, and snapshots {gb(partials)}; {gb(free)} are free at "
            f"{out_dpath}. Choose another --out, or lower --top-k or --max-distribution-samples."
        )


def free_disk(dpath: Path) -> int:
    """Free bytes where `dpath` is or will be."""
    dpath = dpath.absolute()
    while not os.path.exists(dpath):  # unlike Path.exists, False also where one may not look
        dpath = dpath.parent
    return shutil.disk_usage(dpath).free


def _available_host_bytes() -> int:
    """What the machine, or the container's limit, has left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # The page cache counts as used there, but goes when memory is asked for.
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        available = min(available, int(text) - int(used.read_text()) + cached)
    return available


def gb(n_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"
