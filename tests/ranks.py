"""Run the program as users do: in processes of its own, one or several ranks under torchrun; or quicker, in forks."""

import hashlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import pytest

from saev_dist.cli import main
from slurm.task import PORTS

# One thread everywhere, as torchrun does by itself: several ranks share the test machine's cores.
ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SLOWLY = {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent / "slowly"), ENV.get("PYTHONPATH"))))}
"""Environment in which an `extract` takes a while for each batch."""
STAYING = SLOWLY | {"SAEV_DIST_STAYS": "1"}
"""And in which the first attempt of a job does some batches, and no more until it has a signal."""


def run_cli(*args: object, n_ranks: int = 1, n_threads: int = 1, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `saev-dist ARGS`: plain for one rank, under torchrun for several. A hang fails the test."""
    launcher: list[str] = []
    if n_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, *launcher, "-m", "saev_dist", *map(str, args)]
    env = ENV | {"OMP_NUM_THREADS": str(n_threads)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)


def run_ranks(
    *args: object, n_ranks: int = 1, n_threads: int = 1, before: str = "", timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same, seconds sooner: each rank is forked off a process that has imported torch, and no torchrun watches them.

    Args:
        before: Python code that each rank runs first.
    """
    envs = [{"OMP_NUM_THREADS": str(n_threads)}] * n_ranks
    attempt = server().start(*args, n_ranks=n_ranks, before=before, envs=envs, apart=True)
    codes = server().wait(attempt, timeout_s=timeout_s)
    stderr = "".join(log.read_text() for log in attempt.error_logs)
    return subprocess.CompletedProcess(args, next(filter(None, codes), 0), attempt.output(), stderr)


@contextmanager
def leading_a_group(command: Sequence[object], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is piped. In the end it is told to leave, and what is left of its group is killed."""
    with subprocess.Popen(
        list(map(str, command)), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        **settings,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()  # torchrun then ends its ranks, which lead groups of their own
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def launch(*args: object, under: Sequence[str] = (), timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """Run `python -m slurm.launch ARGS`, by way of the command `under`."""
    command = [*under, sys.executable, "-m", "slurm.launch", *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=timeout_s)


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that `saev-dist ARGS` ends with, in this process."""
    capsys.readouterr()  # warnings about synthetic SAEs, which reconstruct nothing
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("saev-dist: error: ") and "\n" not in line
    return line


def rendezvous() -> dict[str, str]:
    """Where ranks that are not started by torchrun may meet."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def artifact_hashes(dpath: Path) -> dict[str, str]:
    """SHA-256 of every file of a finished run but the manifest, which holds times."""
    assert (dpath / "manifest.json").exists(), sorted(path.name for path in dpath.iterdir())
    files = {path.name: path for path in dpath.iterdir() if path.is_file()}
    del files["manifest.json"]
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


# ---- forks

SERVER = """
import ctypes, json, os, selectors, signal, sys
import numpy, pyarrow, saev_dist.extract, saev_dist.merge, saev_dist.replay, torch.distributed
from saev_dist.cli import main, parse
from saev_dist.render.plots import distributions_png

parse(["replay", "--run", "x"]), distributions_png(numpy.ones((1, 1), "f4")), pyarrow.array(numpy.ones(1))  # they import more

libc, server_pid = ctypes.CDLL(None), os.getpid()
PR_SET_PDEATHSIG = 1

def child(job):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank does not outlive the tests
    if os.getppid() != server_pid:
        os._exit(70)
    os.environ.clear()
    os.environ.update(job["env"])
    torch.set_num_threads(int(job["env"]["OMP_NUM_THREADS"]))
    for number in (1, 2):
        os.dup2(os.open(job["logs"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
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


@dataclass
class Attempt:
    """One start of the program, on some ranks."""

    pids: list[int]
    logs: list[Path]
    """Of each rank, what it printed."""
    error_logs: list[Path]
    """The same files, or what went to stderr alone."""

    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)  # a rank may have been told another encoding


class Server:
    """Starts ranks without the seconds that importing torch takes: they are forked off a process that has. A context.

    Args:
        dpath: where logs go.
        env: of that process, beside ENV.
    """

    def __init__(self, dpath: Path, **env: str) -> None:
        self.dpath, self.env = dpath, env
        self._n_attempts = 0
        self._ended: dict[int, int] = {}
        self._messages: queue.Queue[dict[str, int]] = queue.Queue()

    def __enter__(self) -> Self:
        env = ENV | {"TORCH_CPP_LOG_LEVEL": "FATAL"} | self.env
        command = [sys.executable, "-c", SERVER]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()

    def start(
        self, *args: object, n_ranks: int = 1, before: str = "", envs: Sequence[dict[str, str]] = (), apart: bool = False
    ) -> Attempt:
        """Start the program on `n_ranks` ranks.

        Args:
            before: Python code that each rank runs first.
            envs: further environment of each rank.
            apart: keep stdout and stderr in files of their own.
        """
        self._n_attempts += 1
        env = ENV | self.env
        if n_ranks > 1:
            env |= {"WORLD_SIZE": str(n_ranks)} | rendezvous()
        attempt = Attempt([], [], [])
        for rank in range(n_ranks):
            stem = f"attempt{self._n_attempts}.{rank}"
            attempt.logs.append(self.dpath / f"{stem}.log")
            attempt.error_logs.append(self.dpath / f"{stem}.err" if apart else attempt.logs[-1])
            logs = [attempt.logs[-1], attempt.error_logs[-1]]
            for log in logs:
                log.touch()  # for a test that reads it before the rank has run
            own = env | ({"RANK": str(rank)} if n_ranks > 1 else {}) | (envs[rank] if envs else {})
            job = {"args": list(map(str, args)), "env": own, "logs": list(map(str, logs)), "before": before}
            self._process.stdin.write(json.dumps(job) + "\n")
            pid = self._next("started", time.monotonic() + 60)["started"]
            self._ended.pop(pid, None)  # of an earlier rank that had this number
            attempt.pids.append(pid)
        return attempt

    def wait(self, attempt: Attempt, *, timeout_s: float = 120, for_one: bool = False) -> list[int]:
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

    def run(self, *args: object, timeout_s: float = 120, **kwargs: Any) -> tuple[list[int], str]:
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


LOGS = TemporaryDirectory(prefix="saev-dist-ranks-", ignore_cleanup_errors=True)


@cache
def server() -> Server:
    """One for all tests of this process; it ends when its stdin does."""
    return Server(Path(LOGS.name)).__enter__()
