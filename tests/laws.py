"""The battery that every accumulator must pass. Add yours to `KINDS`. What it counts, no law knows: that is yours to test.

Batches favour zeros, ties, empty features, single images and negative codes.
"""

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.topk import TopK

D_SAE, D_MODEL, N_PATCHES = 5, 3, 3
VALUES = (-2.0, -0.25, 0.25, 1.0, 1.0, 1.0, 1.5, 3e-6, 1e-30, 7e4, 1 / 3)
EXACT = (-2.0, -0.25, 0.25, 1.0, 1.0, 1.0, 1.5, 2.0**-20, 7e4)
"""Whose sums are exact in float64 and in fixed point."""

KINDS: dict[str, Callable[[], Accumulator]] = {
    "topk_patches": lambda: TopK(D_SAE, 4, N_PATCHES, "patch"),
    "topk_images": lambda: TopK(D_SAE, 2, N_PATCHES, "image"),
    "moments": lambda: Moments(D_SAE),
    "histogram": lambda: Histogram(D_SAE, 90.0),
    "reconstruction": lambda: Reconstruction(torch.arange(15.0).view(D_SAE, D_MODEL) / 3, torch.ones(D_MODEL)),
}
KINDS["bundle"] = lambda: Bundle({name: KINDS[name]() for name in ("topk_patches", "moments", "histogram")})


def make_codes(img_i: int, values_eps: list[list[list[float]]]) -> Codes:
    """The sparse form of dense codes (images, patches, features)."""
    dense_bs = torch.tensor(values_eps).view(-1, D_SAE)
    feature_n, token_n = dense_bs.T.nonzero(as_tuple=True)
    return Codes(
        token_n=token_n,
        feature_n=feature_n,
        value_n=dense_bs[token_n, feature_n],
        img_i=img_i,
        n_imgs=len(values_eps),
        n_patches=N_PATCHES,
        acts_bd=dense_bs[:, :D_MODEL] * 0.1 + img_i % 7,
    )


def on_device(codes: Codes, device: torch.device) -> DeviceCodes:
    """What an encoder on that device would have made."""
    token_n, feature_n, value_n = (part.to(device) for part in codes.by_token())
    return DeviceCodes(
        token_n=token_n,
        feature_n=feature_n,
        value_n=value_n,
        img_i=codes.img_i,
        n_imgs=codes.n_imgs,
        n_patches=codes.n_patches,
        acts_bd=codes.acts_bd,
        x_bd=codes.acts_bd.to(device),
    )


@st.composite
def batches(draw: st.DrawFn, max_batches: int = 6, values: tuple[float, ...] = VALUES) -> list[Codes]:
    """Disjoint batches with gaps between them, in random order."""
    value = st.one_of(st.just(0.0), st.just(0.0), st.sampled_from(values))
    img = st.lists(st.lists(value, min_size=D_SAE, max_size=D_SAE), min_size=N_PATCHES, max_size=N_PATCHES)
    out, img_i = [], 0
    for _ in range(draw(st.integers(0, max_batches))):
        img_i += draw(st.sampled_from([0, 1, 2**33]))
        imgs = draw(st.lists(img, min_size=1, max_size=3))
        out.append(make_codes(img_i, imgs))
        img_i += len(imgs)
    return draw(st.permutations(out))


def fold(make: Callable[[], Accumulator], group: list[Codes]) -> Accumulator:
    acc = make()
    for codes in group:
        acc.update(codes)
    return acc


def snapshot(acc: Accumulator) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in acc.state_dict().items()}


def same(a: Accumulator, b: Accumulator) -> bool:
    """Equal to the bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[k].dtype == theirs[k].dtype and mine[k].shape == theirs[k].shape and torch.equal(mine[k], theirs[k]) for k in mine
    )


def sliced(acc: Accumulator, low: float, high: float) -> Accumulator:
    """The accumulator over a share of the rows of each tensor."""
    return acc.like({k: v[int(low * len(v)) : int(high * len(v))].clone() for k, v in acc.state_dict().items()})


def as_dense(group: list[Codes]) -> np.ndarray:
    """All images of contiguous batches, float32 (images, patches, features)."""
    dense = np.zeros((sum(codes.n_imgs for codes in group), N_PATCHES, D_SAE), np.float32)
    base = 0
    for codes in sorted(group, key=lambda codes: codes.img_i):
        token = codes.token_n.numpy()
        dense[base + token // N_PATCHES, token % N_PATCHES, codes.feature_n.numpy()] = codes.value_n.numpy()
        base += codes.n_imgs
    return dense


def contiguous(group: list[Codes]) -> list[Codes]:
    """The same batches with no images left out between them."""
    out, img_i = [], 0
    for codes in sorted(group, key=lambda codes: codes.img_i):
        dense = as_dense([codes])
        out.append(make_codes(img_i, dense.tolist()))
        img_i += codes.n_imgs
    return out
