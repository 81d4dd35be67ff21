"""Files on disks that fill up, stall and lose power: one-line errors, a second try, and renames that last."""

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from saev_dist.errors import RunError

T = TypeVar("T")

TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
DELAYS_S = (0.1, 1.0, 5.0)


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
        with open(fpath, "rb", buffering=0) as file:
            while left and (part := os.pread(file.fileno(), left, start)):
                parts.append(part)
                start, left = start + len(part), left - len(part)
        return b"".join(parts)

    return retrying(read)


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


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    while len(data):
        data = data[file.write(data) or 0 :]


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
