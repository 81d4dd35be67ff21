"""Galleries of made-up features on the disk, and the browser that opens them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saev_dist.accumulators.histogram import edges
from saev_dist.choose import FeatureTable
from saev_dist.render.gallery import Facts, FeatureView, TopImage, card, data_js, feature_js, index_html

N_COLS, N_ROWS, PATCH = 6, 4, 16
N_PATCHES = N_COLS * N_ROWS
SIZE = (N_COLS * PATCH + 8, N_ROWS * PATCH + 4)  # 8 px at the right and 4 at the bottom belong to no patch
N_TOKENS = 1_000_000
EDGES_H = edges().numpy()

HOSTILE = '<img src=x onerror="window.hacked=1">.png'
HOSTILE_LABEL = "</script><script>window.hacked=1</script>\u2028&amp;<b>"

DEAD, SHOWN = (7, 21), tuple(s for s in range(60) if s % 3 or s == 21)
"""Of the small gallery's features."""

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """Path of a Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chromium() -> str:
    """The same; without one the test skips, or fails where REQUIRE_BROWSER is set, as in CI."""
    if found := find_chromium():
        return found
    reason = "no chromium on PATH; on Debian: apt-get install chromium"
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, eq=False)
class Gallery:
    """What was written, for oracles."""

    dpath: Path
    facts: Facts
    table: FeatureTable
    shown: tuple[int, ...]
    views: dict[int, FeatureView]

    @property
    def url(self) -> str:
        return (self.dpath / "index.html").as_uri()

    def fires(self, s: int) -> bool:
        return bool(self.table.n_active_s[s] > 0)


def write_gallery(
    dpath: Path, *, d_sae: int, shown: tuple[int, ...], n_images: int = 5, dead: tuple[int, ...] = (), label: str | None = None
) -> Gallery:
    """Write a whole `visuals` folder. Features share a few pictures' pixels; their scores differ everywhere."""
    rng = np.random.default_rng(d_sae)
    alive_s = ~np.isin(np.arange(d_sae), dead)
    n_active_s = np.where(alive_s, np.maximum(1, (10 ** rng.uniform(0.5, 5.2, d_sae)).astype(np.int64)), 0)
    with np.errstate(divide="ignore"):
        table = FeatureTable(
            log10_freq_s=np.log10(n_active_s / N_TOKENS),
            log10_mean_s=np.where(alive_s, rng.uniform(-0.5, 1, d_sae), np.nan),
            max_s=np.where(alive_s, rng.uniform(4, 20, d_sae), -np.inf).astype(np.float32),
            percentile_s=np.where(alive_s, rng.uniform(0, 1, d_sae), 0).astype(np.float32),
            n_active_s=n_active_s,
        )
    facts = Facts(
        sae=f"/runs/{HOSTILE}", shards="/data/shards", dataset="/data/images", fit="crop: to 224 x 224 of 16 px", family="clip", ckpt="ViT-B/16", layer=-2, n_imgs=500,
        n_left_out=0, n_patches=N_PATCHES, n_tokens=N_TOKENS, d_sae=d_sae, l0=31.94, n_dead=len(dead), normalized_mse=None, rank_by="image",
        top_k=16, percentile=99.5, precision="fp32", version="0.1.0",
        features=(5, 0), flags=("--images", "/data/my images", "--no-pictures"),
    )  # fmt: skip
    views = {s: _view(s, table, n_images, label) for s in shown}
    pictures = [_picture(i) for i in range(3)]
    for s, view in views.items():
        (dpath / "features" / str(s)).mkdir(parents=True)
        for k, image in enumerate(view.images):
            pictures[k % 3].save(dpath / "features" / str(s) / image.picture)
            pictures[(k + 1) % 3].save(dpath / "features" / str(s) / image.heatmap)
        (dpath / "features" / str(s) / "data.js").write_text(feature_js(view), encoding="utf-8")
    dpath.mkdir(exist_ok=True)
    (dpath / "data.js").write_text(data_js(facts, table, [card(s, view.images) for s, view in views.items()]), encoding="utf-8")
    (dpath / "index.html").write_text(index_html(facts), encoding="utf-8")
    return Gallery(dpath, facts, table, shown, views)


def _view(s: int, table: FeatureTable, n_images: int, label: str | None) -> FeatureView:
    rng = np.random.default_rng(s)
    upper, n_active = float(table.max_s[s]), int(table.n_active_s[s])
    counts_h = np.zeros(len(EDGES_H) - 1, np.int64)
    if n_active:
        middle = int(np.searchsorted(EDGES_H, 10 ** table.log10_mean_s[s]))
        counts_h[middle - 20 : middle + 20] = rng.multinomial(n_active, np.full(40, 1 / 40))
    images = []
    for k in range(n_images if n_active else 0):
        score = upper * 0.97**k
        values_p = np.round(rng.uniform(0, score / 2, N_PATCHES) * (rng.random(N_PATCHES) < 0.5), 3).astype(np.float32)
        patch_i = int(rng.integers(N_PATCHES))
        values_p[patch_i] = score
        images.append(
            TopImage(
                img_i=int(rng.integers(500)), score=score, patch_i=patch_i, label=label or f"class {k}", path=(label and HOSTILE) or f"class {k}/{s}.png",
                picture=f"{k}.webp", heatmap=f"{k} heat#map?.webp", width=SIZE[0], height=SIZE[1], n_cols=N_COLS, n_rows=N_ROWS, patch=PATCH, values_p=values_p,
            )
        )  # fmt: skip
    return FeatureView(feature=s, upper=upper, edges_h=EDGES_H, counts_h=counts_h, images=images)


def _picture(i: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 80 * i)], axis=2).astype(np.uint8))
