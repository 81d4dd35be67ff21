"""Which entries of a dense product are codes, on the CPU: in NumPy, some features at a time.

While the cache still holds the product's block, what may be a code is noted, and the next block takes its place. The choice is
that of `select.select_at_once`.

Names: `b` tokens, `c` features of a block, `s` all features, `k` kept or groups, `g` groups, `w` columns of a block or
candidates of a token, `n` candidates or codes, `x` some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from saev_dist.accumulators.base import stable_order
from saev_dist.sae.model import Activation, GroupMax, TopK
from saev_dist.sae.select import GROUPS_PER_K

Bound = float | NDArray[np.float32]
"""What an entry must exceed: one number, or (s,)."""
Block = NDArray[np.float32] | NDArray[np.int16]
"""Entries: float32; or bfloat16, whose bits NumPy knows as int16."""
Candidates = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Token, feature and value (or what it is at most)."""

MAX_FEATURES_UNSEEN = 4096
"""Features after which a bar rises in any case; it bounds the table that it takes."""
UNKNOWN, UNKNOWN_BITS = np.float32(-(2.0**127)), np.uint16(0xFF00).astype(np.int16)
"""In place of an entry that is not known: below all that are, so that it raises no bar."""
CROWD = 8
"""Candidates a code at which a token's are thinned out; it bounds their number."""
POSITIVE = np.nextafter(np.float32(0), np.float32(1))
"""The least of all numbers above 0."""


