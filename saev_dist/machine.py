"""What the machine, and the container or job that this process is in, have for it: CPUs, a GPU, memory.

A control group may leave less than the machine has, and so may any group above it. See cgroups(7): version 2 has one tree,
version 1 one for each controller.
"""

import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from saev_dist.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")


def processor(device: torch.device) -> str:
    """What computes: the GPU, or the CPU's model and its vector instructions, by which libraries choose their code."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # the latter two on ARM
    text = read(CPUINFO)
    found = [(name, re.search(rf"^{name}\s*: (\S+)$", text, re.M)) for name in names]
    words = [f"{name} {value[1]}".removeprefix("vendor_id ") for name, value in found if value]
    return " ".join([*(words or [platform.machine()]), torch.backends.cpu.get_cpu_capability()])


def cpu_threads() -> int:
    """Threads that may compute side by side: what OMP_NUM_THREADS says, or torch's own number, at most a quota of CPU time."""
    n_threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return n_threads
    return max(1, min([n_threads, *map(math.ceil, _cpu_quotas())]))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each operation of torch and NumPy: no result depends on the machine, and our threads have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, "blas"):  # NumPy's
            yield
    finally:
        torch.set_num_threads(before)


def rank_cores(local_size: int) -> int:
    """Cores for a rank that shares them with the others on its node.

    Where each rank is a task of Slurm's it has its own; torchrun's ranks share what its task, or a container, has.
    """
    n_cores = min([len(os.sched_getaffinity(0)), *map(math.ceil, _cpu_quotas())])
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal() and os.environ.get("SLURM_NTASKS") == os.environ.get("WORLD_SIZE", "1"):
        return max(1, min(n_cores, int(own)))
    return max(1, n_cores // local_size)


def available_memory() -> int:
    """Bytes of host memory that can still be had, page cache included."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    for dpath in _groups("memory"):
        for limit_name, used_name, prefix in names:
            limit, used = _number(dpath / limit_name), _number(dpath / used_name)
            if limit is not None and used is not None:
                # The page cache counts as used there, but goes when memory is asked for.
                stat = dict(re.findall(r"^(\w+) (\d+)$", read(dpath / "memory.stat"), re.M))
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                available = min(available, limit - used + cached)
    return max(0, available)


def memory_wanted(err: BaseException, device: torch.device) -> str:
    """What has run out of memory, if an error that came of work on `device` says that; else ""."""
    if isinstance(err, torch.OutOfMemoryError):  # torch's own, of a GPU only
        return str(device)
    if device.type == "cuda" and re.search(r"out of memory|ALLOC_FAILED", str(err)):  # of CUDA, cuBLAS, Triton
        return f"{device} or the host"  # for page-locked memory
    is_torchs = isinstance(err, RuntimeError) and "allocate memory" in str(err)
    return "the host" if is_torchs or isinstance(err, MemoryError) else ""


@contextmanager
def allocating(
    device: torch.device | None = None, *, advice: str = "free some there, or use a machine that has more"
) -> Iterator[None]:
    """Turn an error under way that says that memory has run out into one line.

    Args:
        device: where the work is; None: wherever torch is at work.
        advice: what to do about it, for the message.

    Raises:
        ConfigError: that line.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as err:
        device = device or torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        if not (where := memory_wanted(err, device)):
            raise
        why = (str(err).splitlines() or [type(err).__name__])[0]
        raise ConfigError(f"out of memory on {where} ({why}); {advice}.") from None


def _cpu_quotas() -> list[float]:
    """CPUs that each of the groups may use, of those that have a limit."""
    found = []
    for dpath in _groups("cpu"):
        both = re.fullmatch(r"(\d+) (\d+)", read(dpath / "cpu.max"))
        quota, period = (
            map(int, both.groups()) if both else map(_number, (dpath / "cpu.cfs_quota_us", dpath / "cpu.cfs_period_us"))
        )
        if quota and period:
            found.append(quota / period)
    return found


def _groups(controller: str) -> list[Path]:
    """Directories of this process's group and those above it."""
    found: list[Path] = []
    for _, controllers, path in re.findall(r"^(\d+):(.*?):(.*)$", read(OWN_CGROUPS), re.M):
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        below = Path(path.lstrip("/"))  # in a container this may be the path outside; its own group is the root then
        found += [root / part for part in (below, *below.parents)]
    return list(dict.fromkeys(found))


def _number(fpath: Path) -> int | None:
    """A file's number; None where there is no such file, or it says "max", or -1, for no limit."""
    text = read(fpath)
    return int(text) if re.fullmatch(r"\d+", text) else None


def read(fpath: Path) -> str:
    """A file's text, "" where there is none that we may read. A name in it need not be UTF-8."""
    try:
        return os.fsdecode(fpath.read_bytes()).strip()
    except OSError:
        return ""
