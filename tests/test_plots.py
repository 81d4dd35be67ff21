"""The figures of a run: what they count and draw, read back from the picture or from the figure itself."""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from saev_dist.render import plots
from saev_dist.render.plots import ACCENT, MAX_ROWS, ROW_FILL, density_png, distributions_png

RNG = np.random.default_rng(0)
FREQ, MEAN = RNG.normal(-3, 0.7, 900), RNG.normal(0.2, 0.3, 900)


def with_dead(log10_freq_s: np.ndarray, log10_mean_s: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.append(log10_freq_s, np.full(n, -np.inf)), np.append(log10_mean_s, np.full(n, np.nan))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were turned into PNG."""
    made: list[Figure] = []
    to_png = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: made.append(figure) or to_png(figure))
    return made


def picture(png: bytes) -> np.ndarray:
    with Image.open(BytesIO(png)) as image:
        assert image.format == "PNG" and "Software" not in image.info
        return np.asarray(image.convert("RGB")).astype(int)


def n_accent(png: bytes) -> int:
    colour = [int(ACCENT[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture(png) - colour).max(axis=2) < 8).sum())


def test_hexagons_and_both_margins_count_each_firing_feature_once(figures: list[Figure]):
    density_png(*with_dead(FREQ, MEAN, 100))
    main, above, right, _ = figures[0].axes
    assert main.collections[0].get_array().sum() == 900
    for margin, values, orientation in ((above, FREQ, "vertical"), (right, MEAN, "horizontal")):
        (outline,) = margin.patches
        counts, edges, _ = outline.get_data()
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
        assert counts.sum() == 900 and outline.orientation == orientation
    assert figures[0].get_suptitle() == "900 features; 100 (10.0%) more never fire"


def test_frequency_lies_along_the_bottom_and_strength_up_the_side(figures: list[Figure]):
    density_png(np.array([-4.0, -1.0, -1.0]), np.array([0.0, 1.0, 1.0]))
    hexagons = figures[0].axes[0].collections[0]
    places = {tuple(np.round(place)): n for place, n in zip(hexagons.get_offsets(), hexagons.get_array(), strict=True)}
    assert places == {(-4, 0): 1, (-1, 1): 2}


def test_ticks_name_what_the_logarithms_stand_for(figures: list[Figure]):
    density_png(np.array([-5.0, -1.0]), np.array([0.0, 1.0]))
    main = figures[0].axes[0]
    shares = {round(at, 6): label.get_text() for at, label in zip(main.get_xticks(), main.get_xticklabels(), strict=True)}
    assert shares == {-5: "0.001%", -4: "0.01%", -3: "0.1%", -2: "1%", -1: "10%"}
    scores = {
        round(10**at, 6): float(label.get_text()) for at, label in zip(main.get_yticks(), main.get_yticklabels(), strict=True)
    }
    assert scores and all(at == value for at, value in scores.items())


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_or_no_firing_features_are_drawn_without_a_warning(n: int):
    assert picture(density_png(*with_dead(np.full(n, -2.0), np.zeros(n), 3))).std() > 0
    assert picture(density_png(np.zeros(n), np.zeros(n))).std() > 0


def test_scores_next_to_nothing_are_drawn():
    assert picture(distributions_png(np.full((2, 3), 1e-44, np.float32))).std() > 0


def test_bars_count_the_scores_above_zero_and_nothing_else(figures: list[Figure]):
    values_st = np.maximum(RNG.normal(-1, 1, (3, 5000)), 0).astype(np.float32)
    values_st[1] = 0
    distributions_png(values_st)
    (axis,) = figures[0].axes
    for patch, values_t in zip(axis.patches, values_st, strict=True):
        heights, edges, base = patch.get_data()
        counts, _ = np.histogram(values_t[values_t > 0], bins=len(heights), range=(0, values_st.max()))
        np.testing.assert_allclose(base - heights, ROW_FILL * counts / max(1, counts.max()), atol=1e-12)
        assert edges[0] == 0 and edges[-1] == pytest.approx(values_st.max())
    texts = [text.get_text() for text in axis.texts]
    assert texts == [f"{(values_st[0] > 0).mean():.2%} of tokens", "never", f"{(values_st[2] > 0).mean():.2%} of tokens"]


def test_rows_are_capped_and_each_has_its_feature_s_place(figures: list[Figure]):
    distributions_png(np.ones((MAX_ROWS + 5, 4), np.float32))
    (axis,) = figures[0].axes
    assert len(axis.patches) == MAX_ROWS and f"features 0 to {MAX_ROWS - 1}" in figures[0].get_suptitle()
    places = {label.get_text(): at for at, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}
    for s, patch in enumerate(axis.patches):
        heights, _, base = patch.get_data()
        assert base > places[str(s)] > heights.min() >= base - 1


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (3, 4)])
def test_nothing_to_draw_is_drawn_as_nothing(shape: tuple[int, int]):
    assert n_accent(distributions_png(np.zeros(shape, np.float32))) == 0


def test_the_same_arrays_give_the_same_bytes():
    values_st = np.maximum(RNG.normal(0, 1, (3, 500)), 0).astype(np.float32)
    assert density_png(FREQ, MEAN) == density_png(FREQ, MEAN)
    assert distributions_png(values_st) == distributions_png(values_st)
    assert n_accent(density_png(FREQ, MEAN)) > 100 and n_accent(distributions_png(values_st)) > 100
