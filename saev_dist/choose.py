"""PURE. Which features are shown, which of their slots, and which rank works on them.

Names: `s` features, `k` slots, `m` images of a feature, `n` chosen slots.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saev_dist.errors import ConfigError

Sort = Literal["random", "freq", "mean", "max"]
Slots = NDArray[np.void]
SLOT = np.dtype([("img_i", "<i8"), ("feature", "<i8"), ("patch_i", "<i8"), ("place", "<i4"), ("slot", "<i4"), ("score", "<f4")])
"""A slot: `place` counts the feature's distinct images, strongest first; `slot` is its column in the artifacts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureTable:
    """Every feature of the SAE; arrays of length d_sae."""

    log10_freq_s: NDArray[np.float64]
    """Share of tokens on which it is above zero; -inf for a dead one."""
    log10_mean_s: NDArray[np.float64]
    """Mean over those tokens; NaN for a dead one."""
    max_s: NDArray[np.float32]
    """Largest score; -inf for a dead one."""
    percentile_s: NDArray[np.float32]
    n_active_s: NDArray[np.int64]
    """Tokens on which it is above zero."""


def choose_features(
    table: FeatureTable,
    *,
    always: Sequence[int],
    n_features: int,
    every: bool,
    seed: int,
    sort: Sort = "random",
    log_freq_range: tuple[float, float] = (-math.inf, math.inf),
    log_value_range: tuple[float, float] = (-math.inf, math.inf),
) -> list[int]:
    """The features to show, ascending.

    Args:
        always: features that are shown whatever the other rules say.
        n_features: how many of those in the ranges to take besides.
        every: take all features that ever fired, whatever the ranges.
        seed: of the sample.
        sort: random takes a seeded sample of them; the others take the first by that figure, the lower feature first
            among equals.
        log_freq_range, log_value_range: of log10_freq_s and log10_mean_s, bounds included.

    Raises:
        ConfigError: a feature of `always` does not exist, or there is nothing to show.
    """
    log10_freq_s, log10_mean_s = table.log10_freq_s, table.log10_mean_s
    d_sae = len(log10_freq_s)
    if unknown := [feature for feature in always if not 0 <= feature < d_sae]:
        raise ConfigError(f"--features {unknown[0]}: there is no such feature; the SAE has 0 to {d_sae - 1:,}.")
    fired_s = np.isfinite(log10_freq_s)
    if not fired_s.any() and not always:
        raise ConfigError(
            "no feature of this run ever fired, so no slot was won. Do the SAE and its rules (--pre-bias) belong to the layer?"
        )
    if every:
        return sorted({*always, *np.flatnonzero(fired_s).tolist()})
    in_range_s = fired_s & _within(log10_freq_s, log_freq_range) & _within(log10_mean_s, log_value_range)
    candidates = np.flatnonzero(in_range_s)
    if not len(candidates) and not always:
        raise ConfigError(
            f"none of the {int(fired_s.sum()):,} features that fired has log10 frequency in {_span(log_freq_range)} and log10 "
            f"mean in {_span(log_value_range)}; {_found(log10_freq_s, log10_mean_s, fired_s)}. Widen --log-freq-range or "
            "--log-value-range, or name --features."
        )
    if not n_features and not always:
        raise ConfigError("nothing to do: --n-features is 0 and no --features are named. Set one of them, or --all.")
    if sort == "random":
        order = np.random.default_rng(seed).permutation(candidates)
    else:
        figures: dict[str, NDArray[Any]] = {"freq": log10_freq_s, "mean": log10_mean_s, "max": table.max_s}
        figure_s = figures[sort]
        order = candidates[np.argsort(-figure_s[candidates], kind="stable")]
    return sorted({*always, *order[~np.isin(order, always)][:n_features].tolist()})


def choose_slots(
    features: Sequence[int],
    values_sk: NDArray[np.float32],
    imgs_sk: NDArray[np.int64],
    patches_sk: NDArray[np.int64],
    n_images: int | None,
) -> Slots:
    """The filled slots of these features in their `n_images` strongest distinct images (None: in all), as SLOT records."""
    parts = [np.empty(0, SLOT)]
    for feature in features:
        img_k = imgs_sk[feature][imgs_sk[feature] >= 0]  # the filled slots come first
        _, first_m, image_k = np.unique(img_k, return_index=True, return_inverse=True)
        place_k = np.argsort(np.argsort(first_m))[image_k]
        slot_n = np.flatnonzero(place_k < n_images) if n_images is not None else np.arange(len(img_k))
        part = np.empty(len(slot_n), SLOT)
        part["img_i"], part["feature"], part["patch_i"] = img_k[slot_n], feature, patches_sk[feature, slot_n]
        part["place"], part["slot"], part["score"] = place_k[slot_n], slot_n, values_sk[feature, slot_n]
        parts.append(part)
    return np.concatenate(parts)


def deal(slots: Slots, n_ranks: int) -> list[Slots]:
    """Share features out so that the ranks have about equally many distinct images to encode.

    Features with many images first, each to the rank that has the fewest so far; an image that a rank has already costs
    nothing more.

    Returns:
        Each rank's slots, in the order of the images.
    """
    by_feature = slots[np.argsort(slots["feature"], kind="stable")]
    features, starts = np.unique(by_feature["feature"], return_index=True)
    groups = np.split(by_feature, starts[1:]) if len(features) else []
    n_images = [len(np.unique(group["img_i"])) for group in groups]
    load: list[tuple[int, int]] = [(0, rank) for rank in range(n_ranks)]
    seen: list[set[int]] = [set() for _ in range(n_ranks)]
    shares: list[list[Slots]] = [[] for _ in range(n_ranks)]
    for i in sorted(range(len(groups)), key=lambda i: -n_images[i]):
        _, rank = heapq.heappop(load)
        shares[rank].append(groups[i])
        seen[rank].update(groups[i]["img_i"].tolist())
        heapq.heappush(load, (len(seen[rank]), rank))
    merged = [np.concatenate(share) if share else np.empty(0, SLOT) for share in shares]
    return [share[np.lexsort((share["slot"], share["feature"], share["img_i"]))] for share in merged]


def _within(x_s: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.bool_]:
    return (x_s >= bounds[0]) & (x_s <= bounds[1])  # NaN is in no range


def _span(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g}"


def _found(freq_s: NDArray[np.float64], mean_s: NDArray[np.float64], fired_s: NDArray[np.bool_]) -> str:
    freq, mean = freq_s[fired_s], mean_s[fired_s]
    return f"they lie in {freq.min():.2f} to {freq.max():.2f} and {mean.min():.2f} to {mean.max():.2f}"
