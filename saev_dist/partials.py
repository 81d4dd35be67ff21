"""Partials: what a process has done so far, on disk. Both checkpoint and completion mark.

A partial is the state of the accumulators over some batches, and the segments of spill files with those batches' rows.
Partials over disjoint batches merge, so one mechanism serves resume, other world sizes and merging offline.

    <run>/partials/
        run.json                       what the run is (see store)
        lock                           held while a run is at work (see lock)
        <owner>.<number>.partial       the newest of an owner counts
        <kind>.<owner>.bin             its spill files (see spill)
        *.damaged                      set aside

An *owner* is one process: a rank of one attempt. It writes only its own partials and appends only to its own spill files, so
an attempt never changes what another one wrote. (In the end rank 0 may turn a spill file of its own into an artifact, see
`csr`; the rows in it stay as they are.) A new attempt's ranks *absorb* partials: load them, and name their owners in the next
partial of their own, which then stands for both.

Why a kill at any instant costs only the work since the last snapshot:

1. Rows are fsynced, then the partial is written under another name, fsynced, renamed, and the directory fsynced. So a
   partial under its own name is whole, and so are its rows.
2. What it replaces (the owner's former partial, those it absorbed) is removed only after. Should both be there, the
   newer number wins, and an absorbed owner is dropped: nothing counts twice.
3. Nothing else is believed. Rows beyond a segment, files of owners without a partial and half-written files are
   removed by the next attempt; a partial with a wrong digest, or whose rows have a wrong CRC, is set aside, and its
   batches are computed again.

File format: a line with the format's name; a line of JSON, the header; the tensors, little-endian, C order, one after
the other as the header lists them; SHA-256 of all that.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from saev_dist.errors import DamagedError, RunError, warn
from saev_dist.files import fsync_dir, read_part, reading, replacing, retrying, writing
from saev_dist.plan import Intervals, union
from saev_dist.spill import COPY_BYTES, SPILL_PATTERN, Segment, Spill, as_bytes, check_extent, covered

if TYPE_CHECKING:  # the launcher, too, looks at partials
    from torch import Tensor

MAGIC = b"saev-dist partial 1\n"
DIGEST_BYTES = 32
HEADER_BYTES = 2**16
"""Read at first; then four times as many, until the header is whole."""
MAX_HEADER_BYTES = 2**28
RANK_PATTERNS = ("*.partial", "*.partial.tmp", SPILL_PATTERN)
"""What ranks write."""
TRIES = 5
"""Looks at a directory whose ranks replace their partials meanwhile; each reads only what is new."""

State = dict[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Partial:
    """A partial's header."""

    fingerprint: str
    """Of the run: config, SAE and shards."""
    owner: str
    number: int
    """Counts the owner's partials."""
    absorbed: tuple[str, ...]
    """Owners whose partials this one stands for."""
    segments: tuple[Segment, ...]
    arithmetic: tuple[str, ...]
    """What computed them, as `product.arithmetic` calls it; sorted. Nothing in those of former versions."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """dtype and shape of each tensor, in the order of the file."""

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.number:06d}.partial"

    @property
    def n_batches(self) -> int:
        return sum(segment.stop - segment.first for segment in self.segments)


def new_owner(rank: int) -> str:
    """A name that no other process has, for this rank of this attempt."""
    return f"{rank:05d}-{secrets.token_hex(6)}"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what the bytes of the artifacts depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# ---- one file


def write(dpath: Path, partial: Partial, state: State) -> None:
    """Put a partial in place; its spill files must be on the disk.

    Raises:
        OSError: the disk does not take it; then the one before counts, or this one already does.
    """
    digest = hashlib.sha256()
    with replacing(dpath / partial.name, durable=True) as file:
        header = MAGIC + json.dumps(asdict(partial)).encode() + b"\n"
        for piece in (memoryview(header), *(as_bytes(tensor.numpy()) for tensor in state.values())):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
    fsync_dir(dpath)


def read_header(fpath: Path) -> Partial:
    """The header alone, unchecked.

    Raises:
        DamagedError: it is none. OSError: it cannot be read.
    """
    return _read_header(fpath)[0]


def load(fpath: Path) -> tuple[Partial, State]:
    """A partial whose digest is right.

    Raises:
        DamagedError: it is not. RunError: it cannot be read.
    """
    import torch

    with reading(fpath):
        check_digest(fpath)
        partial, offset = _read_header(fpath)
        state = {}
        for name, (dtype, shape) in partial.tensors.items():
            state[name] = torch.from_numpy(np.empty(shape, dtype))
            view = as_bytes(state[name].numpy())
            for start in range(0, len(view), COPY_BYTES):
                part = view[start : start + COPY_BYTES]
                content = read_part(fpath, len(part), offset + start)
                if len(content) < len(part):
                    raise DamagedError(f"{fpath} was cut short while it was read; run again to compute its batches again.")
                part[:] = content
            offset += len(view)
    return partial, state


def check_digest(fpath: Path) -> None:
    """Read a partial through.

    Raises:
        DamagedError: its digest is wrong. OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), retrying(fpath.stat).st_size - DIGEST_BYTES
    for start in range(0, size, COPY_BYTES):
        digest.update(read_part(fpath, min(COPY_BYTES, size - start), start))
    if read_part(fpath, DIGEST_BYTES, max(0, size)) != digest.digest():
        raise DamagedError(f"{fpath}: its checksum is wrong; run again to compute its batches again.")


