"""Follow jobs: what they are doing, how they ended, and why."""

import re
import sys
import time
from collections.abc import Sequence

from saev_dist.errors import count
from slurm.jobs import Job, tail, warnings
from slurm.progress import describe
from slurm.queue import State, ask

POLL_S = (1.0, 10.0)
"""Between two questions to Slurm: at first, and in the long run."""
REPORT_S = 30.0
FORGOTTEN_S = 20.0
NEVER = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit")
"""Slurm's reasons for which a job waits until somebody changes it or the partition."""


def follow(jobs: Sequence[Job]) -> bool:
    """Report on jobs until all have ended; return whether all succeeded."""
    left = {job.job_id: job for job in jobs}
    told: dict[str, str] = {}
    told_at = dict.fromkeys(left, 0.0)
    n_ended = dict.fromkeys(left, 0)
    began = time.monotonic()
    all_well = True
    while left:
        states = ask(list(left.values()))
        for job_id, job in list(left.items()):
            state = states[job_id]
            n_ended[job_id] = 0 if state.is_under_way else n_ended[job_id] + 1
            # A requeue may look like an end for a moment, and a controller that restarts forgets.
            if n_ended[job_id] and (state.name == "COMPLETED" or _is_over(state, n_ended[job_id])):
                well, text = verdict(job, state)
                all_well &= well
                print(f"{job.kind} {job_id} {text}", file=sys.stdout if well else sys.stderr, flush=True)
                if well:
                    print("\n".join(f"  {line}" for line in result(job)), flush=True)
                del left[job_id]
                continue
            if n_ended[job_id]:
                continue
            text = f"{state.name} {state.reason}".strip()
            if text != told.get(job_id) or (state.name == "RUNNING" and time.monotonic() - told_at[job_id] > REPORT_S):
                told[job_id], told_at[job_id] = text, time.monotonic()
                lines = describe(job, is_running=True) if state.name == "RUNNING" else []
                print("\n  ".join([f"{job.kind} {job_id}  {describe_state(state)}", *lines]), flush=True)
        if left:
            time.sleep(min(POLL_S[1], POLL_S[0] + (time.monotonic() - began) / 60))
    return all_well


def _is_over(state: State, n_polls: int) -> bool:
    if state.name == "FORGOTTEN":
        return n_polls * POLL_S[0] > FORGOTTEN_S
    return n_polls > 1


def verdict(job: Job, state: State) -> tuple[bool, str]:
    """Whether an ended job succeeded, and one line on how or why not."""
    found = job.ends()
    # What a rank left of an earlier attempt is not how this one ended.
    attempt = max((end.attempt for end in found), default=0) if state.n_requeues is None else state.n_requeues
    ends = {end.rank: end for end in found if end.attempt == attempt}
    all_done = set(ends) == set(range(job.n_ranks)) and all(end.outcome == "done" for end in ends.values())
    # Every rank's exit code was 0, though a network file system may not show yet what they wrote.
    if all_done or state.name == "COMPLETED":
        return True, f"done: {job.run}"
    log = f" Log: {job.log_fpath(0)}"
    go_on = "Launch it again to go on where it stopped."
    match state.name:
        case "OUT_OF_MEMORY":
            given = f"had {job.mem_gb:g} GB per node" if job.mem_gb else "had the partition's default memory"
            flags = "--read-ahead" if job.kind == "extract" else "--workers or --img-scale"
            return False, f"failed: out of memory: it {given}. Raise --mem-gb, or lower {flags}.{log}"
        case "TIMEOUT" | "DEADLINE":
            return False, f"failed: the time limit of {job.time_h:g} h, with no requeue in time: raise --margin-s. {go_on}{log}"
        case "NODE_FAIL" | "BOOT_FAIL":
            return False, f"failed: a node went down ({state.nodes}). {go_on}{log}"
        case "PREEMPTED":
            return False, f"failed: preempted, and not requeued. {go_on}{log}"
        case "CANCELLED" if "Dependency" in state.reason:
            return False, "cancelled: the extract that it waited for did not succeed."
        case "CANCELLED":
            return False, f"cancelled. {go_on}{log}"
    own = [end for end in ends.values() if end.outcome in ("failed", "crashed") and not end.is_echo]
    silent = [rank for rank in range(job.n_ranks) if rank not in ends]
    if own:
        first = min(own, key=lambda end: (end.at, end.rank))
        where = f" on {first.host}" if len({end.host for end in ends.values()}) > 1 else ""
        text = f"{'failed' if first.outcome == 'failed' else 'crashed'}: rank {first.rank}{where}: {first.error}"
        if silent:
            text += f" ({_ranks(silent)} left no word: killed, perhaps for want of memory.)"
        return False, f"{text} Log: {job.log_fpath(first.rank)}"
    if job.is_cancelled:
        return False, f"cancelled. {go_on}{log}"
    if left := [end for end in ends.values() if end.outcome == "left"]:
        times = max(end.attempt for end in left)
        why = left[0].error.split(":")[0]  # "SIGUSR2 on rank 1: stopped, and what is done is kept in …"
        so_often = f", after {times} of at most {job.max_requeues} requeues" if times or job.cluster == "slurm" else ""
        return False, f"stopped: {why}{so_often}. {go_on}{log}"
    if silent and not found and not job.log_fpath(0).exists():
        finished = " The run is finished." if (job.run / "manifest.json").exists() and job.kind == "extract" else ""
        return False, (
            f"failed: no rank left a word or a log: the job ended before they started (a line of --setup?), or its logs are "
            f"gone from {job.folder}.{finished}"
        )
    if silent:
        last = tail(job.log_fpath(silent[0]), 1) or ["nothing"]
        return (
            False,
            f"failed: {_ranks(silent)} left no word: killed, perhaps for want of memory. Last in the log: {last[0]}{log}",
        )
    return False, f"failed: {state.name}.{log}"


def result(job: Job) -> list[str]:
    """What rank 0 warned of, and its last lines that are neither progress nor submitit's."""
    lines = tail(job.log_fpath(0), 20)
    while lines and lines[-1].startswith("submitit "):
        lines.pop()
    noise = [i for i, line in enumerate(lines) if re.match(r"submitit |\[rank |(extract|replay) +[\d.]+%", line)]
    said = lines[noise[-1] + 1 :] if noise else lines
    warned = warnings(job.log_fpath(0))
    return [*warned, *(line for line in said if line not in warned)]


def describe_state(state: State) -> str:
    """One line."""
    match state.name:
        case "PENDING":
            never = " (this partition will never start it: cancel it, and ask for less)" if state.reason in NEVER else ""
            return f"waits in the queue: {state.reason or 'not looked at yet'}{never}{_requeues(state)}"
        case "RUNNING" | "COMPLETING":
            return f"{' '.join(filter(None, (state.name.lower(), state.elapsed)))} on {state.nodes}{_requeues(state)}"
        case "UNKNOWN":
            return state.reason
        case "FORGOTTEN":
            return "Slurm no longer knows it"
    return state.name.lower()


def _requeues(state: State) -> str:
    return f", requeued {count(state.n_requeues, 'time')}" if state.n_requeues else ""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
