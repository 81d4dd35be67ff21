"""Spill files: rows that a process appends while it streams, and the artifacts that are put together from them.

Such artifacts grow with the data, so at most some tens of megabytes of them are in memory at a time (`read_columns` apart,
whose array is bounded). A process makes files of its own, one for each kind of rows, and never touches another's; a *segment*
says which of their bytes belong to which batches. So a file's end may be torn: what no segment names is not there.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from saev_dist.errors import DamagedError, RunError
from saev_dist.files import Syncer, read_part, reading, retrying, writing
from saev_dist.plan import Intervals, complement, union

T = TypeVar("T")

COPY_BYTES = 4 * 1024 * 1024
BUFFER_BYTES = 1024 * 1024
N_THREADS = min(8, len(os.sched_getaffinity(0)))
"""Chunks that are worked on at a time."""
SPILL_PATTERN = "*.*-*.bin"
"""Matches every `Segment.fpath`, and no shard (`acts*.bin`)."""
MAX_WAITING = 4
"""Batches whose rows wait to be written."""


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
    """One process's rows, appended batch after batch. Each kind has a thread that writes them. A context: it closes the files.

    Args:
        dpath: directory of the files.
        owner: what to call this process; no other, earlier or later, has the same name.
        kinds: for each kind of rows, the bytes that stay free at the start of its file, for a header.
    """

    def __init__(self, dpath: Path, owner: str, kinds: Mapping[str, int]) -> None:
        self.dpath, self.owner = dpath, owner
        self._writers = {name: _Writer(dpath / f"{name}.{owner}.bin", room) for name, room in kinds.items()}
        self._written: list[Segment] = []
        self._waiting: deque[tuple[int, bool, dict[str, Future[tuple[int, int, int]]]]] = deque()
        """Batches that are being written: which, whether it goes on from the one before, and its extents."""
        self._stop = -1
        """The batch after the last that was appended."""

    def append(self, batch_i: int, pieces: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Write the rows of a batch's pieces at the ends of the files, later: they must not change any more.

        Raises:
            RunError: the disk did not take an earlier batch's; that one and all later count as not written.
        """
        self._settle(MAX_WAITING - 1)
        goes_on, self._stop = batch_i == self._stop, batch_i + 1
        extents = {
            name: writer.submit([piece[name] for piece in pieces], goes_on=goes_on) for name, writer in self._writers.items()
        }
        self._waiting.append((batch_i, goes_on, extents))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What has been appended, in order; it waits until it is written.

        Raises:
            RunError: as `append`.
        """
        self._settle(0)
        return tuple(self._written)

    def _settle(self, most: int) -> None:
        """Note what is written, until at most so many batches wait."""
        while len(self._waiting) > most:
            batch_i, goes_on, extents = self._waiting[0]
            found = {name: future.result() for name, future in extents.items()}
            first = self._written.pop().first if goes_on else batch_i
            self._written.append(Segment(first, batch_i + 1, self.owner, found))
            self._waiting.popleft()

    def sync(self) -> None:
        """Bring what is written onto the disk. Any thread may call it while another appends.

        Raises:
            RunError: the disk did not take it, now or before: rows since the last `sync` may be lost.
        """
        for writer in self._writers.values():
            writer.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close, quietly=kind is not None)  # a full disk fails a second time here
            if kind is None:
                self._settle(0)


class _Writer:
    """Writes a file on a thread of its own, beyond the `room` at its beginning."""

    def __init__(self, fpath: Path, room: int) -> None:
        self._fpath = fpath
        self._file: BinaryIO | None = None
        self._syncer: Syncer | None = None
        """Of the file, from the first byte on."""
        self._begin = self._end = room
        self._crc = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spill")

    def submit(self, arrays: Sequence[NDArray[Any]], *, goes_on: bool) -> Future[tuple[int, int, int]]:
        """Write arrays one after the other.

        Returns:
            First byte, byte after the last and CRC-32 of the extent that they end; it begins with them unless it goes on.
        """
        return self._pool.submit(self._write, arrays, goes_on)

    def _write(self, arrays: Sequence[NDArray[Any]], goes_on: bool) -> tuple[int, int, int]:
        if not goes_on:
            self._begin, self._crc = self._end, 0
        with writing(self._fpath):
            if self._file is None or self._syncer is None:
                self._file = open(self._fpath, "xb", buffering=BUFFER_BYTES)
                self._file.seek(self._end)
                self._syncer = Syncer(self._fpath, self._file)
            for array in arrays:
                data = as_bytes(array)
                self._file.write(data)
                self._crc = zlib.crc32(data, self._crc)
                self._end += data.nbytes
        self._syncer.wrote(sum(array.nbytes for array in arrays))
        return self._begin, self._end, self._crc

    def sync(self) -> None:
        if self._syncer is not None:
            self._syncer.sync()

    def close(self, *, quietly: bool) -> None:
        self._pool.shutdown(cancel_futures=quietly)
        if self._file is not None and self._syncer is not None:
            self._syncer.close()
            with suppress(RunError) if quietly else nullcontext(), writing(self._fpath):
                self._file.close()


def as_bytes(array: NDArray[Any]) -> memoryview:
    """An array's bytes, not copied where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


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
        self._dpath, self.name, self._dtype, self._filler, self._check = dpath, name, np.dtype(dtype), filler, check
        row_bytes = self._dtype.itemsize * n_columns
        self._chunk_bytes = max(1, COPY_BYTES // row_bytes) * row_bytes
        segments = list(segments)
        gaps = complement(covered(segments), n_batches)
        self._pieces = sorted([(s.first, s.stop, s) for s in segments] + [(*gap, None) for gap in gaps], key=lambda p: p[0])

    def check_size(self, n_bytes: int) -> None:
        """Refuse to make an artifact of files that do not hold, together, what the plan promises.

        Raises:
            RunError: bytes are missing or too many: the file system is not shared by all ranks; or nobody can tell.
        """
        found = 0
        for first, stop, segment in self._pieces:
            if segment is None:
                found += sum(self._filler(batch_i).nbytes for batch_i in range(first, stop))
                continue
            begin, end, _ = segment.extents[self.name]
            fpath = segment.fpath(self._dpath, self.name)
            with reading(fpath):
                try:
                    size = retrying(fpath.stat).st_size
                except FileNotFoundError:
                    size = 0
            found += max(0, min(end, size) - begin)
        if found != n_bytes:
            raise RunError(
                f"{self._dpath}: the ranks' {self.name} files hold {found:,} bytes; expected {n_bytes:,}. "
                "Do all ranks see this directory? Run again."
            )

    def beginning(self, owner: str, room: int) -> Path | None:
        """The file of a process, if it holds the first rows from byte `room` on, and nothing after them."""
        end, fpath = room, None
        for first, stop, segment in self._pieces:
            if segment is None and not any(self._filler(batch_i).nbytes for batch_i in range(first, stop)):
                continue
            if segment is None or segment.owner != owner or segment.extents[self.name][0] != end:
                break
            end, fpath = segment.extents[self.name][1], segment.fpath(self._dpath, self.name)
        if fpath is None or end == room:
            return None
        with reading(fpath):
            try:
                return fpath if retrying(fpath.stat).st_size == end else None
            except FileNotFoundError:  # as `check_size` will tell
                return None

    def each(self, work: Callable[[int, NDArray[Any]], T]) -> Generator[tuple[int, int, T], None, None]:
        """Go through the array, flat, whole rows of it, some megabytes at a time, several of these at a time on threads.

        Args:
            work: gets the index of a chunk's first number, and the chunk.

        Yields:
            In order: bytes and CRC-32 of a chunk, and what `work` made of it.

        Raises:
            DamagedError: rows are not what was written.
            RunError: they cannot be read.
        """

        def do(load: Callable[[], bytes], first: int) -> tuple[int, int, T]:
            chunk = np.frombuffer(load(), dtype=self._dtype)
            return chunk.nbytes, zlib.crc32(chunk.data), work(first, chunk)

        pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="rows")
        under_way: deque[tuple[Segment | None, Future[tuple[int, int, T]]]] = deque()
        loads, first, n_read, crc = self._loads(), 0, 0, 0
        try:
            while True:
                while len(under_way) < 2 * N_THREADS and (load := next(loads, None)):
                    under_way.append((load[0], pool.submit(do, load[2], first)))
                    first += load[1] // self._dtype.itemsize
                if not under_way:
                    return
                self._check()
                segment, done = under_way.popleft()
                n_bytes, chunk_crc, made = done.result()
                if segment is not None:
                    begin, end, expected = segment.extents[self.name]
                    n_read, crc = n_read + n_bytes, crc32_combine(crc, chunk_crc, n_bytes)
                    if n_read == end - begin:
                        if crc != expected:
                            raise _damaged(segment, segment.fpath(self._dpath, self.name))
                        n_read = crc = 0
                yield n_bytes, chunk_crc, made
        finally:
            pool.shutdown(cancel_futures=True)

    def _loads(self) -> Iterator[tuple[Segment | None, int, Callable[[], bytes]]]:
        """For each chunk: whose it is, its bytes, and what reads it."""
        for first, stop, segment in self._pieces:
            if segment is None:
                for batch_i in range(first, stop):
                    filler = self._filler(batch_i)
                    yield None, filler.nbytes, filler.tobytes
                continue
            begin, end, _ = segment.extents[self.name]
            for position in range(begin, end, self._chunk_bytes):
                size = min(self._chunk_bytes, end - position)
                yield segment, size, partial(_read_chunk, self._dpath, segment, self.name, position, size)


