"""Encode what won slots once more, and hold every score against the stored one.

To be drawn (`reencode`) each image is encoded on its own: a product of fixed shape, so that its codes do not depend on which
other images a rank has. To be verified (`verify_tokens`) only the tokens that won are encoded, those of many images together.
Neither is the shape that `extract` had, so scores agree up to rounding, not to the bit.

Names: `n` slots, `m` features of an image, `p` patches, `t` tokens, `d` model width.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.accumulators.base import Codes
from saev_dist.choose import Slots
from saev_dist.data.reader import Reader, find_bad_value, read_batch
from saev_dist.data.shards import Shards
from saev_dist.errors import DataError, RunError
from saev_dist.finished import FinishedRun
from saev_dist.machine import cpu_threads
from saev_dist.plan import Batch, Plan, union
from saev_dist.sae.encoder import ActivationOverflow, Encoder
from saev_dist.sae.model import GroupMax, TopK
from saev_dist.sae.pieces import piece_tokens

# Largest difference of two evaluations of one score, in shares of the sum of its terms' magnitudes. Products are rounded
# at 2^-24 (fp32), 2^-11 (tf32) and 2^-9 (bf16) of each term; the rest is room for the sum's own rounding.
TOLERANCE = {"fp32": 2.0**-16, "tf32": 2.0**-9, "bf16": 2.0**-6}
SLOTS_AT_ONCE = 4096
"""Or features, whose terms are added up at a time: each brings a row of the encoder's weights along."""
TOKENS_AT_ONCE = 1024
"""That are verified at a time, and one image's more."""


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


def encoder_of(run: FinishedRun, device: torch.device) -> Encoder:
    """An encoder such as the run had, but in fp32 where this device lacks its precision."""
    precision = "fp32" if run.precision == "tf32" and device.type != "cuda" else run.precision
    return Encoder(run.sae, device, precision, cpu_threads() if device.type == "cpu" else 1)


def reencode(
    run: FinishedRun, slots: Slots, encoder: Encoder, check: Check, *, read_ahead: int, look: Callable[[], None]
) -> Iterator[Image]:
    """The images of `slots` (in the order of images), each once, in the order of the shards.

    Memory: `read_ahead` images and a few being encoded, and the scores on all patches of the features that won in one image.

    Args:
        look: called once a second while it waits for an image; what it raises ends it.

    Raises:
        RunError: a score is not the stored one.
        DataError: an activation is not finite.
    """
    ahead, pin = 2 * encoder.n_threads, encoder.device.type == "cuda"
    waiting: deque[tuple[Batch, Slots, NDArray[np.int64], Tensor, Future[Codes]]] = deque()
    for batch, acts_pd, slots_n in _read(run.shards, slots, depth=read_ahead, hold=ahead, pin=pin, check=look):
        feature_m = np.unique(slots_n["feature"])
        only = torch.from_numpy(feature_m).to(encoder.device)
        codes = encoder.submit(acts_pd, img_i=batch.img_i, n_patches=run.shards.n_patches, only=only)
        waiting.append((batch, slots_n, feature_m, acts_pd, codes))
        if len(waiting) > ahead:
            yield _checked(run, encoder, check, *waiting.popleft())
    while waiting:
        yield _checked(run, encoder, check, *waiting.popleft())


def verify_tokens(
    run: FinishedRun, slots: Slots, encoder: Encoder, check: Check, *, read_ahead: int, look: Callable[[], None]
) -> Iterator[None]:
    """Encode the tokens of `slots` (in the order of images) alone.

    It yields once for each image, when it has read it, and for the last one when all are verified.

    Memory: `read_ahead` images; for each of the encoder's threads, and two more, the tokens of a piece and their codes.

    Args:
        look: called once a second while it waits for an image; what it raises ends it.

    Raises:
        RunError: a score is not the stored one.
        DataError: an activation is not finite.
    """
    most = min(TOKENS_AT_ONCE, piece_tokens(encoder.sae.activation, encoder.sae.d_sae))
    waiting: deque[tuple[_Tokens, Future[Codes]]] = deque()
    images: list[_Tokens] = []

    def submit() -> None:
        tokens = _Tokens.together(images)
        images.clear()
        only = torch.from_numpy(np.unique(tokens.slots_n["feature"])).to(encoder.device)
        waiting.append((tokens, encoder.submit(tokens.acts_td, img_i=0, n_patches=1, only=only)))

    n_tokens = 0
    for i, (batch, acts_pd, slots_n) in enumerate(_read(run.shards, slots, depth=read_ahead, check=look)):
        if i:
            yield
        patch_t, token_n = np.unique(slots_n["patch_i"], return_inverse=True)
        images.append(_Tokens([batch], slots_n, token_n, acts_pd[torch.from_numpy(patch_t)]))
        n_tokens += len(patch_t)
        if n_tokens >= most:
            submit()
            n_tokens = 0
        while waiting and (len(waiting) > encoder.n_threads or waiting[0][1].done()):
            _verify(run, encoder, check, *waiting.popleft())
    if images:
        submit()
    while waiting:
        look()
        _verify(run, encoder, check, *waiting.popleft())
    if len(slots):
        yield


