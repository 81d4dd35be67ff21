"""Streaming of activations: positioned reads on background threads, into buffers that are used again.

Only the content tokens of the wanted layer are read. Where CLS tokens lie between them, one vectored read
fetches a run of examples and drops each CLS vector into a scratch buffer, so there is no second copy.
Where shards are small, a buffer takes several whole batches, which are read as one.

Names: `b` tokens of a batch, `d` model width.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from saev_dist.accumulators.fixed_point import LIMIT
from saev_dist.data.shards import Shards
from saev_dist.errors import DataError, MergeError, SaevDistError
from saev_dist.files import retrying
from saev_dist.plan import Batch, Intervals, Plan

MAX_VIEWS = 1024  # IOV_MAX of Linux
MAX_GAP_BYTES = 64 * 1024  # a smaller gap costs less to read than another system call
MAX_THREADS = 8
MIN_PART_BYTES = 4 * 1024 * 1024
"""A part of a buffer that is read by itself has at least so many."""
CHECK_EVERY_S = 1.0
LOAD_BYTES = 64 * 1024 * 1024
"""So many are read as one where batches are smaller, if the plan allows batches as large."""


class Reader:
    """Iterate over the batches of some intervals as `(batch, acts_bd)`.

    `acts_bd` is float32 (batch tokens, d_model); it stays as it is for `hold` more steps of the iteration, and is
    overwritten after that. Memory: `most_buffers`, each of `buffer_examples`, whatever the number of shards.

    Args:
        shards: layer to read.
        plan: plan of the run.
        todo: batches to read, in this order.
        depth: buffers read ahead.
        hold: batches that the consumer still works on when it asks for the next.
        pin: use page-locked buffers, for asynchronous copies to a GPU.
        n_parts: parts of a buffer that are read side by side: from the page cache a thread reads some 4 GB a second.
        skip_bad: leave batches out that cannot be read, and note them.
        check: called once a second while the consumer waits; what it raises ends the iteration.

    Raises:
        DataError: while iterating, a shard is missing, unreadable or too short.
    """

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        todo: Intervals,
        *,
        depth: int,
        hold: int = 1,
        pin: bool = False,
        n_parts: int = 1,
        skip_bad: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.shards, self.plan, self.todo, self.depth, self.hold, self.pin = shards, plan, todo, depth, hold, pin
        self.n_parts, self.skip_bad, self.check = n_parts, skip_bad, check
        self.left_out: dict[int, str] = {}
        """Why each batch that was left out could not be read, by its index."""
        self.n_left_out = 0
        """Images in them."""
        self.n_bytes = 0
        """Content bytes delivered so far."""
        self.wait_s = 0.0
        """Time for which the consumer waited."""
        self._pending: deque[_Load] = deque()
        self._n_to_come = 0  # good batches of the load that is being delivered
        self._is_over = False

    @property
    def is_ready(self) -> bool:
        """Whether the next batch, if there is one, has been read."""
        return self._n_to_come > 0 or not self._pending or all(part.done() for part in self._pending[0].parts)

    def __iter__(self) -> Generator[tuple[Batch, Tensor], None, None]:
        per_example = self.shards.n_patches * self.shards.d_model
        n_floats = buffer_examples(self.plan, self.shards) * per_example
        free: list[Tensor] = []
        held: deque[_Load] = deque()
        bad_shards: set[int] = set()
        pending = self._pending
        todo = (self.plan[index] for first, stop in self.todo for index in range(first, stop))
        queue = _loads(todo, buffer_examples(self.plan, self.shards))
        self._is_over = False
        pool = ThreadPoolExecutor(min(self.depth * self.n_parts, MAX_THREADS), thread_name_prefix="reader")

        def read_ahead() -> None:
            while len(pending) < self.depth and (batches := next(queue, None)) is not None:
                buffer = free.pop() if free else torch.empty(n_floats, pin_memory=self.pin)
                parts, at = [], 0
                for part in _parts(batches, self.shards, self.n_parts):
                    parts.append(pool.submit(self._read_part, part, buffer[at:], bad_shards))
                    at += sum(batch.n_examples for batch in part) * per_example
                pending.append(_Load(batches, buffer, parts))

        try:
            read_ahead()
            while pending:
                load = pending.popleft()
                began = time.perf_counter()
                while wait(load.parts, CHECK_EVERY_S).not_done:  # for all: the buffer may be used again
                    self.check()
                errors: dict[int, str] = {}
                for part in reversed(load.parts):  # of a batch in several parts the first error counts
                    errors |= part.result()
                self.wait_s += time.perf_counter() - began
                read_ahead()  # `depth` buffers are under way while the consumer works on this one
                self._n_to_come, at = sum(batch.index not in errors for batch in load.batches), 0
                for batch in load.batches:
                    first, at = at, at + batch.n_examples * per_example
                    if batch.index in errors:
                        if not self.skip_bad:
                            raise DataError(errors[batch.index])
                        self.left_out[batch.index] = errors[batch.index]
                        self.n_left_out += batch.n_examples
                        continue
                    self._n_to_come -= 1
                    self.n_bytes += batch.n_examples * self.shards.content_bytes
                    yield batch, load.buffer[first:at].view(-1, self.shards.d_model)
                    held.append(load)
                    if len(held) > self.hold and (released := held.popleft()) is not load and released not in held:
                        free.append(released.buffer)
                if load not in held:
                    free.append(load.buffer)
        finally:
            self._is_over = True
            pool.shutdown(wait=True, cancel_futures=True)
            pending.clear()
            self._n_to_come = 0

    def _read_part(self, batches: list[Batch], place: Tensor, bad_shards: set[int]) -> dict[int, str]:
        """Read batches, or pieces of them, one after another; why some of them could not be read, by their index."""
        errors = {}
        for batch in batches:
            if self._is_over:  # of a file system that fails, each file may cost seconds
                break
            # A shard that has failed once despite patience would cost minutes more with each of its batches.
            patient = batch.shard_i not in bad_shards
            try:
                read_batch(self.shards, batch, place, patient=patient)
            except DataError as err:
                errors[batch.index] = str(err)
                bad_shards.add(batch.shard_i)
                if not self.skip_bad:
                    break
            place = place[batch.n_examples * self.shards.n_patches * self.shards.d_model :]
        return errors


@dataclass(frozen=True, eq=False)
class _Load:
    """Batches that lie one after another in one buffer, and the reads that bring them there."""

    batches: list[Batch]
    buffer: Tensor
    parts: list[Future[dict[int, str]]]


def buffer_examples(plan: Plan, shards: Shards) -> int:
    """Examples that a buffer takes: the largest batch, or more where shards are smaller than a batch may be."""
    return max(plan.largest_batch, min(plan.examples_per_batch, plan.n_examples, LOAD_BYTES // shards.content_bytes))


def most_buffers(plan: Plan, shards: Shards, depth: int, hold: int) -> int:
    """Buffers that a `Reader` needs at most; with bad batches left out it may be `depth + hold + 1`.

    Those read ahead, and those of the `hold + 1` batches that the consumer works on. Two loads in a row
    are together more than a buffer takes. So h batches in a row touch at most 2 h · largest / size + 2 loads, and all n
    examples lie in at most 2 n / (size + 1) + 1 loads.
    """
    size = buffer_examples(plan, shards)
    held = min(hold + 1, 2 * (hold + 1) * plan.largest_batch // size + 2)
    return min(depth + held, plan.n_batches, 2 * (plan.n_examples // (size + 1)) + 1)


def _loads(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Runs of batches, each as long as a buffer for `size` examples takes."""
    load: list[Batch] = []
    n_examples = 0
    for batch in batches:
        if load and n_examples + batch.n_examples > size:
            yield load
            load, n_examples = [], 0
        load.append(batch)
        n_examples += batch.n_examples
    if load:
        yield load


