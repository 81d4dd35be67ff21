"""Whether this process uses the Triton kernels on a device."""

from functools import cache
from types import ModuleType

import torch

from saev_dist.errors import warn


@cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """`saev_dist.kernels` where they run: on a GPU, if Triton is there and works, which a warning says where it does not."""
    if device.type != "cuda":
        return None
    try:
        from saev_dist import kernels
    except ImportError:  # not part of every build of torch
        return None
    try:
        with torch.cuda.device(device):
            _try(kernels, device)
    except Exception as err:  # noqa: BLE001  # compilers and drivers raise what they like
        why = str(err).strip().splitlines() or [type(err).__name__]
        warn(f"Triton does not work here ({why[-1]}); the GPU's work is done without it, and takes longer.")
        return None
    return kernels


def _try(kernels: ModuleType, device: torch.device) -> None:
    """Find what is known.

    Raises:
        ValueError: something else was found.
    """
    h_bs = (torch.arange(600, device=device) * 7 % 601 - 300).view(2, 300).float()
    found, (value_bk, feature_bk) = kernels.select_strongest(h_bs, 9), h_bs.topk(9, dim=1)
    same = torch.equal(found[1].view(2, 9), feature_bk.sort(dim=1).values) and torch.equal(found[2].sum(), value_bk.sum())
    found = kernels.select_above(h_bs, torch.full((300,), 100.0, device=device))
    if not (same and torch.equal(found[0] * 300 + found[1], (h_bs > 100).view(-1).nonzero().squeeze(1))):
        raise ValueError("it finds other codes")
