"""A finished run, opened again: what it was made from, its slots and its statistics.

Names: `s` features, `k` slots, `h` bins.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from saev_dist.accumulators.histogram import percentile_stem
from saev_dist.accumulators.rows import n_samples
from saev_dist.choose import FeatureTable
from saev_dist.data.shards import Shards
from saev_dist.errors import RunError
from saev_dist.fields import Fields
from saev_dist.files import did_you_mean
from saev_dist.sae.hub import is_hub_name
from saev_dist.sae.load import Overrides, load_sae
from saev_dist.sae.model import Precision, Sae
from saev_dist.store import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """One run of `extract`, with the shards and the SAE that it was made from."""

    dpath: Path
    manifest: Fields
    shards: Shards
    sae: Sae
    sae_path: Path
    precision: Precision
    values_sk: NDArray[np.float32]
    imgs_sk: NDArray[np.int64]
    patches_sk: NDArray[np.int64]

    @classmethod
    def open(cls, dpath: Path, *, shards: Path | None = None, sae: Path | None = None) -> "FinishedRun":
        """Read a run's manifest and slots, and open its inputs.

        Args:
            dpath: run directory.
            shards, sae: where the inputs are now, if they have moved.

        Raises:
            RunError: it is no finished run, is damaged, or the inputs are not those that it was made from.
            DataError, CheckpointError: the inputs cannot be read.
        """
        store = Run(dpath)
        manifest = store.manifest() if os.path.isdir(dpath) else None
        if manifest is None:
            if os.path.isdir(store.partials_dpath):
                raise RunError(f"{dpath} is an unfinished run: it has no manifest.json yet. Finish `saev-dist extract` first.")
            hint = did_you_mean(dpath, "manifest.json")
            raise RunError(
                f"{dpath} is not a run: it holds no manifest.json. --run takes the --out of `saev-dist extract`.{hint}"
            )
        identity, made_from, made_with = (manifest.sub(name) for name in ("identity", "shards", "sae"))
        shards_dpath = shards or Path(made_from.get("path", str))
        sae_path = sae or Path(made_with.get("path", str))
        for path, flag in ((shards_dpath, "--shards"), (sae_path, "--sae")):
            if not os.path.exists(path) and not is_hub_name(path):  # unlike Path.exists, False also where one may not look
                raise RunError(f"{path}, which {dpath} was made from, is not there; say with {flag} where it is now.")
        opened = Shards.open(shards_dpath, identity.get("layer", int))
        skipped = bool(manifest.get("left_out", list, []))
        _same(opened.fingerprint(), identity.get("shards_sha256", str), shards_dpath, dpath, "shards")
        for found, expected in zip(opened.probes(skip_bad=skipped), identity.get("shards_probes", list), strict=False):
            if None not in (found, expected):  # a shard that could not be read then, or cannot now
                _same(str(found), str(expected), shards_dpath, dpath, "shards")
        loaded = load_sae(sae_path, Overrides.from_json(made_with.sub("overrides")))
        _same(loaded.sha256, identity.get("sae_sha256", str), sae_path, dpath, "sae")
        for name, value in loaded.identity().items():
            if (there := identity.obj.get(name)) != value:
                raise RunError(f"{dpath} was made with {name} {there}; read as its manifest says, {sae_path} has {value}.")
        shape = (loaded.sae.d_sae, identity.positive("top_k"))
        values, imgs, patches = (
            store.load_tensor(f"{stem}.pt", shape).numpy() for stem in ("top_values", "top_img_i", "top_patch_i")
        )
        filled = imgs >= 0
        known = (imgs < opened.n_examples) & (patches < opened.n_patches) & (patches >= 0)
        if not known[filled].all():
            raise RunError(
                f"{dpath}: a slot names an image or a patch that the shards do not have. Run extract again with --force."
            )
        return cls(
            dpath=dpath,
            manifest=manifest,
            shards=opened,
            sae=loaded.sae,
            sae_path=loaded.path,
            precision=_precision(identity),
            values_sk=values,
            imgs_sk=imgs,
            patches_sk=patches,
        )

    def check_slots(self) -> None:
        """As the function of that name."""
        check_slots(Run(self.dpath), self.manifest, self.values_sk, self.imgs_sk, self.patches_sk)

    @property
    def n_left_out(self) -> int:
        """Images that `--skip-bad-shards` left out."""
        parts = self.manifest.get("left_out", list, [])
        return sum(Fields(part, f"{self.manifest.where}, left_out", RunError).get("n_images", int) for part in parts)

    def statistics(self) -> "Statistics":
        """The figures of all features.

        Raises:
            RunError: an artifact is missing or damaged.
        """
        store, d_sae = Run(self.dpath), self.sae.d_sae
        percentile = self.manifest.sub("identity").get("percentile", float)
        histograms = store.load_tensors("histograms.pt", ("counts", "edges"))
        sizes = [tuple(histograms[key].shape) for key in ("counts", "edges")]
        if len(sizes[1]) != 1 or sizes[0] != (d_sae, sizes[1][0] - 1):
            raise RunError(
                f"{self.dpath / 'histograms.pt'} holds counts {sizes[0]} and edges {sizes[1]}; expected a row of counts for "
                f"each of {d_sae:,} features, and an edge more than it has columns. Run extract again with --force."
            )
        with np.errstate(divide="ignore"):
            return Statistics(
                log10_freq_s=np.log10(store.load_tensor("sparsity.pt", (d_sae,)).double().numpy()),
                log10_mean_s=np.log10(store.load_tensor("mean_values.pt", (d_sae,)).double().numpy()),
                max_s=self.values_sk[:, 0],
                percentile=percentile,
                percentile_s=store.load_tensor(f"{percentile_stem(percentile)}.pt", (d_sae,)).numpy(),
                n_active_s=histograms["counts"].sum(dim=1).numpy(),
                counts_sh=histograms["counts"].numpy(),
                edges_h=histograms["edges"].numpy(),
            )

    def distributions(self) -> NDArray[np.float32]:
        """The first features' scores on those of the sampled tokens that were read, float32 (n_distributions, tokens)."""
        identity = self.manifest.sub("identity")
        n_features = min(identity.get("n_distributions", int), self.sae.d_sae)
        n = n_samples(self.shards.n_tokens, identity.positive("max_distribution_samples"))
        values_st = Run(self.dpath).load_tensor("distributions.pt", (n_features, n)).numpy()
        return values_st[:, ~np.isnan(values_st).any(axis=0)]  # NaN: tokens of a shard that was left out


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics(FeatureTable):
    """Figures of all features."""

    percentile: float
    """Which one `percentile_s` is."""
    counts_sh: NDArray[np.int64]
    edges_h: NDArray[np.float32]


