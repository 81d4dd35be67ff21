"""Spill files: rows that a process appends while it streams, and the artifacts that are put together from them.

Such artifacts grow with the data, so nothing here holds more than some megabytes of them. A process makes files of its
own, one for each kind of rows, and never touches another's; a *segment* says which of their bytes belong to which
batches. So a file's end may be torn: what no segment names is not there.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from saev_dist.errors import DamagedError, RunError
from saev_dist.files import reading, retrying, writing
from saev_dist.plan import Intervals, complement, union

COPY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Segment:
    """The rows of consecutive batches, in the files of one process."""

    first: int
    stop: int
    """Batches first … stop-1 of the plan."""
    owner: str
    """Whose files."""
    extents: Mapping[str, tuple[int, int, int]]
    """By kind of rows: first byte, byte after the last, and the CRC-32 of those between."""

    def fpath(self, dpath: Path, name: str) -> Path:
        return dpath / f"{name}.{self.owner}.bin"

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Self:
        """From what JSON made of `dataclasses.asdict`."""
        extents = {kind: (begin, end, crc) for kind, (begin, end, crc) in obj["extents"].items()}
        return cls(obj["first"], obj["stop"], obj["owner"], extents)


def covered(segments: Iterable[Segment]) -> Intervals:
    """The batches of all segments.

    Raises:
        ValueError: two cover the same batch.
    """
    return union(((segment.first, segment.stop),) for segment in segments)


class Spill:
    """One process's rows, appended batch after batch. A context, which closes the files.

    Args:
        dpath: directory of the files.
        owner: what to call this process; no other, earlier or later, has the same name.
        names: kinds of rows.
    """

    def __init__(self, dpath: Path, owner: str, names: Iterable[str]) -> None:
        self.dpath, self.owner = dpath, owner
        self.segments: list[Segment] = []
        """What has been appended, in order."""
        self._files: dict[str, BinaryIO] = {}
        self._names = tuple(names)

    def append(self, batch_i: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write a batch's rows at the ends of the files.

        Raises:
            RunError: the disk does not take them; the batch then counts as not written.
        """
        goes_on = bool(self.segments) and self.segments[-1].stop == batch_i
        if goes_on:
            last = self.segments[-1]
        else:
            ends = {name: self.segments[-1].extents[name][1] if self.segments else 0 for name in self._names}
            last = Segment(batch_i, batch_i, self.owner, {name: (end, end, 0) for name, end in ends.items()})
        extents = {}
        for name in self._names:
            data = np.ascontiguousarray(rows[name]).reshape(-1).view(np.uint8).data
            fpath = last.fpath(self.dpath, name)
            with writing(fpath):
                if name not in self._files:
                    self._files[name] = open(fpath, "xb", buffering=COPY_BYTES)
                self._files[name].write(data)
            begin, end, crc = last.extents[name]
            extents[name] = (begin, end + data.nbytes, zlib.crc32(data, crc))
        segment = Segment(last.first, batch_i + 1, self.owner, extents)
        self.segments[-1 if goes_on else len(self.segments) :] = [segment]

    def sync(self) -> None:
        """Bring what has been appended onto the disk. Any thread may call it while another appends.

        Raises:
            OSError: the disk does not take it.
        """
        for file in tuple(self._files.values()):
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            try:
                with writing(self.dpath):
                    file.close()
            except RunError:
                if kind is None:  # otherwise a full disk fails a second time here
                    raise