@dataclass(frozen=True, eq=False)
class Margin:
    """How far an entry h of token b may be from what it stands for: `absolute_b + relative * |h|`.

    Both hold 2^-20 of themselves to spare, and `relative` 2^-20 more: for the rounding of what is computed from them.
    """

    absolute_b: NDArray[np.float32]
    """At least 2^-110: smaller ones have no room for the rounding of `cut`. Or 0: all entries of the token are 0, exactly."""
    relative: float
    unknown_x: NDArray[np.int64]
    """Rows of the block whose entries may be anything."""

    def at(self, h_n: NDArray[np.float32], token_n: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Of some entries."""
        margin_n: NDArray[np.float32] = np.abs(h_n)
        margin_n *= self.relative
        margin_n += self.absolute_b[token_n]
        return margin_n

    def cut(self, bound_b: NDArray[np.float32] | float) -> NDArray[np.float32]:
        """What an entry must exceed, if what it stands for may exceed `bound_b`, (…, b)."""
        # An entry has lost where h + relative |h| <= most.
        most_b: NDArray[np.float32] = np.asarray(bound_b, np.float32) - self.absolute_b
        cut_b: NDArray[np.float32] = np.abs(most_b)
        cut_b *= -self.relative * (1 + 2 * self.relative)
        cut_b += most_b
        return cut_b

    def of(self, start: int, stop: int) -> "Margin":
        """Of some rows of the block."""
        is_there_x = (self.unknown_x >= start) & (self.unknown_x < stop)
        return replace(self, unknown_x=self.unknown_x[is_there_x] - start)


class Sieve:
    """The entries that may be codes, of blocks whose rows are ascending features and whose columns are the tokens.

    An entry is known exactly, or up to a margin. With TopK a token has a bar, the k-th largest lower bound so
    far: what does not exceed it has lost, for of equals the lower feature wins. It rises when there are k new candidates
    a token, so about as often as the number of features seen doubles.

    Entries that tie, or whose margins overlap, are not ruled out so. A token that has many is thinned out: its candidates are
    made exact, and its k best stay. So of TopK and GroupMax a token holds at most `CROWD` k candidates between blocks, and
    all tokens of TopK twice as many while one is looked at.

    Args:
        activation: what keeps entries.
        threshold: of all activations but TopK and GroupMax.
        n_tokens: columns of every block.
        d_sae: features in all.
        exact: candidates, in their order, with what they are in place of what they are at most. None: they are that.
    """

    def __init__(
        self,
        activation: Activation,
        threshold: Bound,
        n_tokens: int,
        d_sae: int,
        exact: Callable[[Candidates], Candidates] | None = None,
    ) -> None:
        self.activation, self.threshold, self.n_tokens, self.d_sae, self._exact = activation, threshold, n_tokens, d_sae, exact
        self._found: list[Candidates] = []
        self._held_b = np.zeros(n_tokens, np.int64)
        self._crowd = CROWD * min(activation.k, d_sae) if isinstance(activation, TopK | GroupMax) else 0
        self._bar: _Bar | None = None
        self._mask_cw = np.empty((0, 0), dtype=bool)

    def take(self, first: int, h_cw: Block, margin: Margin | None = None) -> None:
        """Look at a block, which may be overwritten afterwards.

        Args:
            first: feature of its first row. With GroupMax no group may lie in two blocks.
            h_cw: the entries, contiguous; above -1e38. It may be changed. Columns past the tokens are not looked at; a
                number of columns that 16 divides is fastest.
            margin: how far the entries may be off; None: they are exact.
        """
        n_features, width = h_cw.shape
        if len(self._mask_cw) < n_features:
            self._mask_cw = np.empty(h_cw.shape, dtype=bool)
        mask_cw = self._mask_cw[:n_features]
        if margin:
            h_cw[margin.unknown_x] = UNKNOWN if h_cw.dtype == np.float32 else UNKNOWN_BITS
        h_cb, mask_cb = h_cw[:, : self.n_tokens], mask_cw[:, : self.n_tokens]
        match self.activation:
            case TopK(k):
                self._bar = self._bar or _Bar(h_cb, min(k, self.d_sae), margin)
                bar_b = self._bar.rise()
                if margin:
                    bar_b = margin.cut(bar_b)
                _exceed(h_cw, _widened(bar_b, width), mask_cw)
            case GroupMax(k):
                h_gxb = _floats(h_cb).reshape(-1, self.d_sae // k, self.n_tokens)
                least_g1b = h_gxb.max(axis=1, keepdims=True)
                if margin:
                    least_g1b -= margin.at(least_g1b, slice(None))
                np.maximum(least_g1b, POSITIVE, out=least_g1b)
                mask_cb[:] = (h_gxb >= (margin.cut(least_g1b) if margin else least_g1b)).reshape(mask_cb.shape)
            case _:
                bound = self.threshold
                if isinstance(bound, np.ndarray):
                    bound = bound[first : first + n_features, None]
                if margin:
                    bound = _widened(margin.cut(bound), width)
                _exceed(h_cw, bound, mask_cw)
        if margin:
            mask_cw[margin.unknown_x] = True
        mask_cw[:, self.n_tokens :] = False
        is_divisible = isinstance(self.activation, TopK) and n_features > 1
        flat_n = _where(mask_cw, self._crowd * self.n_tokens if is_divisible else mask_cw.size)
        if flat_n is None:
            for start, stop in pairwise((0, n_features // 2, n_features)):  # the first half may raise the bar for the other
                self.take(first + start, h_cw[start:stop], margin.of(start, stop) if margin else None)
            return
        row_n = flat_n // width
        token_n = flat_n - row_n * width
        h_n = _floats(h_cw.ravel()[flat_n])
        high_n = low_n = h_n
        if margin:
            margin_n = margin.at(h_n, token_n)
            high_n, low_n = h_n + margin_n, h_n - margin_n
            high_n[h_n == UNKNOWN] = np.inf
        self._found.append((token_n, row_n + first, high_n))
        if self._bar:
            self._bar.note(token_n, low_n, n_features)
        if isinstance(self.activation, TopK | GroupMax):
            self._held_b += np.bincount(token_n, minlength=self.n_tokens)
            if self._held_b.max() > self._crowd:
                self._thin_out(self.activation)

    def candidates(self) -> Candidates:
        """What may be a code so far, by feature, then token."""
        if self._bar:
            self._bar.rise()
        return self._held()

    def _held(self) -> Candidates:
        token_n, feature_n, high_n = (np.concatenate(part) for part in zip(*self._found, strict=True))
        if self._bar is None:
            return token_n, feature_n, high_n
        keep_n = np.flatnonzero(high_n >= self._bar.bar_b[token_n])
        return token_n[keep_n], feature_n[keep_n], high_n[keep_n]

    def _thin_out(self, activation: TopK | GroupMax) -> None:
        """Forget what has lost, and of tokens that hold half a crowd nevertheless all but the best."""
        token_n, feature_n, high_n = self._held()
        self._held_b = np.bincount(token_n, minlength=self.n_tokens)
        is_many_b = self._held_b > self._crowd // 2
        many_x = np.flatnonzero(is_many_b[token_n])
        if len(many_x):
            many = token_n[many_x], feature_n[many_x], high_n[many_x]
            high_n[many_x] = value_x = self._exact(many)[2] if self._exact else many[2]
            row_x = (is_many_b.cumsum() - 1)[many[0]]
            is_best_x = _are_best(activation, (row_x, many[1], value_x), int(is_many_b.sum()), self.d_sae)
            if self._bar:
                self._bar.settle(is_many_b, many[0][is_best_x], value_x[is_best_x])
            keep_n = np.delete(np.arange(len(token_n)), many_x[~is_best_x])
            token_n, feature_n, high_n = token_n[keep_n], feature_n[keep_n], high_n[keep_n]
            self._held_b = np.bincount(token_n, minlength=self.n_tokens)
        self._found = [(token_n, feature_n, high_n)]


class _Bar:
    """The k-th largest value of each token so far, or less.

    The first bar is one that at least k entries of the first block reach, and few others do: the k-th largest of the
    maxima of disjoint groups, each of which is an entry. It is set just below, since those entries must exceed it.

    Args:
        h_cb: the first block.
        k: at most the number of features.
        margin: of its entries.
    """

    def __init__(self, h_cb: Block, k: int, margin: Margin | None) -> None:
        n_features, n_tokens = h_cb.shape
        self.k = k
        self.top_bk = np.full((n_tokens, k), -np.inf, np.float32)
        self.bar_b = np.full(n_tokens, -np.inf, np.float32)
        self._unseen: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self._n_unseen = self._n_features_unseen = 0
        size = max(1, n_features // (GROUPS_PER_K * k))
        n_groups = n_features // size
        if n_groups > k:
            # As bits the largest of negative numbers is the lowest: a lower bar, but an entry's.
            maxima_gb = _floats(h_cb[: size * n_groups].reshape(size, n_groups, n_tokens).max(axis=0))
            kth_b = np.partition(maxima_gb.T, n_groups - k, axis=1)[:, n_groups - k]
            if margin:
                kth_b = kth_b - margin.at(kth_b, slice(None))
            self.bar_b = np.nextafter(kth_b, np.float32(-np.inf))

    def note(self, token_n: NDArray[np.int64], low_n: NDArray[np.float32], n_features: int) -> None:
        """Candidates of so many more features."""
        self._unseen.append((token_n, low_n))
        self._n_unseen += len(token_n)
        self._n_features_unseen += n_features

    def settle(self, is_settled_b: NDArray[np.bool_], token_n: NDArray[np.int64], value_n: NDArray[np.float32]) -> None:
        """All that some tokens have left, exactly."""
        self.top_bk[is_settled_b] = -np.inf
        unseen_token_n, low_n = (np.concatenate(part) for part in zip(*self._unseen, strict=True))
        other_x = np.flatnonzero(~is_settled_b[unseen_token_n])
        self._unseen = [(unseen_token_n[other_x], low_n[other_x]), (token_n, value_n)]

    def rise(self) -> NDArray[np.float32]:
        """The bar, after it has risen if that was due."""
        if self._n_unseen >= self.k * len(self.bar_b) or self._n_features_unseen >= MAX_FEATURES_UNSEEN:
            token_n, low_n = (np.concatenate(part) for part in zip(*self._unseen, strict=True))
            self._unseen, self._n_unseen, self._n_features_unseen = [], 0, 0
            order_n = stable_order(torch.from_numpy(token_n), len(self.bar_b)).numpy()
            low_bw = _table(token_n[order_n], low_n[order_n], self.top_bk)[0]
            width = low_bw.shape[1] - self.k
            low_bw.partition(width, axis=1)
            self.top_bk = low_bw[:, width:].copy()
            self.bar_b = np.maximum(self.bar_b, self.top_bk[:, 0])
        return self.bar_b


def keep(activation: Activation, threshold: Bound, candidates: Candidates, n_tokens: int, d_sae: int) -> NDArray[np.int64]:
    """Which candidates the activation keeps: ascending indices.

    Args:
        activation, threshold, n_tokens, d_sae: as for `Sieve`.
        candidates: in its order, with the exact values.
    """
    _, feature_n, value_n = candidates
    if isinstance(activation, TopK | GroupMax):
        return np.flatnonzero(_are_best(activation, candidates, n_tokens, d_sae) & (value_n != 0))  # zeros are no codes
    return np.flatnonzero(value_n > (threshold[feature_n] if isinstance(threshold, np.ndarray) else threshold))


def _are_best(activation: TopK | GroupMax, candidates: Candidates, n_tokens: int, d_sae: int) -> NDArray[np.bool_]:
    """Of exact candidates, whether each is one of those that its token keeps. With TopK zeros take places too."""
    token_n, feature_n, value_n = candidates
    are_best_n = np.zeros(len(token_n), dtype=bool)
    if isinstance(activation, TopK):
        order_n = stable_order(torch.from_numpy(token_n), n_tokens).numpy()
        are_best_n[order_n] = _is_among_k(token_n[order_n], value_n[order_n], min(activation.k, d_sae), n_tokens)
    else:
        k = activation.k
        largest_bk = np.full((n_tokens, k), -np.inf, np.float32)
        group_n = token_n * k + feature_n // (d_sae // k)
        np.maximum.at(largest_bk.ravel(), group_n, value_n)
        best_x = np.flatnonzero((value_n == largest_bk.ravel()[group_n]) & (value_n > 0))
        are_best_n[best_x[np.unique(group_n[best_x], return_index=True)[1]]] = True
    return are_best_n


def _is_among_k(token_n: NDArray[np.int64], value_n: NDArray[np.float32], k: int, n_tokens: int) -> NDArray[np.bool_]:
    """Of candidates ordered by token, whether each is one of its token's k largest, the earlier first among equals."""
    value_bw, column_n = _table(token_n, value_n, np.empty((n_tokens, 0), np.float32))
    place = max(0, value_bw.shape[1] - k)
    kth_b1 = np.partition(value_bw, place, axis=1)[:, place, None]
    above_bw, equal_bw = value_bw > kth_b1, value_bw == kth_b1
    room_b1 = k - above_bw.sum(axis=1, keepdims=True)
    if (equal_bw.sum(axis=1, keepdims=True) > room_b1).any():
        equal_bw &= equal_bw.cumsum(axis=1) <= room_b1
    above_bw |= equal_bw
    return above_bw[token_n, column_n]


def _table(
    token_n: NDArray[np.int64], value_n: NDArray[np.float32], left_bk: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values ordered by token as a table right of `left_bk`, -inf where a token has fewer; each value's column right of it."""
    n_tokens, n_left = left_bk.shape
    count_b = np.bincount(token_n, minlength=n_tokens)
    column_n = np.arange(len(token_n)) - (count_b.cumsum() - count_b)[token_n]
    table_bw = np.full((n_tokens, n_left + max(1, int(count_b.max()))), -np.inf, np.float32)
    table_bw[:, :n_left] = left_bk
    table_bw[token_n, column_n + n_left] = value_n
    return table_bw, column_n


def _widened(bound_b: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    return np.concatenate([bound_b, np.repeat(bound_b[-1:], width - len(bound_b))])


def _exceed(h_cw: Block, bound: Bound, mask_cw: NDArray[np.bool_]) -> None:
    """Write which entries exceed a bound, a number or (c, 1) or (w,)."""
    if h_cw.dtype == np.float32:
        np.greater(h_cw, bound, out=mask_cw)
        return
    # Ascending, as uint16, are the bits of 0 to infinity, then of -0 to minus infinity: those that exceed a number are a range.
    bits = np.atleast_1d(np.asarray(bound, np.float32) + np.float32(0)).view(np.uint32)  # + 0: there is no -0
    is_negative = bits >> 31 == 1
    least = np.where(is_negative, 0, (bits >> 16) + 1).astype(np.uint16)
    end = np.where(is_negative, 0x8000 + ((bits & 0x7FFFFFFF) + 0xFFFF >> 16), 0x8000).astype(np.uint16)
    if not is_negative.any():  # as int16 what is negative is below them too
        np.greater_equal(h_cw, least.view(np.int16), out=mask_cw)
        return
    bits_cw = h_cw.view(np.uint16)
    np.less(bits_cw if is_negative.all() else bits_cw - least, end - least, out=mask_cw)


def _floats(h: Block) -> NDArray[np.float32]:
    if h.dtype == np.float32:
        return h  # type: ignore[return-value]
    bits = h.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _where(mask_cb: NDArray[np.bool_], most: int) -> NDArray[np.int64] | None:
    """`np.flatnonzero` of a mask with few flags set: it looks for eight of them at a time. None: more than `most` are set."""
    flat = mask_cb.ravel()
    if flat.size % 8:
        found_n = np.flatnonzero(flat)
        return found_n if len(found_n) <= most else None
    word_x = np.flatnonzero(flat.view(np.uint64) != 0)
    flag_n = np.flatnonzero(flat.view(np.uint64)[word_x].view(bool))
    if len(flag_n) > most:
        return None
    flat_n: NDArray[np.int64] = word_x[flag_n >> 3]
    flat_n *= 8
    flat_n += flag_n & 7
    return flat_n
