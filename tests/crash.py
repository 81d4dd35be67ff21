"""Runs of the program that are killed, or refused by the disk, at any file operation; quick enough for hundreds.

The process that ranks are forked off has `faults.c` preloaded.
"""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Attempt, Server

STOPPING = """
import time, saev_dist.extract as e
rows, n_batches = e._rows, iter(range(99))
e._rows = lambda *a: rows(*a) if next(n_batches) < 2 else time.sleep(600)
"""
"""Code for `before`: each rank does two batches and no more."""

SLOW = "import time, saev_dist.extract as e; f = e._rows; e._rows = lambda *a: (time.sleep(0.2), f(*a))[1]"
"""Code for `before`: batches take long enough for a test to strike among them, however loaded the machine is."""


N_BATCHES = 13
"""Of a run of the fixture `whole`: of two images; shards have 7, 7, 7 and 2."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls one rank; see faults.c."""

    ops: str
    at: int
    how: str
    what: str = ""
    """Only if the operation is this one, as `operations` has it: a rank's drawing processes count for themselves."""
    rank: int = 0
    forever: bool = False


QUICK = "import saev_dist.files; saev_dist.files.DELAYS_S = (0.01, 0.02); "


class FaultyServer(Server):
    """Starts ranks that something befalls.

    Args:
        dpath: where logs go.
        library: the compiled faults.c.
    """

    def __init__(self, dpath: Path, library: Path) -> None:
        super().__init__(dpath, LD_PRELOAD=str(library))

    def start(
        self,
        *args: object,
        n_ranks: int = 1,
        before: str = "",
        fault: Fault | None = None,
        roots: tuple[Path, ...] = (),
        log: Path | None = None,
    ) -> Attempt:
        """Start the program on `n_ranks` ranks.

        Args:
            before: Python code that each rank runs first.
            fault: counts operations below `roots`.
            log: lists these operations, for `operations`.
        """
        envs = []
        for rank in range(n_ranks):
            env = {"FAULT_ROOTS": ":".join(map(str, roots))}
            if log is not None:
                env |= {"FAULT_OPS": fault.ops if fault else "orwtflmu", "FAULT_LOG": f"{log}.{rank}"}
            if fault is not None and fault.rank == rank:
                env |= {"FAULT_OPS": fault.ops, "FAULT_AT": str(fault.at), "FAULT_HOW": fault.how}
                env |= {"FAULT_FOREVER": "1"} if fault.forever else {}
                env |= {"FAULT_WHAT": fault.what} if fault.what else {}
            envs.append(env)
        return super().start(*args, n_ranks=n_ranks, before=QUICK + before, envs=envs)


def compile_faults(dpath: Path) -> Path:
    """faults.c as a shared library; where there is no compiler the test skips, or fails where CI is set."""
    library = dpath / "faults.so"
    source = Path(__file__).parent / "faults.c"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    except FileNotFoundError:
        reason = "no gcc to compile tests/faults.c"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    return library


def operations(log: Path, rank: int = 0) -> list[tuple[int, str]]:
    """The operations of a rank and its drawing processes: each one's number in its process, and what it was."""
    fpath = Path(f"{log}.{rank}")
    lines = [line.split(" ", 1) for line in fpath.read_text().splitlines()] if fpath.exists() else []
    return [(int(number), what) for number, what in lines]


def killed(server, args, out, *, at: int, n_ranks: int = 1, ops: str = "m", rank: int = 0) -> None:
    """Start a run that is killed at the n-th rename below `out`, and its other ranks with it."""
    fault = Fault(ops=ops, at=at, how="kill", rank=rank)
    attempt = server.start(*args, out, n_ranks=n_ranks, fault=fault, roots=(out,))
    assert min(server.wait(attempt, for_one=True)) == -9, attempt.output()
    server.kill(attempt)
    server.wait(attempt)


def unfinished(server, args, out: Path) -> Path:
    """A run killed before its last partial; the partial."""
    killed(server, args, out, at=1 + N_BATCHES)
    (fpath,) = out.glob("partials/*.partial")
    return fpath


def wait_for(condition: Callable[[], Any], *, say: Callable[[], str] = str) -> None:
    """Wait until it holds; where it never does, fail with what there is to `say`."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.01)
