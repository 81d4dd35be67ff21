"""PURE. The slots: each feature's strongest scores, and where they are.

Names: `s` features, `k` slots, `n` candidates.
"""

from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators.base import Accumulator, Codes

RankBy = Literal["patch", "image"]


class TopK(Accumulator):
    """The `top_k` strongest scores of each feature under a total order.

    Order: score descending, then image ascending, then patch ascending; only scores above zero take a slot.
    A place is one int64, `img_i * n_patches + patch_i`, so the last two rules are one comparison, and 2^63 tokens
    fit. Since the order is total, the slots are a function of the set of scores: merging is exactly commutative.

    Memory: 12 bytes a slot, plus candidates that await their merge: half as many as there are slots, and one
    batch's. Merging at that fill instead of after each batch makes the number of merges logarithmic in the data.

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
        """float32, non-increasing along dim 1; -inf = empty."""
        self.places_sk = torch.full((d_sae, top_k), -1, dtype=torch.int64)
        """int64; -1 = empty."""
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, codes: Codes) -> None:
        # The last slot is the bar. It may lag behind while candidates wait, which costs only candidates.
        bar_n = self.values_sk[:, -1][codes.feature_n]
        keep_n = ((codes.value_n >= bar_n) & (codes.value_n > 0)).nonzero().squeeze(1)
        feature_n, value_n = codes.feature_n[keep_n], codes.value_n[keep_n]
        place_n = codes.token_n[keep_n] + codes.img_i * self.n_patches
        beaten_n = (value_n == bar_n[keep_n]) & (place_n >= self.places_sk[:, -1][feature_n])
        if beaten_n.any():
            feature_n, value_n, place_n = feature_n[~beaten_n], value_n[~beaten_n], place_n[~beaten_n]
        if self.rank_by == "image":
            feature_n, value_n, place_n = _best_of_image(feature_n, value_n, place_n, self.n_patches)
        self._waiting.append((feature_n, value_n, place_n))
        if sum(len(feature_n) for feature_n, _, _ in self._waiting) >= self.values_sk.numel() // 2:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        feature_n, value_n, place_n = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        if not len(feature_n):
            return
        top_k = self.values_sk.shape[1]
        crowded_n = torch.bincount(feature_n)[feature_n] > top_k
        if crowded_n.any():  # a dense feature must not widen everybody's row
            crowd = _first_of_each(feature_n[crowded_n], value_n[crowded_n], place_n[crowded_n], top_k)
            rest = (feature_n[~crowded_n], value_n[~crowded_n], place_n[~crowded_n])
            feature_n, value_n, place_n = (torch.cat(pair) for pair in zip(rest, crowd, strict=True))
        feature_n, order_n = feature_n.sort(stable=True)
        rows_r, row_n, count_r = feature_n.unique_consecutive(return_inverse=True, return_counts=True)
        slot_n = torch.arange(len(feature_n)) - (count_r.cumsum(0) - count_r)[row_n]
        values_rw = torch.full((len(rows_r), int(count_r.max())), -torch.inf)
        places_rw = torch.full(values_rw.shape, -1, dtype=torch.int64)
        values_rw[row_n, slot_n] = value_n[order_n]
        places_rw[row_n, slot_n] = place_n[order_n]
        self.values_sk[rows_r], self.places_sk[rows_r] = _strongest(
            torch.cat([self.values_sk[rows_r], values_rw], dim=1),
            torch.cat([self.places_sk[rows_r], places_rw], dim=1),
            top_k,
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._waiting = []

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        merged = type(self)(0, self.values_sk.shape[1], self.n_patches, self.rank_by)
        merged.values_sk, merged.places_sk = _strongest(
            torch.cat([self.values_sk, other.values_sk], dim=1),
            torch.cat([self.places_sk, other.places_sk], dim=1),
            self.values_sk.shape[1],
        )
        return merged

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        self.flush()
        empty_sk = self.places_sk < 0
        return {
            "top_values": self.values_sk,
            "top_img_i": self.places_sk.div(self.n_patches, rounding_mode="floor").masked_fill_(empty_sk, -1),
            "top_patch_i": self.places_sk.remainder(self.n_patches).masked_fill_(empty_sk, -1),
        }


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


def _first_of_each(feature_n: Tensor, value_n: Tensor, place_n: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates that are among the first `top_k` of their feature in the total order."""
    order_n = torch.from_numpy(np.lexsort((place_n.numpy(), -value_n.numpy(), feature_n.numpy())))
    feature_n, value_n, place_n = feature_n[order_n], value_n[order_n], place_n[order_n]
    count_s = torch.bincount(feature_n)
    keep_n = torch.arange(len(feature_n)) - (count_s.cumsum(0) - count_s)[feature_n] < top_k
    return feature_n[keep_n], value_n[keep_n], place_n[keep_n]


def _best_of_image(feature_n: Tensor, value_n: Tensor, place_n: Tensor, n_patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the candidates of one feature in one image keep the first in the total order."""
    img_n = place_n.div(n_patches, rounding_mode="floor")
    order = np.lexsort((place_n.numpy(), -value_n.numpy(), img_n.numpy(), feature_n.numpy()))
    order_n = torch.from_numpy(order)
    feature_n, value_n, place_n, img_n = (x[order_n] for x in (feature_n, value_n, place_n, img_n))
    first_n = torch.ones(len(order_n), dtype=torch.bool)
    first_n[1:] = (feature_n[1:] != feature_n[:-1]) | (img_n[1:] != img_n[:-1])
    return feature_n[first_n], value_n[first_n], place_n[first_n]