class Rows:
    """All rows of one kind in data order, out of the files of all processes.

    Args:
        dpath: directory of the spill files.
        name: kind of rows.
        segments: what covers the plan; batches in none of them were left out.
        n_batches: of the plan.
        dtype, n_columns: of a row.
        filler: the rows that stand for a batch that was left out.
        check: called between pieces; it may raise to stop, for there can be many.
    """

    def __init__(
        self,
        dpath: Path,
        name: str,
        segments: Iterable[Segment],
        n_batches: int,
        dtype: type[np.generic],
        *,
        n_columns: int = 1,
        filler: Callable[[int], NDArray[Any]],
        check: Callable[[], None],
    ) -> None:
        self._dpath, self.name, self._dtype, self._filler, self._check = dpath, name, dtype, filler, check
        self._row_bytes = np.dtype(dtype).itemsize * n_columns
        segments = list(segments)
        gaps = complement(covered(segments), n_batches)
        self._pieces = sorted([(s.first, s.stop, s) for s in segments] + [(*gap, None) for gap in gaps], key=lambda p: p[0])

    def check_size(self, n_bytes: int) -> None:
        """Refuse to make an artifact of files that do not hold, together, what the plan promises.

        Raises:
            RunError: bytes are missing or too many: the file system is not shared by all ranks.
        """
        found = 0
        for first, stop, segment in self._pieces:
            if segment is None:
                found += sum(self._filler(batch_i).nbytes for batch_i in range(first, stop))
                continue
            begin, end, _ = segment.extents[self.name]
            fpath = segment.fpath(self._dpath, self.name)
            found += max(0, min(end, fpath.stat().st_size if fpath.exists() else 0) - begin)
        if found != n_bytes:
            raise RunError(
                f"{self._dpath}: the ranks' {self.name} files hold {found:,} bytes; the plan promises {n_bytes:,}. "
                "Do all ranks see this directory? Run again."
            )

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The array, flat, whole rows of it, some megabytes at a time.

        Raises:
            DamagedError: rows are not what was written.
            RunError: they cannot be read.
        """
        chunk_bytes = max(1, COPY_BYTES // self._row_bytes) * self._row_bytes
        for first, stop, segment in self._pieces:
            if segment is None:
                yield from map(self._filler, range(first, stop))
                continue
            for data in read_extent(self._dpath, segment, self.name, chunk_bytes):
                self._check()
                yield np.frombuffer(data, dtype=self._dtype)


def read_extent(dpath: Path, segment: Segment, name: str, chunk_bytes: int = COPY_BYTES) -> Iterator[bytes]:
    """A segment's bytes of one kind, in chunks, checked at the end.

    Raises:
        DamagedError: they are not what was written.
        RunError: they cannot be read.
    """
    position, end, expected = segment.extents[name]
    if position == end:
        return
    fpath, crc = segment.fpath(dpath, name), 0
    if not fpath.exists():
        raise DamagedError(f"{fpath} is gone; run again to compute its batches again.")
    with reading(fpath), open(fpath, "rb", buffering=0) as file:
        while position < end:
            size = min(chunk_bytes, end - position)
            data = retrying(lambda: read_at(file.fileno(), size, position))  # noqa: B023  # called at once
            if len(data) < size:
                break
            crc, position = zlib.crc32(data, crc), position + size
            yield data
    if position < end or crc != expected:
        batches = f"batches {segment.first} to {segment.stop - 1}"
        raise DamagedError(f"{fpath} is damaged in the rows of {batches}; run again to compute them again.")


def read_at(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`; fewer only at the end of the file."""
    parts = []
    while size and (part := os.pread(fd, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


def read_columns(rows: Rows | None, n_columns: int, n_rows: int) -> NDArray[np.float32]:
    """The transpose of float32 rows: (n_columns, n_rows)."""
    out = np.empty((n_columns, n_rows), np.float32)
    if rows is None:
        return out
    rows.check_size(out.nbytes)
    first = 0
    for chunk in rows.chunks():
        block = chunk.reshape(-1, n_columns)
        out[:, first : first + len(block)] = block.T
        first += len(block)
    return out


def write_csr(file: BinaryIO, shape: tuple[int, int], counts: Rows, indices: Rows, data: Rows) -> None:
    """Write a CSR matrix as `scipy.sparse.save_npz` does, uncompressed, from spill files, some megabytes at a time.

    Args:
        file: where to.
        shape: of the matrix.
        counts: int64 entries per row. indices: int32 columns. data: float32.
    """
    counts.check_size(8 * shape[0])
    n_entries = sum(int(chunk.sum()) for chunk in counts.chunks())
    indices.check_size(4 * n_entries)
    data.check_size(4 * n_entries)
    index_dtype = np.dtype(np.int32 if max(n_entries, *shape) <= np.iinfo(np.int32).max else np.int64)

    def pointers() -> Iterator[NDArray[Any]]:
        total = 0
        yield np.zeros(1, index_dtype)
        for chunk in counts.chunks():
            if len(chunk):
                ends = total + chunk.cumsum()
                total = int(ends[-1])
                yield ends.astype(index_dtype)

    members: list[tuple[str, np.dtype[Any], tuple[int, ...], Iterator[NDArray[Any]]]] = [
        ("indices", index_dtype, (n_entries,), (chunk.astype(index_dtype, copy=False) for chunk in indices.chunks())),
        ("indptr", index_dtype, (shape[0] + 1,), pointers()),
        ("format", np.dtype("S3"), (), iter([np.array(b"csr")])),
        ("shape", np.dtype(np.int64), (2,), iter([np.array(shape, np.int64)])),
        ("data", np.dtype(np.float32), (n_entries,), data.chunks()),
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
