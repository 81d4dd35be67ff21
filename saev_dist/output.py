"""Standard output: tables of facts, and its errors, which are told from those of files (nobody reads it, the disk is full)."""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO

from saev_dist.errors import OutputError, RunError, printable, warn


def table(lines: Mapping[str, str]) -> str:
    """Two aligned columns, of a line for each name."""
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {printable(text)}" for name, text in lines.items())


def gb(n_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


@contextmanager
def printing() -> Iterator[None]:
    """Inside, and at the end, an error of standard output is one of ours.

    Where its reader has gone, as that of `--help | head`, this exits with 1 and no word: it has seen enough.

    Raises:
        RunError: it takes no more for another reason.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed, and its number would be that of the next file that is opened
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w"))
    escape_what_cannot_be_encoded()
    stream = sys.stdout
    output = sys.stdout = _Output(stream)
    try:
        try:
            yield
        except SystemExit as err:  # of --help too
            if not err.code:
                output.flush()
            raise
        output.flush()
    except OutputError as err:
        output.drop()
        if err.number == errno.EPIPE:
            sys.exit(1)
        raise RunError(str(err)) from None
    except BaseException:  # it is told of, with its own exit code
        try:
            output.flush()
        except OutputError:
            output.drop()
        raise
    finally:
        sys.stdout = stream


def spare_output() -> None:
    """From here on, inside `printing`, work goes on where nothing can be printed: what it makes are files."""
    if isinstance(sys.stdout, _Output):
        sys.stdout.is_spare = True


def escape_what_cannot_be_encoded() -> None:
    """A path of bytes that are no text, or a character that the locale lacks, is printed as an escape, not an error.

    Python does so on standard error only, and the other comes up at the end of a run, with its summary.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Output:
    """A stream, and what it says in words of ours."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_spare = False

    def write(self, text: str) -> Any:
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def drop(self) -> None:
        """Let what waits to be written go nowhere: Python writes it at the exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as err:
            error = OutputError(err)
            if not self.is_spare:
                raise error from None
            self.drop()
            if error.number != errno.EPIPE:
                warn(str(error))
