"""PURE. Artifacts with rows in data order: each piece of a batch makes its rows, and the artifact is their concatenation.

They grow with the data, so unlike accumulators they are never held whole: a rank appends its rows to a spill file
(`spill.Spill`), and because batches cover the data without overlap, concatenating in plan order is their merge.

Names: `n` codes, `e` images, `r` sampled tokens, `v` groups of codes of one feature and image; `x` some of them, `p` place
among the strongest.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.accumulators.base import Codes, DeviceCodes, changes, stable_order
from saev_dist.fused import kernels_on

N_STRONGEST = 3
MAX_PLACES = 32
"""Codes of a feature in an image, up to which they are looked at one after the other."""
GROUPS = 2**15
"""Groups that are looked at together: their values stay in the cache."""
GROUPS_ON_DEVICE = 2**22
"""The same on a GPU, at 50 bytes each."""
NOTHING = -(2**63)
"""A key below those of all values."""


def sample_stride(n_tokens: int, max_samples: int) -> int:
    """Every how many tokens a sample is taken, so that there are at most `max_samples`."""
    return max(1, -(-n_tokens // max_samples))


def n_samples(n_tokens: int, max_samples: int) -> int:
    """Tokens 0, stride, 2 * stride, … below `n_tokens`."""
    return -(-n_tokens // sample_stride(n_tokens, max_samples))


def n_sampled(first_token: int, n_tokens: int, stride: int) -> int:
    """How many of the tokens first_token … first_token + n_tokens - 1 are multiples of `stride`."""
    return len(range(-first_token % stride, n_tokens, stride))


def sampled_values(codes: Codes | DeviceCodes, n_features: int, stride: int) -> Tensor:
    """The first features' values, zeros included, on those tokens whose global index is a multiple of `stride`.

    Returns:
        float32 (r, n_features), where the codes are.
    """
    if isinstance(codes, DeviceCodes):
        return _sampled_values_on_device(codes, n_features, stride)
    offset = -codes.img_i * codes.n_patches % stride
    rows = np.zeros((n_sampled(codes.img_i * codes.n_patches, codes.n_tokens, stride), n_features), np.float32)
    stop = int(np.searchsorted(codes.feature_n.numpy(), n_features))
    feature_n, token_n, value_n = (x.numpy()[:stop] for x in (codes.feature_n, codes.token_n, codes.value_n))
    keep_n = (token_n - offset) % stride == 0
    rows[(token_n[keep_n] - offset) // stride, feature_n[keep_n]] = value_n[keep_n]
    return torch.from_numpy(rows)


def _sampled_values_on_device(codes: DeviceCodes, n_features: int, stride: int) -> Tensor:
    offset = -codes.img_i * codes.n_patches % stride
    n_rows = n_sampled(codes.img_i * codes.n_patches, codes.n_tokens, stride)
    row_n, past_n = (codes.token_n - offset) // stride, (codes.token_n - offset) % stride
    nowhere = n_rows * n_features  # a place for the others, so that nobody waits for their number
    flat_n = torch.where((codes.feature_n < n_features) & (past_n == 0), row_n * n_features + codes.feature_n, nowhere)
    rows = codes.value_n.new_zeros(nowhere + 1).scatter_(0, flat_n, codes.value_n)
    return rows[:nowhere].view(n_rows, n_features)


def image_means(codes: Codes | DeviceCodes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per image and feature the mean of the 3 strongest patches (of all, with fewer), as rows of a CSR matrix.

    Patches without a code count as zeros, between the positive and the negative ones. Means of 0 are not stored.
    As saev: `sae_acts.topk(3, dim=patches).values.mean()`.

    Returns:
        entries per image, int64 (e,); their features, int32 (v,), ascending within an image; their means, float32 (v,);
        where the codes are.
    """
    if isinstance(codes, DeviceCodes):
        return _image_means_on_device(codes, d_sae)
    feature_n, value_n = codes.feature_n.numpy(), codes.value_n.numpy()
    img_n = codes.token_n.numpy() // codes.n_patches
    start_v = np.flatnonzero(codes.is_first_n | changes(img_n))
    img_v, feature_v = img_n[start_v], feature_n[start_v]
    sum_v = _strongest_sums(value_n, start_v, codes.n_patches, has_below=not codes.all_above)
    mean_v = sum_v / np.float32(min(N_STRONGEST, codes.n_patches))
    keep_v = mean_v != 0
    img_v, feature_v, mean_v = img_v[keep_v], feature_v[keep_v], mean_v[keep_v]
    order_v = stable_order(torch.from_numpy(img_v), codes.n_imgs).numpy()
    found = np.bincount(img_v, minlength=codes.n_imgs), feature_v[order_v].astype(np.int32), mean_v[order_v]
    counts_e, indices_v, means_v = map(torch.from_numpy, found)
    return counts_e, indices_v, means_v


