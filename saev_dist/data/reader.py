"""Streaming of activations: positioned reads on background threads, into buffers that are used again.

Only the content tokens of the wanted layer are read. Where CLS tokens lie between them, one vectored read
fetches a run of examples and drops each CLS vector into a scratch buffer, so there is no second copy.

Names: `b` tokens of a batch, `d` model width.
"""

import math
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from saev_dist.data.shards import Shards
from saev_dist.errors import DataError
from saev_dist.files import retrying
from saev_dist.plan import Batch, Intervals, Plan

MAX_VIEWS = 1024  # IOV_MAX of Linux
MAX_GAP_BYTES = 64 * 1024  # a smaller gap costs less to read than another system call
MAX_THREADS = 8
MIN_PART_BYTES = 4 * 1024 * 1024
"""A part of a batch that is read by itself has at least so many."""


class Reader:
    """Iterate over the batches of some intervals as `(batch, acts_bd)`.

    `acts_bd` is float32 (batch tokens, d_model); it stays as it is for `hold` more steps of the iteration, and is
    overwritten after that. Memory: `depth + hold + 1` buffers of one batch each, whatever the number of shards.

    Args:
        shards: layer to read.
        plan: plan of the run.
        todo: batches to read, in this order.
        depth: batches read ahead.
        hold: batches that the consumer still works on when it asks for the next.
        pin: use page-locked buffers, for asynchronous copies to a GPU.
        n_parts: parts of a batch that are read side by side: from the page cache a thread reads some 4 GB a second.
        skip_bad: leave batches out that cannot be read, and note them.

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
    ) -> None:
        self.shards, self.plan, self.todo, self.depth, self.hold, self.pin = shards, plan, todo, depth, hold, pin
        self.n_parts, self.skip_bad = n_parts, skip_bad
        self.left_out: dict[int, str] = {}
        """Why each batch that was left out could not be read, by its index."""
        self.n_left_out = 0
        """Images in them."""
        self.n_bytes = 0
        """Content bytes delivered so far."""
        self.wait_s = 0.0
        """Time for which the consumer waited."""
        self._pending: deque[tuple[Batch, Tensor, list[Future[None]]]] = deque()

    @property
    def is_ready(self) -> bool:
        """Whether the next batch, if there is one, has been read."""
        return not self._pending or all(part.done() for part in self._pending[0][2])

    def __iter__(self) -> Generator[tuple[Batch, Tensor], None, None]:
        per_example = self.shards.n_patches * self.shards.d_model
        n_floats = self.plan.examples_per_batch * per_example
        n_batches = sum(stop - first for first, stop in self.todo)
        free = [torch.empty(n_floats, pin_memory=self.pin) for _ in range(min(self.depth + self.hold + 1, n_batches))]
        held: deque[Tensor] = deque()
        bad_shards: set[int] = set()
        pending = self._pending
        queue = (self.plan[index] for first, stop in self.todo for index in range(first, stop))
        pool = ThreadPoolExecutor(min(self.depth * self.n_parts, MAX_THREADS), thread_name_prefix="reader")

        def read_ahead() -> None:
            while len(pending) < self.depth and (batch := next(queue, None)) is not None:
                buffer = free.pop()
                # A shard that has failed once despite patience would cost minutes more with each of its batches.
                patient = batch.shard_i not in bad_shards
                parts = _parts(batch, self.shards, self.n_parts)
                places = [buffer[(part.example_i - batch.example_i) * per_example :] for part in parts]
                futures = [
                    pool.submit(read_batch, self.shards, part, place, patient=patient)
                    for part, place in zip(parts, places, strict=True)
                ]
                pending.append((batch, buffer, futures))

        try:
            read_ahead()
            while pending:
                batch, buffer, futures = pending.popleft()
                began = time.perf_counter()
                wait(futures)  # for all: the buffer may be used again
                try:
                    for future in futures:
                        future.result()
                except DataError as err:
                    if not self.skip_bad:
                        raise
                    self.left_out[batch.index] = str(err)
                    self.n_left_out += batch.n_examples
                    bad_shards.add(batch.shard_i)
                    free.append(buffer)
                    read_ahead()
                    continue
                self.wait_s += time.perf_counter() - began
                read_ahead()  # `depth` batches are under way while the consumer works on this one
                self.n_bytes += batch.n_examples * self.shards.content_bytes
                n_tokens = batch.n_examples * self.shards.n_patches
                yield batch, buffer[: n_tokens * self.shards.d_model].view(n_tokens, self.shards.d_model)
                held.append(buffer)
                if len(held) > self.hold:
                    free.append(held.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            pending.clear()


def _parts(batch: Batch, shards: Shards, most: int) -> list[Batch]:
    """The batch in at most so many runs of its examples, none of them small."""
    n_parts = max(1, min(most, batch.n_examples, batch.n_examples * shards.content_bytes // MIN_PART_BYTES))
    step = -(-batch.n_examples // n_parts)
    return [
        replace(
            batch, example_i=batch.example_i + first, img_i=batch.img_i + first, n_examples=min(step, batch.n_examples - first)
        )
        for first in range(0, batch.n_examples, step)
    ]


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
            f"{fpath} ends at byte {err}; it was longer when the run began. Write the shard again, "
            "or leave it out with extract --skip-bad-shards."
        ) from None
    except OSError as err:
        raise DataError(
            f"{fpath}: cannot read: {err.strerror}. Mend it, or leave it out with extract --skip-bad-shards."
        ) from None


def _read_runs(fpath: Path, shards: Shards, runs: list[tuple[int, list[memoryview]]]) -> None:
    fd = os.open(fpath, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(runs) > 1 or len(runs[0][1]) > 1:  # parts of the file: to the kernel each would come as a surprise
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
    img, patch_i = divmod(token, shards.n_patches)
    return DataError(
        f"{shards.dpath / shards.names[batch.shard_i]}: image {batch.img_i + img} (example {batch.example_i + img} "
        f"of the shard), patch {patch_i}, dimension {column} is {acts_bd[token, column].item()}; activations should be "
        f"finite and below {limit:.2g} ({n_bad} of the batch's {len(acts_bd)} tokens are not). Compute this shard again."
    )