def _read_chunk(dpath: Path, segment: Segment, name: str, position: int, size: int) -> bytes:
    fpath = segment.fpath(dpath, name)
    with reading(fpath):
        try:
            data = read_part(fpath, size, position)
        except FileNotFoundError:
            raise DamagedError(f"{fpath} is gone; run again to compute its batches again.") from None
    if len(data) < size:
        raise _damaged(segment, fpath)
    return data


def _damaged(segment: Segment, fpath: Path) -> DamagedError:
    batches = f"batches {segment.first} to {segment.stop - 1}"
    return DamagedError(f"{fpath} is damaged in the rows of {batches}; run again to compute them again.")


def check_extent(dpath: Path, segment: Segment, name: str, check: Callable[[], None]) -> None:
    """Read a segment's bytes of one kind.

    Args:
        check: called between pieces; it may raise to stop, for there can be many.

    Raises:
        DamagedError: they are not what was written.
        RunError: they cannot be read.
    """
    begin, end, expected = segment.extents[name]
    crc = 0
    for position in range(begin, end, COPY_BYTES):
        check()
        crc = zlib.crc32(_read_chunk(dpath, segment, name, position, min(COPY_BYTES, end - position)), crc)
    if crc != expected:
        raise _damaged(segment, segment.fpath(dpath, name))


