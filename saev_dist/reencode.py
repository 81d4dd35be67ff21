"""Encode the images that won slots once more, and hold every score against the stored one.

Each image is encoded on its own: a product of fixed shape, so that its codes do not depend on which other images a rank
has. It is not the shape that `extract` had, so scores agree up to rounding, not to the bit.

Names: `n` slots, `m` features of an image, `p` patches, `d` model width.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.accumulators.base import Codes
from saev_dist.choose import Slots
from saev_dist.data.reader import Reader, find_bad_value, read_batch
from saev_dist.data.shards import FLOAT_BYTES
from saev_dist.errors import RunError
from saev_dist.finished import FinishedRun
from saev_dist.plan import Intervals, Plan
from saev_dist.sae.model import ActivationOverflow, Encoder

# Largest difference of two evaluations of one score, in shares of the sum of its terms' magnitudes. Products are rounded
# at 2^-24 (fp32), 2^-11 (tf32) and 2^-9 (bf16) of each term; the rest is room for the sum's own rounding.
TOLERANCE = {"fp32": 2.0**-16, "tf32": 2.0**-9, "bf16": 2.0**-6}


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """One image, encoded again."""

    img_i: int
    slots_n: Slots
    """The slots that it won, by feature."""
    feature_m: NDArray[np.int64]
    """Their features, ascending."""
    values_mp: NDArray[np.float32]
    """Those features' scores on every patch, zeros included."""


@dataclass
class Check:
    """What the comparison found so far."""

    n_slots: int = 0
    n_on_edge: int = 0
    """Scores that another rounding pushed out of their token's code, found again in the batch as `extract` encoded it."""
    largest: float = 0.0
    """Largest difference, in shares of the tolerance."""
    wait_s: float = field(default=0.0)


def reencode(run: FinishedRun, slots: Slots, encoder: Encoder, check: Check, *, read_ahead: int) -> Iterator[Image]:
    """The images of `slots` (in the order of images), each once, in the order of the shards.

    Memory: `read_ahead` images and a few being encoded, whatever the number of slots.

    Raises:
        RunError: a score is not the stored one.
        DataError: an activation is not finite.
    """
    img_i, starts = np.unique(slots["img_i"], return_index=True)
    groups = iter(np.split(slots, starts[1:]) if len(img_i) else [])
    by_image = Plan(run.shards.examples, 1)
    ahead = 2 * encoder.n_threads
    reader = Reader(run.shards, by_image, _intervals(img_i), depth=read_ahead, hold=ahead, pin=encoder.device.type == "cuda")
    waiting: deque[tuple[Slots, NDArray[np.int64], Tensor, Callable[[], Codes]]] = deque()
    for batch, acts_pd in chain(reader, [(None, None)] * ahead):
        if batch is not None and acts_pd is not None:
            slots_n = next(groups)
            feature_m = np.unique(slots_n["feature"])
            only = torch.from_numpy(feature_m).to(encoder.device)
            codes = encoder.submit(acts_pd, img_i=batch.img_i, n_patches=run.shards.n_patches, only=only)
            waiting.append((slots_n, feature_m, acts_pd, codes))
            if len(waiting) <= ahead:
                continue
        if waiting:
            yield _checked(run, encoder, check, *waiting.popleft())
    check.wait_s = reader.wait_s


def _checked(
    run: FinishedRun,
    encoder: Encoder,
    check: Check,
    slots_n: Slots,
    feature_m: NDArray[np.int64],
    acts_pd: Tensor,
    codes: Callable[[], Codes],
) -> Image:
    img_i = int(slots_n["img_i"][0])
    try:
        values_mp = _dense(codes(), feature_m)
    except ActivationOverflow as err:
        raise find_bad_value(acts_pd, Plan(run.shards.examples, 1)[img_i], run.shards, err.limit) from None
    row_n = np.searchsorted(feature_m, slots_n["feature"])
    feature_n = torch.from_numpy(slots_n["feature"].copy())
    allowed_n = TOLERANCE[run.precision] * encoder.magnitude(acts_pd[slots_n["patch_i"].copy()], feature_n).numpy()
    distance_n = np.abs(values_mp[row_n, slots_n["patch_i"]] - slots_n["score"])
    if (distance_n > allowed_n).any():
        # A token's code may leave out a score that all but ties with one that it keeps: there, any rounding decides.
        # The batch in the shape that extract gave it rounds as extract did.
        n_off = int((distance_n > allowed_n).sum())
        values_mp = _dense(_as_extracted(run, encoder, img_i), feature_m)
        distance_n = np.abs(values_mp[row_n, slots_n["patch_i"]] - slots_n["score"])
        check.n_on_edge += n_off
    bad_n = np.flatnonzero(~(distance_n <= allowed_n))
    if len(bad_n):
        slot = slots_n[bad_n[0]]
        found = values_mp[row_n[bad_n[0]], slot["patch_i"]]
        where = f"feature {slot['feature']}, slot {slot['slot']} (image {img_i}, patch {slot['patch_i']})"
        raise RunError(
            f"{run.dpath}: {where} is stored as {slot['score']:.7g}; encoded again it is {found:.7g}, "
            f"further off than the tolerance {allowed_n[bad_n[0]]:.2g}. "
            "The SAE's rules (--pre-bias), the layer or the shards' content changed since, or the run was on another kind of "
            "device where a TopK all but tied, or its files were altered. Extract again with --force."
        )
    check.n_slots += len(slots_n)
    check.largest = max(check.largest, float((distance_n / np.maximum(allowed_n, 1e-30)).max()))
    return Image(img_i=img_i, slots_n=slots_n, feature_m=feature_m, values_mp=values_mp)


def _as_extracted(run: FinishedRun, encoder: Encoder, img_i: int) -> Codes:
    """The codes of one image out of its whole batch."""
    batch = run.plan.find(img_i)
    shards = run.shards
    buffer = torch.empty(batch.n_examples * shards.content_bytes // FLOAT_BYTES)
    read_batch(shards, batch, buffer)
    codes = encoder.encode(buffer.view(-1, shards.d_model), img_i=batch.img_i, n_patches=shards.n_patches)
    first = (img_i - batch.img_i) * shards.n_patches
    inside_n = (codes.token_n >= first) & (codes.token_n < first + shards.n_patches)
    return Codes(
        token_n=codes.token_n[inside_n] - first,
        feature_n=codes.feature_n[inside_n],
        value_n=codes.value_n[inside_n],
        img_i=img_i,
        n_imgs=1,
        n_patches=shards.n_patches,
        acts_bd=codes.acts_bd[first : first + shards.n_patches],
    )


def _dense(codes: Codes, feature_m: NDArray[np.int64]) -> NDArray[np.float32]:
    """One image's scores of some features on every patch: float32 (m, p)."""
    feature_n = codes.feature_n.numpy()
    row_n = np.minimum(np.searchsorted(feature_m, feature_n), len(feature_m) - 1)
    keep_n = feature_m[row_n] == feature_n
    values_mp = np.zeros((len(feature_m), codes.n_patches), np.float32)
    values_mp[row_n[keep_n], codes.token_n.numpy()[keep_n]] = codes.value_n.numpy()[keep_n]
    return values_mp


def _intervals(img_i: NDArray[np.int64]) -> Intervals:
    """Ascending indices as intervals."""
    if not len(img_i):
        return ()
    cuts = np.flatnonzero(np.diff(img_i) > 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(img_i, cuts))
