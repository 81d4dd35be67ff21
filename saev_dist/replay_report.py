"""What a replay tells people: what it is about to draw, and what it drew."""

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np

from saev_dist.choose import Slots
from saev_dist.errors import count, warn
from saev_dist.files import free_disk
from saev_dist.output import gb, table
from saev_dist.replay_job import Job
from saev_dist.report import describe_edge, describe_left_out

BYTES_PER_PX = {"webp": 0.2, "png": 1.8}
"""Of photographs, about. WebP at quality 80: 0.09 where the demo's are drawn twice as large, up to 0.3; PNG: 1.07 there, more
of sharper ones, which nobody has measured."""
BLOCK_BYTES = 4096
"""What a file takes at least."""


def already_done(job: Job) -> str:
    """What a replay prints whose gallery is there."""
    return f"{job.visuals.dpath / 'index.html'} is this gallery, finished: open it. (--force draws it again.)"


def announce(job: Job) -> None:
    """Say what the user may not have meant, while there is time to stop."""
    dataset = job.finished.shards.dataset
    if job.cfg.pictures and job.pictures is None and dataset:
        warn(
            f"the pictures of {job.finished.shards.dpath} are in {dataset}, as its metadata says; there is no such folder "
            "here, so heatmaps will be on a plain ground. --images names another one, --no-pictures asks for none."
        )
    if job.pictures and (found := job.pictures.out_of_number()):
        img_i, name = found
        warn(
            f"{job.pictures.root}: pictures go by the order of their names, so image {img_i} is {job.pictures.name(img_i)}, "
            f"and not {name}. If the shards were written in the order of the numbers, pad these with zeros."
        )
    if (need := _disk(job)) > (free := free_disk(job.cfg.run)):
        warn(
            f"the pictures may take about {gb(need)} of disk; {gb(free)} are free at {job.cfg.run}. Lower --n-features, "
            "--n-images or --img-scale, or free some."
        )
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or no one can tell
        n_features = len(json.loads((job.visuals.dpath / "replay.json").read_bytes())["features"])
        there = f"{job.visuals.dpath} has a gallery of {count(n_features, 'feature')}"
        print(f"{there}; this one of {len(job.features):,} will replace it.")


def describe_plan(job: Job) -> str:
    """What --dry-run prints."""
    n_pictures = _count_pictures(job, job.slots)
    lines = {
        "features": f"{len(job.features):,} of {job.finished.sae.d_sae:,}",
        "images": f"{len(np.unique(job.slots['img_i'])):,} to encode again, of {job.finished.shards.n_examples:,}",
        "to draw": f"{count(n_pictures, 'picture')}, each with and without heatmap",
        "pictures": _ground(job),
        "fit": job.geometry.describe(with_pictures=job.pictures is not None),
        "disk": f"about {gb(_disk(job))} in {2 * n_pictures + len(job.features):,} files; {gb(free_disk(job.cfg.run))} free",
        "gallery": str(job.visuals.dpath / "index.html"),
    }
    return table(lines) + "\ndry run: nothing was encoded or written."


def describe_task(job: Job, todo: Slots) -> str:
    """What is to be drawn, and what an earlier attempt has drawn."""
    n_all, n_left = _count_pictures(job, job.slots), _count_pictures(job, todo)
    task = f"{count(len(job.features), 'feature')}: {count(n_all, 'picture')}, each with and without heatmap, of "
    task += f"{count(len(np.unique(job.slots['img_i'])), 'image')}; about {gb(_disk(job))}"
    if n_left < n_all:
        task += f"; {n_all - n_left:,} are drawn already: going on"
    return f"{task}."


def summary(job: Job, reports: list[dict[str, Any]]) -> str:
    """What a finished replay prints, of the reports of all ranks."""
    total = {key: sum(report[key] for report in reports) for key in ("n_images", "n_pictures", "n_slots", "n_on_edge")}
    seconds, n_on_edge = max(report["seconds"] for report in reports), total["n_on_edge"]
    silent = [feature for feature in job.features if not math.isfinite(job.statistics.log10_freq_s[feature])]
    lines = {
        "features": f"{len(job.features):,} of {job.finished.sae.d_sae:,}",
        **({"never fired": ", ".join(map(str, silent)) + ": nothing to draw"} if silent else {}),
        "images": f"{_encoded(job.slots, total['n_images'])} in {seconds:,.1f} s",
        "verified": f"{total['n_slots'] - n_on_edge:,} scores equal the stored ones{describe_edge(n_on_edge)}",
        "drawn": f"{total['n_pictures']:,} heatmaps, {total['n_pictures'] / max(seconds, 1e-9):,.0f} per second",
        "pictures": _ground(job),
        "fit": job.geometry.describe(with_pictures=job.pictures is not None),
        "gallery": f"{job.visuals.dpath / 'index.html'}: open it in a browser",
    }
    if job.finished.n_left_out:
        lines["left out"] = describe_left_out(job.finished.manifest)
    return table(lines)


def _encoded(slots: Slots, n_encoded: int) -> str:
    """How often the images of some slots were encoded, by all ranks together."""
    n_images = len(np.unique(slots["img_i"]))
    if n_encoded <= n_images:  # fewer: an earlier attempt did the others
        return f"{n_encoded:,} encoded again"
    return f"{n_images:,} encoded again ({n_encoded:,} times in all: by each rank those of its own features)"


def _disk(job: Job) -> int:
    """About what the features take on the disk."""
    per_px = BYTES_PER_PX[job.cfg.image_format] if job.pictures else 0.0  # a plain ground is next to nothing
    picture = max(BLOCK_BYTES, round(per_px * job.geometry.shown_px))
    return 2 * _count_pictures(job, job.slots) * picture + len(job.features) * BLOCK_BYTES


def _count_pictures(job: Job, slots: Slots) -> int:
    return len(np.unique(slots["img_i"] * job.finished.sae.d_sae + slots["feature"]))


def _ground(job: Job) -> str:
    """What heatmaps are drawn on."""
    if job.pictures:
        return f"{job.pictures.root} ({job.pictures.kind}), matched by order"
    return f"none{' found (name them with --images)' if job.cfg.pictures else ''}: heatmaps on a plain ground"