def _read(shards: Shards, slots: Slots, **settings: Any) -> Iterator[tuple[Batch, Tensor, Slots]]:
    """The images of `slots` (in the order of images): place, activations, slots. Settings: `Reader`'s."""
    img_i, starts = np.unique(slots["img_i"], return_index=True)
    todo = union(((i, i + 1),) for i in img_i.tolist())
    groups = np.split(slots, starts[1:]) if len(slots) else []
    for (batch, acts_pd), slots_n in zip(Reader(shards, Plan(shards.examples, 1), todo, **settings), groups, strict=True):
        yield batch, acts_pd, slots_n


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of an image, or of some, that won slots."""

    batches: list[Batch]
    """Of one image each."""
    slots_n: Slots
    token_n: NDArray[np.int64]
    """Each slot's, of `acts_td`."""
    acts_td: Tensor
    """float32, a copy."""

    @classmethod
    def together(cls, images: list[Self]) -> Self:
        firsts = np.cumsum([0, *(len(image.acts_td) for image in images[:-1])])
        return cls(
            batches=[batch for image in images for batch in image.batches],
            slots_n=np.concatenate([image.slots_n for image in images]),
            token_n=np.concatenate([image.token_n + first for image, first in zip(images, firsts, strict=True)]),
            acts_td=torch.cat([image.acts_td for image in images]),
        )


def _verify(run: FinishedRun, encoder: Encoder, check: Check, tokens: _Tokens, encoded: Future[Codes]) -> None:
    """Hold the slots of some tokens against their codes."""
    n_tokens, slots_n = len(tokens.acts_td), tokens.slots_n
    try:
        codes = encoded.result()
    except ActivationOverflow as err:
        raise _find_bad_image(run.shards, tokens.batches, err.limit) from None
    key_c = codes.feature_n.numpy() * n_tokens + codes.token_n.numpy()  # ascending, as codes are
    key_n = slots_n["feature"] * n_tokens + tokens.token_n
    place_n = np.minimum(np.searchsorted(key_c, key_n), max(0, len(key_c) - 1))
    found_n = np.zeros(len(slots_n), np.float32)
    if len(key_c):
        np.copyto(found_n, codes.value_n.numpy()[place_n], where=key_c[place_n] == key_n)
    _hold(run, encoder, check, slots_n, tokens.acts_td, tokens.token_n, found_n)


def _find_bad_image(shards: Shards, batches: list[Batch], limit: float) -> DataError:
    """The error for images one of which has an activation that is not below `limit`: they are read again."""
    acts_pd = torch.empty(shards.n_patches, shards.d_model)
    for batch in batches:
        read_batch(shards, batch, acts_pd.view(-1))
        if not bool((acts_pd.abs() < limit).all()):
            return find_bad_value(acts_pd, batch, shards, limit)
    return DataError(f"{shards.dpath}: an image changed while it was read. Run again.")


def _checked(
    run: FinishedRun,
    encoder: Encoder,
    check: Check,
    batch: Batch,
    slots_n: Slots,
    feature_m: NDArray[np.int64],
    acts_pd: Tensor,
    codes: Future[Codes],
) -> Image:
    try:
        values_mp = _dense(codes.result(), feature_m)
    except ActivationOverflow as err:
        raise find_bad_value(acts_pd, batch, run.shards, err.limit) from None
    row_n, patch_n = np.searchsorted(feature_m, slots_n["feature"]), slots_n["patch_i"].copy()
    on_edge_x = _hold(run, encoder, check, slots_n, acts_pd, patch_n, values_mp[row_n, patch_n])
    values_mp[row_n[on_edge_x], patch_n[on_edge_x]] = slots_n["score"][on_edge_x]
    return Image(img_i=batch.img_i, slots_n=slots_n, feature_m=feature_m, values_mp=values_mp)