def _parts(batches: list[Batch], shards: Shards, most: int) -> list[list[Batch]]:
    """The examples of the batches in at most so many runs, none of them small; a batch is cut where a run ends."""
    n_examples = sum(batch.n_examples for batch in batches)
    n_parts = max(1, min(most, n_examples, n_examples * shards.content_bytes // MIN_PART_BYTES))
    step = -(-n_examples // n_parts)
    parts: list[list[Batch]] = [[] for _ in range(-(-n_examples // step))]
    at = 0
    for batch in batches:
        first = 0
        while first < batch.n_examples:
            part_i, n_before = divmod(at, step)
            n = min(step - n_before, batch.n_examples - first)
            piece = batch
            if n < batch.n_examples:
                piece = replace(batch, example_i=batch.example_i + first, img_i=batch.img_i + first, n_examples=n)
            parts[part_i].append(piece)
            first, at = first + n, at + n
    return parts


def read_batch(shards: Shards, batch: Batch, buffer: Tensor, *, patient: bool = True) -> None:
    """Fill the start of `buffer` (float32, flat, CPU) with the content tokens of a batch, in order.

    Args:
        patient: repeat a read that fails with an error that may pass.

    Raises:
        DataError: the shard is missing, unreadable or too short.
    """
    fpath = shards.dpath / shards.names[batch.shard_i]
    target = memoryview(buffer.numpy().data).cast("B")
    size = shards.content_bytes
    gap = shards.example_bytes - size
    if gap == 0:  # one layer, no CLS: the batch is one piece
        runs = [(batch.example_i, [target[: batch.n_examples * size]])]
    else:
        scratch = memoryview(bytearray(gap if gap <= MAX_GAP_BYTES else 0))
        per_run = MAX_VIEWS // 2 if gap <= MAX_GAP_BYTES else 1
        runs = []
        for low in range(0, batch.n_examples, per_run):
            views = []
            for i in range(low, min(low + per_run, batch.n_examples)):
                views += [target[i * size : (i + 1) * size], scratch]
            runs.append((batch.example_i + low, views[:-1]))
    try:
        retrying(lambda: _read_runs(fpath, shards, runs), patient=patient)
    except EOFError as err:
        raise DataError(
            f"{fpath} ends at byte {err}; its images need more than that. Write the shard again, "
            "or leave it out with extract --skip-bad-shards."
        ) from None
    except OSError as err:
        raise DataError(
            f"{fpath}: cannot read: {err.strerror}. Restore it, or leave it out with extract --skip-bad-shards."
        ) from None


def _read_runs(fpath: Path, shards: Shards, runs: list[tuple[int, list[memoryview]]]) -> None:
    fd = os.open(fpath, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(runs) > 1 or len(runs[0][1]) > 1:  # parts of the file, which the kernel's own readahead does not foresee
            for example_i, views in runs:
                os.posix_fadvise(fd, shards.content_offset(example_i), sum(map(len, views)), os.POSIX_FADV_WILLNEED)
        for example_i, views in runs:
            _read_exactly(fd, list(views), shards.content_offset(example_i))
    finally:
        os.close(fd)


def sample_images(shards: Shards, n_images: int, *, skip_bad: bool = False) -> Iterator[Tensor]:
    """Activations of up to `n_images` images, evenly spread over all shards: float32 (patches, d_model) each.

    Args:
        skip_bad: leave out what cannot be read, or is not finite.

    Raises:
        DataError: an image is not finite, or cannot be read.
    """
    plan = Plan(shards.examples, 1)
    for index in range(0, plan.n_batches, -(-plan.n_batches // n_images)):
        buffer = torch.empty(shards.n_patches * shards.d_model)
        acts_pd = buffer.view(shards.n_patches, shards.d_model)
        try:
            read_batch(shards, plan[index], buffer)
            if not torch.isfinite(acts_pd).all():
                raise find_bad_value(acts_pd, plan[index], shards, math.inf)
        except DataError:
            if not skip_bad:
                raise
            continue
        yield acts_pd


def _read_exactly(fd: int, views: list[memoryview], offset: int) -> None:
    """`os.preadv` until all views are full; EOFError with the file's end otherwise."""
    first = 0
    while first < len(views):
        n_bytes = os.preadv(fd, views[first:], offset)
        if n_bytes == 0:
            raise EOFError(offset)
        offset += n_bytes
        while first < len(views) and n_bytes >= len(views[first]):
            n_bytes -= len(views[first])
            first += 1
        if n_bytes:
            views[first] = views[first][n_bytes:]


def find_bad_value(acts_bd: Tensor, batch: Batch, shards: Shards, limit: float) -> DataError:
    """The error for a batch with an activation that is NaN, infinite, or not below `limit`: the first one's place."""
    bad_bd = ~(acts_bd.abs() < limit)
    n_bad = int(bad_bd.any(dim=1).sum())
    token, column = (int(i) for i in bad_bd.nonzero()[0])
    return DataError(
        f"{_place(batch, shards, token, column)} is {acts_bd[token, column].item()}; activations should be "
        f"finite and below {limit:.2g} ({n_bad} of the batch's {len(acts_bd)} tokens are not). Compute this shard again."
    )


def explain_overflow(acts_bd: Tensor, batch: Batch, shards: Shards, err: MergeError) -> SaevDistError:
    """The error for some of a batch's first tokens whose sums leave the range in which they are kept: the place of the largest
    activation, if sums of such ones and of their squares do."""
    token, column = divmod(int(acts_bd.abs().argmax()), shards.d_model)
    largest = acts_bd[token, column].item()
    if largest**2 * acts_bd.numel() < LIMIT:
        return MergeError(
            f"image {batch.img_i} and the next ones: {err} The activations reach {abs(largest):.3g} there, so it is what the "
            "SAE makes of them that is so large: look at its weights and at --input-scale."
        )
    return DataError(
        f"{_place(batch, shards, token, column)} is {largest:.3g}, the largest of these {len(acts_bd)} tokens: {err} If it is "
        "not meant, compute this shard again."
    )


def _place(batch: Batch, shards: Shards, token: int, column: int) -> str:
    """Where one of a batch's activations is."""
    img, patch_i = divmod(token, shards.n_patches)
    return (
        f"{shards.dpath / shards.names[batch.shard_i]}: image {batch.img_i + img} (example {batch.example_i + img} "
        f"of the shard), patch {patch_i}, dimension {column}"
    )
