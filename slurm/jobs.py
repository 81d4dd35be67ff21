"""What is known of a launched job, on disk: who it is, and how each of its ranks ended.

    <run>/slurm/jobs.jsonl             one line per job launched for the run, the latest last
    <logs>/<job id>_<rank>_log.out     a rank's output, of all attempts; srun's own messages are in rank 0's
    <logs>/<job id>_<rank>_end.json    how the rank's latest attempt ended
    <logs>/<job id>_cancelled          `cancel` was asked to end the job; a local one's ranks look at it

A rank removes its own end.json when it starts, and writes the number of its attempt into the new one: the end of an
attempt before a requeue is never taken for that of the one under way.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from saev_dist.errors import RunError, warn
from saev_dist.files import replacing, writing

TAIL_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as it was launched. JSON keeps it."""

    cluster: Literal["slurm", "local"]
    kind: Literal["extract", "replay"]
    job_id: str
    """Slurm's, such as 123, or 123_4 in an array; the controlling process's on --cluster local."""
    run: Path
    folder: Path
    """Of its logs and its ranks' ends."""
    n_ranks: int
    max_requeues: int
    time_h: float
    mem_gb: float | None
    host: str = ""
    """Of a job of --cluster local: the machine that it runs on."""

    def log_fpath(self, rank: int) -> Path:
        return self.folder / f"{self.job_id}_{rank}_log.out"

    @property
    def is_cancelled(self) -> bool:
        """Whether the launcher was asked to end it for good."""
        return cancelled_fpath(self.folder, self.job_id).exists()

    def ends(self) -> list["End"]:
        """The ends that ranks have written, by rank."""
        found = [End.read(end_fpath(self.folder, self.job_id, rank)) for rank in range(self.n_ranks)]
        return [end for end in found if end is not None]


@dataclass(frozen=True, kw_only=True)
class End:
    """How one rank ended."""

    rank: int
    attempt: int
    """0, and one more for each requeue."""
    outcome: Literal["done", "failed", "crashed", "left"]
    """failed: an error that the user can mend. crashed: any other. left: told to by a signal."""
    error: str = ""
    is_echo: bool = False
    """The error is another rank's."""
    host: str = ""
    at: float = 0.0
    """Unix time."""

    def write(self, fpath: Path) -> None:
        with replacing(fpath) as file:
            file.write(json.dumps(asdict(replace(self, host=os.uname().nodename, at=time.time()))).encode() + b"\n")

    @classmethod
    def read(cls, fpath: Path) -> "End | None":
        try:
            return cls(**json.loads(fpath.read_text()))
        except (OSError, ValueError, TypeError):
            return None  # not there yet, or on its way through a network file system


def cancelled_fpath(folder: Path, job_id: str) -> Path:
    """Its being there tells the ranks of a local job not to come back."""
    return folder / f"{job_id}_cancelled"


def end_fpath(folder: Path, job_id: str, rank: int) -> Path:
    return folder / f"{job_id}_{rank}_end.json"


def forget(folder: Path, job_id: str, n_ranks: int) -> None:
    """Remove what an earlier job of this number left: a local job's is its process's, which may have been another's."""
    for fpath in (cancelled_fpath(folder, job_id), *(end_fpath(folder, job_id, rank) for rank in range(n_ranks))):
        fpath.unlink(missing_ok=True)


def remember(job: Job) -> None:
    """Append the job to its run's list.

    Raises:
        RunError: it cannot be written.
    """
    fpath = job.run / "slurm" / "jobs.jsonl"
    with writing(fpath):
        fpath.parent.mkdir(parents=True, exist_ok=True)
        is_torn = fpath.exists() and fpath.read_bytes()[-1:] not in (b"", b"\n")
        with open(fpath, "a", encoding="utf-8") as file:
            file.write("\n" * is_torn + json.dumps(asdict(job), default=str) + "\n")


def launched(run: Path) -> list[Job]:
    """The jobs launched for a run, the latest last; at their new places if it has moved, without those of one it is a copy of.

    Raises:
        RunError: the list cannot be read.
    """
    fpath = run / "slurm" / "jobs.jsonl"
    try:
        lines = fpath.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as err:
        raise RunError(f"{fpath}: {err.strerror}; make it readable, it lists the run's jobs.") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        try:
            jobs.append(_job(json.loads(line)))
        except (ValueError, TypeError, KeyError):  # the disk was full, or the launcher died
            warn(f"{fpath}: line {number} is no job; if one was launched then, only squeue knows of it.")
    return [here for job in jobs if (here := _here(job, run.absolute()))]


def _here(job: Job, run: Path) -> Job | None:
    """A job out of the list in `run`; None: it is another directory's, of which this one is a copy."""
    if os.path.exists(job.run):
        return job if os.path.samefile(job.run, run) else None
    moved_with_it = Path(os.path.normpath(run / os.path.relpath(job.folder, job.run)))
    return replace(job, run=run, folder=job.folder if job.folder.exists() else moved_with_it)


def latest(run: Path) -> list[Job]:
    """The last extract launched for a run and the last replay since, whichever there are."""
    found: dict[str, Job] = {}
    for job in launched(run):
        if job.kind == "extract":
            found.clear()
        found[job.kind] = job
    return list(found.values())


def _job(fields: dict[str, Any]) -> Job:
    return Job(**fields | {"run": Path(fields["run"]), "folder": Path(fields["folder"])})


def warnings(fpath: Path) -> list[str]:
    """What a log warns of, each once."""
    try:
        with open(fpath, encoding="utf-8", errors="replace") as file:
            return list(dict.fromkeys(line.rstrip() for line in file if line.startswith("saev-dist: warning: ")))
    except OSError:
        return []


def tail(fpath: Path, n_lines: int) -> list[str]:
    """The last lines of a log that say something: neither empty nor submitit's own; a bar's carriage returns end lines, too."""
    try:
        with open(fpath, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not line.startswith("submitit INFO")]
    return lines[max(0, len(lines) - n_lines) :]
