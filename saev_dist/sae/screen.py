"""A product in bfloat16 that finds the few entries worth a product in float32, and how far it may be off: `--screen bf16`.

The bound. Let x be a token, w a feature's column and o what is added (its bias, less its threshold); x^ and w^ are x and w
rounded to bfloat16. An entry of the fast product, h^, and the float32 value that a code would have, h, are both near
x.w + o, and so no further apart than the sum of

    |x^| |w^ - w| + |x^ - x| |w|      of rounding x and w: x^.w^ - x.w = x^.(w^ - w) + (x^ - x).w, and Cauchy-Schwarz
    (4 d + 16) 2^-24 (|x| |w| + |o|)  of the float32 sums of both, in any order, one of them rounded to odd as ARM's units do
                                      (Higham, "Accuracy and Stability of Numerical Algorithms", eq. 3.5); with the larger
                                      of |x| and |x^|, and of |w| and |w^|
    |o - o^|                          o^ is two bfloat16 numbers, columns of w^ whose tokens are 1
    2^-110 (1 + |x|) (1 + |w|)        of numbers below 2^-126, which the product may take for 0; for d up to 2^15; not where
                                      x and o are 0, and both entries too
    2^-8 |h^|                         of rounding the result

The norms are taken of the numbers at hand, not of the worst ones. A block shares one bound for w and o, the largest of its
features', so a bound is one number a token; the loudest features of a block, whose own bounds would swell everybody's, are
left out of that and always computed again. What passes is computed in float32, each entry by itself: its bits do not depend
on what else passed, on the block, or on the processor's bfloat16 unit (on its float32 unit they do, as a product's do).

Names: `b` tokens, `c` features of a block, `s` features, `d` model width, `e` the same and two more, padded with zeros of
w^, `n` candidates, `x` rows.
"""

import threading
import warnings
from dataclasses import dataclass
from timeit import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.errors import ConfigError, RunError
from saev_dist.machine import one_thread
from saev_dist.sae.product import numpy_is_faster
from saev_dist.sae.sieve import Candidates, Margin

ROOM = 1 + 2.0**-10
"""For the rounding of the bound itself."""
LOUD = 4
"""A feature is loud if its bound exceeds this many times the median of its block's."""
LOUDEST = 64
"""At most one feature in this many is treated as loud."""
STEP = 2048
"""Features that are rounded at a time."""
PAYS = 1.2
"""Times as fast as in float32 a product must be for a screen to gain anything."""
RELATIVE = 2.0**-8 * (1 + 2.0**-6)
"""Of the rounding of the fast product's result, with room for its use."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Tokens in bfloat16."""

    x_be: Tensor
    off_b: NDArray[np.float64]
    """Norm of the difference to the tokens."""
    size_b: NDArray[np.float64]
    """At least the norm of the token, and of it in bfloat16."""


