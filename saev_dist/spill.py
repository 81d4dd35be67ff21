"""Spill files: rows that ranks append while they stream, and the artifacts that are put together from them.

Such artifacts grow with the data, so nothing here holds more than some megabytes of them.
"""

import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from saev_dist.errors import RunError

COPY_BYTES = 8 * 1024 * 1024


@contextmanager
def writing(fpath: Path) -> Iterator[None]:
    """Turn an OSError under way into one line that names the file and what to do."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{fpath}: {err.strerror}; free some space there or choose another --out, then run again.") from None
        raise RunError(f"{fpath}: cannot write: {err.strerror or err}; choose an --out that you can write to.") from None


class Spill:
    """A rank's rows of one array, appended in data order; the ranks' files, concatenated, are the array.

    A context, which closes the file.

    Args:
        fpath: file to make or read.
    """

    def __init__(self, fpath: Path) -> None:
        self.fpath = fpath
        self._file: BinaryIO | None = None

    def append(self, rows: NDArray[Any]) -> None:
        """Write an array's bytes at the end."""
        with writing(self.fpath):
            if self._file is None:
                self._file = open(self.fpath, "wb", buffering=COPY_BYTES)
            self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        with writing(self.fpath) if kind is None else suppress(OSError):  # a full disk fails a second time here
            self._file.close()

    @property
    def n_bytes(self) -> int:
        """Size so far. A rank that had nothing to do has no file."""
        return self.fpath.stat().st_size if self.fpath.exists() else 0

    def chunks(self, dtype: type[np.generic], n_columns: int = 1) -> Iterator[NDArray[Any]]:
        """The array, flat, whole rows of it, some megabytes at a time."""
        if not self.n_bytes:
            return
        row_bytes = np.dtype(dtype).itemsize * n_columns
        with open(self.fpath, "rb") as file:
            while chunk := file.read(max(1, COPY_BYTES // row_bytes) * row_bytes):
                yield np.frombuffer(chunk, dtype=dtype)


def check_size(spills: list[Spill], n_bytes: int) -> None:
    """Refuse to make an artifact of spill files that do not hold, together, what the plan promises.

    Raises:
        RunError: bytes are missing or too many: another run wrote here, or the file system is not shared by all ranks.
    """
    if (found := sum(spill.n_bytes for spill in spills)) != n_bytes:
        raise RunError(
            f"{spills[0].fpath.parent}: the ranks' {spills[0].fpath.name.split('.')[0]} files hold {found:,} bytes; the plan "
            f"promises {n_bytes:,}. Do all ranks see this directory, and is no other run at work in it? Run again."
        )


def read_columns(spills: list[Spill], n_columns: int, n_rows: int) -> NDArray[np.float32]:
    """The transpose of the float32 rows in spill files: (n_columns, n_rows)."""
    out = np.empty((n_columns, n_rows), np.float32)
    if spills:
        check_size(spills, out.nbytes)
    first = 0
    for spill in spills:
        for chunk in spill.chunks(np.float32, n_columns):
            rows = chunk.reshape(-1, n_columns)
            out[:, first : first + len(rows)] = rows.T
            first += len(rows)
    return out


def write_csr(file: BinaryIO, shape: tuple[int, int], counts: list[Spill], indices: list[Spill], data: list[Spill]) -> None:
    """Write a CSR matrix as `scipy.sparse.save_npz` does, uncompressed, from spill files, some megabytes at a time.

    Args:
        file: where to.
        shape: of the matrix.
        counts: int64 entries per row. indices: int32 columns. data: float32.
    """
    n_entries = sum(int(chunk.sum()) for spill in counts for chunk in spill.chunks(np.int64))
    check_size(counts, 8 * shape[0])
    check_size(indices, 4 * n_entries)
    check_size(data, 4 * n_entries)
    index_dtype = np.dtype(np.int32 if max(n_entries, *shape) <= np.iinfo(np.int32).max else np.int64)

    def pointers() -> Iterator[NDArray[Any]]:
        total = 0
        yield np.zeros(1, index_dtype)
        for spill in counts:
            for chunk in spill.chunks(np.int64):
                ends = total + chunk.cumsum()
                total = int(ends[-1])
                yield ends.astype(index_dtype)

    def concatenated(spills: list[Spill], stored: type[np.generic], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        for spill in spills:
            for chunk in spill.chunks(stored):
                yield chunk.astype(dtype, copy=False)

    members: list[tuple[str, np.dtype[Any], tuple[int, ...], Iterator[NDArray[Any]]]] = [
        ("indices", index_dtype, (n_entries,), concatenated(indices, np.int32, index_dtype)),
        ("indptr", index_dtype, (shape[0] + 1,), pointers()),
        ("format", np.dtype("S3"), (), iter([np.array(b"csr")])),
        ("shape", np.dtype(np.int64), (2,), iter([np.array(shape, np.int64)])),
        ("data", np.dtype(np.float32), (n_entries,), concatenated(data, np.float32, np.dtype(np.float32))),
    ]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, dtype, member_shape, chunks in members:
            # a fixed date: the bytes must not depend on the clock
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": member_shape}
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(chunk.tobytes())
