"""Encode the images that won slots once more, and hold every score against the stored one.

Each image is encoded on its own: a product of fixed shape, so that its codes do not depend on which other images a rank
has. It is not the shape that `extract` had, so scores agree up to rounding, not to the bit.

Names: `n` slots, `m` features of an image, `p` patches, `d` model width.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.accumulators.base import Codes
from saev_dist.choose import Slots
from saev_dist.data.reader import Reader, find_bad_value
from saev_dist.errors import RunError
from saev_dist.finished import FinishedRun
from saev_dist.plan import Intervals, Plan
from saev_dist.sae.encoder import ActivationOverflow, Encoder
from saev_dist.sae.model import GroupMax, TopK

# Largest difference of two evaluations of one score, in shares of the sum of its terms' magnitudes. Products are rounded
# at 2^-24 (fp32), 2^-11 (tf32) and 2^-9 (bf16) of each term; the rest is room for the sum's own rounding.
TOLERANCE = {"fp32": 2.0**-16, "tf32": 2.0**-9, "bf16": 2.0**-6}
SLOTS_AT_ONCE = 4096
"""Or features, whose terms are added up at a time: each brings a row of the encoder's weights along."""


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
    """Scores that rounding pushed out of their token's code: they all but tie with what it keeps."""
    largest: float = 0.0
    """Largest difference, in shares of the tolerance."""


def describe_encoded(slots: Slots, n_encoded: int) -> str:
    """How often the images of some slots were encoded, by all ranks together."""
    n_images = len(np.unique(slots["img_i"]))
    if n_encoded <= n_images:  # fewer: an earlier attempt did the others
        return f"{n_encoded:,} encoded again"
    return f"{n_images:,} encoded again, by each rank those of its own features: {n_encoded:,}"


def reencode(run: FinishedRun, slots: Slots, encoder: Encoder, check: Check, *, read_ahead: int) -> Iterator[Image]:
    """The images of `slots` (in the order of images), each once, in the order of the shards.

    Memory: `read_ahead` images and a few being encoded, and the scores on all patches of the features that won in one image.

    Raises:
        RunError: a score is not the stored one.
        DataError: an activation is not finite.
    """
    img_i, starts = np.unique(slots["img_i"], return_index=True)
    groups = iter(np.split(slots, starts[1:]) if len(img_i) else [])
    by_image = Plan(run.shards.examples, 1)
    ahead = 2 * encoder.n_threads
    reader = Reader(run.shards, by_image, _intervals(img_i), depth=read_ahead, hold=ahead, pin=encoder.device.type == "cuda")
    waiting: deque[tuple[Slots, NDArray[np.int64], Tensor, Future[Codes]]] = deque()
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


def _checked(
    run: FinishedRun,
    encoder: Encoder,
    check: Check,
    slots_n: Slots,
    feature_m: NDArray[np.int64],
    acts_pd: Tensor,
    codes: Future[Codes],
) -> Image:
    img_i = int(slots_n["img_i"][0])
    try:
        values_mp = _dense(codes.result(), feature_m)
    except ActivationOverflow as err:
        raise find_bad_value(acts_pd, Plan(run.shards.examples, 1)[img_i], run.shards, err.limit) from None
    row_n = np.searchsorted(feature_m, slots_n["feature"])
    feature_n = torch.from_numpy(slots_n["feature"].copy())
    patch_n = slots_n["patch_i"].copy()
    parts = [slice(first, first + SLOTS_AT_ONCE) for first in range(0, len(slots_n), SLOTS_AT_ONCE)]
    magnitudes = [encoder.magnitude(acts_pd[patch_n[part]], feature_n[part]).numpy() for part in parts]
    allowed_n = TOLERANCE[run.precision] * np.concatenate(magnitudes)
    distance_n = np.abs(values_mp[row_n, slots_n["patch_i"]] - slots_n["score"])
    for n in np.flatnonzero(~(distance_n <= allowed_n)):
        slot, found = slots_n[n], values_mp[row_n[n], slots_n[n]["patch_i"]]
        if not _is_on_edge(encoder, acts_pd, slot, float(allowed_n[n]), TOLERANCE[run.precision]):
            where = f"feature {slot['feature']}, slot {slot['slot']} (image {img_i}, patch {slot['patch_i']})"
            raise RunError(
                f"{run.dpath}: {where} is stored as {slot['score']:.7g}; encoded again it is {found:.7g}, "
                f"further off than the tolerance {allowed_n[n]:.2g}. The SAE's rules (--pre-bias), the layer or the shards' "
                "content changed since, or the run's files were altered. Extract again with --force."
            )
        values_mp[row_n[n], slot["patch_i"]] = slot["score"]
        distance_n[n] = 0
        check.n_on_edge += 1
    check.n_slots += len(slots_n)
    check.largest = max(check.largest, float((distance_n / np.maximum(allowed_n, 1e-30)).max()))
    return Image(img_i=img_i, slots_n=slots_n, feature_m=feature_m, values_mp=values_mp)


def _is_on_edge(encoder: Encoder, acts_pd: Tensor, slot: np.void, allowed: float, tolerance: float) -> bool:
    """Whether rounding alone keeps a stored score out of its token's code.

    A code leaves out what does not reach a bound: a threshold, or the k-th largest of its token. A score that all but ties
    with the bound is in the code under one rounding and not under another, as those of a GPU and a CPU are. So its feature
    is lifted by as much as rounding can move it and the bound, which may be any feature's score, against each other; then it
    must be there.
    """
    feature, patch_i = int(slot["feature"]), int(slot["patch_i"])
    acts_1d = acts_pd[patch_i : patch_i + 1]

    def is_there(lift: float) -> bool:
        lift_s = torch.zeros(encoder.sae.d_sae)
        lift_s[feature] = lift
        codes = encoder.encode(acts_1d, img_i=int(slot["img_i"]), n_patches=1, lift_s=lift_s)
        value_n = codes.value_n[codes.feature_n == feature]
        return bool(((value_n - float(slot["score"])).abs() <= allowed + lift).any())

    if is_there(2 * allowed):  # as nearly all are
        return True
    if not isinstance(encoder.sae.activation, TopK | GroupMax):
        return False
    parts = torch.arange(encoder.sae.d_sae).split(SLOTS_AT_ONCE)
    largest = max(float(encoder.magnitude(acts_1d, feature_n).max()) for feature_n in parts)
    return is_there(allowed + tolerance * largest)


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
