"""PURE. saev's running percentile estimate, for comparison with runs of saev's own scripts.

The estimate depends on the order of the tokens, so it merges with nothing, and runs in one process only. The histogram's
percentile is exact to 3.1 %; this one walks towards the percentile by less than 0.002 a token, and stays far from
it on fewer than many thousand tokens.
"""

import itertools
from typing import Any, Self

import torch

from saev_dist.accumulators.base import Accumulator, Codes
from saev_dist.accumulators.histogram import percentile_stem
from saev_dist.errors import MergeError

STEP = 1e-3


class SaevPercentile(Accumulator):
    """`estimate += step * (sign(score - estimate) + 2 p - 1)` per token, with a step that falls linearly to zero.

    Source: saev's `PercentileEstimator` (September 2025).

    Args:
        d_sae: features.
        percentile: in 0 … 100.
        n_tokens: tokens of the whole data, which set how fast the step falls.
    """

    STATE = ("estimate_s", "n_seen_1")
    SETTINGS = ("percentile", "n_tokens")

    def __init__(self, d_sae: int, percentile: float, n_tokens: int) -> None:
        self.percentile, self.n_tokens = percentile, n_tokens
        self.estimate_s = torch.zeros(d_sae)
        self.n_seen_1 = torch.zeros(1, dtype=torch.int64)
        """Of the first tokens of the data."""

    def update(self, codes: Codes) -> None:
        """Walk through the batch's tokens; batches must come in data order."""
        n_seen = int(self.n_seen_1)
        assert n_seen == codes.img_i * codes.n_patches
        self.n_seen_1 += codes.n_tokens
        drift = 2 * self.percentile / 100 - 1.0
        token_n, feature_n, value_n = codes.by_token()
        cuts = torch.searchsorted(token_n, torch.arange(codes.n_tokens + 1)).tolist()
        score_s = torch.zeros_like(self.estimate_s)
        for low, high in itertools.pairwise(cuts):
            n_seen += 1
            step = STEP * (self.n_tokens - n_seen) / self.n_tokens
            score_s.zero_()[feature_n[low:high]] = value_n[low:high]
            self.estimate_s += step * (torch.sign(score_s - self.estimate_s) + drift)

    def merge(self, other: Self) -> Self:
        raise MergeError("saev's estimate of a percentile depends on the order of the tokens: two of them do not merge.")

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        return {percentile_stem(self.percentile): self.estimate_s}
