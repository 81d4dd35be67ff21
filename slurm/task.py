"""What each rank of a launched job runs: the job in its place among the ranks, and what becomes of it.

A signal that tells the job to leave reaches all ranks. Where there is something to save the job itself catches it, and
takes a snapshot or puts its pictures away; elsewhere the rank leaves at once. Then rank 0 puts the job back into the
queue by submitit's own protocol (`checkpoint`, then `scontrol requeue`), unless Slurm is taking the job down anyway: a
cancelled job must not come back, and one that Slurm requeues need not be requeued.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import FrameType

import submitit
from submitit.core.job_environment import JobEnvironment

from saev_dist.config import Extract, Replay
from saev_dist.errors import PeerError, Preempted, SaevDistError
from saev_dist.output import escape_what_cannot_be_encoded, printing, spare_output
from saev_dist.signals import be_deaf
from slurm.hold import HELD
from slurm.jobs import End, cancelled_fpath, end_fpath

STUCK_S = 10.0
"""So long after a local job was cancelled a rank leaves that cannot even take notice: it waits for one that is gone."""
PORTS = range(20_000, 32_768)
"""At one of which rank 0 listens. From 32,768 on Linux gives ports to connections, which had taken it now and then."""

Handler = Callable[[int, FrameType | None], None]


class Told(BaseException):
    """A signal told this rank to leave where there is nothing to save."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job, to be called once in each of its ranks. Pickled into the job's folder: the queue may take days."""

    cfg: Extract | Replay
    n_threads: int
    """Cores of a rank."""
    max_requeues: int
    n_requeues: int = 0
    """So far; where Slurm does not count them."""

    def __call__(self) -> None:
        escape_what_cannot_be_encoded()
        here: JobEnvironment = submitit.JobEnvironment()
        requeue = signal.getsignal(here._usr_sig())  # submitit's own handler
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", self.n_requeues))
        # Before torch is imported. Its own words on a store whose host is gone are a stack trace beside our one line.
        os.environ.setdefault("OMP_NUM_THREADS", str(self.n_threads))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        _join(here, attempt)
        paths = here.paths
        fpath = end_fpath(paths.folder, here.job_id, here.global_rank)
        for stale in (fpath, paths.result_pickle, paths.result_pickle.with_suffix(".pkl.save_tmp")):
            stale.unlink(missing_ok=True)  # of the attempt before
        cancelled = cancelled_fpath(paths.folder, here.job_id) if here.cluster == "local" else None
        end = self._run(End(rank=here.global_rank, attempt=attempt, outcome="done"), cancelled)
        end.write(fpath)
        if end.outcome == "left" and end.rank == 0 and self._may_requeue(here, attempt, cancelled):
            assert callable(requeue)
            requeue(here._usr_sig(), None)  # exits
        if end.outcome != "done":
            sys.exit(os.EX_TEMPFAIL if end.outcome == "left" else 1)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit is to run after a requeue."""
        return submitit.helpers.DelayedSubmission(replace(self, n_requeues=self.n_requeues + 1))

    def _run(self, end: End, cancelled: Path | None) -> End:
        """Do the job; return `end` with what became of it. From then on this rank is deaf to signals.

        Args:
            end: of this rank.
            cancelled: of a local job: the file whose being there tells it to leave for good.
        """
        told: list[str] = []
        is_ready = False

        def leave(number: int, frame: FrameType | None) -> None:
            told.append(signal.Signals(number).name)
            if is_ready:  # an exception amid the import of torch would end in its C++
                be_deaf()
                raise Told

        for number in HELD:
            signal.signal(number, leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)  # one may have come before
        try:
            job = import_module(f"saev_dist.{type(self.cfg).__name__.lower()}")
            is_ready = True
            if cancelled is not None:
                if cancelled.exists():  # a signal may have come before this process could be told by one
                    told.append("cancelled")
                Thread(target=_leave_if_stuck, args=(cancelled, leave), daemon=True).start()
            if told:
                raise Told
            with printing(), import_module("saev_dist.machine").allocating():
                spare_output()
                job.run(self.cfg)
        except BaseException as err:  # noqa: BLE001  # whatever it is, the launcher is to hear of it
            be_deaf()
            if told:  # whatever came of it on the way out
                return replace(end, outcome="left", error=told[0])
            match err:
                case Preempted():
                    _say(str(err))
                    return replace(end, outcome="left", error=str(err))
                case PeerError():  # that rank has said why
                    return replace(end, outcome="failed", error=str(err), is_echo=True)
                case SaevDistError():
                    _say(f"error: rank {end.rank}: {err}")
                    return replace(end, outcome="failed", error=str(err))
            traceback.print_exc()
            return replace(end, outcome="crashed", error="".join(traceback.format_exception_only(err)).strip())
        be_deaf()
        return end

    def _may_requeue(self, here: JobEnvironment, attempt: int, cancelled: Path | None) -> bool:
        """Whether this job is to put itself back into the queue."""
        if cancelled is not None and cancelled.exists():
            return False
        if attempt >= self.max_requeues:
            _say(f"requeued {attempt} times already (--max-requeues): launch it again to go on")
            return False
        if here.cluster == "slurm" and (state := _own_state(here.job_id)) != "RUNNING":
            _say(f"the job is {state or 'gone from the queue'}: what follows is up to Slurm")
            return False
        return True


def _join(here: JobEnvironment, attempt: int) -> None:
    """Put this rank's place among the ranks where `saev_dist.world` looks for it."""
    os.environ["MASTER_PORT"] = str(random.Random(here.job_id).choice(PORTS))  # whatever the submitting shell had
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if here.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a laptop's own name need not resolve
        os.environ["SLURM_RESTART_COUNT"] = str(attempt)


def _leave_if_stuck(cancelled: Path, leave: Handler) -> None:
    """End this process after its job was cancelled if its main thread does not get to run `leave`.

    It then waits, in C++, for a rank that the same signal ended before it could join. At work other handlers are in place.
    """
    while not cancelled.exists():
        time.sleep(1)
    time.sleep(STUCK_S)
    if signal.getsignal(signal.SIGTERM) is leave:
        os._exit(os.EX_TEMPFAIL)


def _own_state(job_id: str) -> str:
    """What Slurm says of this job, once it answers: COMPLETING when it is being taken down."""
    for _ in range(10):
        done = subprocess.run(["squeue", "--noheader", "--jobs", job_id, "--format=%T"], capture_output=True, text=True)
        if done.returncode == 0:
            break
        time.sleep(1)
    return done.stdout.strip()


def _say(text: str) -> None:
    print(f"saev-dist: {text.rstrip('.')}.", file=sys.stderr, flush=True)
