"""PURE. The slots: each feature's strongest scores, and where they are.

Names: `s` features, `k` slots, `n` candidates.
"""

from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes, changes, stable_order, to_cpu

RankBy = Literal["patch", "image"]
Candidates = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]
"""Features, scores and places."""

PRUNED_SLOTS = 2**20
"""Slots that are looked at at a time."""
TINY = np.nextafter(np.float32(0), np.float32(1))
"""The least score that may take a slot."""


class TopK(Accumulator):
    """The `top_k` strongest scores of each feature under a total order.

    Order: score descending, then image ascending, then patch ascending; only scores above zero take a slot.
    A place is one int64, `img_i * n_patches + patch_i`, so the last two rules are one comparison, and 2^63 tokens
    fit. Since the order is total, the slots are a function of the set of scores: merging is exactly commutative.

    Memory: 12 bytes a slot, plus candidates that await their merge, 20 bytes each: half as many as there are slots, and one
    `update`'s. Pruning at that fill instead of each time makes the number of prunings logarithmic in the data. On a GPU as
    much, there, and the slots once more on the CPU.

    Args:
        d_sae: features.
        top_k: slots per feature.
        n_patches: tokens per image.
        rank_by: "patch" ranks every patch; "image" only the strongest patch (of equals the first) of each image.
    """

    STATE = ("values_sk", "places_sk")
    SETTINGS = ("n_patches", "rank_by")

    def __init__(self, d_sae: int, top_k: int, n_patches: int, rank_by: RankBy) -> None:
        self.n_patches, self.rank_by = n_patches, rank_by
        self.values_sk = torch.full((d_sae, top_k), -torch.inf)
        """float32; -inf = empty. Non-increasing along dim 1 once flushed, in no order before."""
        self.places_sk = torch.full((d_sae, top_k), -1, dtype=torch.int64)
        """int64; -1 = empty."""
        self._waiting: list[Candidates] = []
        self._n_waiting, self._sorted = 0, True
        self._on_device: _SlotsOnDevice | None = None
        """On a device: these slots, and all that came since."""
        self._raise_bar()

    def update(self, codes: Codes) -> None:
        if self._on_device is not None:
            self.flush()
            self._on_device = None
            self._raise_bar()
        # The weakest slot is the bar. It may lag behind while candidates wait, which costs only candidates.
        feature_n, value_n = codes.feature_n.numpy(), codes.value_n.numpy()
        keep_n = np.flatnonzero(value_n >= self._bar_s[feature_n])
        feature_n, value_n = feature_n[keep_n], value_n[keep_n]
        place_n = codes.token_n.numpy()[keep_n] + codes.img_i * self.n_patches
        beaten_n = (value_n == self._bar_s[feature_n]) & (place_n >= self._bar_place_s[feature_n])
        if beaten_n.any():
            feature_n, value_n, place_n = feature_n[~beaten_n], value_n[~beaten_n], place_n[~beaten_n]
        if self.rank_by == "image":
            keep_n = _best_of_image(feature_n, value_n, place_n // self.n_patches)
            feature_n, value_n, place_n = feature_n[keep_n], value_n[keep_n], place_n[keep_n]
        if len(value_n):
            self._waiting.append((feature_n, value_n, place_n))
            self._n_waiting += len(value_n)
        if self._n_waiting >= self.values_sk.numel() // 2:
            self._prune()

    def update_on_device(self, codes: DeviceCodes) -> None:
        if self._on_device is None:
            self.flush()
            self._on_device = _SlotsOnDevice(self.values_sk, self.places_sk, codes.value_n.device)
        self._on_device.update(codes, self.rank_by)

    def flush(self) -> None:
        if self._on_device is not None:
            self.values_sk, self.places_sk = self._on_device.cpu()
            return
        self._prune()
        if not self._sorted:
            self.values_sk, self.places_sk = _strongest(self.values_sk, self.places_sk, self.values_sk.shape[1])
            self._sorted = True

    def _prune(self) -> None:
        """Let the waiting candidates take the slots that are theirs; slots are then in no order."""
        if not self._waiting:
            return
        n_features, top_k = self.values_sk.shape
        feature_n, value_n, place_n = _by_feature(self._waiting, n_features)
        self._waiting, self._n_waiting, self._sorted = [], 0, False
        step = max(1, PRUNED_SLOTS // top_k)
        cuts = np.searchsorted(feature_n, np.arange(0, n_features + step, step))
        for first, (low, high) in zip(range(0, n_features, step), pairwise(cuts), strict=True):
            if low < high:
                slots = self.values_sk[first : first + step].numpy(), self.places_sk[first : first + step].numpy()
                _let_in(*slots, feature_n[low:high] - first, value_n[low:high], place_n[low:high])
        self._raise_bar()

    def _raise_bar(self) -> None:
        """Note the least score that may still take a slot, and the place of the slot that it would take."""
        if self.values_sk.is_meta:  # only the state's shape is wanted
            return
        values_sk, places_sk = self.values_sk.numpy(), self.places_sk.numpy()
        least_s = values_sk.min(axis=1)
        self._bar_s = np.maximum(least_s, TINY)
        last_s = np.where(values_sk == least_s[:, None], places_sk, -1).max(axis=1)
        self._bar_place_s = np.where(least_s > 0, last_s, np.iinfo(np.int64).max)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._waiting, self._n_waiting, self._sorted, self._on_device = [], 0, True, None
        self._raise_bar()

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        values_sk, places_sk = _strongest(
            torch.cat([self.values_sk, other.values_sk], dim=1),
            torch.cat([self.places_sk, other.places_sk], dim=1),
            self.values_sk.shape[1],
        )
        return self.like({"values_sk": values_sk, "places_sk": places_sk})

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        self.flush()
        empty_sk = self.places_sk < 0
        return {
            "top_values": self.values_sk,
            "top_img_i": self.places_sk.div(self.n_patches, rounding_mode="floor").masked_fill_(empty_sk, -1),
            "top_patch_i": self.places_sk.remainder(self.n_patches).masked_fill_(empty_sk, -1),
        }


class _SlotsOnDevice:
    """The slots on a GPU, and the candidates that await their merge: the same order, pruned at the same fill, by sorting.

    Args:
        values_sk, places_sk: the slots so far, in order.
    """

    def __init__(self, values_sk: Tensor, places_sk: Tensor, device: torch.device) -> None:
        self.values_sk, self.places_sk = values_sk.to(device), places_sk.to(device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_waiting = 0
        self._raise_bar()

    def update(self, codes: DeviceCodes, rank_by: RankBy) -> None:
        token_n, feature_n, value_n = codes.token_n, codes.feature_n, codes.value_n
        bar_n = self._bar_s[feature_n]
        # Few exceed the bar; of those that tie with it, fewer still are from an earlier place.
        first_n = token_n + codes.img_i * codes.n_patches < self._bar_place_s[feature_n]
        kept_x = ((value_n > bar_n) | ((value_n == bar_n) & first_n)).nonzero().squeeze(1)
        token_n, feature_n, value_n = token_n[kept_x], feature_n[kept_x], value_n[kept_x]
        if rank_by == "image":  # the first of the strongest of each feature and image; tokens ascend
            value_n, order_n = value_n.sort(descending=True, stable=True)
            group_n, again_n = (feature_n * codes.n_imgs + token_n // codes.n_patches)[order_n].sort(stable=True)
            new_n = torch.ones_like(group_n, dtype=torch.bool)
            torch.ne(group_n[1:], group_n[:-1], out=new_n[1:])
            best_x = again_n[new_n]
            value_n, order_x = value_n[best_x], order_n[best_x]
            token_n, feature_n = token_n[order_x], feature_n[order_x]
        if len(value_n):
            self._waiting.append((feature_n, value_n, token_n + codes.img_i * codes.n_patches))
            self._n_waiting += len(value_n)
        if self._n_waiting >= self.values_sk.numel() // 2:
            self._prune()

    def cpu(self) -> list[Tensor]:
        """The slots, in order."""
        self._prune()
        return to_cpu(self.values_sk, self.places_sk)

    def _prune(self) -> None:
        if not self._waiting:
            return
        n_features, top_k = self.values_sk.shape
        feature_s = torch.arange(n_features, device=self.values_sk.device)
        slots = feature_s.repeat_interleave(top_k), self.values_sk.view(-1), self.places_sk.view(-1)
        feature_n, value_n, place_n = (torch.cat(part) for part in zip(slots, *self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        place_n, order_n = place_n.sort()
        value_n = value_n[order_n]
        # Numbers above zero are ordered as their patterns are, of 31 bits; an empty slot comes last.
        weakness_n = 2**31 - 1 - value_n.clamp(min=0).view(torch.int32).long()
        key_n, order_n = (feature_n[order_n] << 31 | weakness_n).sort(stable=True)
        first_s1 = torch.searchsorted(key_n, feature_s << 31)[:, None]
        strongest_sk = order_n[first_s1 + torch.arange(top_k, device=first_s1.device)]  # each feature has so many, its slots
        self.values_sk, self.places_sk = value_n[strongest_sk], place_n[strongest_sk]
        self._raise_bar()

    def _raise_bar(self) -> None:
        """Note the score that must be exceeded for a slot, and the place of the slot's holder."""
        self._bar_s = self.values_sk[:, -1].clamp(min=0)  # an empty slot, too, takes only what is above zero
        self._bar_place_s = self.places_sk[:, -1].contiguous()


def _strongest(values_rw: Tensor, places_rw: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The first `top_k` entries of each row in the total order."""
    sorted_rw, order_rw = values_rw.sort(dim=1, descending=True, stable=True)
    # Float values seldom tie, and ties are mostly in order already: sort by place only the rows that need it.
    moved_rw = places_rw.gather(1, order_rw)
    wrong_r = ((sorted_rw[:, 1:] == sorted_rw[:, :-1]) & (moved_rw[:, 1:] < moved_rw[:, :-1])).any(dim=1)
    if wrong_r.any():
        order_xw = places_rw[wrong_r].argsort(dim=1, stable=True)
        by_value_xw = values_rw[wrong_r].gather(1, order_xw).argsort(dim=1, descending=True, stable=True)
        order_rw[wrong_r] = order_xw.gather(1, by_value_xw)
    order_rk = order_rw[:, :top_k]
    return values_rw.gather(1, order_rk), places_rw.gather(1, order_rk)


def _by_feature(parts: list[Candidates], n_features: int) -> Candidates:
    """All candidates, ordered by feature, as those of each part are."""
    if len(parts) == 1:
        return parts[0]
    feature_n, value_n, place_n = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order_n = stable_order(torch.from_numpy(feature_n), n_features).numpy()
    return feature_n[order_n], value_n[order_n], place_n[order_n]


def _let_in(
    values_sk: NDArray[np.float32],
    places_sk: NDArray[np.int64],
    feature_n: NDArray[np.int64],
    value_n: NDArray[np.float32],
    place_n: NDArray[np.int64],
) -> None:
    """Give the slots, in place, to the strongest of their holders and of candidates ordered by feature.

    It selects and does not sort: the k-th largest score of a row, then what reaches it takes the slots of what does not.
    """
    n_features, top_k = values_sk.shape
    count_s = np.bincount(feature_n, minlength=n_features)
    crowded_n = (count_s > 2 * top_k)[feature_n]
    if crowded_n.any():  # a dense feature must not widen everybody's row
        crowd = _first_of_each(feature_n[crowded_n], value_n[crowded_n], place_n[crowded_n], top_k)
        rest = (feature_n[~crowded_n], value_n[~crowded_n], place_n[~crowded_n])
        feature_n, value_n, place_n = _by_feature([rest, crowd], n_features)
        count_s = np.bincount(feature_n, minlength=n_features)
    width = int(count_s.max())
    values_sw = np.full((n_features, top_k + width), -np.inf, np.float32)
    values_sw[:, :top_k] = values_sk
    column_n = top_k + _rank(feature_n, count_s)
    values_sw[feature_n, column_n] = value_n
    bar_s = np.maximum(np.partition(values_sw, width, axis=1)[:, width], TINY)  # an empty slot does not reach it
    leaves_sk, enters_n = values_sk < bar_s[:, None], value_n >= bar_s[feature_n]
    room_s, n_entering_s = leaves_sk.sum(axis=1), np.bincount(feature_n[enters_n], minlength=n_features)
    tied_s = n_entering_s > room_s  # more reach the bar than fit: the places decide
    if tied_s.any():
        places_tw = np.full((int(tied_s.sum()), top_k + width), -1, np.int64)
        places_tw[:, :top_k] = places_sk[tied_s]
        tied_n = tied_s[feature_n]
        places_tw[(tied_s.cumsum() - 1)[feature_n[tied_n]], column_n[tied_n]] = place_n[tied_n]
        strongest = _strongest(torch.from_numpy(values_sw[tied_s]), torch.from_numpy(places_tw), top_k)
        values_sk[tied_s], places_sk[tied_s] = (x.numpy() for x in strongest)
        enters_n &= ~tied_n
        n_entering_s[tied_s] = 0
    feature_n = feature_n[enters_n]
    slot_n = np.flatnonzero(leaves_sk)[(room_s.cumsum() - room_s)[feature_n] + _rank(feature_n, n_entering_s)]
    slot_n -= feature_n * top_k
    values_sk[feature_n, slot_n], places_sk[feature_n, slot_n] = value_n[enters_n], place_n[enters_n]


def _rank(feature_n: NDArray[np.int64], count_s: NDArray[np.int64]) -> NDArray[np.int64]:
    """The how manieth of its feature each candidate is, from 0; they are ordered by feature."""
    rank_n: NDArray[np.int64] = np.arange(len(feature_n)) - (count_s.cumsum() - count_s)[feature_n]
    return rank_n


def _first_of_each(
    feature_n: NDArray[np.int64], value_n: NDArray[np.float32], place_n: NDArray[np.int64], top_k: int
) -> Candidates:
    """The candidates that are among the first `top_k` of their feature in the total order."""
    order_n = np.lexsort((place_n, -value_n, feature_n))
    feature_n, value_n, place_n = feature_n[order_n], value_n[order_n], place_n[order_n]
    keep_n = _rank(feature_n, np.bincount(feature_n)) < top_k
    return feature_n[keep_n], value_n[keep_n], place_n[keep_n]


def _best_of_image(feature_n: NDArray[np.int64], value_n: NDArray[np.float32], img_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of candidates ordered by feature, then place: where the first of the strongest of each feature and image is."""
    if not len(value_n):
        return np.empty(0, np.int64)
    new_n = changes(feature_n) | changes(img_n)
    start_v = np.flatnonzero(new_n)
    group_n = new_n.cumsum() - 1
    best_x = np.flatnonzero(value_n == np.maximum.reduceat(value_n, start_v)[group_n])
    first_x: NDArray[np.int64] = best_x[changes(group_n[best_x])]
    return first_x
