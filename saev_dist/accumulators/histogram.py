"""PURE. The distribution of every feature's scores in fixed log-linear bins, and percentiles from it.

A bin is the top bits of the float32 pattern: 16 bins to each power of two, from 2^-16 to 2^16, with one bin for
smaller scores above zero and one for larger. Fixed bins merge exactly, and the relative width of a bin is at most
1/16, so a percentile read off its middle is within 1/32 (3.1 %) of the true one inside that range. (The layout of
HdrHistogram and DDSketch, with the exponent taken from the number itself.)

Names: `s` features, `h` bins.
"""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes
from saev_dist.fused import kernels_on

BITS = 4
MIN_EXPONENT, MAX_EXPONENT = -16, 16
_SHIFT = 23 - BITS
_FIRST = (127 + MIN_EXPONENT) << BITS
_REGULAR = (MAX_EXPONENT - MIN_EXPONENT) << BITS
N_BINS = _REGULAR + 2
PERCENTILE_ROWS = 2048
"""Features whose counts are summed up at a time: 8 MB."""


def bin_of(value: Tensor) -> Tensor:
    """Bin, int32, of float32 scores above zero. Bin i holds `edges()[i] <= score < edges()[i + 1]`."""
    return (value.view(torch.int32) >> _SHIFT).sub_(_FIRST - 1).clamp_(0, N_BINS - 1)


def edges() -> Tensor:
    """float32 (n_bins + 1,): 0, 2^-16, …, 2^16, infinity."""
    patterns = np.arange(_FIRST, _FIRST + _REGULAR + 1, dtype=np.int32) << _SHIFT
    return torch.from_numpy(np.concatenate([[0.0], patterns.view(np.float32), [np.inf]]).astype(np.float32))


def percentile_stem(percentile: float) -> str:
    """Of the artifact's name."""
    return f"percentiles_p{percentile:.10g}"


def _place(feature_n: Tensor, value_n: Tensor) -> Tensor:
    """Where a score is counted in the flat counts, int64."""
    place_n = feature_n * N_BINS
    place_n += bin_of(value_n)
    return place_n


class Histogram(Accumulator):
    """Counts of each feature's scores above zero, by bin.

    Memory: 8 bytes a bin, 514 bins: 4.1 kB a feature; as much on a GPU.

    Args:
        d_sae: features.
        percentile: which one `finalize` reports, in 0 … 100; None: none.
    """

    STATE = ("counts_sh",)
    SETTINGS = ("percentile",)

    def __init__(self, d_sae: int, percentile: float | None) -> None:
        self.percentile = percentile
        self.counts_sh = torch.zeros(d_sae, N_BINS, dtype=torch.int64)
        self._waiting_sh: Tensor | None = None
        """On a device: the counts since the last `flush`."""

    def update(self, codes: Codes) -> None:
        feature_n, value_n = codes.feature_n, codes.value_n
        if not codes.all_above:
            feature_n, value_n = feature_n[value_n > 0], value_n[value_n > 0]
        np.add.at(self.counts_sh.view(-1).numpy(), _place(feature_n, value_n).numpy(), 1)

    def update_on_device(self, codes: DeviceCodes) -> None:
        if self._waiting_sh is None:
            self._waiting_sh = torch.zeros(self.counts_sh.shape, dtype=torch.int64, device=codes.value_n.device)
        if kernels := kernels_on(codes.value_n.device):
            kernels.add_to_histogram(self._waiting_sh, codes.feature_n, codes.value_n, _SHIFT, _FIRST - 1)
            return
        # A score of zero or below counts nothing: its weight is 0, and its bin is merely in range.
        place_n = _place(codes.feature_n, codes.value_n)
        self._waiting_sh.view(-1).scatter_add_(0, place_n, (codes.value_n > 0).long())

    def flush(self) -> None:
        if self._waiting_sh is not None:
            self.counts_sh += self._waiting_sh.cpu()
            self._waiting_sh = None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._waiting_sh = None

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        return self.like({"counts_sh": self.counts_sh + other.counts_sh})

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        found = (
            {} if self.percentile is None else {percentile_stem(self.percentile): self.percentiles(n_tokens, self.percentile)}
        )
        return found | {"histograms": {"counts": self.counts_sh, "edges": edges(), "n_tokens": n_tokens}}

    def percentiles(self, n_tokens: int, percentile: float) -> Tensor:
        """A percentile of each feature over all tokens, scores not above zero counting as 0: float32 (d_sae,).

        The nearest-rank definition (NumPy's "inverted_cdf"): the smallest score that at least percentile % of all
        tokens do not exceed, read off as the middle of its bin.
        """
        edge_h = edges()
        # The open bin at the top has no middle: its lower edge is what is known.
        middle_h = torch.cat([(edge_h[:-2] + edge_h[1:-1]) / 2, edge_h[-2:-1]])
        rank = max(1, -(-round(percentile * 1_000_000) * n_tokens // 100_000_000))
        below_s = n_tokens - self.counts_sh.sum(dim=1)  # tokens at zero
        value_s = torch.empty(len(below_s))
        for first in range(0, len(below_s), PERCENTILE_ROWS):  # the sums of all would take as much as the counts
            part = slice(first, first + PERCENTILE_ROWS)
            bins_s1 = torch.searchsorted(self.counts_sh[part].cumsum(dim=1), rank - below_s[part, None])
            value_s[part] = middle_h[bins_s1[:, 0]]
        return torch.where(below_s >= rank, torch.zeros(()), value_s)
