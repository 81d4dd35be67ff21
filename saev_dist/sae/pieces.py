"""PURE. How batches are cut into pieces for threads, pieces into blocks for caches, and how many are under way."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from saev_dist.sae.model import Activation, GroupMax, TopK

PIECE_CODES = 2**25  # most codes that a piece may have: they are held until it is done
BLOCK_TOKENS = 2048
BLOCK_FEATURES = 768  # 6 MB: of the multiples of 256 the fastest, by 7 % at d_model 768 and 14 % at 1,024
FIRST_BLOCKS = 4  # of features that a TopK sees first, together: a high bar from the start halves the candidates
WANTED_FEATURES = 256  # of a block, where only some are wanted: each costs its block, all hardly more than larger blocks do
LANES = 2  # batches that a GPU works on at a time
LANE_CODES = 2**29  # entries of a GPU's product at a time, 2 GB in fp32


def encodes_at_once(device: torch.device) -> bool:
    """Whether all features of a token are looked at together, and the codes stay on the device: not on the CPU."""
    return device.type != "cpu"


def piece_tokens(activation: Activation, d_sae: int) -> int:
    """Most tokens of a piece on the CPU, unless one image has more: so few that its codes do not pass PIECE_CODES."""
    per_token = min(activation.k, d_sae) if isinstance(activation, TopK | GroupMax) else d_sae
    return max(1, min(PIECE_CODES // per_token, BLOCK_TOKENS))


def piece_images(n_imgs: int, n_patches: int, activation: Activation, d_sae: int, device: torch.device) -> int:
    """Images of a batch that are one piece: a function of the shapes and the kind of device, not of rank or threads."""
    if encodes_at_once(device):
        return n_imgs
    most = max(1, piece_tokens(activation, d_sae) // n_patches)
    n_pieces = -(-n_imgs // most)
    return -(-n_imgs // n_pieces)


def block_shape(n_tokens: int, activation: Activation, d_sae: int, device: torch.device) -> tuple[int, int, int]:
    """Of the blocks of a piece of `n_tokens`: tokens, features of the first, features of the others. A function of the same."""
    if encodes_at_once(device):
        return min(n_tokens, max(1, LANE_CODES // d_sae)), d_sae, d_sae
    unit = d_sae // activation.k if isinstance(activation, GroupMax) else 16  # whole groups, or whole cache lines
    n_blocks = -(-d_sae // max(BLOCK_FEATURES, unit))
    n_features = min(d_sae, -(-d_sae // (n_blocks * unit)) * unit)
    n_parts = -(-n_tokens // max(1, BLOCK_TOKENS * BLOCK_FEATURES // max(n_features, BLOCK_FEATURES)))
    n_first = min(d_sae, FIRST_BLOCKS * n_features) if isinstance(activation, TopK) else n_features
    return -(-n_tokens // n_parts), n_first, n_features


def feature_blocks(n_tokens: int, activation: Activation, d_sae: int, device: torch.device, only: Tensor | None) -> list[slice]:
    """The features of each block of a piece: all of them; or, where the activation looks at each by itself, those near the
    wanted ones, cut so that a feature's block does not depend on what else is wanted.

    Args:
        only: the wanted ones, int64; None: all.
    """
    _, n_first, step = block_shape(n_tokens, activation, d_sae, device)
    if only is None or isinstance(activation, TopK | GroupMax):
        return [slice(first, stop) for first, stop in pairwise([0, *range(n_first, d_sae, step), d_sae])]
    firsts = (only // WANTED_FEATURES * WANTED_FEATURES).unique().tolist()
    return [slice(first, min(first + WANTED_FEATURES, d_sae)) for first in firsts]


def count_pieces(sizes: Mapping[int, int], n_patches: int, activation: Activation, d_sae: int, device: torch.device) -> int:
    """Pieces of all batches: `sizes` has the number of batches of each number of images."""
    return sum(n * -(-n_imgs // piece_images(n_imgs, n_patches, activation, d_sae, device)) for n_imgs, n in sizes.items())


def batches_ahead(
    sizes: Mapping[int, int], n_patches: int, activation: Activation, d_sae: int, device: torch.device, n_threads: int
) -> int:
    """Most batches under way beside the one whose codes are being worked on: on average they have a piece for each thread."""
    n_batches = sum(sizes.values())
    n_pieces = max(1, count_pieces(sizes, n_patches, activation, d_sae, device))
    beside = -(-n_threads * n_batches // n_pieces) + (len(sizes) > 1 and not encodes_at_once(device))
    return min(beside, max(1, n_batches - 1))
