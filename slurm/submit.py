"""Hand jobs to Slurm, or to this machine, through submitit."""

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib import import_module
from io import StringIO
from itertools import takewhile
from math import ceil
from pathlib import Path
from shlex import join
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from saev_dist.config import Extract, Replay
from saev_dist.errors import ConfigError
from saev_dist.files import writing
from slurm import hold
from slurm.config import Launcher
from slurm.jobs import Job, cancelled_fpath, forget
from slurm.sweep import run_dpath
from slurm.task import Task

# submitit would count a signal as a time-out if it comes within 10 minutes of the limit, and give up after a few;
# `Task` counts requeues itself.
NO_LIMIT = 1_000_000
# submitit's own program for a local job, `submitit.local._local`, starts the ranks six times at most.
CONTROLLER = (
    "import pathlib, sys; from submitit.local.local import Controller; "
    "Controller(pathlib.Path(sys.argv[1])).run(max_retry=int(sys.argv[2]))"
)
RANK = join([sys.executable, "-I", "-S", hold.__file__, sys.executable])
"""How Slurm starts a rank's Python."""
# Of the shell that submits; in the job they would be taken for its own. Slurm's own settings must stay.
KEPT = ("SLURM_CONF", "SBATCH_", "SLURM_CLUSTERS")


class SbatchText(submitit.SlurmExecutor):
    """Says what would be submitted, also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self, n_jobs: int) -> str:
        if n_jobs > 1:
            self.parameters["map_count"] = n_jobs
        return self._make_submission_file_text(self._submitit_command_str, "")


def sbatch_text(launcher: Launcher, kind: str, n_jobs: int, logs: Path, dependency: str = "") -> str:
    """The file that `submit` would give to sbatch."""
    executor = SbatchText(logs, max_num_timeout=NO_LIMIT, python=RANK)
    executor.update_parameters(**_parameters(launcher, kind, dependency))
    return executor.text(n_jobs)


def submit(launcher: Launcher, cfgs: Sequence[Extract | Replay], logs: Path, dependency: str = "") -> list[Job]:
    """Submit one job for each config, several as one array.

    Args:
        cfgs: of one kind.
        logs: where logs and ranks' ends go.
        dependency: as sbatch takes it.

    Raises:
        ConfigError: Slurm refuses, or there is none.
    """
    kind = type(cfgs[0]).__name__.lower()
    tasks = [Task(cfg=cfg, n_threads=launcher.cpus_per_gpu, max_requeues=launcher.max_requeues) for cfg in cfgs]
    with _clean_environment(launcher.signal):
        if launcher.cluster == "local":
            local = submitit.LocalExecutor(logs, max_num_timeout=NO_LIMIT)
            local.update_parameters(
                timeout_min=launcher.time_h * 60,
                signal_delay_s=launcher.margin_s,
                gpus_per_node=launcher.gpus_per_node,
                visible_gpus=_visible_gpus(launcher.gpus_per_node),
                tasks_per_node=launcher.ranks_per_node,
                setup=[*launcher.setup, *_controlling(logs, launcher.max_requeues + 1)],
                stderr_to_stdout=True,
            )
            with writing(logs), _beyond_ctrl_c():
                submitted = local.submit_array(tasks)
            for job in submitted:  # its number is a process's, and may have been an earlier job's
                forget(job.paths.folder, job.job_id, launcher.n_ranks)
        else:
            try:
                executor = submitit.SlurmExecutor(logs, max_num_timeout=NO_LIMIT, python=RANK)
                executor.update_parameters(**_parameters(launcher, kind, dependency))
                with writing(logs), redirect_stderr(StringIO()):  # submitit prints what it raises
                    submitted = _submit(executor, tasks)
            except FailedJobError as err:
                raise ConfigError(f"Slurm refuses the {kind} job: {_brief(str(err))}") from None
            except RuntimeError as err:  # there is no srun
                raise ConfigError(f"cannot submit: {err} --cluster local runs on this machine.") from None
    return [
        Job(
            cluster=launcher.cluster,  # type: ignore[arg-type]  # debug does not come here
            kind=kind,  # type: ignore[arg-type]
            job_id=job.job_id,
            run=run_dpath(cfg),
            folder=job.paths.folder,
            n_ranks=launcher.n_ranks,
            max_requeues=launcher.max_requeues,
            time_h=launcher.time_h,
            mem_gb=launcher.mem_gb,
            host=os.uname().nodename if launcher.cluster == "local" else "",
        )
        for job, cfg in zip(submitted, cfgs, strict=True)
    ]


def _controlling(logs: Path, n_attempts: int) -> list[str]:
    """Shell lines that become the process which starts a local job's ranks; what submitit adds after them is not reached.

    The shell's number, by which the launcher knows the job, is that process's own then. submitit takes it for its parent's,
    but a shell may, as bash since 5.1 does, run its last command in its own place: the parent is then the launcher.
    """
    return ["export SUBMITIT_LOCAL_WITH_SHELL=", "exec " + join([sys.executable, "-c", CONTROLLER, str(logs), str(n_attempts)])]


def _submit(executor: submitit.SlurmExecutor, tasks: Sequence[Task]) -> list[submitit.Job[None]]:
    try:
        return executor.submit_array(tasks)
    except FileNotFoundError as err:
        if err.filename != "sbatch":
            raise
        raise ConfigError(
            "cannot submit: there is srun, but no sbatch on PATH. --cluster local runs on this machine."
        ) from None


def tell_to_leave(job: Job) -> None:
    """End a job on this machine for good: its ranks keep what they have done.

    Raises:
        ConfigError: it is another user's.
    """
    marker_fpath = cancelled_fpath(job.folder, job.job_id)
    with writing(marker_fpath):
        marker_fpath.touch()  # first: a rank that the signal does not reach, for it is only starting, sees it
    try:
        os.kill(int(job.job_id), signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just ended
    except PermissionError:
        raise ConfigError(f"{job.run}: {job.kind} {job.job_id} is another user's process.") from None


def _visible_gpus(n_wanted: int) -> tuple[int, ...]:
    """Those that the shell leaves to the job, by number. () where it says nothing: submitit then takes the first ones.

    Raises:
        ConfigError: they are too few, or named otherwise.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None or not n_wanted:
        return ()
    words = [word.strip() for word in text.split(",") if word.strip()]
    words = list(takewhile(lambda word: not word.startswith("-"), words))  # so CUDA ends the list
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={text} names GPUs otherwise than by number; submitit takes numbers only.")
    gpus = tuple(map(int, words))
    if len(gpus) < n_wanted:
        raise ConfigError(f"--gpus-per-node {n_wanted}, but CUDA_VISIBLE_DEVICES={text} leaves {len(gpus)} of this machine's.")
    return gpus