def check_slots(
    store: Run, manifest: Fields, values_sk: NDArray[np.float32], imgs_sk: NDArray[np.int64], patches_sk: NDArray[np.int64]
) -> None:
    """Refuse slots that no extract writes. It reads no activations: whether scores are right, `verify` tells.

    Raises:
        RunError: they are out of order, twice the same, of no image or patch, or not as many as the features fired.
    """
    identity, shards = manifest.sub("identity"), manifest.sub("shards")
    top_k, n_tokens = values_sk.shape[1], manifest.sub("metrics").get("n_tokens", int)
    filled_sk = imgs_sk >= 0
    n_filled_s = filled_sk.sum(axis=1)
    fired_s = np.rint(store.load_tensor("sparsity.pt", (len(values_sk),)).double().numpy() * n_tokens)
    most_s = np.minimum(fired_s, top_k)
    of_images = identity.get("rank_by", str) == "image"  # an image has one slot, however often the feature fires in it
    (v, w), (i, j), (p, q) = ((array[:, :-1], array[:, 1:]) for array in (values_sk, imgs_sk, patches_sk))
    ordered = (v > w) | ((v == w) & ((i < j) | ((i == j) & (p < q)))) | ~filled_sk[:, 1:]
    known = (imgs_sk < shards.positive("n_examples")) & (patches_sk < shards.positive("n_patches")) & (patches_sk >= 0)
    claims = {
        "scores are in descending order, ties in that of images and patches": ordered.all(),
        "filled slots have finite scores above zero": (np.isfinite(values_sk) & (values_sk > 0))[filled_sk].all(),
        "filled slots come first": (filled_sk[:, :-1] | ~filled_sk[:, 1:]).all(),
        "empty slots hold -inf and -1": (np.isneginf(values_sk) & (imgs_sk == -1) & (patches_sk == -1))[~filled_sk].all(),
        "images and patches exist": known[filled_sk].all(),
        "a feature has as many slots as it fired, up to top_k": (
            (n_filled_s <= most_s) & ((n_filled_s > 0) == (fired_s > 0)) if of_images else n_filled_s == most_s
        ).all(),
    }
    if broken := [claim for claim, holds in claims.items() if not holds]:
        raise RunError(
            f"{store.dpath}: it should hold that {' and that '.join(broken)}, and does not. Run extract again with --force."
        )


def _precision(identity: Fields) -> Precision:
    name = identity.get("precision", str)
    if name not in get_args(Precision):
        raise RunError(f"{identity.where}: precision is {name!r}; expected one of {', '.join(get_args(Precision))}.")
    return cast(Precision, name)


def _same(found: str, expected: str, path: Path, dpath: Path, what: str) -> None:
    if found != expected:
        raise RunError(
            f"{path} is not what {dpath} was made from: its fingerprint is {found[:12]}…, the manifest has {expected[:12]}…. "
            f"Name the right one with --{what}, or extract again."
        )
