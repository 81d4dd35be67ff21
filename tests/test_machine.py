"""What kind of machine it is; its CPUs and memory, as control groups of both versions leave them: see cgroups(7)."""

import platform
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist import machine
from saev_dist.cli import main
from saev_dist.config import Replay
from slurm.jobs import End
from slurm.task import Task
from tests.ranks import fails, run_ranks
from tests.replays import make_run

GB = 10**9
FREE_KB = 8 * GB // 1024


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files of control groups; this process is in /job/step."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for name in ("CGROUPS", "OWN_CGROUPS", "MEMINFO"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    (tmp_path / "MEMINFO").write_text(f"MemTotal: 99 kB\nMemAvailable:   {FREE_KB} kB\n")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "OWN_CGROUPS").write_text(own)
        for name, text in files.items():
            fpath = tmp_path / "CGROUPS" / name
            fpath.parent.mkdir(parents=True, exist_ok=True)
            fpath.write_text(text + "\n")

    return write


V2, V1 = "0::/job/step\n", "5:memory:/job/step\n3:cpu,cpuacct:/job/step\n1:name=systemd:/elsewhere\n0::/\n"
PERIOD = {"cpu/job/step/cpu.cfs_period_us": "100000", "cpu/job/cpu.cfs_period_us": "50000"}
QUOTAS = {
    "none": ("", {}, 8),
    "2: no limit": (V2, {"job/step/cpu.max": "max 100000"}, 8),
    "2: own": (V2, {"job/step/cpu.max": "200000 100000", "job/cpu.max": "max 100000"}, 2),
    "2: of a group above": (V2, {"job/step/cpu.max": "700000 100000", "job/cpu.max": "150000 50000"}, 3),
    "2: of the root, as in a container": (V2, {"cpu.max": "250000 100000"}, 3),
    "2: less than one": (V2, {"job/step/cpu.max": "5000 100000"}, 1),
    "1: no limit": (V1, {"cpu/job/step/cpu.cfs_quota_us": "-1"} | PERIOD, 8),
    "1: own": (V1, {"cpu/job/step/cpu.cfs_quota_us": "400000"} | PERIOD, 4),
    "1: of a group above": (V1, {"cpu/job/cpu.cfs_quota_us": "100000"} | PERIOD, 2),
    "1: of another process": (V1, {"cpu/other/cpu.cfs_quota_us": "100000", "cpu/other/cpu.cfs_period_us": "100000"}, 8),
    "2: nothing that cgroups(7) knows": (V2, {"job/cpu.max": "1 2 3", "job/step/cpu.max": "none", "cpu.max": ""}, 8),
    "2: no period": (V2, {"job/cpu.max": "3 0"}, 8),
    "a list of groups that is none": ("nonsense\n\n7\n", {}, 8),
    "2: more than there are": (V2, {"job/cpu.max": "9900000 100000"}, 8),
}


@pytest.mark.parametrize(("own", "files", "n_threads"), QUOTAS.values(), ids=QUOTAS)
def test_no_more_threads_than_a_quota_feeds(groups, monkeypatch, own, files, n_threads):
    groups(own, files)
    assert machine.cpu_threads() == n_threads
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert machine.cpu_threads() == 8, "what the user asks for"


