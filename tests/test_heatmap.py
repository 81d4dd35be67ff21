"""Heatmaps: saev's own picture, and grids drawn on gradients, where a shift or a transposition shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saev_dist.render.geometry import Geometry
from saev_dist.render.heatmap import highlight, plain
from saev_dist.render.plots import plasma

FIXTURE = Path(__file__).parent / "data" / "heatmap"


def test_the_picture_equals_saevs():
    params = json.loads((FIXTURE / "params.json").read_text())
    picture = Image.open(FIXTURE / "image.png").convert("RGB")
    place = Geometry(fit="grid", n_patches=70, patch_size=params["patch_size"]).place(*picture.size)
    assert (place.n_cols, place.n_rows, place.resize) == (10, 7, picture.size)
    drawn = highlight(np.asarray(picture), np.load(FIXTURE / "patches.npy"), params["upper"], place, plasma())
    expected = np.asarray(Image.open(FIXTURE / "expected.png").convert("RGB"))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def gradient(width: int, height: int) -> np.ndarray:
    """Every pixel tells where it is."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(fit="grid", n_patches=15, grid=(5, 3)),
        Geometry(fit="grid", n_patches=15, grid=(3, 5), patch_size=7, img_scale=1.5),
        Geometry(fit="crop", n_patches=12, resize=(90, 80), crop=(64, 48), patch_size=16),
        Geometry(fit="crop", n_patches=12, resize=(90, 80), crop=(70, 50), patch_size=16, img_scale=2),
    ],
)
def test_one_hot_patch_colours_its_own_pixels_and_no_others(geometry):
    place = geometry.place(50, 30)
    width, height = place.size
    picture = gradient(width, height)
    for patch_i in range(geometry.n_patches):
        values = np.zeros(geometry.n_patches, np.float32)
        values[patch_i] = 2.0
        drawn = highlight(picture, values, 2.0, place, plasma())
        # the oracle: every pixel asks for itself whether its middle lies in the patch
        column, row = patch_i % place.n_cols, patch_i // place.n_cols
        left, top = column * place.patch, row * place.patch
        for y in range(0, height, 3):
            for x in range(0, width, 3):
                inside = left <= x + 0.5 < left + place.patch and top <= y + 0.5 < top + place.patch
                expected = picture[y, x]
                if inside:
                    alpha = int(0.9 * 255) / 255
                    expected = picture[y, x] * (1 - alpha) + (plasma()[255] * 255).astype(np.uint8) * alpha
                assert np.abs(drawn[y, x].astype(float) - expected).max() <= 1, (patch_i, x, y)


def test_scores_below_zero_leave_the_picture_alone():
    place = Geometry(fit="grid", n_patches=4, patch_size=4).place(8, 8)
    picture = gradient(8, 8)
    assert (highlight(picture, np.array([-3, 0, -1, -0.5], np.float32), 1.0, place, plasma()) == picture).all()
    assert plain(place).shape == (8, 8, 3)
