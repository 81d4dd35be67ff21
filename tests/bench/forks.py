"""Functions in forked processes, and what they take. The parent must have no threads of torch: it sets one and forks."""

import multiprocessing
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_forks(target: Any, *argss: tuple[Any, ...]) -> list[Any]:
    """What `target` returns in a process for each set of arguments, all at once; the imports are done, and shared."""
    queue: SimpleQueue[tuple[int, Any]] = FORK.SimpleQueue()

    def call(i: int, args: tuple[Any, ...]) -> None:
        try:
            queue.put((i, target(*args)))
        except BaseException as err:
            queue.put((i, None))
            raise err

    processes = [FORK.Process(target=call, args=(i, args)) for i, args in enumerate(argss)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes), "a forked process failed; see above"
    return [found[i] for i in range(len(argss))]


def status(name: str) -> int:
    """Bytes of a memory counter of this process, such as VmRSS."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def forget_peak() -> None:
    """VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
