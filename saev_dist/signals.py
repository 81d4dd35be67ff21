"""Signals that ask a run to leave: noted at once, obeyed at the next batch boundary."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_S, PASSED_ON_S = 2.0, 20.0
"""Launchers forward a signal, as itself or as another one, to a process that may have had it from the terminal already. The
same one within the first time, or another within the second (a busy machine may take long), counts as the same request."""


def be_deaf() -> None:
    """On the way out nothing is to interrupt: a launcher may pass on what this process has obeyed already."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)


class Signals:
    """Catches the signals of schedulers and terminals while it is entered; the first one is only noted.

    A second one, some time after the first, ends the process at once, as it would have without this. Nothing is
    caught outside the main thread, where Python allows no handlers.

    Args:
        rank: of this process; rank 0 says what goes on.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._former: dict[signal.Signals, object] = {}
        self._since, self._first = 0.0, 0
        self.received = ""
        """Name of the first signal, "" before it."""
        self.last = ""
        """What is done before the process leaves, for the message."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in ASKING}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)  # a launcher may have held them until there are handlers
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal returned it

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since, self._first = signal.Signals(number).name, time.monotonic(), number
            if self._rank == 0:
                again = f"the same again, {SAME_S:.0f} s or more later, leaves at once"
                line = "\n" if os.isatty(2) else ""  # there may be a bar, and ^C behind it
                text = f"{line}saev-dist: {self.received}: leaving, after {self.last} at the latest; {again}.\n"
                with suppress(OSError):  # the same signal may have ended who reads it
                    os.write(2, text.encode())  # print is not safe within a print
        elif time.monotonic() - self._since > (SAME_S if number == self._first else PASSED_ON_S):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
