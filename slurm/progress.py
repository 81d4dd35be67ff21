"""How far a run is, read from its directory and its ranks' logs."""

import json
import math
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from saev_dist.errors import RunError
from slurm.jobs import Job, tail

if TYPE_CHECKING:
    from saev_dist.partials import Partial

# What `saev_dist.progress` writes, behind the rank.
LINE = re.compile(r"(?:extract|replay) +[\d.]+%.*ETA .*")


def describe(job: Job, *, is_running: bool) -> list[str]:
    """Lines on the whole and, of a job at work, on each rank, as far as anything is known."""
    kept = _kept(job.run) if job.kind == "extract" else None
    if not is_running:  # its ranks' logs, and the age of their snapshots, are an earlier attempt's
        return [kept.share] if kept else []
    lines = [] if kept is None else [kept.text()]
    for rank in range(job.n_ranks):
        said = next((found[0] for line in reversed(tail(job.log_fpath(rank), 50)) if (found := LINE.search(line))), "")
        snapshot = kept.of_rank(rank) if kept else ""
        if said or snapshot:
            lines.append(f"rank {rank}: {'; '.join(filter(None, (said, snapshot)))}")
    return lines


class Kept:
    """What the partials of an unfinished extract cover.

    Args:
        n_batches: of the plan.
        partials: those that count, each with its age in seconds.
        attempt_s: how long the attempt under way has run.
    """

    def __init__(self, n_batches: int, partials: list[tuple["Partial", float]], attempt_s: float) -> None:
        self._n_batches, self._attempt_s = n_batches, attempt_s
        self._n_kept = sum(partial.n_batches for partial, _ in partials)
        self._new: dict[int, tuple[int, float]] = {}
        for partial, age_s in partials:
            if age_s < attempt_s:
                own = sum(segment.stop - segment.first for segment in partial.segments if segment.owner == partial.owner)
                self._new[int(partial.owner.split("-")[0])] = own, age_s

    @property
    def share(self) -> str:
        return f"{self._n_kept / self._n_batches:.1%} of {self._n_batches:,} batches are kept on the disk"

    def text(self) -> str:
        """One line on all ranks."""
        rate = sum(n / (self._attempt_s - age_s) for n, age_s in self._new.values())
        if not rate:
            return f"{self.share}; no snapshot of this attempt yet"
        done_since = sum(n * age_s / (self._attempt_s - age_s) for n, age_s in self._new.values())
        left_s = max(0.0, (self._n_batches - self._n_kept - done_since) / rate)
        return f"{self.share}; ETA {timedelta(seconds=round(left_s))} at the rate of the last snapshots"

    def of_rank(self, rank: int) -> str:
        if rank not in self._new:
            return ""
        n, age_s = self._new[rank]
        return f"snapshot {age_s:,.0f} s ago, {n:,} batches since this attempt began"


def _kept(run: Path) -> Kept | None:
    """None where no extract is under way, or its files cannot be read just now."""
    from saev_dist.partials import newest  # it brings NumPy

    dpath = run / "partials"
    try:
        now = time.time()
        n_batches = json.loads((dpath / "run.json").read_bytes())["n_batches"]
        ages = [(partial, _age_s(dpath / partial.name, now)) for partial in newest(dpath)]
        return Kept(n_batches, ages, now - os.stat(dpath / "lock").st_mtime)
    except (OSError, ValueError, KeyError, TypeError, RunError):
        return None


def _age_s(fpath: Path, now: float) -> float:
    """Of a partial; where another one has just replaced it: nobody knows, so it counts as an earlier attempt's."""
    try:
        return now - os.stat(fpath).st_mtime
    except FileNotFoundError:
        return math.inf