def _read_header(fpath: Path) -> tuple[Partial, int]:
    """The header, and where the tensors begin."""
    content = read_part(fpath, size := HEADER_BYTES, 0)
    while not (end := content.find(b"\n", len(MAGIC)) + 1) and len(content) == size < MAX_HEADER_BYTES:
        content = read_part(fpath, size := 4 * size, 0)
    try:
        if not content.startswith(MAGIC):
            raise ValueError
        obj = json.loads(content[len(MAGIC) : end])
        partial = Partial(
            fingerprint=obj["fingerprint"],
            owner=obj["owner"],
            number=obj["number"],
            absorbed=tuple(obj["absorbed"]),
            segments=tuple(map(Segment.from_json, obj["segments"])),
            arithmetic=tuple(obj.get("arithmetic", ())),
            tensors={name: (dtype, tuple(shape)) for name, (dtype, shape) in obj["tensors"].items()},
        )
        if partial.name != fpath.name:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{fpath}: its header is not one of a partial; run again to compute its batches again.") from None
    return partial, end


# ---- the directory, at the start of an attempt


def names(dpath: Path) -> list[str]:
    """All files that are called partials, whatever is in them."""
    return sorted(fpath.name for fpath in dpath.glob("*.partial"))


def fault(fpath: Path, check: Callable[[], None] = lambda: None) -> str:
    """Read a partial and its rows through; what is wrong with them, or "".

    Args:
        check: called first, and between pieces of the rows, which can be large; it may raise to stop.

    Raises:
        RunError: it cannot be read.
    """
    check()
    try:
        with reading(fpath):
            check_digest(fpath)
            for segment in read_header(fpath).segments:
                for kind in segment.extents:
                    check_extent(fpath.parent, segment, kind, check)
    except DamagedError as err:
        return str(err)
    return ""


def newest(dpath: Path) -> list[Partial]:
    """Headers of the partials that count: the newest of each owner, less those that another one has absorbed. Also while
    ranks are at work, which replace theirs.

    Raises:
        DamagedError: one is none. RunError: it cannot be read.
    """
    headers: dict[str, Partial] = {}
    for left in reversed(range(TRIES)):
        try:
            for name in names(dpath):
                if name not in headers:
                    with reading(dpath / name):
                        headers[name] = read_header(dpath / name)
            break
        except RunError:
            if not left or os.path.exists(dpath / name):  # unlike Path.exists, False also where a disk does not answer
                raise
    by_owner: dict[str, Partial] = {}
    for partial in headers.values():
        if partial.number >= by_owner.get(partial.owner, partial).number:
            by_owner[partial.owner] = partial
    for absorbed in {owner for partial in by_owner.values() for owner in partial.absorbed}:
        by_owner.pop(absorbed, None)
    return list(by_owner.values())


def settle(dpath: Path, faults: Mapping[str, str], expected_fingerprint: str) -> list[Partial]:
    """Decide which partials count, and remove what no longer does. One process does it, while no rank is at work.

    Args:
        dpath: the directory.
        faults: what `fault` found, by name of the file.
        expected_fingerprint: of this run.

    Returns:
        Headers of disjoint partials.

    Raises:
        RunError: a partial is of another run, or the directory cannot be written.
    """
    with writing(dpath):
        for name, what in faults.items():
            warn(f"{what.rstrip('.')}; set aside as {name}.damaged.")
            os.replace(dpath / name, dpath / f"{name}.damaged")
    found = newest(dpath)
    for partial in found:
        if partial.fingerprint != expected_fingerprint:
            raise RunError(f"{dpath / partial.name} belongs to another run. Move it away, or start over with --force.")
    try:
        covered(segment for partial in found for segment in partial.segments)
        live = found
    except ValueError:  # a rank that the others had given up lived on, and wrote after they had started again
        live = _disjoint(dpath, found)
    with writing(dpath):
        _remove_dead(dpath, live)
    return sorted(live, key=lambda partial: partial.name)


