"""PURE. How much of the activations the SAE's decoder gives back.

Names: `b` tokens, `d` model width, `n` codes, `s` features.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saev_dist.accumulators import fixed_point
from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes, stable_order, to_cpu

TOKENS, TOKENS_ON_DEVICE = 1024, 8192
"""Of which a float64 copy is made at a time, into one buffer; on a GPU more, for few kernels."""
PART_BYTES = 2**22
"""Of the decoder, that all tokens of a piece are given before the next part: then it comes from a CPU's cache."""
MOST_BYTES = 2**24
"""Of a part; a larger one would not stay in the cache either."""
CODES_IN_PART = 16
"""Of a token, on average at least: with fewer, fetching the sums again costs more than the cache saves."""


class Reconstruction(Accumulator):
    """Sums from which the normalized mean squared error follows.

    `normalized_mse = sum |x - x_hat|^2 / sum |x - mean(x)|^2`, with the mean over all tokens, as saev defines it. The
    float64 sums of each update are rounded to fixed point, and the rest is exact integer arithmetic.

    Cost: one row of the decoder is read per code; two (tokens, d_model) arrays of a piece, or on a GPU of a batch, and what
    `undo_norm` takes; on a GPU the decoder.

    Args:
        w_dec_sd: float32 (d_sae, d_model).
        b_dec_d: float32 (d_model,).
        undo_norm: takes the decoder's output for tokens, and the tokens, to the tokens' units; None: it is in them already.
    """

    STATE = ("sum_d2", "squares_12", "errors_12")

    def __init__(self, w_dec_sd: Tensor, b_dec_d: Tensor, undo_norm: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.w_dec_sd, self.b_dec_d, self.undo_norm = w_dec_sd, b_dec_d, undo_norm
        self.sum_d2 = torch.zeros(len(b_dec_d), 2, dtype=torch.int64)
        """Sum of the activations."""
        self.squares_12 = torch.zeros(1, 2, dtype=torch.int64)
        """Sum of their squares."""
        self.errors_12 = torch.zeros(1, 2, dtype=torch.int64)
        """Sum of the squared errors."""
        self._on_device: tuple[Tensor, Tensor] | None = None
        """The decoder."""

    def update(self, codes: Codes) -> None:
        self._fold(codes.acts_bd, _decode_by_parts(codes, self.w_dec_sd, self.b_dec_d))

    def update_on_device(self, codes: DeviceCodes) -> None:
        if self._on_device is None:
            self._on_device = self.w_dec_sd.to(codes.value_n.device), self.b_dec_d.to(codes.value_n.device)
        w_dec_sd, b_dec_d = self._on_device
        first_b = torch.searchsorted(codes.token_n, torch.arange(len(codes.x_bd), device=codes.x_bd.device))
        self._fold(codes.x_bd, _sum_rows(codes.feature_n, codes.value_n, first_b, w_dec_sd).add_(b_dec_d))

    def _fold(self, x_bd: Tensor, decoded_bd: Tensor) -> None:
        """Add the sums of some tokens, and overwrite what the decoder made of them."""
        if self.undo_norm is not None:
            decoded_bd = self.undo_norm(decoded_bd, x_bd)
        _, errors_1 = _sums(decoded_bd.sub_(x_bd))
        for name, value in zip(self.STATE, to_cpu(*_sums(x_bd), errors_1), strict=True):
            setattr(self, name, fixed_point.add(getattr(self, name), fixed_point.from_float(value)))

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        return self.like({name: fixed_point.add(getattr(self, name), getattr(other, name)) for name in self.STATE})

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        d_model = len(self.sum_d2)
        (squares,) = fixed_point.to_fractions(self.squares_12)
        (errors,) = fixed_point.to_fractions(self.errors_12)
        baseline = squares - sum(total**2 for total in fixed_point.to_fractions(self.sum_d2)) / n_tokens
        return {
            "metrics": {
                # constant activations have no variance to explain
                "normalized_mse": float(errors / baseline) if baseline > 0 else None,
                "sse_recon": float(errors),
                "sse_baseline": float(baseline),
                "mse_per_dim": float(errors / (n_tokens * d_model)),
                "mse_per_token": float(errors / n_tokens),
                "baseline_mse_per_dim": float(baseline / (n_tokens * d_model)),
                "baseline_mse_per_token": float(baseline / n_tokens),
                "d_model": d_model,
            }
        }


def _decode_by_parts(codes: Codes, w_dec_sd: Tensor, b_dec_d: Tensor) -> Tensor:
    """What the decoder makes of codes, float32 (b, d): of some features for all tokens, then of the next ones."""
    decoded_bd, token_n = b_dec_d.repeat(codes.n_tokens, 1), codes.token_n.numpy()
    n_parts = min(-(-w_dec_sd.nbytes // PART_BYTES), len(token_n) // (CODES_IN_PART * codes.n_tokens))
    if w_dec_sd.nbytes > n_parts * MOST_BYTES:
        n_parts = 1
    step = -(-len(w_dec_sd) // n_parts)
    cuts = np.searchsorted(codes.feature_n.numpy(), range(0, len(w_dec_sd) + step, step))
    for part_i, (low, high) in enumerate(pairwise(cuts)):
        order_n = low + stable_order(codes.token_n[low:high], codes.n_tokens)
        count_b = np.bincount(token_n[low:high], minlength=codes.n_tokens)
        first_b, first = torch.from_numpy(count_b.cumsum() - count_b), part_i * step
        part_sd = w_dec_sd[first : first + step]
        decoded_bd += _sum_rows(codes.feature_n[order_n] - first, codes.value_n[order_n], first_b, part_sd)
    return decoded_bd


def _sum_rows(feature_n: Tensor, value_n: Tensor, first_b: Tensor, w_dec_sd: Tensor) -> Tensor:
    """Each token's sum of rows of the decoder, float32 (b, d), of codes ordered by token: a token's begin at `first_b`."""
    return F.embedding_bag(feature_n, w_dec_sd, first_b, mode="sum", per_sample_weights=value_n)


def _sums(x_bd: Tensor) -> tuple[Tensor, Tensor]:
    """Over the tokens, float64 (d,), and of all squares, float64 (1,); exact, and so independent of the order, of integers."""
    step = TOKENS if x_bd.device.type == "cpu" else TOKENS_ON_DEVICE
    wide_bd = x_bd.new_empty(min(step, len(x_bd)), x_bd.shape[1], dtype=torch.float64)
    sums, squares = [], []
    for part_bd in x_bd.split(step):
        part_bd = wide_bd[: len(part_bd)].copy_(part_bd)
        sums.append(part_bd.sum(0))
        squares.append(part_bd.square_().sum())
    return torch.stack(sums).sum(0), torch.stack(squares).sum().view(1)
