"""PURE. Artifacts with rows in data order: each batch makes its rows, and the artifact is their concatenation.

They grow with the data, so unlike accumulators they are never held whole: a rank appends its rows to a spill file
(`store.Spill`), and because batches cover the data without overlap, concatenating in plan order is their merge.

Names: `n` codes, `e` images of the batch, `r` sampled tokens, `v` stored entries.
"""

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from saev_dist.accumulators.base import Codes

N_STRONGEST = 3


def sample_stride(n_tokens: int, max_samples: int) -> int:
    """Every how many tokens a sample is taken, so that there are at most `max_samples`."""
    return max(1, -(-n_tokens // max_samples))


def n_samples(n_tokens: int, max_samples: int) -> int:
    """Tokens 0, stride, 2 * stride, … below `n_tokens`."""
    return -(-n_tokens // sample_stride(n_tokens, max_samples))


def n_sampled(first_token: int, n_tokens: int, stride: int) -> int:
    """How many of the tokens first_token … first_token + n_tokens - 1 are multiples of `stride`."""
    return len(range(-first_token % stride, n_tokens, stride))


def sampled_values(codes: Codes, n_features: int, stride: int) -> NDArray[np.float32]:
    """The first features' values, zeros included, on the batch's tokens whose global index is a multiple of `stride`.

    Returns:
        float32 (r, n_features).
    """
    offset = -codes.img_i * codes.n_patches % stride
    rows = torch.zeros(n_sampled(codes.img_i * codes.n_patches, codes.n_tokens, stride), n_features)
    keep_n = ((codes.feature_n < n_features) & ((codes.token_n - offset) % stride == 0)).nonzero().squeeze(1)
    rows[(codes.token_n[keep_n] - offset) // stride, codes.feature_n[keep_n]] = codes.value_n[keep_n]
    return rows.numpy()


def image_means(codes: Codes, d_sae: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Per image and feature the mean of the 3 strongest patches (of all, with fewer), as rows of a CSR matrix.

    Patches without a code count as zeros, between the positive and the negative ones. Means of 0 are not stored.
    As saev: `sae_acts.topk(3, dim=patches).values.mean()`.

    Returns:
        entries per image, int64 (e,); their features, int32 (v,), ascending within an image; their means, float32 (v,).
    """
    # One sort of 64-bit keys orders the codes by image, feature, then score descending: NumPy sorts plain integers
    # with vector instructions. Image and feature share 31 bits, so a batch with very many goes in pieces.
    imgs_per_piece = max(1, 2**31 // d_sae)
    img_n = (codes.token_n // codes.n_patches).numpy()
    cuts = [*np.searchsorted(img_n, np.arange(0, codes.n_imgs, imgs_per_piece)).tolist(), len(img_n)]
    groups, means = [], []
    for low, high in itertools.pairwise(cuts):
        base = int(img_n[low]) if high > low else 0
        group_n = (img_n[low:high] - base) * d_sae + codes.feature_n[low:high].numpy()
        group_v, mean_v = _strongest_means(group_n, codes.value_n[low:high].numpy(), codes.n_patches)
        groups.append(group_v + base * d_sae)
        means.append(mean_v)
    group_v, mean_v = np.concatenate(groups), np.concatenate(means)
    img_v = group_v // d_sae
    counts_e = np.bincount(img_v, minlength=codes.n_imgs)
    return counts_e, (group_v - img_v * d_sae).astype(np.int32), mean_v


def _strongest_means(
    group_n: NDArray[np.int64], value_n: NDArray[np.float32], n_patches: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Groups below 2^31 with a mean other than 0, ascending, and those means."""
    bits_n = value_n.view(np.int32)
    rising_n = bits_n ^ ((bits_n >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    key_n = np.sort((group_n << 32) | ((rising_n ^ 0x7FFFFFFF).view(np.uint32)))  # complement: strongest first
    group_n = key_n >> 32
    rising_n = (key_n & 0xFFFFFFFF).astype(np.uint32).view(np.int32) ^ 0x7FFFFFFF
    value_n = (rising_n ^ ((rising_n >> 31) & 0x7FFFFFFF)).view(np.float32)

    start_v = np.flatnonzero(np.diff(group_n, prepend=-1))
    if not len(start_v):
        return group_n, value_n
    stop_v = np.append(start_v[1:], len(group_n))
    n_zeros_v = n_patches - (stop_v - start_v)
    n_above_v = np.add.reduceat((value_n > 0).astype(np.int64), start_v)
    total_v = np.zeros(len(start_v), dtype=np.float32)
    n_strongest = min(N_STRONGEST, n_patches)
    for place in range(n_strongest):  # place in the descending order of all patches: above zero, zeros, below zero
        code_v = start_v + np.where(place < n_above_v, place, place - n_zeros_v)
        stored_v = (place < n_above_v) | (place >= n_above_v + n_zeros_v)
        total_v[stored_v] += value_n[code_v[stored_v]]
    mean_v = total_v / np.float32(n_strongest)
    keep_v = mean_v != 0
    return group_n[start_v[keep_v]], mean_v[keep_v]