class Screen:
    """A `product.Product` in bfloat16, and what of it matters in float32, on the CPU.

    Args:
        w_ds: float32 (d, s).
        bias_s: float32 (s,).
        threshold: what a code must exceed; a number, or float32 (s,).

    Raises:
        ConfigError: a weight, bias or threshold is too large for bfloat16.

    Memory: `w_ds` once more, and half of it.
    """

    dtype = torch.bfloat16

    def __init__(self, w_ds: Tensor, bias_s: Tensor, threshold: float | Tensor) -> None:
        d_model, d_sae = w_ds.shape
        self._bias_s, self._threshold = bias_s, threshold
        offset_s = bias_s.double() - threshold
        self._w_sd = torch.empty(d_sae, d_model)
        self._w_se = torch.zeros(d_sae, _padded(d_model + 2), dtype=torch.bfloat16)
        self._w_se[:, d_model] = offset_s
        self._w_se[:, d_model + 1] = offset_s - self._w_se[:, d_model].double()
        self._parts_4s = np.empty((4, d_sae))
        """Of w: the norm of the difference, the norm. Of o: the difference, the magnitude."""
        for first in range(0, d_sae, STEP):
            part = slice(first, first + STEP)
            self._w_sd[part] = w_ds[:, part].T
            self._w_se[part, :d_model] = self._w_sd[part]
            off_cd = self._w_se[part, :d_model].float() - self._w_sd[part]  # exact: they share their leading bits
            self._parts_4s[:2, part] = _norms(off_cd), _norms(self._w_sd[part])
        self._parts_4s[2] = (offset_s - self._w_se[:, d_model:].double().sum(dim=1)).abs()
        self._parts_4s[3] = bias_s.double().abs() + torch.as_tensor(threshold).abs()
        if not np.isfinite(self._parts_4s).all():
            raise ConfigError(
                "--screen bf16: a weight, bias or threshold of the SAE is too large for bfloat16. Leave --screen out, and add "
                "--force if the run has begun."
            )
        self._lock = threading.Lock()
        self._n_tokens = self._n_recomputed = 0
        with warnings.catch_warnings():  # torch says once that sparse CSR tensors are new
            warnings.simplefilter("ignore")
            torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1))

    def prepare(self, x_bd: Tensor) -> Rounded:
        """float32 (b, d), no value of which is infinite in bfloat16."""
        n_tokens, d_model = x_bd.shape
        x_be = torch.ones(n_tokens, self._w_se.shape[1], dtype=torch.bfloat16)
        x_be[:, :d_model] = x_bd
        off_b, norm_b = _norms(x_be[:, :d_model].float() - x_bd), _norms(x_bd)
        with self._lock:
            self._n_tokens += n_tokens
        return Rounded(x_be, off_b, norm_b + off_b)

    def into(self, out_cb: Tensor, features: slice, prepared: Rounded) -> Margin:
        """Write the fast product of some features, bias less threshold added.

        Args:
            out_cb: bfloat16 (c, b).
            features: c of them.
            prepared: the tokens.

        Returns:
            How far each entry may be off its code's float32 value, less the threshold.
        """
        torch.mm(self._w_se[features], prepared.x_be.T, out=out_cb)
        parts_4c = self._parts_4s[:, features]
        bound_c = self._bound(prepared.off_b.max(keepdims=True), prepared.size_b.max(keepdims=True), parts_4c)
        ordered_c = np.sort(bound_c)
        is_loud_c = bound_c > max(LOUD * ordered_c[len(ordered_c) // 2], ordered_c[-1 - len(ordered_c) // LOUDEST])
        bound_b = self._bound(prepared.off_b, prepared.size_b, parts_4c[:, ~is_loud_c].max(axis=1, keepdims=True))
        return Margin((bound_b * ROOM).astype(np.float32), RELATIVE, np.flatnonzero(is_loud_c))

    def _bound(self, off: NDArray[np.float64], size: NDArray[np.float64], parts: NDArray[np.float64]) -> NDArray[np.float64]:
        """The module's sum but for the result's rounding, of tokens and features that broadcast."""
        w_off, w_norm, o_off, o_size = parts
        w_size = w_norm + w_off
        sums = (4 * self._w_sd.shape[1] + 16) * 2.0**-24 * (size * w_size + o_size)
        tiny = 2.0**-110 * ((size > 0) | (o_size > 0)) * (1 + size) * (1 + w_size)
        bound: NDArray[np.float64] = size * w_off + off * w_norm + sums + o_off + tiny
        return bound

    @property
    def recomputed_per_token(self) -> float:
        """Entries that passed so far; one that passed early may count twice."""
        return self._n_recomputed / max(1, self._n_tokens)

    def recompute(self, candidates: Candidates, x_bd: Tensor) -> Candidates:
        """Candidates with what they are, in float32, in place of what they are at most.

        Raises:
            RunError: one is more than that: the product was not what the bound supposes.
        """
        token_n, feature_n, most_n = candidates
        with self._lock:
            self._n_recomputed += len(token_n)
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


def speedup(d_model: int) -> float:
    """How many times as fast as an encoder would make it in float32 this machine makes a product of that width in bfloat16, one
    thread each."""
    x_bd, w_sd = torch.ones(512, d_model), torch.ones(512, d_model)
    fast_x_be, fast_w_se = (torch.ones(512, _padded(d_model + 2), dtype=torch.bfloat16) for _ in range(2))
    plain = (lambda: x_bd.numpy() @ w_sd.numpy().T) if numpy_is_faster() else lambda: x_bd @ w_sd.T
    with one_thread():  # of four times the first one prepares
        seconds = [min(repeat(multiply, number=1, repeat=4)) for multiply in (plain, lambda: fast_x_be @ fast_w_se.T)]
    return seconds[0] / seconds[1]


def _padded(width: int) -> int:
    """Rows that begin at cache lines: AMX then takes half the time."""
    return -(-width // 32) * 32


def _norms(x_nd: Tensor) -> NDArray[np.float64]:
    norm_n: NDArray[np.float64] = torch.linalg.vector_norm(x_nd, dim=1, dtype=torch.float64).numpy()
    return norm_n
