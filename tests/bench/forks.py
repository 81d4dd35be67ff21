"""Functions in forked processes, and what they take. The parent must have no threads of torch: it sets one and forks."""

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_forks(target: Any, *argss: tuple[Any, ...]) -> list[Any]:
    """What `target` returns in a process for each set of arguments, all at once; the imports are done, and shared."""

    def call(sender: Connection, args: tuple[Any, ...]) -> None:
        sender.send(target(*args))

    processes, receivers = [], []
    for args in argss:
        receiver, sender = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=call, args=(sender, args)))
        processes[-1].start()
        sender.close()  # so that the process's death ends the wait for it
        receivers.append(receiver)
    found = []
    for receiver in receivers:
        with suppress(EOFError):
            found.append(receiver.recv())
    for process in processes:
        process.join()
    assert len(found) == len(argss), "a forked process failed; see above"
    return found


def status(name: str) -> int:
    """Bytes of a memory counter of this process, such as VmRSS."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def forget_peak() -> None:
    """VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
