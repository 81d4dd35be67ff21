"""PURE. The plan: every batch of a run, in order, and who computes which.

A plan is a function of the data (examples per shard) and of the config (examples per batch), never of
the world size. It stores a few integers per shard; a batch is looked up by arithmetic, so 10^5 shards
and 10^9 batches cost the same memory.

Sets of batches are *intervals*: sorted, disjoint, non-touching half-open pairs `(first, stop)`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Intervals = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """A fixed run of whole examples inside one shard: the unit of GPU work."""

    index: int
    """Position in the plan."""
    shard_i: int
    example_i: int
    """First example, counted from the start of the shard."""
    n_examples: int
    img_i: int
    """First example, counted over all shards."""


class Plan:
    """All batches of a run, in the order of the data.

    Args:
        examples_per_shard: examples in each shard, in order; a shard may be empty.
        examples_per_batch: whole examples per batch, at most; the last batch of a shard may be shorter.
    """

    def __init__(self, examples_per_shard: Sequence[int], examples_per_batch: int) -> None:
        assert examples_per_batch >= 1
        examples = np.asarray(examples_per_shard, dtype=np.int64)
        self.examples_per_batch = examples_per_batch
        """As it was asked for."""
        self.largest_batch = min(examples_per_batch, int(examples.max(initial=0)))
        """Examples of the largest batch: fewer where no shard has as many."""
        self._examples = np.concatenate([[0], np.cumsum(examples)])
        self._batches = np.concatenate([[0], np.cumsum(-(-examples // examples_per_batch))])
        self.n_examples = int(self._examples[-1])
        self.n_batches = int(self._batches[-1])

    def sizes(self) -> dict[int, int]:
        """How many batches there are of each number of examples."""
        full, rest = np.divmod(np.diff(self._examples), self.examples_per_batch)
        rests, n_rests = np.unique(rest[rest > 0], return_counts=True)
        sizes = {self.examples_per_batch: int(full.sum())} | dict(zip(rests.tolist(), n_rests.tolist(), strict=True))
        return {n_examples: n for n_examples, n in sizes.items() if n}

    def __getitem__(self, index: int) -> Batch:
        """The batch at `index`; IndexError outside 0 … n_batches-1."""
        if not 0 <= index < self.n_batches:
            raise IndexError(index)
        shard_i = int(np.searchsorted(self._batches, index, side="right")) - 1
        example_i = (index - int(self._batches[shard_i])) * self.examples_per_batch
        img_i = int(self._examples[shard_i]) + example_i
        n_examples = min(self.examples_per_batch, int(self._examples[shard_i + 1]) - img_i)
        return Batch(index, shard_i, example_i, n_examples, img_i)

    def shard_batches(self, shard_i: int) -> tuple[int, int]:
        """The batches first … stop-1 of a shard."""
        return int(self._batches[shard_i]), int(self._batches[shard_i + 1])

    def examples_before(self, index: int) -> int:
        """Examples in the batches 0 … index-1."""
        return self.n_examples if index == self.n_batches else self[index].img_i

    def n_examples_in(self, intervals: Intervals) -> int:
        """Examples in the batches of `intervals`."""
        return sum(self.examples_before(stop) - self.examples_before(first) for first, stop in intervals)

    def deal(self, todo: Intervals, n_ranks: int) -> list[Intervals]:
        """Share `todo` out: one contiguous run of it per rank, balanced by examples.

        Rank order is data order. A rank gets nothing when there are fewer batches than ranks.
        """
        done = [0]  # examples before each interval, counted within todo
        position = [0]  # and batches
        for first, stop in todo:
            done.append(done[-1] + self.n_examples_in(((first, stop),)))
            position.append(position[-1] + stop - first)

        def cut(target: int) -> int:
            """The first position in todo (counted in batches) with at least `target` examples before it."""
            interval_i = min(bisect_right(done, target), len(todo)) - 1
            first, stop = todo[interval_i]
            wanted = target - done[interval_i] + self.examples_before(first)
            return position[interval_i] + bisect_left(range(first, stop), wanted, key=self.examples_before)

        def between(low: int, high: int) -> Intervals:
            """The batches at positions low … high-1."""
            out = []
            for i in range(bisect_right(position, low) - 1, bisect_left(position, high)):
                first, stop = todo[i]
                out.append((first + max(0, low - position[i]), min(stop, first + high - position[i])))
            return tuple(out)

        cuts = [0, *(cut(done[-1] * rank // n_ranks) for rank in range(1, n_ranks)), position[-1]] if todo else [0, 0]
        shares = [between(low, high) if low < high else () for low, high in pairwise(cuts)]
        return shares + [()] * (n_ranks - len(shares))


def union(parts: Iterable[Intervals]) -> Intervals:
    """Merge disjoint sets of batches.

    Raises:
        ValueError: two parts cover the same batch.
    """
    out: list[tuple[int, int]] = []
    for first, stop in sorted(interval for part in parts for interval in part):
        if out and first < out[-1][1]:
            raise ValueError(f"batches {first} to {min(stop, out[-1][1]) - 1} are covered twice")
        if out and first == out[-1][1]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((first, stop))
    return tuple(out)


def complement(done: Intervals, stop: int, *, first: int = 0) -> Intervals:
    """The batches first … stop-1 that `done`, which lies among them, does not cover."""
    edges = [first, *(edge for interval in done for edge in interval), stop]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def subtract(intervals: Intervals, taken: Intervals) -> Intervals:
    """The batches of `intervals` that `taken` does not cover."""
    out: list[tuple[int, int]] = []
    lows, highs = [low for low, _ in taken], [high for _, high in taken]
    for first, stop in intervals:
        inside = taken[bisect_right(highs, first) : bisect_left(lows, stop)]
        out += complement(tuple((max(first, low), min(stop, high)) for low, high in inside), stop, first=first)
    return tuple(out)
