"""What a GPU does with a product and its codes, in Triton, where plain torch would pass over them many times.

Each function has a counterpart in plain torch beside its caller, which is used where Triton does not work, and which the
tests hold it to, to the bit. `fused.kernels_on` says which it is. Triton comes with torch's CUDA builds; it compiles at
first use, and needs a C compiler for that.

Selecting goes in two steps. `_scan_*` has a part of a token's row in registers, and notes in which groups of a few
features there is something to keep: of a TopK it finds the k-th largest, without a sort, by counting how many reach a
guess, and guessing better, first among the largest of the groups, which are few. `_write_*` looks at these groups again and
writes the codes to their places.

Names: as in `select`; `p` parts of rows, `g` groups of features, or pairs of image and feature; `key` an int32 in the order
of the floats.
"""

from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 2**14
"""Most features of a part, which 256 threads hold, 64 each."""
MOST_AT_ONCE = 2**16
"""What 1,024 threads hold, the most of a program."""
PART_ABOVE = 2**12
"""The same where a threshold decides: 128 threads, 32 each."""
GROUP, GROUP_ABOVE = 16, 8
"""Features of a group: where few are kept, and where some hundredths are."""
GROUPS_AT_ONCE = 64
GUESSES = 24
"""Guesses that suit scores; after them midway between two keys, which always ends."""
CODES_AT_ONCE = 1024
EXACT = {"enable_fp_fusion": False}
"""Results are those of plain torch, to the bit: no product is fused with a sum."""
_launching = Lock()
"""One thread launches at a time: Triton hands out as loaded a kernel that another thread is still loading."""


