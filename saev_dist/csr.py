"""A SciPy CSR matrix out of spill files, written by several threads.

Its values come first in the file. A process leaves `ROOM` for the headers before the values that it spills, so that what it
has spilled can become the matrix's file, and half of the matrix need not be written a second time.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from saev_dist.files import Syncer
from saev_dist.spill import Rows, as_bytes, crc32_combine

DATE = (1980, 1, 1, 0, 0, 0)
"""Of all members: the bytes must not depend on the clock."""
MAX_INT32 = 2**31 - 1
"""Up to which SciPy's indices are int32."""


def write_csr(file: BinaryIO, shape: tuple[int, int], counts: Rows, indices: Rows, data: Rows) -> None:
    """Write a CSR matrix as `scipy.sparse.save_npz` does, uncompressed, but with its values first, some megabytes at a time.

    Args:
        file: where to; a file of the system's, at its beginning. What it holds already, from `ROOM` on, are the first numbers
            of `data`.
        shape: of the matrix.
        counts: int64 entries per row. indices: int32 columns. data: float32.

    Raises:
        RunError: rows are not what was written, or the disk does not take the file; it is on the disk otherwise.
    """
    counts.check_size(8 * shape[0])
    n_entries = sum(made for *_, made in counts.each(lambda _, chunk: int(chunk.sum())))
    indices.check_size(4 * n_entries)
    data.check_size(4 * n_entries)
    index_dtype = np.dtype(np.int32 if max(n_entries, *shape) <= MAX_INT32 else np.int64)

    def pointers() -> Iterator[NDArray[Any]]:
        total = 0
        yield np.zeros(1, index_dtype)
        for *_, chunk in counts.each(lambda _, chunk: chunk):
            ends = total + chunk.cumsum()
            total = int(ends[-1]) if len(ends) else total
            yield ends.astype(index_dtype)

    with closing(Syncer(Path(file.name), file)) as syncer:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _write_large(archive, file, syncer, "data", n_entries, np.dtype(np.float32), data)
            _write_large(archive, file, syncer, "indices", n_entries, index_dtype, indices)
            _write_small(archive, "indptr", index_dtype, (shape[0] + 1,), pointers())
            _write_small(archive, "format", np.dtype("S3"), (), iter([np.array(b"csr")]))
            _write_small(archive, "shape", np.dtype(np.int64), (2,), iter([np.array(shape, np.int64)]))
        syncer.sync()


def _write_small(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunks: Iterator[NDArray[Any]]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", DATE), "w", force_zip64=True) as member:
        member.write(_npy_header(dtype, shape))
        for chunk in chunks:
            member.write(as_bytes(chunk))


def _write_large(
    archive: zipfile.ZipFile, file: BinaryIO, syncer: Syncer, name: str, n: int, dtype: np.dtype[Any], rows: Rows
) -> None:
    """The same; a chunk is written to its place, unless it is there, by the thread that read it. Headers are zipfile's."""
    info, header = _headers(name, dtype, n)
    info.header_offset = archive.start_dir
    begin = info.header_offset + len(info.FileHeader(zip64=True)) + len(header)
    fd = file.fileno()
    n_there = max(0, os.fstat(fd).st_size - begin) // dtype.itemsize
    assert not n_there or begin == ROOM

    def write(first: int, chunk: NDArray[Any]) -> int | None:
        if first + len(chunk) <= n_there:
            return None
        data = as_bytes(chunk.astype(dtype, copy=False))
        n_written = 0
        while n_written < len(data):
            n_written += os.pwrite(fd, data[n_written:], begin + first * dtype.itemsize + n_written)
        return zlib.crc32(data) if chunk.dtype != dtype else None

    with closing(rows.each(write)) as chunks:  # no thread writes any more when this is left
        for n_bytes, crc, other_crc in chunks:
            if other_crc is not None:
                n_bytes, crc = n_bytes // 4 * dtype.itemsize, other_crc
            info.CRC = crc32_combine(info.CRC, crc, n_bytes)
            syncer.wrote(n_bytes)
    file.seek(info.header_offset)
    file.write(info.FileHeader(zip64=True) + header)
    archive.start_dir = begin + n * dtype.itemsize
    file.seek(archive.start_dir)
    archive.filelist.append(info)
    archive.NameToInfo[info.filename] = info


def _headers(name: str, dtype: np.dtype[Any], n: int) -> tuple[zipfile.ZipInfo, bytes]:
    """A member of `n` numbers, as zipfile would have it but for its place and the CRC of the numbers; and what NumPy writes
    before them."""
    info, header = zipfile.ZipInfo(f"{name}.npy", DATE), _npy_header(dtype, (n,))
    info.external_attr = 0o600 << 16
    info.file_size = info.compress_size = len(header) + n * dtype.itemsize
    info.CRC = zlib.crc32(header)
    return info, header


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    header = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _room() -> int:
    info, header = _headers("data", np.dtype(np.float32), 0)
    return len(info.FileHeader(zip64=True)) + len(header)


ROOM = _room()
"""Bytes before the first value, however many there are: zipfile's header and NumPy's."""
