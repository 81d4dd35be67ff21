"""What Slurm says about jobs: squeue, which needs no accounting, then sacct for what the controller has forgotten."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from slurm.jobs import Job

FIELDS = {"JobArrayID": 40, "State": 20, "Reason": 50, "RestartCnt": 12, "TimeUsed": 20, "NodeList": 200}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
# Any other state is an end, unless a requeue follows.
UNDER_WAY = {
    *WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "UNKNOWN",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class State:
    """One job, as Slurm sees it at the moment."""

    name: str
    """Slurm's word; UNKNOWN where nobody answers, FORGOTTEN where it knows of no such job."""
    reason: str = ""
    """Why it waits, or why nobody answers."""
    n_requeues: int | None = None
    elapsed: str = ""
    nodes: str = ""

    @property
    def is_under_way(self) -> bool:
        return self.name in UNDER_WAY

    @property
    def is_at_work(self) -> bool:
        """Whether what its ranks say is of now, and not of an earlier attempt."""
        return self.is_under_way and self.name not in (*WAITING, "UNKNOWN")


def ask(jobs: list[Job]) -> dict[str, State]:
    """The state of each job, by job id."""
    found = {job.job_id: _process(job) for job in jobs if job.cluster == "local"}
    ids = [job.job_id for job in jobs if job.cluster == "slurm"]
    if ids:
        found |= _squeue(ids)
    if missing := [job_id for job_id in ids if job_id not in found]:
        found |= _sacct(missing)
    return {job.job_id: found.get(job.job_id, State(name="FORGOTTEN")) for job in jobs}


def _squeue(ids: list[str]) -> dict[str, State]:
    # Once per array: a list of all its members may be too long for a command line.
    arrays = sorted({job_id.split("_")[0] for job_id in ids})
    layout = ",".join(f"{name}:{width}" for name, width in FIELDS.items())
    done = call("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}", f"--Format={layout}")
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        why = (done.stderr.strip().splitlines() or [f"squeue: exit code {done.returncode}"])[-1]
        return {job_id: State(name="UNKNOWN", reason=f"no answer from Slurm: {why}") for job_id in ids}
    found: dict[str, State] = {}
    for line in done.stdout.splitlines():
        texts, at = {}, 0
        for name, width in FIELDS.items():
            texts[name] = line[at : at + width].strip()
            at += width
        found[texts["JobArrayID"]] = State(
            name=texts["State"],
            reason=texts["Reason"] if texts["Reason"] != "None" else "",
            n_requeues=int(texts["RestartCnt"]) if texts["RestartCnt"].isdecimal() else None,
            elapsed=texts["TimeUsed"],
            nodes=texts["NodeList"],
        )
    return {job_id: found[job_id] for job_id in ids if job_id in found}


def _sacct(ids: list[str]) -> dict[str, State]:
    layout = "--format=JobID,State,Elapsed,NodeList"
    done = call("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(ids)}", layout)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
    return {
        job_id: State(name=state.split()[0], elapsed=elapsed, nodes=nodes)  # "CANCELLED by 1000"
        for job_id, state, elapsed, nodes in rows
        if job_id in ids
    }


def is_elsewhere(job: Job) -> bool:
    """Whether it is a job of --cluster local of another machine, whose processes cannot be seen from here."""
    return job.cluster == "local" and job.host not in ("", os.uname().nodename)


def _has_ended(job: Job) -> bool:
    """Whether all ranks say so, and none that it will come back."""
    ends = job.ends()
    return len(ends) == job.n_ranks and (job.is_cancelled or all(end.outcome != "left" for end in ends))


def _process(job: Job) -> State:
    """A job of --cluster local: its controlling process is there, or it is not."""
    if is_elsewhere(job):
        if _has_ended(job):
            return State(name="ENDED", nodes=job.host)
        return State(name="UNKNOWN", reason=f"it was started on {job.host}: ask there")
    fpath = Path(f"/proc/{job.job_id}/cmdline")
    try:
        command = fpath.read_bytes()
        if not command:  # it has ended, or the shell is just turning into what follows it
            time.sleep(0.1)
            command = fpath.read_bytes()
        # Its number may be another process's by now, and that one another job's. A shell has the folder in its own spelling.
        folder = str(job.folder)
        is_there = b"submitit" in command and any(os.fsencode(name) in command for name in (folder, quote(folder)))
    except OSError:
        is_there = False
    return State(name="RUNNING" if is_there else "ENDED", nodes=os.uname().nodename)


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """The command's outcome; where there is no such command, one that says so."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(
            command, 127, "", f"{command[0]} is not on PATH: this is no machine of a Slurm cluster."
        )
    except OSError as err:
        return subprocess.CompletedProcess(command, 126, "", f"{command[0]}: {err.strerror}")