def select_strongest(h_bs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The k largest of each row, of equal ones the first; zeros are left out.

    Args:
        h_bs: float32 or bfloat16 (b, s), contiguous, finite.
        k: at most s.

    Returns:
        Token and feature, int64 (n,), and value, float32 (n,), by token, then feature. None: k is larger than a part, or the
        strongest of all parts are more than 1,024 threads can hold.
    """
    n_tokens, d_sae = h_bs.shape
    n_parts = -(-d_sae // PART)
    width = -(-d_sae // n_parts)
    if k > d_sae - (n_parts - 1) * width or (n_parts > 1 and n_parts * k > MOST_AT_ONCE):
        return None
    feature_bk, value_bk = _strongest(h_bs, k, n_parts, width)
    if n_parts > 1:  # the strongest of all are among those of each part, which are in the features' order
        column_bk, value_bk = _strongest(value_bk, k, 1, n_parts * k)
        feature_bk = feature_bk.gather(1, column_bk)
    token_n = torch.arange(n_tokens, device=h_bs.device).repeat_interleave(k)
    feature_n, value_n = feature_bk.view(-1), value_bk.view(-1)
    if bool((value_n == 0).any()):
        kept_x = value_n.nonzero().squeeze(1)
        return token_n[kept_x], feature_n[kept_x], value_n[kept_x]
    return token_n, feature_n, value_n


def _strongest(h_bs: Tensor, k: int, n_parts: int, width: int) -> tuple[Tensor, Tensor]:
    """Of each part of each row the k largest, in the order of the features: int64 and float32 (b, parts * k)."""
    n_tokens, d_sae = h_bs.shape
    size = triton.next_power_of_2(max(width, GROUP))
    group_pg = torch.empty(n_tokens * n_parts, size // GROUP, dtype=torch.int32, device=h_bs.device)
    noted_3p = torch.empty(3, n_tokens * n_parts, dtype=torch.int32, device=h_bs.device)
    feature_bk = torch.empty(n_tokens, n_parts * k, dtype=torch.int64, device=h_bs.device)
    value_bk = torch.empty(n_tokens, n_parts * k, device=h_bs.device)
    grid = n_tokens, n_parts
    shift = 16 if h_bs.dtype == torch.bfloat16 else 0  # whose keys end in 16 equal bits
    _launch(
        _scan_strongest, grid, h_bs, group_pg, noted_3p, d_sae, width, k,
        SIZE=size, GROUP=GROUP, GUESSES=GUESSES, SHIFT=shift, num_warps=_warps(size, 64),
    )  # fmt: skip
    n_groups = min(GROUPS_AT_ONCE, size // GROUP)
    _launch(
        _write_strongest, grid, h_bs, group_pg, noted_3p, feature_bk, value_bk, d_sae, width, k,
        N_GROUPS=size // GROUP, AT_ONCE=n_groups, GROUP=GROUP, SHIFT=shift, num_warps=_warps(n_groups * GROUP, 16),
    )  # fmt: skip
    return feature_bk, value_bk


def select_above(h_bs: Tensor, threshold_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What exceeds the thresholds.

    Args:
        h_bs: float32 or bfloat16 (b, s), contiguous, finite.
        threshold_s: float32 (s,).

    Returns:
        As of `select_strongest`.
    """
    n_tokens, d_sae = h_bs.shape
    n_parts = -(-d_sae // PART_ABOVE)
    width = -(-d_sae // n_parts)
    size = triton.next_power_of_2(max(width, GROUP_ABOVE))
    group_pg = torch.empty(n_tokens * n_parts, size // GROUP_ABOVE, dtype=torch.int32, device=h_bs.device)
    noted_2p = torch.empty(2, n_tokens * n_parts, dtype=torch.int32, device=h_bs.device)
    grid = n_tokens, n_parts
    _launch(
        _scan_above, grid, h_bs, threshold_s, group_pg, noted_2p, d_sae, width,
        SIZE=size, GROUP=GROUP_ABOVE, num_warps=_warps(size, 32),
    )  # fmt: skip
    end_p = noted_2p[1].cumsum(0)
    n_codes = int(end_p[-1])
    token_n, feature_n = (torch.empty(n_codes, dtype=torch.int64, device=h_bs.device) for _ in range(2))
    value_n = torch.empty(n_codes, device=h_bs.device)
    n_groups = min(GROUPS_AT_ONCE, size // GROUP_ABOVE)
    _launch(
        _write_above, grid, h_bs, threshold_s, group_pg, noted_2p, end_p, token_n, feature_n, value_n, d_sae, width,
        N_GROUPS=size // GROUP_ABOVE, AT_ONCE=n_groups, GROUP=GROUP_ABOVE, num_warps=_warps(n_groups * GROUP_ABOVE, 16),
    )  # fmt: skip
    return token_n, feature_n, value_n


def add_to_moments(sums_5s: Tensor, feature_n: Tensor, value_n: Tensor) -> None:
    """Add the counts of values above zero, and the parts that `fixed_point.to_parts` makes of them: int64 (5, s)."""
    grid = (triton.cdiv(len(value_n), CODES_AT_ONCE),)
    _launch(_add_to_moments, grid, sums_5s, feature_n, value_n, len(value_n), sums_5s.shape[1], SIZE=CODES_AT_ONCE, num_warps=4)


def add_to_histogram(counts_sh: Tensor, feature_n: Tensor, value_n: Tensor, shift: int, first: int) -> None:
    """Count the values above zero, each in the bin that the upper bits of its pattern are, `first` being bin 0."""
    grid = (triton.cdiv(len(value_n), CODES_AT_ONCE),)
    n_bins = counts_sh.shape[1]
    _launch(
        _add_to_histogram, grid, counts_sh, feature_n, value_n, len(value_n), n_bins, first,
        SHIFT=shift, SIZE=CODES_AT_ONCE, num_warps=4,
    )  # fmt: skip


def strongest_means(token_n: Tensor, feature_n: Tensor, value_n: Tensor, n_imgs: int, n_patches: int, d_sae: int) -> Tensor:
    """Means of the 3 largest of each image and feature, zeros where there are fewer; of values above zero: float32 (g,)."""
    n_groups = n_imgs * d_sae
    best_3g = torch.zeros(3, n_groups, dtype=torch.int64, device=token_n.device)
    mean_g = torch.empty(n_groups, device=token_n.device)
    codes = token_n, feature_n, value_n, len(token_n), n_patches, d_sae
    grid = (triton.cdiv(len(token_n), CODES_AT_ONCE),)
    for place in range(min(3, n_patches)):
        former_g = best_3g[max(0, place - 1)]
        _launch(_raise_best, grid, best_3g[place], former_g, *codes, IS_FIRST=place == 0, SIZE=CODES_AT_ONCE, num_warps=4)
    grid = (triton.cdiv(n_groups, CODES_AT_ONCE),)
    _launch(_mean_of_best, grid, mean_g, best_3g, n_groups, float(min(3, n_patches)), SIZE=CODES_AT_ONCE, num_warps=4)
    return mean_g


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    with _launching:
        kernel[grid](*args, **settings, **EXACT)


def _warps(n_numbers: int, per_thread: int) -> int:
    return max(1, n_numbers // (32 * per_thread))


# ---- on the device; pointers have the names of what they point to


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    pattern = x.to(tl.int32, bitcast=True)
    return tl.where(pattern < 0, pattern ^ 0x7FFFFFFF, pattern)


@triton.jit
def _float(key):  # type: ignore[no-untyped-def]
    """What has this key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _load(row, column, stop):  # type: ignore[no-untyped-def]
    return tl.load(row + column, mask=column < stop, other=float("-inf")).to(tl.float32)


@triton.jit
def _largest_of_groups(x, N_GROUPS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.max(tl.reshape(x, (N_GROUPS, GROUP)), 1)


@triton.jit
def _note_groups(group, some_g, N_GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the numbers of the groups that have something to keep; return how many they are."""
    n_g = tl.cumsum(some_g, 0)
    tl.store(group + n_g - 1, tl.arange(0, N_GROUPS), mask=some_g > 0)
    return tl.max(n_g, 0)


@triton.jit
def _raise_low(key, low, n_low, high, k, most, GUESSES: tl.constexpr, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raise `low`, which `n_low` keys reach, until no more than `most` do, but k or more; or to one that `most` equal."""
    n_high = tl.full((), 0, tl.int32)  # so many reach `high`: fewer than k
    n_guesses = 0
    while (n_low > most) & (low + 1 < high):
        guess = (low >> 1) + (high >> 1) + (low & high & 1)
        if n_guesses < GUESSES:  # as if the logarithm of how many reach a float fell evenly
            share = tl.log(n_low / k) / tl.log(n_low / tl.maximum(n_high.to(tl.float32), 0.5))
            between = (1 - share) * _float(low << SHIFT) + share * _float((high - 1) << SHIFT)
            guess = tl.minimum(tl.maximum(_key(between) >> SHIFT, low + 1), high - 1)
        n_guesses += 1
        n_guess = tl.sum((key >= guess).to(tl.int32), 0)
        if n_guess >= k:
            low = guess
            n_low = n_guess
        else:
            high = guess
            n_high = n_guess
    return low, n_low


@triton.jit
def _scan_strongest(  # type: ignore[no-untyped-def]
    h, group, noted, n_features, width, k,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GUESSES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    n_all_parts = tl.num_programs(0) * tl.num_programs(1)
    row = h + tl.program_id(0).to(tl.int64) * n_features
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, n_features)
    column = first + tl.arange(0, SIZE)
    key = _key(_load(row, column, stop)) >> SHIFT
    low = tl.min(tl.where(column < stop, key, 0x7FFFFFFF), 0)
    n_low = stop - first
    largest_g = _largest_of_groups(key, SIZE // GROUP, GROUP)
    high = tl.max(largest_g, 0) + 1
    n_groups = (stop - first) // GROUP
    if k <= n_groups:  # what the largest of k groups reach, k keys do, and hardly more
        low, _ = _raise_low(largest_g, low, tl.sum((largest_g >= low).to(tl.int32), 0), high, k, k + k // 8, GUESSES, SHIFT)
        n_low = tl.sum((key >= low).to(tl.int32), 0)
    low, n_low = _raise_low(key, low, n_low, high, k, k, GUESSES, SHIFT)
    n_equal = k
    if n_low > k:  # of those that are equal to the k-th largest only the first are kept
        n_equal = k - tl.sum((key > low).to(tl.int32), 0)
    n_noted = _note_groups(group + part.to(tl.int64) * (SIZE // GROUP), (largest_g >= low).to(tl.int32), SIZE // GROUP)
    tl.store(noted + part, n_noted)
    tl.store(noted + n_all_parts + part, low)
    tl.store(noted + 2 * n_all_parts + part, n_equal)


@triton.jit
def _write_strongest(  # type: ignore[no-untyped-def]
    h, group, noted, feature, value, n_features, width, k,
    N_GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    n_all_parts = tl.num_programs(0) * tl.num_programs(1)
    row = h + tl.program_id(0).to(tl.int64) * n_features
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, n_features)
    n_noted = tl.load(noted + part)
    least = tl.load(noted + n_all_parts + part)
    n_equal = tl.load(noted + 2 * n_all_parts + part)
    place = part.to(tl.int64) * k - 1
    i = tl.arange(0, AT_ONCE * GROUP)
    begin = 0
    while begin < n_noted:
        number = tl.load(
            group + part.to(tl.int64) * N_GROUPS + begin + i // GROUP, mask=begin + i // GROUP < n_noted, other=N_GROUPS
        )
        column = first + number * GROUP + i % GROUP
        x = _load(row, column, stop)
        key = _key(x) >> SHIFT
        equal = (key == least).to(tl.int32)
        equal_so_far = tl.cumsum(equal, 0)
        kept = (key > least) | ((equal > 0) & (equal_so_far <= n_equal))
        n = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(feature + place + n, column.to(tl.int64), mask=kept)
        tl.store(value + place + n, x, mask=kept)
        n_equal -= tl.max(equal_so_far, 0)
        place += tl.max(n, 0)
        begin += AT_ONCE


@triton.jit
def _scan_above(h, threshold, group, noted, n_features, width, SIZE: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = h + tl.program_id(0).to(tl.int64) * n_features
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, n_features)
    column = first + tl.arange(0, SIZE)
    kept = _load(row, column, stop) > tl.load(threshold + column, mask=column < stop, other=0.0)
    some_g = _largest_of_groups(kept.to(tl.int32), SIZE // GROUP, GROUP)
    n_noted = _note_groups(group + part.to(tl.int64) * (SIZE // GROUP), some_g, SIZE // GROUP)
    tl.store(noted + part, n_noted)
    tl.store(noted + tl.num_programs(0) * tl.num_programs(1) + part, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _write_above(  # type: ignore[no-untyped-def]
    h, threshold, group, noted, end, token, feature, value, n_features, width,
    N_GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = h + tl.program_id(0).to(tl.int64) * n_features
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, n_features)
    n_noted = tl.load(noted + part)
    place = tl.load(end + part) - tl.load(noted + tl.num_programs(0) * tl.num_programs(1) + part) - 1
    i = tl.arange(0, AT_ONCE * GROUP)
    begin = 0
    while begin < n_noted:
        number = tl.load(
            group + part.to(tl.int64) * N_GROUPS + begin + i // GROUP, mask=begin + i // GROUP < n_noted, other=N_GROUPS
        )
        column = first + number * GROUP + i % GROUP
        x = _load(row, column, stop)
        kept = x > tl.load(threshold + column, mask=column < stop, other=0.0)
        n = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(token + place + n, column.to(tl.int64) * 0 + tl.program_id(0), mask=kept)
        tl.store(feature + place + n, column.to(tl.int64), mask=kept)
        tl.store(value + place + n, x, mask=kept)
        place += tl.max(n, 0)
        begin += AT_ONCE


@triton.jit
def _add_to_moments(sums, feature, value, n_codes, d_sae, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(value + i, mask=i < n_codes, other=0.0).to(tl.float64)
    sum_ = sums + tl.load(feature + i, mask=i < n_codes, other=0)
    whole = tl.minimum(x, 4611686018427387904.0).to(tl.int64)  # 2^62; it is rounded down
    fraction = (x - whole.to(tl.float64)) * 4611686018427387904.0
    # To the nearest, of two the even one: numbers from 2^52 on have no fractions, and floats from 2^51 on have none left.
    fraction = tl.where(fraction < 2251799813685248.0, (fraction + 4503599627370496.0) - 4503599627370496.0, fraction)
    fraction = tl.where(x < 4611686018427387904.0, fraction, 0.0).to(tl.int64)
    tl.atomic_add(sum_, tl.full((SIZE,), 1, tl.int64), mask=x > 0, sem="relaxed")
    tl.atomic_add(sum_ + d_sae, whole >> 31, mask=(x > 0) & (whole >> 31 != 0), sem="relaxed")
    tl.atomic_add(sum_ + 2 * d_sae, whole & 0x7FFFFFFF, mask=(x > 0) & (whole & 0x7FFFFFFF != 0), sem="relaxed")
    tl.atomic_add(sum_ + 3 * d_sae, fraction >> 31, mask=(x > 0) & (fraction >> 31 != 0), sem="relaxed")
    tl.atomic_add(sum_ + 4 * d_sae, fraction & 0x7FFFFFFF, mask=(x > 0) & (fraction & 0x7FFFFFFF != 0), sem="relaxed")


@triton.jit
def _add_to_histogram(counts, feature, value, n_codes, n_bins, first, SHIFT: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(value + i, mask=i < n_codes, other=0.0)
    bin_ = tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> SHIFT) - first, 0), n_bins - 1)
    place = tl.load(feature + i, mask=i < n_codes, other=0) * n_bins + bin_
    tl.atomic_add(counts + place, tl.full((SIZE,), 1, tl.int64), mask=x > 0, sem="relaxed")


@triton.jit
def _raise_best(best, former, token, feature, value, n_codes, n_patches, d_sae, IS_FIRST: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raise the largest of each image and feature; of what is below the former largest, unless it is the first."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    token = tl.load(token + i, mask=i < n_codes, other=0)
    group = token // n_patches * d_sae + tl.load(feature + i, mask=i < n_codes, other=0)
    x = tl.load(value + i, mask=i < n_codes, other=0.0)
    key = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token  # all differ
    counts = i < n_codes
    if not IS_FIRST:
        counts = counts & (key < tl.load(former + group, mask=i < n_codes, other=0))
    tl.atomic_max(best + group, key, mask=counts, sem="relaxed")


@triton.jit
def _mean_of_best(mean, best, n_groups, n_places, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first = (tl.load(best + i, mask=i < n_groups, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    second = (tl.load(best + n_groups + i, mask=i < n_groups, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    third = (tl.load(best + 2 * n_groups + i, mask=i < n_groups, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(mean + i, tl.div_rn((first + second) + third, n_places), mask=i < n_groups)
