"""The end of a run: the merged state and all ranks' rows become artifacts, and the manifest says what they are."""

import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from saev_dist import __version__
from saev_dist.accumulators import rows
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import percentile_stem
from saev_dist.config import Extract
from saev_dist.csr import ROOM, write_csr
from saev_dist.errors import DataError
from saev_dist.job import Job, as_json
from saev_dist.plan import Batch, complement
from saev_dist.spill import Rows, Segment, covered, read_columns
from saev_dist.store import Run
from saev_dist.world import World


def find_left_out(job: Job, segments: list[Segment], why: Mapping[int, str]) -> list[dict[str, Any]]:
    """The runs of images that no batch covers, and why; JSON.

    Raises:
        DataError: nothing is left.
    """
    plan = job.plan
    found: list[dict[str, Any]] = []
    for first, stop in complement(covered(segments), plan.n_batches):
        for batch in (plan[index] for index in range(first, stop)):
            reason, shard = why[batch.index], job.shards.names[batch.shard_i]
            if found and found[-1]["shard"] == shard and found[-1]["img_i"] + found[-1]["n_images"] == batch.img_i:
                found[-1]["n_images"] += batch.n_examples
            else:
                found.append({"shard": shard, "img_i": batch.img_i, "n_images": batch.n_examples, "reason": reason})
    if sum(part["n_images"] for part in found) == plan.n_examples:
        raise DataError(
            f"{job.cfg.shards}: no shard can be read, so there is nothing to write; the first: {found[0]['reason']}"
        )
    return found


def row_kinds(cfg: Extract) -> dict[str, int]:
    """The kinds of rows that a run spills, and the room that each one's file leaves at its beginning."""
    kinds = {"img_acts_counts": 0, "img_acts_indices": 0, "img_acts_data": ROOM} if cfg.img_acts else {}
    return kinds | ({"distributions": 0} if cfg.n_distributions else {})


def write(
    job: Job,
    store: Run,
    world: World,
    segments: list[Segment],
    owner: str,
    whole: Bundle,
) -> tuple[list[str], dict[str, Any]]:
    """Stage all artifacts; return their names and the metrics. It may take long, so it looks for signals.

    Args:
        segments: all ranks'.
        owner: of this process's rows, which it writes no more.
    """
    cfg, shards, plan, d_sae = job.cfg, job.shards, job.plan, job.sae.d_sae
    artifacts = whole.finalize(plan.n_examples_in(covered(segments)) * shards.n_patches)
    metrics = artifacts.pop("metrics")
    if cfg.percentile_estimator == "histogram":  # the middle of the last bin may lie above the largest score
        percentiles = percentile_stem(cfg.percentile)
        artifacts[percentiles] = torch.minimum(artifacts[percentiles], artifacts["top_values"][:, 0].clamp(min=0))
    for stem, content in artifacts.items():
        world.check()
        store.stage_tensors(f"{stem}.pt", content)
    names = [f"{stem}.pt" for stem in artifacts]

    def spilled(kind: str, dtype: type[np.generic], n_columns: int, n_filler: Callable[[Batch], int], filler: float) -> Rows:
        """All ranks' rows; a batch that was left out has `n_filler` rows of `filler`."""
        return Rows(
            store.partials_dpath,
            kind,
            segments,
            plan.n_batches,
            dtype,
            n_columns=n_columns,
            filler=lambda batch_i: np.full(n_filler(plan[batch_i]) * n_columns, filler, dtype),
            check=world.check,
        )

    n_features = min(cfg.n_distributions, d_sae)
    n_samples = rows.n_samples(shards.n_tokens, cfg.max_distribution_samples)
    stride = rows.sample_stride(shards.n_tokens, cfg.max_distribution_samples)

    def n_sampled(batch: Batch) -> int:
        return rows.n_sampled(batch.img_i * shards.n_patches, batch.n_examples * shards.n_patches, stride)

    samples = spilled("distributions", np.float32, n_features, n_sampled, np.nan) if n_features else None
    store.stage_tensors("distributions.pt", torch.from_numpy(read_columns(samples, n_features, n_samples)))
    names.append("distributions.pt")
    if cfg.img_acts:
        counts = spilled("img_acts_counts", np.int64, 1, lambda batch: batch.n_examples, 0)
        indices = spilled("img_acts_indices", np.int32, 1, lambda batch: 0, 0)
        data = spilled("img_acts_data", np.float32, 1, lambda batch: 0, 0)
        with store.stage("img_acts.npz", onto=data.beginning(owner, ROOM)) as file:
            write_csr(file, (shards.n_examples, d_sae), counts, indices, data)
        names.append("img_acts.npz")
    store.stage_json("metrics.json", metrics)
    return [*names, "metrics.json"], metrics


def make_manifest(
    job: Job,
    world: World,
    reports: list[dict[str, Any]],
    seconds: dict[str, float],
    metrics: dict[str, Any],
    left_out: list[dict[str, Any]],
) -> dict[str, Any]:
    """What a finished run says of itself; JSON.

    Args:
        job: of rank 0.
        world: the ranks.
        reports: what each rank did, less its segments and what it left out.
        seconds: wall time by stage.
        metrics: as `write` returns them.
        left_out: as `find_left_out` returns it.
    """
    cfg, shards, sae = job.cfg, job.shards, job.sae
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    return {
        "identity": job.identity,
        "config": as_json(cfg),
        "job_id": world.job_id,
        "left_out": left_out,
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
        "sae": {
            "path": str(job.loaded.path.absolute()),
            "format": job.loaded.sae_format,
            "source": sae.source,
            "d_sae": sae.d_sae,
            "rules": sae.rules(),
            "overrides": job.overrides.to_json(),
        },
        "plan": {"n_batches": job.plan.n_batches, "images_per_batch": job.plan.largest_batch},
        "self_check": job.self_check.to_json() if job.self_check else None,
        "metrics": metrics,
        "versions": {
            "saev_dist": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": job.device.type, "gpu": gpu, "n_threads": job.n_threads},
        "world_size": world.size,
        "wall_s": seconds,
        "ranks": reports,
    }
