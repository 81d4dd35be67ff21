"""Which entries of a dense product are codes, all features at a time: in torch, or in Triton where it works.

On the CPU `sieve` makes the same choice, some features at a time.

Names: `b` tokens, `s` features, `k` kept or groups, `g` groups, `n` candidates or codes, `x` some of them.
"""

import torch
from torch import Tensor

from saev_dist.fused import kernels_on
from saev_dist.sae.model import Activation, GroupMax, TopK

GROUPS_PER_K = 8
"""Groups a code: the k-th largest of their maxima is a bound that k entries reach, and few others."""


def select_at_once(h_bs: Tensor, activation: Activation, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries that the activation keeps, before it changes their values.

    Args:
        h_bs: (b, s), contiguous.
        activation: what keeps them.
        threshold: of all activations but TopK and GroupMax: an entry must be larger. One number, or (s,).

    Returns:
        Token and feature, int64 (n,), and value, float32 (n,), by token, then feature. On the block's device.
    """
    kernels = kernels_on(h_bs.device)
    match activation:
        case TopK(k):
            k = min(k, h_bs.shape[1])
            codes: tuple[Tensor, Tensor, Tensor] | None = kernels.select_strongest(h_bs, k) if kernels else None
            if codes:
                return codes
            flat_n, value_n = _k_largest(h_bs, k)
        case GroupMax(k):
            flat_n, value_n = _largest_of_groups(h_bs, k)
        case _:
            if kernels:
                if isinstance(threshold, Tensor):
                    threshold_s = threshold.float()
                else:  # filled on the device: a copy from here would wait for the product
                    threshold_s = torch.full((h_bs.shape[1],), threshold, dtype=torch.float32, device=h_bs.device)
                codes = kernels.select_above(h_bs, threshold_s)
                return codes
            flat_n = (h_bs > threshold).view(-1).nonzero().squeeze(1)
            value_n = h_bs.view(-1)[flat_n].float()
    token_n = flat_n // h_bs.shape[1]
    return token_n, flat_n - token_n * h_bs.shape[1], value_n


def _largest_of_groups(h_bs: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    h_bkg = h_bs.unflatten(1, (n_groups, -1))
    least_bk1 = h_bkg.amax(dim=2, keepdim=True).clamp(min=_least(h_bs.dtype))  # of a dead group all may be equal
    flat_n = (h_bkg >= least_bk1).view(-1).nonzero().squeeze(1)
    group_n = flat_n // h_bkg.shape[2]
    flat_n = flat_n[torch.cat([group_n[:1] >= 0, group_n[1:] != group_n[:-1]])]
    return flat_n, h_bs.view(-1)[flat_n].float()


def _least(dtype: torch.dtype) -> float:
    """The least number above 0."""
    return float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))


def _k_largest(h_bs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each row, the earlier first among equals: of what reaches a bound that k entries reach."""
    d_sae = h_bs.shape[1]
    group = max(1, d_sae // (GROUPS_PER_K * k))
    n_groups = d_sae // group
    maxima_bg = h_bs[:, : group * n_groups].unflatten(1, (group, n_groups)).amax(dim=1)
    bound_b1 = maxima_bg.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    bound_b1 = bound_b1.masked_fill(bound_b1 == 0, _least(h_bs.dtype))  # zeros are no codes, and may be most of a row
    flat_n = (h_bs >= bound_b1).view(-1).nonzero().squeeze(1)
    value_n = h_bs.view(-1)[flat_n].float()
    row_n = flat_n // d_sae
    order_n = value_n.sort(descending=True, stable=True).indices
    row_n, again_n = row_n[order_n].sort(stable=True)
    first_b = torch.searchsorted(row_n, torch.arange(len(h_bs), device=h_bs.device))
    is_among_k_n = torch.arange(len(row_n), device=h_bs.device) - first_b[row_n] < k
    keep_n = torch.zeros_like(is_among_k_n)
    keep_n[order_n[again_n]] = is_among_k_n
    kept_x = (keep_n & (value_n != 0)).nonzero().squeeze(1)
    return flat_n[kept_x], value_n[kept_x]
