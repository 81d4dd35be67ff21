"""Files on disks that fill up, stall and lose power: one-line errors, a second try, writes and renames that last."""

import ctypes
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from saev_dist.errors import RunError
from saev_dist.fields import Fields

T = TypeVar("T")

TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
DELAYS_S = (0.1, 1.0, 5.0)
SYNC_BYTES = 64 * 1024 * 1024
"""Bytes of a large file that are written before the disk is told to take them."""


def retrying(read: Callable[[], T], *, patient: bool = True) -> T:
    """Call `read`; on an error that network file systems and tired disks recover from, again after each of the delays.

    Args:
        read: what may be repeated.
        patient: False calls it once.

    Raises:
        OSError: another error, or still the same one.
    """
    for delay_s in DELAYS_S if patient else ():
        try:
            return read()
        except OSError as err:
            if err.errno not in TRANSIENT:
                raise
            time.sleep(delay_s)
    return read()


def read_part(fpath: Path, size: int, offset: int) -> bytes:
    """`size` bytes of a file from `offset`; fewer only at its end. A second try opens it anew: an open file stays stale.

    Raises:
        OSError: it cannot be read.
    """

    def read() -> bytes:
        parts, start, left = [], offset, size
        with open(fpath, "rb", buffering=0) as file:  # a buffered one is silent where it should try again (EAGAIN)
            while left and (part := os.pread(file.fileno(), left, start)):
                parts.append(part)
                start, left = start + len(part), left - len(part)
        return b"".join(parts)

    return retrying(read)


def refuse_lacking(dpath: Path, manifest: Fields) -> None:
    """Raise RunError where an artifact of a finished run is gone, or not as large as its manifest says that it was written."""
    for name, n_bytes in manifest.get("artifacts", dict, {}).items():  # older manifests list none
        if type(n_bytes) is not int or not re.fullmatch(r"\w[\w.-]*", name):
            raise RunError(
                f"{manifest.where}: artifacts lists {name!r} with {n_bytes!r}; it should hold names and their bytes."
            )
        try:
            found = os.stat(dpath / name).st_size
        except OSError as err:
            raise RunError(f"{dpath / name}: {err.strerror}; run extract again with --force.") from None
        if found != n_bytes:
            raise RunError(f"{dpath / name} holds {found:,} bytes of {n_bytes:,}; run extract again with --force.")


@contextmanager
def reading(fpath: Path) -> Iterator[None]:
    """Turn an OSError under way into one line that names the file of a run."""
    try:
        yield
    except OSError as err:
        raise RunError(f"{fpath}: cannot read: {err.strerror or err}; run again.") from None


@contextmanager
def writing(fpath: Path) -> Iterator[None]:
    """Turn an OSError under way into one line that names the file and what to do."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{fpath}: {err.strerror}; free some space there or use another directory, then run again."
            ) from None
        raise RunError(f"{fpath}: cannot write: {err.strerror or err}; make it writable, or use another directory.") from None


def did_you_mean(dpath: Path, fname: str) -> str:
    """What to add to the error for a directory without a file of that name, where one to three within it have one."""
    with suppress(OSError):
        found = sorted(str(fpath.parent) for fpath in dpath.glob(f"*/{fname}"))
        if 0 < len(found) <= 3:
            return f" Did you mean {' or '.join(found)}?"
    return ""


@contextmanager
def replacing(fpath: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write in place of another, if any: it has its name only once it is whole. Where that fails, nothing is left.

    Args:
        durable: have it on the disk before. (After a crash of the machine a file that was only renamed may be torn.)
    """
    temporary = fpath.with_name(f".{fpath.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, fpath)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    while len(data):
        data = data[file.write(data) or 0 :]


class Syncer:
    """Brings a large file onto the disk on a thread of its own while others write it, so that little is left for `sync`.

    Args:
        fpath: what errors call it.
        file: the file; its owner closes it, after this.
    """

    def __init__(self, fpath: Path, file: BinaryIO) -> None:
        self._fpath, self._file = fpath, file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._under_way: Future[None] | None = None
        self._n_unsynced = 0
        self._error: RunError | None = None
        """Of the first `fsync` that failed."""

    def wrote(self, n_bytes: int) -> None:
        """So many bytes more were written. Not for several threads at a time.

        Raises:
            RunError: the disk did not take those of before.
        """
        self._n_unsynced += n_bytes
        if self._n_unsynced >= SYNC_BYTES and (self._under_way is None or self._under_way.done()):
            if self._under_way is not None:
                self._under_way.result()
            self._under_way, self._n_unsynced = self._pool.submit(self._fsync), 0

    def sync(self) -> None:
        """Bring all that is written onto the disk. Any thread may call it.

        Raises:
            RunError: the disk did not take it, now or before. The kernel drops what it could not write and says so once, so
                that a second try would only seem to work.
        """
        self._pool.submit(self._fsync).result()

    def _fsync(self) -> None:
        if self._error is not None:
            raise self._error
        try:
            with writing(self._fpath):
                self._file.flush()
                os.fsync(self._file.fileno())
        except RunError as err:
            self._error = err
            raise

    def close(self) -> None:
        """Wait for what is under way; what was never synced stays so."""
        self._pool.shutdown()


def sync_file_system(dpath: Path) -> None:
    """Bring what was written to the file system that holds `dpath` to its disk: of thousands of small files sooner done than
    an fsync of each. By syncfs(2), which Python lacks; sync(2), where there is no other, also waits for other file systems.

    Raises:
        OSError: the disk refuses.
    """
    fd = os.open(dpath, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) == 0:
            return
        number = ctypes.get_errno()
    finally:
        os.close(fd)
    if number not in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number))
    os.sync()


def fsync_dir(dpath: Path) -> None:
    """Make renames in a directory outlive a power failure."""
    fd = os.open(dpath, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_disk(dpath: Path) -> int:
    """Free bytes where `dpath` is or will be."""
    dpath = dpath.absolute()
    while not os.path.exists(dpath):  # unlike Path.exists, False also where one may not look
        dpath = dpath.parent
    return shutil.disk_usage(dpath).free
