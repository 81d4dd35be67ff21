"""What a user can set about a launch; the jobs' own flags are `saev_dist.config`'s."""

import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from saev_dist.config import ALIASES, OptionalFloat, OptionalInt, OptionalPath, OptionalText, Texts
from saev_dist.errors import ConfigError

RunPaths = Annotated[tuple[Path, ...], tyro.conf.arg(aliases=ALIASES["run"])]


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Put a job of saev-dist on a Slurm cluster, follow it, and let it survive preemption.

    Write the launcher's flags, then a command, then the command's own flags (`… extract --help` explains those):

      extract FLAGS               as `saev-dist extract FLAGS`; several values after one --sae or --shards make a job array
      replay FLAGS                as `saev-dist replay FLAGS`; several values after --run make a job array
      pipeline FLAGS [-- FLAGS]   extract, then replay once it is done; replay's flags after the --
      status --run DIR …          the job that works on a run, or those on all runs in DIR: state, progress, end of the log
      cancel --run DIR …          end it
    """

    config: OptionalPath = None
    """TOML file of defaults for these flags, such as configs/slurm/one_node_8gpu.toml."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """local: on this machine, one job after another. debug: in this process. Both always wait."""

    partition: OptionalText = None
    """Partition to submit to. Default: the cluster's."""
    account: OptionalText = None
    """Whom to charge. Default: the cluster's choice."""
    qos: OptionalText = None
    """Quality of service. Default: the cluster's choice."""
    nodes: int = 1
    """Nodes per job."""
    gpus_per_node: int = 1
    """GPUs per node, and as many ranks. 0: a CPU partition, with --tasks-per-node ranks."""
    tasks_per_node: OptionalInt = None
    """Ranks per node. Default: one per GPU; one without GPUs."""
    cpus_per_gpu: int = 4
    """CPU cores per rank, also without GPUs; there so many threads of it encode, unless OMP_NUM_THREADS is set."""
    mem_gb: OptionalFloat = None
    """Host memory per node, GB as Slurm counts them (2^30 bytes). Default: the partition's."""
    time_h: float = 4.0
    """Time limit of one attempt, hours. A job that reaches it goes on in the next."""
    constraint: OptionalText = None
    """Features that the nodes must have, if any."""
    exclude: OptionalText = None
    """Nodes to avoid, if any."""
    array_parallelism: int = 16
    """Jobs of an array that run at the same time."""
    setup: Texts = ()
    """Shell lines to run on the first node before the ranks start, such as "module load cuda"."""
    slurm_args: Texts = ()
    """Further options of sbatch, KEY=VALUE, or KEY alone for one without a value: reservation=night exclusive."""

    margin_s: int = 120
    """Seconds before the time limit at which the job is told to leave; a snapshot must fit in."""
    signal: Literal["USR1", "USR2"] = "USR2"
    """The signal that tells it, also at a preemption where the cluster sends one."""
    max_requeues: int = 20
    """A job that was requeued this often, by itself or by Slurm, does not put itself back. 0: never, nor does Slurm."""

    logs: OptionalPath = None
    """Directory for logs. Default: slurm/ in --out or --run, of several runs beside them."""
    wait: bool = False
    """Follow the job to its end: progress, then the result; exit code 1 if it failed."""
    dry_run: bool = False
    """Print the plan and the sbatch file, and submit nothing."""

    def __post_init__(self) -> None:
        lowest = {"nodes": 1, "gpus_per_node": 0, "cpus_per_gpu": 1, "array_parallelism": 1, "margin_s": 0, "max_requeues": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            raise ConfigError(f"tasks_per_node must be at least 1, got {self.tasks_per_node}.")
        if self.tasks_per_node is not None and self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise ConfigError(
                f"a rank takes one GPU, so --tasks-per-node {self.tasks_per_node} does not go with "
                f"--gpus-per-node {self.gpus_per_node}; leave it out."
            )
        if self.mem_gb is not None and not 0 < self.mem_gb < math.inf:
            raise ConfigError(f"mem_gb must be a number above 0, got {self.mem_gb:g}.")
        if not self.time_h < math.inf:
            raise ConfigError(f"time_h must be a number of hours, got {self.time_h:g}.")
        if self.time_h * 3600 <= self.margin_s:
            raise ConfigError(f"a time limit of {self.time_h:g} h leaves nothing before --margin-s {self.margin_s}.")
        if self.cluster == "local" and self.nodes > 1:
            raise ConfigError(f"--cluster local is one node, got --nodes {self.nodes}.")
        for text in self.slurm_args:
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", text.strip()):
                raise ConfigError(f"--slurm-args takes KEY=VALUE with a long option of sbatch as KEY, got {text!r}.")

    @property
    def of_no_effect(self) -> list[str]:
        """Flags that were given and mean nothing without Slurm; to one rank in this process most do."""
        if self.cluster == "slurm":
            return []
        names = ["partition", "account", "qos", "mem_gb", "constraint", "exclude", "slurm_args"]
        if self.cluster == "local":
            names += ["array_parallelism"]
        else:
            names += [
                field.name
                for field in fields(self)
                if field.name not in (*names, "config", "cluster", "logs", "wait", "dry_run")
            ]
        usual = {field.name: field.default for field in fields(self)}
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != usual[name]]

    @property
    def n_threads(self) -> int:
        """Of a rank on CPUs: its cores, unless --setup says otherwise, or the environment that the job inherits."""
        said = os.environ.get("OMP_NUM_THREADS", "")
        for line in self.setup:
            if found := re.search(r"\bunset OMP_NUM_THREADS\b|\bOMP_NUM_THREADS=(\d*)", line):
                said = found[1] or ""
        return int(said) if said.isdecimal() and int(said) else self.cpus_per_gpu

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def n_ranks(self) -> int:
        return 1 if self.cluster == "debug" else self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Status:
    """Tell what the last job launched for each run directory is doing."""

    run: RunPaths
    """Run directories, or those that hold the runs of a sweep."""
    lines: int = 3
    """How many of the last lines of the log to show, after what it warns of."""


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """End the job that works on each run directory. What it has done stays: launched again it goes on."""

    run: RunPaths
    """Run directories, or those that hold the runs of a sweep."""
