"""The faults that a user can cause and mend. Each message is one line: where, found, expected, what to do.

`cli.main` prints the line and exits 1; programmer errors are `assert`s and keep their traceback.
"""

import os
import sys
from contextlib import suppress

LONGEST = 8192
"""Characters of a line, twice as many as a path has bytes; of a longer one the middle is left out."""


class SaevDistError(Exception):
    """Base of every error that is shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(SaevDistError):
    """Flags, a TOML file or the machine do not allow this run."""


class DataError(SaevDistError):
    """A shard directory, a shard or an image folder is not what it says it is."""


class CheckpointError(SaevDistError):
    """An SAE checkpoint cannot be read under known rules."""


class UnknownFormatError(CheckpointError):
    """Nothing about a path says that an SAE is there."""


class RunError(SaevDistError):
    """A run directory is in the way, or cannot be written or read."""


class DamagedError(RunError):
    """A file of a run is not what was written."""


class OutputError(SaevDistError):
    """Standard output takes no more."""

    def __init__(self, err: OSError) -> None:
        super().__init__(f"cannot print: {err.strerror or err}.")
        self.number = err.errno


class Preempted(SaevDistError):
    """A signal asked the run to leave. What it has done is kept, and the same command continues; exit code 75."""


class MergeError(SaevDistError):
    """Two accumulator states do not belong to one run, or their sum leaves the number range."""


class PeerError(SaevDistError):
    """Another rank failed first; it has printed its own error, so this rank only stops."""


def of_file(err: OSError) -> RunError:
    """One line for the error of a file of which no one who knows more of it spoke."""
    where = f"{err.filename}: " if err.filename else ""
    return RunError(f"{where}{err.strerror or err}.")


def printable(text: str) -> str:
    """One line of printable text: names of files and fields are others', and may be long, or hold line ends and escape
    sequences."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def count(n: int, noun: str) -> str:
    """Some of a thing whose plural ends in s: "1 rank", "1,024 ranks"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def warn(text: str) -> None:
    """A line that does not stop the run."""
    tell(f"saev-dist: warning: {rank_prefix()}{printable(text)}")


def tell(line: str) -> None:
    """Print to standard error. Where nobody reads it any more nothing is said, and nothing stops."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):  # what waits to be written would fail again at the exit, and change its code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def rank_prefix() -> str:
    """What a line begins with where several processes print some."""
    return f"rank {os.environ.get('RANK', '?')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