def run_here(cfg: Extract | Replay, logs: Path) -> None:
    """Do the job in this process, as one rank; what it raises is raised."""
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    with _clean_environment("USR2"):  # it is one rank, whatever others this shell is of
        job = submitit.DebugExecutor(logs).submit(partial(_run, cfg))
        err = job.exception()
    if err is not None:  # results() would open a debugger
        raise err


def _run(cfg: Extract | Replay) -> None:
    import_module(f"saev_dist.{type(cfg).__name__.lower()}").run(cfg)


def _parameters(launcher: Launcher, kind: str, dependency: str) -> dict[str, Any]:
    # submitit itself takes the signal's name from the environment, when it is imported: in the job, that is.
    further: dict[str, Any] = {"signal": f"{launcher.signal}@{launcher.margin_s}"}
    further["requeue" if launcher.max_requeues else "no-requeue"] = True
    if dependency:
        further["kill-on-invalid-dep"] = "yes"
    for text in launcher.slurm_args:
        key, equals, value = text.strip().partition("=")
        further[key] = value if equals else True
    parameters = {
        "job_name": f"saev-{kind}",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "time": ceil(launcher.time_h * 60),
        "nodes": launcher.nodes,
        "ntasks_per_node": launcher.ranks_per_node,
        "gpus_per_node": launcher.gpus_per_node or None,
        "cpus_per_task": launcher.cpus_per_gpu,
        "mem": None if launcher.mem_gb is None else f"{ceil(launcher.mem_gb * 1024)}M",
        "constraint": launcher.constraint,
        "exclude": launcher.exclude,
        "dependency": dependency or None,
        # A user's SBATCH_EXPORT or --slurm-args export=NONE would reach srun too, and ranks would not know where they are.
        "setup": ["export SLURM_EXPORT_ENV=ALL", *launcher.setup],
        "array_parallelism": launcher.array_parallelism,
        "stderr_to_stdout": True,
        # Since Slurm 22.05 srun does not take this from sbatch, and each rank would have one core.
        "srun_args": [f"--cpus-per-task={launcher.cpus_per_gpu}"],
        "additional_parameters": further,
    }
    return {name: value for name, value in parameters.items() if value is not None}


@contextmanager
def _clean_environment(signal_name: str) -> Iterator[None]:
    """Without what an enclosing job or torchrun left; sbatch hands the rest on."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    with submitit.helpers.clean_env():
        os.environ.update(kept | {"SUBMITIT_PREEMPT_SIGNAL": signal_name})
        yield


@contextmanager
def _beyond_ctrl_c() -> Iterator[None]:
    """Processes started in it ignore the terminal's SIGINT until they are at work: the launcher ends them in order."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _brief(text: str) -> str:
    """The last line of sbatch's complaint, with what to do where its words do not tell."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith('Try "sbatch')]
    line = re.sub(r"^sbatch: ((error|fatal): )?", "", lines[-1].strip()) if lines else "sbatch failed, and said nothing"
    hints = {
        "node configuration is not available": "no node has that much: lower --gpus-per-node, --cpus-per-gpu or --mem-gb",
        "generic resource": "has this partition GPUs? --gpus-per-node 0 asks for none",
        "unrecognized option": "see --slurm-args",
        "configuration source": "this machine is in no Slurm cluster: --cluster local runs here",
        "time limit": "lower --time-h: the job goes on in another attempt",
    }
    return f"{line}." + "".join(f" ({hint}.)" for words, hint in hints.items() if words in line)
