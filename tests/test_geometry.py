"""Where a picture's patches lie: as the model saw it, and what is said where that cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev_dist.errors import ConfigError
from saev_dist.render.geometry import Geometry, default_fit, nearest_grid


@given(st.integers(1, 5000), st.floats(0.1, 10))
def test_the_grid_is_the_factorisation_nearest_to_the_aspect(n_patches, aspect):
    n_cols, n_rows = nearest_grid(n_patches, aspect)
    assert n_cols * n_rows == n_patches
    best = min(abs(c / (n_patches // c) - aspect) for c in range(1, n_patches + 1) if n_patches % c == 0)
    assert abs(n_cols / n_rows - aspect) == best


def test_clip_siglip_and_dinov2_are_cropped_and_others_fit_a_grid():
    fits = {family: default_fit(family, 256) for family in ("clip", "siglip", "dinov2", "dinov3", "pe", "demo")}
    assert fits == {"clip": "crop", "siglip": "crop", "dinov2": "crop", "dinov3": "grid", "pe": "grid", "demo": "grid"}
    assert Geometry(fit="crop", n_patches=256).place(640, 480).patch == 14
    place = Geometry(fit="crop", n_patches=196).place(640, 480)
    assert (place.resize, place.crop, place.n_cols, place.n_rows, place.patch) == ((256, 256), (16, 16, 240, 240), 14, 14, 16)
    scaled = Geometry(fit="crop", n_patches=196, img_scale=2).place(640, 480)
    assert (scaled.resize, scaled.size, scaled.patch) == ((512, 512), (448, 448), 32)
    assert Geometry(fit="grid", n_patches=1920).place(640, 480).size == (48 * 16, 40 * 16)


def test_dinov2_fits_a_grid_where_the_crop_does_not_give_its_patches_and_clip_is_refused():
    assert [n_patches for n_patches in (9, 12, 256, 576, 784, 1369) if default_fit("dinov2", n_patches) == "crop"] == [256]
    assert default_fit("dinov2", 1369, crop=(518, 518)) == "crop"
    assert [default_fit("dinov2", 9, patch_size=size) for size in (16, 74)] == ["grid", "crop"]
    assert default_fit("clip", 576) == "crop"  # a larger picture, cropped; a grid would be drawn without a word
    with pytest.raises(ConfigError, match=r"into 9 patches without a rest\. Set --resize and --crop"):
        Geometry(fit="crop", n_patches=9)


def test_a_patch_that_does_not_divide_the_default_crop_must_be_asked_for():
    """CLIP at 336 px has 24 x 24 patches; 9 px would give as many of a picture of 224."""
    with pytest.raises(ConfigError, match=r"576 patches without a rest.* such as --resize 384 384 --crop 336 336 for patches"):
        Geometry(fit="crop", n_patches=576)
    assert Geometry(fit="crop", n_patches=576, patch_size=9).place(640, 480).patch == 9
    assert Geometry(fit="crop", n_patches=576, resize=(384, 384), crop=(336, 336)).place(640, 480).patch == 14
    assert Geometry(fit="crop", n_patches=729, resize=(384, 384), crop=(384, 384)).place(640, 480).patch == 14  # 6 px over
    with pytest.raises(ConfigError) as caught:
        Geometry(fit="crop", n_patches=600)  # of no square
    assert "such as --resize" not in str(caught.value)


def test_of_the_patches_that_fit_the_largest_is_taken():
    assert Geometry(fit="crop", n_patches=12, resize=(90, 80), crop=(70, 50)).place(9, 9).patch == 16
    assert Geometry(fit="crop", n_patches=1).place(9, 9).patch == 224
    assert Geometry(fit="crop", n_patches=12, crop=(4, 3)).place(9, 9).patch == 1


@pytest.mark.parametrize(
    ("picture", "resize", "corner"),
    [
        ((640, 480), (298, 224), (37, 0)),  # 298.67 px, as torchvision cuts it
        ((480, 640), (224, 298), (0, 37)),
        ((500, 333), (336, 224), (56, 0)),
        ((501, 333), (337, 224), (56, 0)),  # 56.5: half a pixel goes to the even side
        ((503, 333), (338, 224), (57, 0)),
        ((100, 100), (224, 224), (0, 0)),
        ((50, 30), (373, 224), (74, 0)),
    ],
)
def test_with_its_aspect_kept_a_picture_lies_where_torchvisions_resize_and_center_crop_have_it(picture, resize, corner):
    """`int(size * long / short)` in `_compute_resized_output_size` of torchvision/transforms/functional.py."""
    geometry = {"fit": "crop", "n_patches": 49, "resize": (224, 224), "keep_aspect": True}
    place = Geometry(**geometry).place(*picture)
    (left, top), (width, height) = corner, resize
    assert (place.resize, place.crop) == ((width, height), (left, top, left + 224, top + 224))
    assert (place.n_cols, place.n_rows, place.patch, place.size) == (7, 7, 32, (224, 224))
    twice = Geometry(**geometry, img_scale=2).place(*picture)
    assert (twice.resize, twice.size, twice.patch) == ((2 * width, 2 * height), (448, 448), 64)


def test_a_picture_too_long_for_its_aspect_to_be_kept_is_refused():
    with pytest.raises(ConfigError, match="Lower --img-scale or --resize, or leave --keep-aspect out"):
        Geometry(fit="crop", n_patches=196, resize=(224, 224), keep_aspect=True).place(100_000, 10)


@pytest.mark.parametrize(("edge", "left"), [(256, 16), (255, 16), (257, 16), (253, 14)])
def test_the_crop_lies_where_torchvisions_center_crop_has_it(edge, left):
    """`int(round((height - crop_height) / 2.0))` in torchvision/transforms: half a pixel goes to the even side."""
    place = Geometry(fit="crop", n_patches=196, resize=(edge, 300), crop=(224, 224)).place(640, 480)
    assert place.crop == (left, 38, left + 224, 262)


@pytest.mark.parametrize(
    "settings", [{"patch_size": 8000}, {"img_scale": 64, "patch_size": 1000}, {"grid": (1, 6), "patch_size": 2731}]
)
def test_pictures_too_large_to_be_stored_are_refused(settings):
    with pytest.raises(ConfigError, match="a side may have 16,383 px"):
        Geometry(fit="grid", n_patches=6, **settings).place(60, 40)
    assert Geometry(fit="grid", n_patches=3, grid=(1, 3), patch_size=5461).place(1, 1).size == (5461, 16_383)


def test_pictures_shown_smaller_have_a_pixel_at_least():
    for fit, n_patches in (("grid", 4), ("crop", 49)):
        assert Geometry(fit=fit, n_patches=n_patches, img_scale=0.001).place(9, 9).size == (1, 1)


def test_a_grids_patches_grow_with_its_picture():
    place = Geometry(fit="grid", n_patches=4, img_scale=2).place(9, 9)
    assert (place.size, place.patch) == ((64, 64), 32)


def test_pixels_shown_are_those_of_the_crop_or_of_the_patches():
    assert Geometry(fit="crop", n_patches=196, img_scale=3).shown_px == 9 * 224 * 224
    assert Geometry(fit="grid", n_patches=15, patch_size=7, img_scale=3).shown_px == 15 * 21 * 21
    assert Geometry(fit="grid", n_patches=15).shown_px == 15 * 16 * 16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit": "grid", "n_patches": 12, "grid": (5, 2)}, ["has 10 patches", "have 12", "4 3, 3 4"]),
        ({"fit": "crop", "n_patches": 196, "patch_size": 14}, ["16 x 16 = 256 patches", "have 196", "These sizes fit: 16"]),
        ({"fit": "crop", "n_patches": 7}, ["no patch size cuts --crop 224 224 into 7", "7 1, 1 7"]),
        ({"fit": "crop", "n_patches": 196, "crop": (300, 224)}, ["larger than --resize 256 256"]),
        ({"fit": "crop", "n_patches": 196, "grid": (14, 14)}, ["--grid belongs to --fit grid"]),
        (
            {"fit": "crop", "n_patches": 196, "resize": (256, 224), "keep_aspect": True},
            ["got 256 224", "such as --resize 224 224"],
        ),
        ({"fit": "crop", "n_patches": 252, "crop": (224, 300)}, ["larger than --resize 256 256"]),
        ({"fit": "crop", "n_patches": 196, "patch_size": 18}, ["12 x 12 = 144 patches", "These sizes fit: 16"]),
        (
            {"fit": "crop", "n_patches": 12, "resize": (90, 80), "crop": (70, 50), "patch_size": 10},
            ["7 x 5 = 35 patches"],
        ),
        ({"fit": "crop", "n_patches": 9}, ["rows fit: 3 3, 9 1, 1 9."]),
        ({"fit": "grid", "n_patches": 24, "grid": (5, 5)}, ["These fit: 6 4, 4 6, 8 3, 3 8, 12 2, 2 12, 24 1, 1 24."]),
        ({"fit": "grid", "n_patches": 36, "grid": (5, 5)}, ["18 2, 2 18, 36 1 and 1 more."]),
        ({"fit": "grid", "n_patches": 196, "crop": (448, 448)}, ["--resize, --crop and --keep-aspect belong to --fit crop"]),
        ({"fit": "grid", "n_patches": 196, "resize": (512, 512)}, ["--resize, --crop and --keep-aspect belong to --fit crop"]),
        ({"fit": "grid", "n_patches": 196, "keep_aspect": True}, ["--resize, --crop and --keep-aspect belong to --fit crop"]),
    ],
)
def test_a_geometry_that_does_not_fit_names_those_that_would(settings, words):
    with pytest.raises(ConfigError) as caught:
        Geometry(**settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (Geometry(fit="grid", n_patches=70), "grid: resized to 70 whole patches of 16 px, at about the aspect of the picture"),
        (Geometry(fit="grid", n_patches=15, grid=(5, 3), patch_size=7), "grid: resized to 5 × 3 whole patches of 7 px"),
        (
            Geometry(fit="crop", n_patches=196),
            "crop: resized to 256 × 256 px, of that the middle 224 × 224: 14 × 14 patches of 16 px",
        ),
        (
            Geometry(fit="crop", n_patches=49, resize=(224, 224), keep_aspect=True),
            "crop: resized to 224 px on the shorter side, its aspect kept, of that the middle 224 × 224: 7 × 7 patches of 32 px",
        ),
        (
            Geometry(fit="crop", n_patches=12, resize=(90, 80), crop=(70, 50), img_scale=2),
            "crop: resized to 90 × 80 px, of that the middle 70 × 50: 4 × 3 patches of 16 px",
        ),
        (
            Geometry(fit="crop", n_patches=12, resize=(90, 80), crop=(70, 50), patch_size=15),
            "crop: resized to 90 × 80 px, of that the middle 70 × 50: 4 × 3 patches of 15 px",
        ),
    ],
)
def test_what_is_taken_for_the_preparation_is_told(geometry, text):
    assert geometry.describe(with_pictures=True) == text
    alone = geometry.describe(with_pictures=False)
    assert (alone == text) == (geometry.fit == "crop" or geometry.grid is not None)
    assert alone == text or alone.startswith("grid: 7 × 10 of 70 patches, the nearest to a square: ")