def read_columns(rows: Rows | None, n_columns: int, n_rows: int) -> NDArray[np.float32]:
    """The transpose of float32 rows: (n_columns, n_rows)."""
    out = np.empty((n_columns, n_rows), np.float32)
    if rows is None:
        return out
    rows.check_size(out.nbytes)

    def place(first: int, chunk: NDArray[Any]) -> None:
        block = chunk.reshape(-1, n_columns)
        out[:, first // n_columns : first // n_columns + len(block)] = block.T

    deque(rows.each(place), maxlen=0)
    return out


def crc32_combine(first: int, second: int, n_second: int) -> int:
    """CRC-32 of two sequences of bytes, one after the other, from those of each and the length of the second.

    Bytes that follow multiply a CRC, a polynomial over GF(2) with the highest power in the lowest bit, by x^8 each. Source:
    zlib's `crc32_combine` (crc32.c, "multmodp"). Python has it from 3.15 on.
    """
    return _times(_power(n_second), first) ^ second


@lru_cache
def _power(n_bytes: int) -> int:
    """x^(8 n_bytes)."""
    product, power = 1 << 31, 1 << 23  # x^0, x^8
    while n_bytes:
        if n_bytes & 1:
            product = _times(product, power)
        power, n_bytes = _times(power, power), n_bytes >> 1
    return product


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product