def _disjoint(dpath: Path, found: list[Partial]) -> list[Partial]:
    """Partials that cover no batch twice, large ones first."""
    live: list[Partial] = []
    done: Intervals = ()
    for partial in sorted(found, key=lambda p: -p.n_batches):
        try:
            done = union([done, covered(partial.segments)])
            live.append(partial)
        except ValueError as err:
            warn(f"{dpath / partial.name} is not needed: {err}.")
    return live


def _remove_dead(dpath: Path, live: list[Partial]) -> None:
    """Remove files that no live partial needs, and cut spill files to the length that one does."""
    keep = {partial.name for partial in live}
    ends: dict[str, int] = {}
    for partial in live:
        for segment in partial.segments:
            for kind, (_, end, _) in segment.extents.items():
                name = segment.fpath(dpath, kind).name
                ends[name] = max(end, ends.get(name, 0))
    for pattern in RANK_PATTERNS:
        for fpath in dpath.glob(pattern):
            if fpath.name in ends:
                if fpath.stat().st_nlink == 1:  # else it may be an artifact by now, under its final name
                    os.truncate(fpath, ends[fpath.name])
            elif fpath.name not in keep:
                fpath.unlink(missing_ok=True)  # a rank that was given up may still be at work


# ---- a rank at work


class Keeper:
    """Keeps a rank's partial up to date while it streams. A context; on leaving it waits for the write under way.

    A write that fails leaves the former partial as it is and is tried again when the next one is due; but where the disk
    has not taken rows, nobody knows which, and the run ends with a RunError: the former partial still has all of its own.

    Args:
        spill: the rank's rows; they say which batches it has done.
        fingerprint: of the run.
        absorbed: partials that the rank's state started from.
        arithmetic: what this rank computes on.
        every_s: seconds from one to the next.
    """

    def __init__(self, spill: Spill, fingerprint: str, absorbed: list[Partial], arithmetic: str, every_s: float) -> None:
        self._spill, self._fingerprint, self._every_s = spill, fingerprint, every_s
        self._absorbed, self._arithmetic = absorbed, arithmetic
        self._inherited = tuple(segment for partial in absorbed for segment in partial.segments)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._writing: Future[None] | None = None
        self._saved_s = time.monotonic()
        self._kept: tuple[Segment, ...] = ()
        """This rank's own segments in the partial on the disk."""
        self._number = 0
        self._replaced = tuple(partial.name for partial in absorbed)
        """What the next write makes superfluous."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the rank's state covers."""
        return (*self._inherited, *self._spill.segments)

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """What that was computed on."""
        return self._computed_on(self._spill.segments)

    def _computed_on(self, own: tuple[Segment, ...]) -> tuple[str, ...]:
        kinds = {kind for partial in self._absorbed for kind in partial.arithmetic}
        return tuple(sorted(kinds | {self._arithmetic} if own else kinds))

    def save_if_due(self, state: Callable[[], State]) -> None:
        """Write on another thread, from a copy of the state, if it is time and the last write is done.

        With an interval of 0 it writes at once, after every batch.
        """
        if not self._every_s:
            self.save(state())
            return
        if time.monotonic() - self._saved_s < self._every_s or (self._writing is not None and not self._writing.done()):
            return
        if self._writing is not None:
            self._writing.result()
        self._saved_s = time.monotonic()
        copied = {name: tensor.clone() for name, tensor in state().items()}
        self._writing = self._pool.submit(self._write, copied, self._spill.segments)

    def save(self, state: State) -> bool:
        """Write now, unless the disk has it all. Whether it has, then."""
        if self._writing is not None:
            self._writing.result()
        self._write(state, self._spill.segments)
        return self._kept == self._spill.segments

    def _write(self, state: State, own: tuple[Segment, ...]) -> None:
        """On either thread, so that it may not ask the spill for its segments."""
        if own == self._kept:
            return
        dpath = self._spill.dpath
        partial = Partial(
            fingerprint=self._fingerprint,
            owner=self._spill.owner,
            number=self._number,
            absorbed=tuple(partial.owner for partial in self._absorbed),
            segments=(*self._inherited, *own),
            arithmetic=self._computed_on(own),
            tensors={name: (str(tensor.numpy().dtype), tuple(tensor.shape)) for name, tensor in state.items()},
        )
        self._spill.sync()
        try:
            write(dpath, partial, state)
        except OSError as err:
            warn(f"no snapshot: {dpath / partial.name}: {err.strerror}. The one before stays; what came since is not safe yet.")
            return
        for name in self._replaced:
            with suppress(OSError):  # the next attempt removes it
                (dpath / name).unlink()
        self._kept, self._number, self._replaced = own, self._number + 1, (partial.name,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