def _hold(
    run: FinishedRun,
    encoder: Encoder,
    check: Check,
    slots_n: Slots,
    acts_td: Tensor,
    token_n: NDArray[np.int64],
    found_n: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Hold what was found against the stored scores, and note it; indices of those on the edge of what their token keeps.

    Args:
        token_n: each slot's, of `acts_td`.
    """
    tolerance, distance_n = TOLERANCE[run.precision], np.abs(found_n - slots_n["score"])
    # The sum of a score's terms' magnitudes takes long to make, and is no smaller than the score. So it is made only where the
    # difference, in shares of the tolerance, may be larger than all before even with the score in its place.
    open_n = np.flatnonzero(~(distance_n <= check.largest * tolerance * found_n))
    allowed_n = tolerance * _magnitudes(encoder, acts_td, token_n[open_n], slots_n["feature"][open_n])
    is_off_n = ~(distance_n[open_n] <= allowed_n)
    for n, allowed in zip(open_n[is_off_n], allowed_n[is_off_n].tolist(), strict=True):
        slot, token = slots_n[n], int(token_n[n])
        if found_n[n] or not _is_on_edge(encoder, acts_td[token : token + 1], slot, allowed, tolerance):
            where = f"feature {slot['feature']}, slot {slot['slot']} (image {slot['img_i']}, patch {slot['patch_i']})"
            raise RunError(
                f"{run.dpath}: {where} is stored as {slot['score']:.7g}; encoded again it is {found_n[n]:.7g}, "
                f"further off than the tolerance {allowed:.2g}. The SAE's rules (--pre-bias), the layer or the shards' "
                "content changed since, or the run's files were altered. Extract again with --force."
            )
    check.n_on_edge += int(is_off_n.sum())
    check.n_slots += len(slots_n)
    shares_n = distance_n[open_n[~is_off_n]] / allowed_n[~is_off_n]
    check.largest = max(check.largest, float(shares_n.max(initial=0)))
    off_n: NDArray[np.int64] = open_n[is_off_n]
    return off_n


def _magnitudes(
    encoder: Encoder, acts_td: Tensor, token_n: NDArray[np.int64], feature_n: NDArray[np.int64]
) -> NDArray[np.float32]:
    """`encoder.magnitude` of some tokens of `acts_td` and features."""
    magnitude_n = np.empty(len(token_n), np.float32)
    for first in range(0, len(token_n), SLOTS_AT_ONCE):
        part = slice(first, first + SLOTS_AT_ONCE)
        magnitude_n[part] = encoder.magnitude(acts_td[token_n[part]], torch.from_numpy(feature_n[part].copy())).numpy()
    return magnitude_n


def _is_on_edge(encoder: Encoder, acts_1d: Tensor, slot: np.void, allowed: float, tolerance: float) -> bool:
    """Whether rounding alone keeps a stored score out of its token's code.

    A code leaves out what does not reach a bound: a threshold, or the k-th largest of its token. A score that all but ties
    with the bound is in the code under one rounding and not under another, as those of a GPU and a CPU are. So its feature
    is lifted by as much as rounding can move it and the bound, which may be any feature's score, against each other; then it
    must be there, and without the lift, one more term to round, equal the stored one.
    """
    feature, lift = int(slot["feature"]), 2 * allowed
    value = encoder.encode_lifted(acts_1d, feature, lift)  # where nearly all are
    if value is None and isinstance(encoder.sae.activation, TopK | GroupMax):
        parts = torch.arange(encoder.sae.d_sae).split(SLOTS_AT_ONCE)
        lift = allowed + tolerance * max(float(encoder.magnitude(acts_1d, feature_n).max()) for feature_n in parts)
        value = encoder.encode_lifted(acts_1d, feature, lift)
    return value is not None and abs(value - lift - float(slot["score"])) <= allowed + tolerance * lift


def _dense(codes: Codes, feature_m: NDArray[np.int64]) -> NDArray[np.float32]:
    """One image's scores of some features on every patch: float32 (m, p)."""
    feature_n = codes.feature_n.numpy()
    row_n = np.minimum(np.searchsorted(feature_m, feature_n), len(feature_m) - 1)
    keep_n = feature_m[row_n] == feature_n
    values_mp = np.zeros((len(feature_m), codes.n_patches), np.float32)
    values_mp[row_n[keep_n], codes.token_n.numpy()[keep_n]] = codes.value_n.numpy()[keep_n]
    return values_mp
