"""What the machine, and the container or job that this process is in, have for it: CPUs and memory.

A control group may leave less than the machine has, and so may any group above it. See cgroups(7): version 2 has one tree,
version 1 one for each controller.
"""

import math
import os
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def cpu_threads() -> int:
    """Threads that may compute side by side: torch's own number, at most a quota of CPU time; or what OMP_NUM_THREADS says."""
    n_threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return n_threads
    return min(n_threads, *(math.ceil(quota) for quota in _cpu_quotas()), n_threads)


def available_memory() -> int:
    """Bytes of host memory that can still be had, page cache included."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for dpath in _groups("memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            if (most := _read(dpath / limit)) and most != "max" and (now := _read(dpath / used)):
                # The page cache counts as used there, but goes when memory is asked for.
                stat = dict(line.split() for line in _read(dpath / "memory.stat").splitlines())
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                available = min(available, int(most) - int(now) + cached)
    return max(0, available)


def _cpu_quotas() -> list[float]:
    """CPUs that each of the groups may use, of those that have a limit."""
    found = []
    for dpath in _groups("cpu"):
        quota, period = _read(dpath / "cpu.max").split() or [
            _read(dpath / "cpu.cfs_quota_us"),
            _read(dpath / "cpu.cfs_period_us"),
        ]
        if quota.isdigit() and period.isdigit():  # not "max", -1, or a missing file
            found.append(int(quota) / int(period))
    return found


def _groups(controller: str) -> list[Path]:
    """Directories of this process's group and those above it."""
    found: list[Path] = []
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        below = Path(path.lstrip("/"))  # in a container this may be the path outside; its own group is the root then
        found += [root / part for part in (below, *below.parents)]
    return list(dict.fromkeys(found))


def _read(fpath: Path) -> str:
    """A file's text, "" where there is none that we may read."""
    try:
        return fpath.read_text().strip()
    except OSError:
        return ""
