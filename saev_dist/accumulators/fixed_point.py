"""PURE. Sums that do not depend on the order: floats rounded to a fixed-point integer of two int64 limbs.

A number is `whole + fraction * 2**-62` with `0 <= fraction < 2**62`. A float64 below 2^62 loses at most 2^-63 on
entry; addition is exact and associative up to 4.6e18, beyond which it is an error, never a wrap.

Where many numbers are added in no order, on a GPU, they are added as four integers of 31 bits each (`to_parts`).
"""

from fractions import Fraction

import torch
from torch import Tensor

from saev_dist.errors import MergeError

FRACTION_BITS = 62
LIMIT = 2**62
PART_BITS = FRACTION_BITS // 2
MAX_ADDED = 2**31
"""Numbers whose parts may be added up: the sums then stay below 2^63."""


def from_float(x: Tensor) -> Tensor:
    """Round float64 (...) to limbs, int64 (..., 2).

    Raises:
        MergeError: a number is not finite, or 2^62 or larger.
    """
    if x.numel() and not float(x.abs().max()) < LIMIT:
        raise MergeError(f"a sum over some tokens is {float(x.abs().max())}; sums of activations must stay below 4.6e18.")
    whole = x.trunc()  # then x - whole is exact; after floor it is not, for small negative x
    fraction = ((x - whole) * LIMIT).round().to(torch.int64)
    return _carry(whole.to(torch.int64), fraction)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two sets of limbs, int64 (..., 2).

    Raises:
        MergeError: a sum is 2^62 or larger.
    """
    total = _carry(a[..., 0] + b[..., 0], a[..., 1] + b[..., 1])
    if total.numel() and int(total[..., 0].abs().max()) >= LIMIT:
        raise MergeError("a sum of activations passes 4.6e18, the largest that is kept exactly.")
    return total


def to_parts(x_n: Tensor) -> Tensor:
    """Round float64 (n,), from 0 on, to the halves of their limbs: int64 (4, n). What is 2^62 or larger becomes 2^62."""
    whole_n = x_n.trunc()
    fraction_n = ((x_n - whole_n) * LIMIT).round().to(torch.int64)
    whole_n = whole_n.clamp(max=LIMIT).to(torch.int64)
    return torch.stack([half for limb in (whole_n, fraction_n) for half in (limb >> PART_BITS, limb & (2**PART_BITS - 1))])


def from_parts(parts_4s: Tensor) -> Tensor:
    """Limbs, int64 (s, 2), of sums of at most MAX_ADDED numbers' parts, int64 (4, s).

    Raises:
        MergeError: a sum is 2^62 or larger.
    """
    wholes, whole, fractions, fraction = parts_4s
    fractions = fractions + (fraction >> PART_BITS)
    whole = whole + (fractions >> PART_BITS)
    wholes = wholes + (whole >> PART_BITS)
    if wholes.numel() and int(wholes.max()) >= 2**PART_BITS:
        raise MergeError("a sum of activations passes 4.6e18, the largest that is kept exactly.")
    low = 2**PART_BITS - 1
    return torch.stack([(wholes << PART_BITS) | (whole & low), ((fractions & low) << PART_BITS) | (fraction & low)], dim=-1)


def to_float(limbs: Tensor) -> Tensor:
    """Nearest float64 (up to one rounding of each limb) of limbs int64 (..., 2)."""
    # Below zero the limbs are brought to one sign: -1 + (1 - tiny) would round away most of tiny.
    borrow = ((limbs[..., 0] < 0) & (limbs[..., 1] > 0)).long()
    return (limbs[..., 0] + borrow).double() + (limbs[..., 1] - borrow * LIMIT).double() / LIMIT


def to_fractions(limbs: Tensor) -> list[Fraction]:
    """Exact values of limbs int64 (n, 2)."""
    return [Fraction(whole) + Fraction(part, LIMIT) for whole, part in limbs.tolist()]


def _carry(whole: Tensor, fraction: Tensor) -> Tensor:
    return torch.stack([whole + (fraction >> FRACTION_BITS), fraction & (LIMIT - 1)], dim=-1)