@pytest.mark.parametrize(
    ("quota", "env", "local_size", "n_cores"),
    [
        (None, {}, 1, 8),
        (None, {}, 3, 2),
        (None, {}, 99, 1),
        ("300000 100000", {}, 1, 3),
        ("300000 100000", {}, 3, 1),
        (None, {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "16", "WORLD_SIZE": "16"}, 8, 8),
        (None, {"SLURM_CPUS_PER_TASK": "2", "SLURM_NTASKS": "1"}, 1, 2),
        (None, {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1", "WORLD_SIZE": "4"}, 4, 2),
    ],
)
def test_a_rank_has_its_share_of_the_cores(groups, monkeypatch, quota, env, local_size, n_cores):
    groups(V2, {} if quota is None else {"job/cpu.max": quota})
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert machine.rank_cores(local_size) == n_cores


STAT1 = "cache 77\ninactive_file 1\nactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 500"
LIMITS = {
    "none": ("", {}, FREE_KB * 1024),
    "2: no limit": (V2, {"job/step/memory.max": "max", "job/step/memory.current": "5"}, FREE_KB * 1024),
    "2: own, page cache counts as free": (
        V2,
        {
            "job/step/memory.max": "5000000",
            "job/step/memory.current": "3000000",
            "job/step/memory.stat": "anon 7\ninactive_file 1000\nactive_file 500",
        },
        2_001_500,
    ),
    "2: of a group above": (V2, {"job/memory.max": "5000000", "job/memory.current": "1000000"}, 4_000_000),
    "2: used up": (V2, {"job/memory.max": "5000000", "job/memory.current": "5000009"}, 0),
    "1: own": (
        V1,
        {
            "memory/job/step/memory.limit_in_bytes": "5000000",
            "memory/job/step/memory.usage_in_bytes": "3000000",
            "memory/job/step/memory.stat": STAT1,
        },
        2_001_500,
    ),
    "2: nothing that cgroups(7) knows": (
        V2,
        {"job/memory.max": "lots", "job/memory.current": "5", "memory.max": "7", "memory.current": "some"},
        FREE_KB * 1024,
    ),
    "2: statistics of another kind": (
        V2,
        {"job/memory.max": "7000", "job/memory.current": "5000", "job/memory.stat": "one\ntwo words here\ninactive_file x"},
        2000,
    ),
    "1: none, in another way": (
        V1,
        {"memory/memory.limit_in_bytes": "-1", "memory/memory.usage_in_bytes": "5"},
        FREE_KB * 1024,
    ),
    "1: no limit": (
        V1,
        {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"},
        FREE_KB * 1024,
    ),
}


@pytest.mark.parametrize(("own", "files", "n_bytes"), LIMITS.values(), ids=LIMITS)
def test_no_more_memory_than_a_group_has_left(groups, own, files, n_bytes):
    groups(own, files)
    assert machine.available_memory() == n_bytes


def test_the_name_of_a_group_need_not_be_text(groups, tmp_path):
    groups("", {"cpu.max": "200000 100000"})
    (tmp_path / "OWN_CGROUPS").write_bytes(b"0::/job/\xff\n")
    assert machine.cpu_threads() == 2


def test_this_machine_has_some():
    assert machine.available_memory() > 10**8
    assert machine.cpu_threads() >= 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("CUDA error: out of memory", "cuda:1 or the host"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuda:1 or the host"),
        ("Triton Error [CUDA]: out of memory", "cuda:1 or the host"),
        ("CUDA error: an illegal memory access was encountered", ""),
    ],
)
def test_what_a_gpus_libraries_say_of_memory_is_understood(text, where):
    assert machine.memory_wanted(RuntimeError(text), torch.device("cuda", 1)) == where
    assert machine.memory_wanted(RuntimeError(text), torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("take", "why"),
    [
        (lambda: torch.empty(2**50), r"[^\n]*can't allocate memory[^\n]*"),
        (lambda: np.empty(2**50), "Unable to allocate [^\n]*"),
    ],
    ids=["torch", "numpy"],
)
def test_want_of_memory_is_one_line_wherever_it_is_met(monkeypatch, capsys, take, why):
    said = rf"out of memory on the host \({why}\); free some there, or use a machine that has more\."
    monkeypatch.setattr("saev_dist.verify.run", lambda cfg: take())
    assert re.fullmatch(f"saev-dist: error: {said}", fails(capsys, "verify", "--run", "r"))
    monkeypatch.setattr("saev_dist.replay.run", lambda cfg: take())
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it would leave us deaf
    task = Task(cfg=Replay(run=Path("r")), n_threads=1, max_requeues=0)
    end = task._run(End(rank=0, attempt=0, outcome="done"), None)
    assert end.outcome == "failed" and re.fullmatch(said, end.error), end
    assert re.fullmatch(f"saev-dist: error: rank 0: {said}\n", capsys.readouterr().err)


def test_a_launched_job_goes_on_where_its_log_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr("saev_dist.replay.run", lambda cfg: print("done", flush=True))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it would leave us deaf
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        end = Task(cfg=Replay(run=Path("r")), n_threads=1, max_requeues=0)._run(End(rank=0, attempt=0, outcome="done"), None)
    assert end.outcome == "done", end
    assert capsys.readouterr().err == "saev-dist: warning: cannot print: No space left on device.\n"


def test_any_other_error_of_torchs_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("saev_dist.verify.run", lambda cfg: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["verify", "--run", "r"])


def test_ranks_leave_with_the_one_that_lacks_memory(tmp_path):
    small = (
        "import os, torch, saev_dist.verify as v\nif os.environ['RANK'] == '1': v.encoder_of = lambda *_: torch.empty(2**50)"
    )
    done = run_ranks("verify", "--run-dir", make_run(tmp_path), "--no-progress", n_ranks=2, before=small)
    assert done.returncode == 1 and re.fullmatch(
        r"saev-dist: error: rank 1: out of memory on the host [^\n]*\n", done.stderr
    ), done


def test_processors_that_may_round_otherwise_have_other_names(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    def name(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return machine.processor(torch.device("cpu"))

    zen_3 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7763\n"
    assert name(zen_3) == name(zen_3 * 2) == name(zen_3.replace("7763", "7713")) == "AuthenticAMD cpu family 25 model 1 AVX2"
    assert name(zen_3.replace(": 25", ": 26")) != name(zen_3)
    neoverse = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    assert name(neoverse) == "CPU implementer 0x41 CPU part 0xd40 AVX2"
    assert name("") == f"{platform.machine()} AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert name(zen_3).endswith(" DEFAULT")
