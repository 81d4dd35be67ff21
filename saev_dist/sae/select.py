"""Which entries of a dense block are codes.

On the CPU in NumPy, a slice of some rows at a time, so that each look at it but the first finds it in the cache: the
block is read from memory once. Elsewhere in torch, the whole block at a time. Both make the same choice.

Names: `b` rows, `s` features, `k` kept or groups, `g` groups of features, `w` candidates of a row, `n` codes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.sae.model import Activation, GroupMax, TopK

SLICE_CODES = 2**20  # 4 MB
GROUPS_PER_K = 8

Flat = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Positions in the flat block, ascending, and the values there."""


def select(h_bs: Tensor, activation: Activation, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """The entries that the activation keeps, before it changes their values.

    Args:
        h_bs: (b, s), contiguous.
        activation: what keeps them.
        threshold: of all activations but TopK and GroupMax: an entry must be larger. One number, or (s,).

    Returns:
        Positions in the flat block, int64 (n,), ascending; the values there, float32 (n,). On the block's device.
    """
    if h_bs.device.type != "cpu":
        return _select_at_once(h_bs, activation, threshold)
    bound = threshold.float().numpy() if isinstance(threshold, Tensor) else threshold
    n_rows, d_sae = h_bs.shape
    step = max(1, SLICE_CODES // d_sae)
    mask_bs = np.empty((min(step, n_rows), d_sae), dtype=bool)
    parts: list[Flat] = []
    for first in range(0, n_rows, step):
        slice_bs = h_bs[first : first + step].float().numpy()
        flat_n, value_n = _select_slice(slice_bs, activation, bound, mask_bs[: len(slice_bs)])
        parts.append((flat_n + first * d_sae, value_n))
    flat_n, value_n = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(flat_n), torch.from_numpy(value_n)


# ---- on the CPU


def _select_slice(
    h_bs: NDArray[np.float32], activation: Activation, threshold: float | NDArray[np.float32], mask_bs: NDArray[np.bool_]
) -> Flat:
    match activation:
        case TopK(k):
            k = min(k, h_bs.shape[1])
            np.greater_equal(h_bs, _kth_bound_slice(h_bs, k), out=mask_bs)
            return _keep_k_slice(h_bs, np.flatnonzero(mask_bs), k)
        case GroupMax(k):
            h_bkg = h_bs.reshape(len(h_bs), k, -1)
            np.equal(h_bkg, h_bkg.max(axis=2, keepdims=True), out=mask_bs.reshape(h_bkg.shape))
            flat_n = np.flatnonzero(mask_bs)
            flat_n = _first_of_groups(flat_n, flat_n // h_bkg.shape[2])
            value_n = h_bs.ravel()[flat_n]
            return flat_n[value_n > 0], value_n[value_n > 0]
    np.greater(h_bs, threshold, out=mask_bs)
    flat_n = np.flatnonzero(mask_bs)
    return flat_n, h_bs.ravel()[flat_n]


def _kth_bound_slice(h_bs: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """A value per row, (b, 1), that at least `k` entries of the row reach and few others do.

    The k-th largest of the maxima of disjoint groups: each of those maxima is an entry of the row. Finding it
    reads the slice once and selects among a few hundred numbers instead of all features.
    """
    n_rows, d_sae = h_bs.shape
    group = max(1, d_sae // (GROUPS_PER_K * k))
    n_groups = d_sae // group
    maxima_bg = h_bs[:, : group * n_groups].reshape(n_rows, group, n_groups).max(axis=1)
    bound: NDArray[np.float32] = np.partition(maxima_bg, n_groups - k, axis=1)[:, n_groups - k, None]
    return bound


def _keep_k_slice(h_bs: NDArray[np.float32], flat_n: NDArray[np.int64], k: int) -> Flat:
    """Of candidates keep each row's k largest, the lower feature first among equals; zeros are no codes."""
    value_n = h_bs.ravel()[flat_n]
    row_n = flat_n // h_bs.shape[1]
    count_b = np.bincount(row_n, minlength=len(h_bs))
    place_n = np.arange(len(flat_n)) - (count_b.cumsum() - count_b)[row_n]
    width = int(count_b.max())
    value_bw = np.full((len(h_bs), width), -np.inf, np.float32)
    value_bw[row_n, place_n] = value_n
    kth_b1 = np.partition(value_bw, width - k, axis=1)[:, width - k, None]
    above_bw, equal_bw = value_bw > kth_b1, value_bw == kth_b1
    room_b1 = k - above_bw.sum(axis=1, keepdims=True)
    if (equal_bw.sum(axis=1, keepdims=True) > room_b1).any():
        equal_bw &= equal_bw.cumsum(axis=1) <= room_b1
    keep_n = (above_bw | equal_bw)[row_n, place_n] & (value_n != 0)
    return flat_n[keep_n], value_n[keep_n]


def _first_of_groups(flat_n: NDArray[np.int64], group_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first position of each group; a group's positions lie side by side."""
    first_n: NDArray[np.int64] = flat_n[np.diff(group_n, prepend=-1) != 0]
    return first_n


# ---- elsewhere


def _select_at_once(h_bs: Tensor, activation: Activation, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    match activation:
        case TopK(k):
            k = min(k, h_bs.shape[1])
            return _keep_k(h_bs, (h_bs >= _kth_bound(h_bs, k)).view(-1).nonzero().squeeze(1), k)
        case GroupMax(k):
            h_bkg = h_bs.unflatten(1, (k, -1))
            flat_n = (h_bkg == h_bkg.amax(dim=2, keepdim=True)).view(-1).nonzero().squeeze(1)
            group_n = flat_n // h_bkg.shape[2]
            flat_n = flat_n[torch.cat([group_n.new_ones(1, dtype=torch.bool), group_n[1:] != group_n[:-1]])]
            value_n = h_bs.view(-1)[flat_n].float()
            return flat_n[value_n > 0], value_n[value_n > 0]
    flat_n = (h_bs > threshold).view(-1).nonzero().squeeze(1)
    return flat_n, h_bs.view(-1)[flat_n].float()


def _kth_bound(h_bs: Tensor, k: int) -> Tensor:
    d_sae = h_bs.shape[1]
    group = max(1, d_sae // (GROUPS_PER_K * k))
    n_groups = d_sae // group
    maxima_bg = h_bs[:, : group * n_groups].unflatten(1, (group, n_groups)).amax(dim=1)
    bound_b1: Tensor = maxima_bg.topk(k, dim=1, sorted=True).values[:, -1:]
    return bound_b1


def _keep_k(h_bs: Tensor, flat_n: Tensor, k: int) -> tuple[Tensor, Tensor]:
    value_n = h_bs.view(-1)[flat_n].float()
    row_n = flat_n // h_bs.shape[1]
    count_b = torch.bincount(row_n, minlength=len(h_bs))
    place_n = torch.arange(len(flat_n), device=h_bs.device) - (count_b.cumsum(0) - count_b)[row_n]
    value_bw = torch.full((len(h_bs), int(count_b.max())), -torch.inf, device=h_bs.device)
    value_bw[row_n, place_n] = value_n
    kth_b1 = value_bw.topk(k, dim=1, sorted=True).values[:, -1:]
    above_bw, equal_bw = value_bw > kth_b1, value_bw == kth_b1
    equal_bw &= equal_bw.cumsum(dim=1) <= k - above_bw.sum(dim=1, keepdim=True)
    keep_n = (above_bw | equal_bw)[row_n, place_n] & (value_n != 0)
    return flat_n[keep_n], value_n[keep_n]
