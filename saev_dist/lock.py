"""The lock of a run directory, `partials/lock`: one process works there at a time, and the lock of a dead one goes with it."""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from saev_dist.errors import RunError, tell, warn
from saev_dist.files import writing

GLANCE_S = 0.1
"""Far longer than `holder` looks at a lock."""
ENDING = "a run that is just ending"


class Lock:
    """An flock, freed by the kernel, or the file server, when its holder dies.

    On NFS it holds between machines where the server's lock service works (NFSv4, or v3 with lockd); the lock of a machine
    that crashed goes when its lease ends, after 90 s by default. Where the file system has no locks there is a warning
    and no protection.

    Args:
        run_dpath: the run directory; it need not exist.
    """

    def __init__(self, run_dpath: Path) -> None:
        self.run_dpath = run_dpath
        self.dpath = run_dpath / "partials"
        self.fpath = self.dpath / "lock"

    @contextmanager
    def hold(self, *, patience_s: float = 0, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep other processes out; makes the directory.

        Args:
            patience_s: how long to wait for who holds it. A moment it waits in any case: it may be `holder` that looks.
            check: called while it waits; what it raises ends the waiting.

        Raises:
            RunError: another process holds it, or the directory cannot be written, or is a link to nowhere.
        """
        began, has_told = time.monotonic(), False
        with ExitStack() as stack:
            stack.callback(self._drop_directory)
            while isinstance(file := self._try_to_own(), str):
                waited = time.monotonic() - began
                if waited >= max(GLANCE_S, patience_s):
                    raise self._in_use(file)
                if waited > GLANCE_S and not has_told:
                    tell(f"saev-dist: {self._in_use(file, f'Waiting for it, {patience_s:.0f} s at most.')}")
                    has_told = True
                check()
                time.sleep(0.05)
            stack.enter_context(file)
            stack.callback(self._drop)
            with writing(self.fpath):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            yield

    def holder(self) -> str:
        """The process that works here now, as it calls itself; "" where none does, or nobody can tell. Changes nothing."""
        with suppress(OSError), open(self.fpath, "rb") as file:
            if not _try_lock(file, fcntl.LOCK_SH):
                return _who_holds(file)
        return ""

    def refuse_held(self) -> None:
        """Raise RunError where another process holds it now."""
        if holder := self.holder():
            raise self._in_use(holder)

    def _try_to_own(self) -> BinaryIO | str:
        """The lock, open, and ours or nobody can tell; or who holds it. Its last holder removes it, and the directory."""
        with writing(self.fpath), ExitStack() as stack:
            try:
                self.dpath.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self.fpath, "ab+", buffering=0))  # closing it writes nothing, on a full disk
                if not self._is_ours(file):
                    return _who_holds(file)
                if not os.path.samestat(os.stat(self.fpath), os.fstat(file.fileno())):
                    return ENDING
            except (FileNotFoundError, FileExistsError):  # mkdir says the latter of a directory that goes meanwhile
                for dpath in (self.run_dpath, self.dpath):
                    if os.path.isfile(dpath) or (os.path.islink(dpath) and not os.path.exists(dpath)):
                        raise RunError(f"{dpath} leads to no directory. Remove it, or choose another --out.") from None
                return ENDING
            except OSError as err:
                if err.errno != errno.ESTALE:  # removed on another machine
                    raise
                return ENDING
            stack.pop_all()
            return file

    def _is_ours(self, file: BinaryIO) -> bool:
        """Whether it could be locked, or nobody can tell."""
        try:
            return _try_lock(file, fcntl.LOCK_EX)
        except OSError as err:
            if err.errno == errno.ESTALE:
                raise
            warn(f"{self.fpath}: cannot lock ({err.strerror}); see to it that no other run uses {self.run_dpath}.")
            return True

    def _drop(self) -> None:
        """Remove the lock, which is held, unless a run is under way: who has opened it meanwhile sees that it is gone."""
        with suppress(OSError):
            if not (self.dpath / "run.json").exists():
                self.fpath.unlink()

    def _drop_directory(self) -> None:
        """Remove `partials/` where nothing is left in it: on NFS not before the lock is closed."""
        with suppress(OSError):
            self.dpath.rmdir()

    def _in_use(self, holder: str, advice: str = "Wait for it, or stop it.") -> RunError:
        return RunError(f"{self.run_dpath} is in use by {holder}. {advice}")


def _who_holds(file: BinaryIO) -> str:
    """What the process that has the lock wrote into it."""
    holder = b""
    with suppress(OSError):  # there are locks that keep others from reading
        file.seek(0)
        holder = file.read(200)
    return holder.decode(errors="replace").strip() or "another process"


def _try_lock(file: IO[Any], kind: int) -> bool:
    """Whether the lock could be had.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