def _image_means_on_device(codes: DeviceCodes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the definition, as tables with a place for each image and feature, some images at a time."""
    parts = []
    for part in codes.split(max(1, GROUPS_ON_DEVICE // d_sae)):
        mean_g = _strongest_means(part, d_sae)
        kept_x = mean_g.nonzero().squeeze(1)
        end_e = torch.searchsorted(kept_x, torch.arange(1, part.n_imgs + 1, device=kept_x.device) * d_sae)
        parts.append((end_e.diff(prepend=end_e.new_zeros(1)), (kept_x % d_sae).int(), mean_g[kept_x]))
    counts_e, indices_v, means_v = (torch.cat(part) for part in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    return counts_e, indices_v, means_v


def _strongest_means(codes: DeviceCodes, d_sae: int) -> Tensor:
    """float32 (images * features,): the largest value is taken out three times, a zero where the patches without a code win."""
    if codes.all_above and (kernels := kernels_on(codes.value_n.device)):
        means_g: Tensor = kernels.strongest_means(
            codes.token_n, codes.feature_n, codes.value_n, codes.n_imgs, codes.n_patches, d_sae
        )
        return means_g
    group_n = codes.token_n // codes.n_patches * d_sae + codes.feature_n
    # Keys are in the order of the values, and differ: the pattern of a float, with the other bits flipped below zero, is an
    # integer in the order of the floats; below it the token.
    pattern_n = codes.value_n.view(torch.int32)
    pattern_n = torch.where(pattern_n < 0, pattern_n ^ (2**31 - 1), pattern_n).long()
    key_n = pattern_n << 32 | codes.token_n
    minus_n = torch.full_like(group_n, -1, dtype=torch.int32)
    n_zeros_g = minus_n.new_full((codes.n_imgs * d_sae,), codes.n_patches).scatter_add_(0, group_n, minus_n)
    sum_g = codes.value_n.new_zeros(len(n_zeros_g))
    n_places = min(N_STRONGEST, codes.n_patches)
    for _ in range(n_places):
        best_g = torch.where(n_zeros_g > 0, 0, NOTHING).scatter_reduce_(0, group_n, key_n, "amax")
        n_zeros_g -= (best_g == 0).int()
        best_pattern_g = (best_g >> 32).int()
        sum_g += torch.where(best_pattern_g < 0, best_pattern_g ^ (2**31 - 1), best_pattern_g).view(torch.float32)
        key_n.masked_fill_(key_n == best_g[group_n], NOTHING)
    # a divisor on the device: torch would multiply by the inverse of a number of the CPU's, which rounds otherwise
    return sum_g.div_(sum_g.new_full((1,), n_places))


def _strongest_sums(
    value_n: NDArray[np.float32], start_v: NDArray[np.int64], n_patches: int, *, has_below: bool
) -> NDArray[np.float32]:
    """Sums of the 3 strongest patches of each group: its values, side by side from `start_v` on, and zeros for the rest.

    Args:
        has_below: some values are below zero.
    """
    size_v = np.diff(start_v, append=len(value_n))
    sum_v = np.zeros(len(start_v), np.float32)
    large_v = size_v > MAX_PLACES
    if has_below:  # where too few zeros are left, values below zero count
        large_v |= size_v > n_patches - N_STRONGEST
    small_x, large_x = np.flatnonzero(~large_v), np.flatnonzero(large_v)
    for first in range(0, len(small_x), GROUPS):
        part_x = small_x[first : first + GROUPS]
        sum_v[part_x] = _strongest_of_small(value_n, start_v[part_x], size_v[part_x])
    if len(large_x):
        sum_v[large_x] = _strongest_of_large(value_n[np.repeat(large_v, size_v)], size_v[large_x], n_patches)
    return sum_v


def _strongest_of_small(
    value_n: NDArray[np.float32], start_v: NDArray[np.int64], size_v: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The same sums where zeros beat what is below them: the groups side by side, a place of each at a time."""
    order_v = stable_order(torch.from_numpy(MAX_PLACES - size_v), MAX_PLACES + 1).numpy()  # the largest first
    start_v, n_longer = start_v[order_v], len(size_v) - np.bincount(size_v, minlength=1).cumsum()
    strongest_pv = np.zeros((N_STRONGEST, len(size_v)), np.float32)
    for place, n_groups in enumerate(n_longer[:-1]):
        value_x = value_n[start_v[:n_groups] + place]
        for strongest_v in strongest_pv[:, :n_groups]:
            beaten_x = np.minimum(strongest_v, value_x)
            np.maximum(strongest_v, value_x, out=strongest_v)
            value_x = beaten_x
    sum_v = np.empty(len(size_v), np.float32)
    sum_v[order_v] = (strongest_pv[0] + strongest_pv[1]) + strongest_pv[2]
    return sum_v


def _strongest_of_large(value_n: NDArray[np.float32], size_v: NDArray[np.int64], n_patches: int) -> NDArray[np.float32]:
    """The same sums by their definition: the largest value is taken out three times. It overwrites `value_n`."""
    start_v = size_v.cumsum() - size_v
    group_n = np.repeat(np.arange(len(size_v)), size_v)
    largest_pv = np.empty((N_STRONGEST, len(size_v)), np.float32)
    for place in range(N_STRONGEST):
        largest_pv[place] = np.maximum.reduceat(value_n, start_v)
        found_x = np.flatnonzero(value_n == largest_pv[place][group_n])
        value_n[found_x[changes(group_n[found_x])]] = -np.inf  # of equal ones the first
    n_zeros_v = n_patches - size_v
    n_above_v = (largest_pv > 0).sum(axis=0)
    sum_v = np.zeros(len(size_v), np.float32)
    for place in range(min(N_STRONGEST, n_patches)):  # place in the descending order: above zero, zeros, below zero
        code_v = np.where(place < n_above_v, place, place - n_zeros_v)
        stored_v = (place < n_above_v) | (place >= n_above_v + n_zeros_v)
        sum_v[stored_v] += largest_pv[code_v[stored_v], stored_v.nonzero()[0]]
    return sum_v
