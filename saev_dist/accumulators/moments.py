"""PURE. How often and how strongly each feature fires.

Names: `s` features.
"""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators import fixed_point
from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes, changes
from saev_dist.fused import kernels_on


class Moments(Accumulator):
    """Count and sum of each feature's scores above zero.

    The count is exact. The sum over each `update` is taken in float64 and rounded to fixed point (2^-63); totals are
    exact sums of those. On a GPU each score is rounded to fixed point. Memory: 24 bytes a feature; 40 more on a GPU.
    """

    STATE = ("count_s", "sum_s2")

    def __init__(self, d_sae: int) -> None:
        self.count_s = torch.zeros(d_sae, dtype=torch.int64)
        """Tokens on which the feature is above zero."""
        self.sum_s2 = torch.zeros(d_sae, 2, dtype=torch.int64)
        """Sum of those scores, in limbs of `fixed_point`."""
        self._waiting_5s: Tensor | None = None
        """On a device: the count and the parts of the sum since the last `flush`."""
        self._n_waiting = 0

    def update(self, codes: Codes) -> None:
        feature_n, value_n, is_first_n = codes.feature_n.numpy(), codes.value_n.numpy(), codes.is_first_n
        if not codes.all_above:
            feature_n, value_n = feature_n[value_n > 0], value_n[value_n > 0]
            is_first_n = changes(feature_n)
        start_v = np.flatnonzero(is_first_n)
        if not len(start_v):
            return
        feature_v = torch.from_numpy(feature_n[start_v])
        self.count_s[feature_v] += torch.from_numpy(np.diff(start_v, append=len(value_n)))
        # a float64 sum of reduceat's is a function of the feature's own values in their order, and so reproducible
        sum_v = torch.from_numpy(np.add.reduceat(value_n, start_v, dtype=np.float64))
        self.sum_s2[feature_v] = fixed_point.add(self.sum_s2[feature_v], fixed_point.from_float(sum_v))

    def update_on_device(self, codes: DeviceCodes) -> None:
        if self._n_waiting + codes.n_tokens > fixed_point.MAX_ADDED:
            self.flush()
        if self._waiting_5s is None:
            self._waiting_5s = torch.zeros(5, len(self.count_s), dtype=torch.int64, device=codes.value_n.device)
        self._n_waiting += codes.n_tokens
        if kernels := kernels_on(codes.value_n.device):
            kernels.add_to_moments(self._waiting_5s, codes.feature_n, codes.value_n)
            return
        above_n = (codes.value_n > 0).long()
        parts_4n = fixed_point.to_parts(codes.value_n.double().clamp_(min=0))
        for waiting_s, part_n in zip(self._waiting_5s, (above_n, *parts_4n), strict=True):
            waiting_s.scatter_add_(0, codes.feature_n, part_n)  # of integers, so in any order

    def flush(self) -> None:
        if self._waiting_5s is not None:
            count_s, *parts_4s = self._waiting_5s.cpu()
            self._waiting_5s, self._n_waiting = None, 0
            self.count_s += count_s
            self.sum_s2 = fixed_point.add(self.sum_s2, fixed_point.from_parts(torch.stack(parts_4s)))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._waiting_5s, self._n_waiting = None, 0

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        return self.like({"count_s": self.count_s + other.count_s, "sum_s2": fixed_point.add(self.sum_s2, other.sum_s2)})

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        mean_s = fixed_point.to_float(self.sum_s2) / self.count_s  # 0 / 0 = NaN: a feature that never fired
        return {
            "sparsity": (self.count_s.double() / n_tokens).float(),
            "mean_values": mean_s.float(),
            "metrics": {
                "n_tokens": n_tokens,
                "d_sae": len(self.count_s),
                "l0": int(self.count_s.sum()) / n_tokens,
                "n_dead": int((self.count_s == 0).sum()),
            },
        }
