"""PURE. How much of the activations the SAE's decoder gives back.

Names: `b` tokens, `d` model width, `s` features.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from saev_dist.accumulators import fixed_point
from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes, to_cpu

TOKENS = 1024
"""Of which a float64 copy is made at a time."""


class Reconstruction(Accumulator):
    """Sums from which the normalized mean squared error follows.

    `normalized_mse = sum |x - x_hat|^2 / sum |x - mean(x)|^2`, with the mean over all tokens, as saev defines it. A
    batch's float64 sums are rounded to fixed point, and the rest is exact integer arithmetic.

    Cost: one row of the decoder is read per code; a (tokens, d_model) array for each batch; on a GPU the decoder.

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
        self._fold(codes.acts_bd, *codes.by_token(), self.w_dec_sd, self.b_dec_d)

    def update_on_device(self, codes: DeviceCodes) -> None:
        if self._on_device is None:
            self._on_device = self.w_dec_sd.to(codes.value_n.device), self.b_dec_d.to(codes.value_n.device)
        self._fold(codes.x_bd, codes.token_n, codes.feature_n, codes.value_n, *self._on_device)

    def _fold(
        self, x_bd: Tensor, token_n: Tensor, feature_n: Tensor, value_n: Tensor, w_dec_sd: Tensor, b_dec_d: Tensor
    ) -> None:
        """Add the sums of some tokens, whose codes are ordered by token."""
        first_b = torch.searchsorted(token_n, torch.arange(len(x_bd), device=x_bd.device))
        decoded_bd = F.embedding_bag(feature_n, w_dec_sd, first_b, mode="sum", per_sample_weights=value_n)
        decoded_bd.add_(b_dec_d)
        if self.undo_norm is not None:
            decoded_bd = self.undo_norm(decoded_bd, x_bd)
        sums = (x_bd.sum(0, dtype=torch.float64), _sum_of_squares(x_bd), _sum_of_squares(decoded_bd.sub_(x_bd)))
        for name, value in zip(self.STATE, to_cpu(*sums), strict=True):
            setattr(self, name, fixed_point.add(getattr(self, name), fixed_point.from_float(value)))

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        merged = type(self)(self.w_dec_sd, self.b_dec_d, self.undo_norm)
        for name in self.STATE:
            setattr(merged, name, fixed_point.add(getattr(self, name), getattr(other, name)))
        return merged

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


def _sum_of_squares(x_bd: Tensor) -> Tensor:
    """float64 (1,), without a float64 copy of the whole; exact of integers, so in any order."""
    return torch.stack([part_bd.double().square_().sum() for part_bd in x_bd.split(TOKENS)]).sum().view(1)
