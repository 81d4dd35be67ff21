"""A product in bfloat16 that finds the few entries worth a product in float32, and how far it may be off: `--screen bf16`.

The bound. Let x be a token, w a feature's column and o what is added (its bias, less its threshold); x^ and w^ are x and w
rounded to bfloat16. An entry of the fast product, h^, and the float32 value that a code would have, h, are both near
x.w + o, and so no further apart than the sum of

    |x^| |w^ - w| + |x^ - x| |w|      of rounding x and w: x^.w^ - x.w = x^.(w^ - w) + (x^ - x).w, and Cauchy-Schwarz
    (2 d + 16) 2^-24 (|x| |w| + |o|)  of the float32 sums of both, in any order (Higham, "Accuracy and Stability of
                                      Numerical Algorithms", eq. 3.5), with the larger of |x| and |x^|, and of |w| and |w^|
    |o - o^|                          o^ is two bfloat16 numbers, columns of w^ whose tokens are 1
    2^-110 (1 + |x|) (1 + |w|)        of numbers below 2^-126, which the product may take for 0
    2^-8 |h^|                         of rounding the result

The norms are taken of the numbers at hand, not of the worst ones. A block shares one bound for w and o, the largest of its
features', so a bound is one number a token. What passes it is computed in float32, each entry by itself: its bits do not
depend on what else passed, on the block, or on the processor's bfloat16 unit.

Names: `b` tokens, `c` features of a block, `s` features, `d` model width, `e` the same and two more, `n` candidates.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.errors import ConfigError, RunError
from saev_dist.sae.select import Candidates, Margin

ROOM = 1 + 2.0**-10
"""For the rounding of the bound itself."""
RELATIVE = 2.0**-8 * (1 + 2.0**-6)
"""Of the rounding of the fast product's result, with room for its use."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Tokens in bfloat16."""

    x_be: Tensor
    off_b: NDArray[np.float64]
    """Norm of the difference to the tokens."""
    size_b: NDArray[np.float64]
    """At least the norm of either."""


class Screen:
    """The weights of an SAE's encoder, in bfloat16 and in float32, on the CPU.

    Args:
        w_ds: float32 (d, s).
        bias_s: float32 (s,).
        threshold: what a code must exceed; a number, or float32 (s,).

    Raises:
        ConfigError: a weight is too large for bfloat16.

    Memory: `w_ds` once more, and half of it.
    """

    def __init__(self, w_ds: Tensor, bias_s: Tensor, threshold: float | Tensor) -> None:
        d_model, d_sae = w_ds.shape
        self._bias_s, self._threshold = bias_s, threshold
        self._w_sd = w_ds.T.contiguous()
        offset_s = bias_s.double() - threshold
        self._w_se = torch.zeros(d_sae, d_model + 2, dtype=torch.bfloat16)
        self._w_se[:, :d_model] = self._w_sd
        self._w_se[:, d_model] = offset_s
        self._w_se[:, d_model + 1] = offset_s - self._w_se[:, d_model].double()
        if not torch.isfinite(self._w_se).all():
            raise ConfigError("--screen bf16: a weight of the SAE is too large for bfloat16. Run without it.")
        left_s = offset_s - self._w_se[:, d_model:].double().sum(dim=1)
        self._offset_off_s, self._offset_s = left_s.abs().numpy(), (bias_s.abs() + torch.as_tensor(threshold).abs()).numpy()
        off_sd = self._w_se[:, :d_model].float() - self._w_sd  # exact: they share their leading bits
        self._off_s, self._norm_s = _norms(off_sd), _norms(self._w_sd)
        with warnings.catch_warnings():  # torch says once that sparse CSR tensors are new
            warnings.simplefilter("ignore")
            torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1))

    def round(self, x_bd: Tensor) -> Rounded:
        """float32 (b, d), no value of which is infinite in bfloat16."""
        n_tokens, d_model = x_bd.shape
        x_be = torch.ones(n_tokens, d_model + 2, dtype=torch.bfloat16)
        x_be[:, :d_model] = x_bd
        off_b, norm_b = _norms(x_be[:, :d_model].float() - x_bd), _norms(x_bd)
        return Rounded(x_be, off_b, norm_b + off_b)

    def product(self, first: int, tokens: Rounded, out_cb: Tensor) -> Margin:
        """The fast product, less the threshold, of as many features from `first` on as `out_cb` (bfloat16) has rows."""
        rows = slice(first, first + len(out_cb))
        torch.mm(self._w_se[rows], tokens.x_be.T, out=out_cb)
        d_model = self._w_sd.shape[1]
        off, norm, offset = (float(part[rows].max()) for part in (self._off_s, self._norm_s, self._offset_s))
        size = norm + off
        bound_b = tokens.size_b * off + tokens.off_b * norm
        bound_b += (2 * d_model + 16) * 2.0**-24 * (tokens.size_b * size + offset) + float(self._offset_off_s[rows].max())
        bound_b += 2.0**-110 * (1 + tokens.size_b) * (1 + size)
        return Margin((bound_b * ROOM).astype(np.float32), RELATIVE)

    def recompute(self, candidates: Candidates, x_bd: Tensor) -> Candidates:
        """Candidates with what they are, in float32, in place of what they are at most.

        Raises:
            RunError: one is more than that: the product was not what the bound supposes.
        """
        token_n, feature_n, most_n = candidates
        ends_s = np.bincount(feature_n, minlength=len(self._w_sd)).cumsum()
        wanted_sb = torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], ends_s])),
            torch.from_numpy(token_n),
            torch.zeros(len(token_n)),
            (len(self._w_sd), len(x_bd)),
        )
        value_n = torch.sparse.sampled_addmm(wanted_sb, self._w_sd, x_bd.T, beta=0.0).values()
        value_n = (value_n + self._bias_s[torch.from_numpy(feature_n)]).numpy()
        threshold = self._threshold.numpy()[feature_n] if isinstance(self._threshold, Tensor) else self._threshold
        wrong_n = np.flatnonzero(~(value_n.astype(np.float64) - threshold <= most_n))
        if len(wrong_n):
            n = wrong_n[0]
            raise RunError(
                f"--screen bf16: a code of feature {feature_n[n]} is {value_n[n]:.7g}, above the bound of its fast product, "
                f"{most_n[n]:.7g} ({len(wrong_n)} of {len(value_n)} are). This machine's product is less exact than bfloat16 "
                "with float32 sums. Run without --screen, into another --out."
            )
        return token_n, feature_n, value_n


def _norms(x_nd: Tensor) -> NDArray[np.float64]:
    norm_n: NDArray[np.float64] = torch.linalg.vector_norm(x_nd, dim=1, dtype=torch.float64).numpy()
    return norm_n
