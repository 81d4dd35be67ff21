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

        with torch.cuda.device(device):
            _try(kernels, device)
    except Exception as err:  # noqa: BLE001  # compilers and drivers raise what they like
        if isinstance(err, ModuleNotFoundError) and err.name == "triton":
            return None  # it is not part of every build of torch
        why = str(err).strip().splitlines() or [type(err).__name__]
        warn(f"Triton does not work here ({why[-1]}); the GPU's work is done without it, and takes longer.")
        return None
    return kernels


def _try(kernels: ModuleType, device: torch.device) -> None:
    """Run each kernel on a few numbers whose results are known.

    Raises:
        ValueError: something else was found.
    """
    for d_sae, dtype in ((300, torch.bfloat16), (20_000, torch.float32)):
        h_bs = (torch.arange(2 * d_sae, device=device) * 7 % (2 * d_sae + 1) - d_sae).view(2, d_sae).to(dtype)
        found, value_bk = kernels.select_strongest(h_bs, 9), h_bs.topk(9, dim=1).values.float()
        strongest = torch.equal(found[2].view(2, 9).sort(descending=True).values, value_bk)
        strongest &= torch.equal(h_bs[found[0], found[1]].float(), found[2])
        found = kernels.select_above(h_bs, torch.full((d_sae,), 100.0, device=device))
        if not (strongest and torch.equal(found[0] * d_sae + found[1], (h_bs > 100).view(-1).nonzero().squeeze(1))):
            raise ValueError("it finds other codes")
    token_n, feature_n = torch.tensor([[0, 1, 3], [0, 2, 2]], device=device)
    value_n = torch.tensor([1.5, 2.0, 0.25], device=device)
    sums_5s = torch.zeros(5, 3, dtype=torch.int64, device=device)
    counts_sh = torch.zeros(3, 4, dtype=torch.int64, device=device)
    kernels.add_to_moments(sums_5s, feature_n, value_n)
    kernels.add_to_histogram(counts_sh, feature_n, value_n, 23, 126)
    mean_g = kernels.strongest_means(token_n, feature_n, value_n, 1, 4, 3)
    if sums_5s.tolist() != [[1, 0, 2], [0, 0, 0], [1, 0, 2], [2**30, 0, 2**29], [0, 0, 0]]:
        raise ValueError("it adds up otherwise")
    if counts_sh.tolist() != [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]] or mean_g.tolist() != [0.5, 0, 0.75]:
        raise ValueError("it counts otherwise")
