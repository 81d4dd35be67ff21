"""Runs of the program that are killed, or refused by the disk, at any file operation; quick enough for hundreds.

Importing torch takes seconds, so one server process imports it, under the preloaded `faults.c`, and forks a child for
each rank of each run.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.ranks import ENV

SERVER = """
import json, os, selectors, sys
import saev_dist.extract, saev_dist.files, saev_dist.merge, torch.distributed
from saev_dist.cli import main

saev_dist.files.DELAYS_S = (0.01, 0.02)

def child(job):
    os.environ.update(job["env"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    exec(job["before"], {})
    main(job["args"])

stdin = os.fdopen(0, "rb", buffering=0)  # select does not see what a buffer holds
selector = selectors.DefaultSelector()
selector.register(stdin, selectors.EVENT_READ)
while True:
    if selector.select(0.01):
        line = stdin.readline()
        if not line:
            break
        pid = os.fork()
        if not pid:
            code = 70
            try:
                child(json.loads(line))
                code = 0
            except SystemExit as err:
                code = err.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"started": pid}), flush=True)
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if not pid:
            break
        print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
"""


SLOW = "import time, saev_dist.extract as e; f = e._rows; e._rows = lambda *a: (time.sleep(0.02), f(*a))[1]"
"""Code for `before`: batches take long enough for a test to strike among them, however loaded the machine is."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls one rank; see faults.c."""

    ops: str
    at: int
    how: str
    rank: int = 0
    forever: bool = False


@dataclass
class Attempt:
    """One start of the program, on some ranks."""

    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)


class Server:
    """Starts ranks. A context.

    Args:
        dpath: where logs go.
        library: the compiled faults.c.
    """

    def __init__(self, dpath: Path, library: Path) -> None:
        self.dpath, self.library = dpath, library
        self._n_attempts = 0
        self._ended: dict[int, int] = {}
        self._messages: queue.Queue[dict[str, int]] = queue.Queue()

    def __enter__(self) -> Self:
        env = ENV | {"LD_PRELOAD": str(self.library), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-c", SERVER]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()

    def start(
        self,
        *args: object,
        n_ranks: int = 1,
        fault: Fault | None = None,
        roots: tuple[Path, ...] = (),
        log: Path | None = None,
        before: str = "",
    ) -> Attempt:
        """Start the program on `n_ranks` ranks.

        Args:
            fault: counts operations below `roots`.
            log: lists these operations.
            before: Python code that each rank runs first.
        """
        self._n_attempts += 1
        env = {"FAULT_ROOTS": ":".join(map(str, roots))}
        if n_ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                env |= {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        attempt = Attempt([], [])
        for rank in range(n_ranks):
            own = env | ({"RANK": str(rank)} if n_ranks > 1 else {})
            if log is not None:
                own |= {"FAULT_OPS": fault.ops if fault else "orwtfmu", "FAULT_LOG": f"{log}.{rank}"}
            if fault is not None and fault.rank == rank:
                own |= {"FAULT_OPS": fault.ops, "FAULT_AT": str(fault.at), "FAULT_HOW": fault.how}
                own |= {"FAULT_FOREVER": "1"} if fault.forever else {}
            attempt.logs.append(self.dpath / f"attempt{self._n_attempts}.{rank}.log")
            attempt.logs[-1].touch()  # for a test that reads it before the rank has run
            job = {"args": list(map(str, args)), "env": own, "log": str(attempt.logs[-1]), "before": before}
            self._process.stdin.write(json.dumps(job) + "\n")
            attempt.pids.append(self._next("started", time.monotonic() + 60)["started"])
        return attempt

    def wait(self, attempt: Attempt, *, timeout_s: float = 60, for_one: bool = False) -> list[int]:
        """Exit codes in rank order, negative for a signal; a hang fails the test.

        Args:
            for_one: return once one rank has ended badly, or all have ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            codes = {pid: self._ended[pid] for pid in attempt.pids if pid in self._ended}
            if len(codes) == len(attempt.pids) or (for_one and any(codes.values())):
                return [codes.get(pid, 0) for pid in attempt.pids]
            self._next("ended", deadline)

    def run(self, *args: object, timeout_s: float = 60, **kwargs: Any) -> tuple[list[int], str]:
        """Start, wait; exit codes and what was printed."""
        attempt = self.start(*args, **kwargs)
        return self.wait(attempt, timeout_s=timeout_s), attempt.output()

    def kill(self, attempt: Attempt, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to every rank that is still there."""
        for pid in attempt.pids:
            if pid not in self._ended:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._messages.put(json.loads(line))

    def _next(self, kind: str, deadline: float) -> dict[str, int]:
        """Read the server's messages up to the next of a kind."""
        while True:
            try:
                message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError("a rank hangs") from None
            if "ended" in message:
                self._ended[message["ended"]] = message["code"]
            if kind in message:
                return message


def compile_faults(dpath: Path) -> Path:
    """faults.c as a shared library; skips where there is no compiler."""
    library = dpath / "faults.so"
    source = Path(__file__).parent / "faults.c"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    except FileNotFoundError:
        pytest.skip("no gcc to compile tests/faults.c")
    return library
