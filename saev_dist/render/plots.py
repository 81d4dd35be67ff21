"""PURE. What matplotlib makes: two figures of a whole run, as PNG, and the colours of heatmaps.

Arrays in, bytes out: the same arrays give the same bytes.

Names: `s` features, `t` sampled tokens.
"""

import math
from functools import cache
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, FAINT, ACCENT, RULE = "#1d1b20", "#6a6670", "#9b2177", "#c9c5cb"
DPI = 150
MAX_HEXAGONS = 60  # across
N_BINS = 60
MAX_ROWS = 32
"""Distributions drawn; more would be too low to read."""
ROW_FILL = 0.9
"""Share of a row's height that its longest bar takes."""


@cache
def plasma() -> NDArray[np.float64]:
    """The colour map of heatmaps as 256 colours, (256, 3), in 0 … 1."""
    colours_c3: NDArray[np.float64] = matplotlib.colormaps["plasma"](np.arange(256))[:, :3]
    return colours_c3


def density_png(log10_freq_s: NDArray[np.floating], log10_mean_s: NDArray[np.floating]) -> bytes:
    """How often features fire against how strongly: hexagons by their number of features, with both margins.

    Args:
        log10_freq_s: share of tokens, log10; -inf for a feature that never fires.
        log10_mean_s: mean score where it fires, log10; NaN for one that never fires.

    Returns:
        PNG. Features that never fire are counted in its title and drawn nowhere.
    """
    fires_s = np.isfinite(log10_freq_s) & np.isfinite(log10_mean_s)
    x, y = log10_freq_s[fires_s], log10_mean_s[fires_s]
    n_dead = int((~fires_s).sum())

    figure = _figure(6.4, 5.6)
    main = _axes(figure, 0.75, 0.55, 4.2, 3.85)
    above, right = _axes(figure, 0.75, 4.45, 4.2, 0.75, sharex=main), _axes(figure, 5.0, 0.55, 0.6, 3.85, sharey=main)
    share = f" ({n_dead / len(fires_s):.1%})" if len(fires_s) else ""
    figure.suptitle(
        f"{len(x):,} features; {n_dead:,}{share} more never fire", x=0.02, ha="left", fontsize=11, color=INK, weight="bold"
    )
    _plain(main)
    main.set_xlabel("share of tokens on which it fires")
    main.set_ylabel("mean score where it fires")
    for margin in (above, right):
        margin.axis("off")
    if len(x):
        left, high_x, bottom, high_y = *_range(x), *_range(y)
        # As many hexagons as the features can fill, so that a small SAE does not look like noise.
        n = int(np.clip(np.sqrt(len(x)), 12, MAX_HEXAGONS))
        hexagons = main.hexbin(
            x, y, gridsize=n, bins="log", mincnt=1, cmap="plasma", linewidths=0.2, extent=(left, high_x, bottom, high_y)
        )
        x_ticks, y_ticks = _ticks(left, high_x), _ticks(bottom, high_y)
        main.set(xlim=(left, high_x), xticks=x_ticks, xticklabels=[_share(power) for power in x_ticks])
        main.set(ylim=(bottom, high_y), yticks=y_ticks, yticklabels=[f"{10**power:.3g}" for power in y_ticks])
        # One outline instead of as many bars, each of which takes matplotlib as long.
        above.stairs(*np.histogram(x, bins=N_BINS, range=(left, high_x)), fill=True, color=ACCENT)
        right.stairs(*np.histogram(y, bins=N_BINS, range=(bottom, high_y)), fill=True, color=ACCENT, orientation="horizontal")
        bar = figure.colorbar(hexagons, cax=_axes(figure, 5.7, 0.55, 0.12, 3.85))
        bar.set_label("features", color=FAINT, fontsize=9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=FAINT)
    else:
        main.text(0.5, 0.5, "no feature fires", transform=main.transAxes, ha="center", color=FAINT)
        main.set(xticks=[], yticks=[])
    return _png(figure)


def distributions_png(values_st: NDArray[np.float32]) -> bytes:
    """The scores of the first features on the sampled tokens, a row each, on one scale.

    Args:
        values_st: float32 (n_distributions, n_samples). Most scores are zero; those not above zero are counted in the
            row's text and not drawn, as they would hide the rest. At most `MAX_ROWS` features are drawn.

    Returns:
        PNG. Bars are shares of a feature's own scores above zero, so that rare features can be read too.
    """
    rows = values_st[:MAX_ROWS]
    n_rows, n_samples = max(len(rows), 1), values_st.shape[1]
    high = float(rows.max(initial=0.0))
    if high < np.finfo(np.float32).tiny:  # NumPy makes no bins of it
        high = 1.0
    figure = _figure(6.4, 1.0 + 0.42 * n_rows)
    shown = f"features 0 to {len(rows) - 1}" if len(rows) > 1 else "feature 0" if len(rows) else "no features"
    figure.suptitle(
        f"Scores above zero of {shown}, on {n_samples:,} tokens", x=0.02, ha="left", fontsize=11, color=INK, weight="bold"
    )
    axis = _axes(figure, 0.4, 0.55, 4.9, 0.42 * n_rows)  # one for all rows: two dozen would take matplotlib seconds
    _plain(axis)
    axis.spines["left"].set_visible(False)
    axis.set(xlim=(0, high), ylim=(n_rows, 0), xlabel="score")
    axis.set_yticks([s + 0.5 for s in range(len(rows))], [str(s) for s in range(len(rows))])
    axis.tick_params(axis="y", length=0)
    axis.hlines(range(1, n_rows), 0, high, color=RULE, linewidth=0.8)
    for s, values_t in enumerate(rows):
        above_t = values_t[values_t > 0]
        counts, edges = np.histogram(above_t, bins=N_BINS, range=(0, high))
        base = s + 1.0  # the scale runs downwards
        axis.stairs(base - ROW_FILL * counts / max(int(counts.max()), 1), edges, baseline=base, fill=True, color=ACCENT)
        share = f"{len(above_t) / n_samples:.2%} of tokens" if len(above_t) else "never"
        axis.text(1.01, s + 0.5, share, transform=axis.get_yaxis_transform(), va="center", fontsize=8, color=FAINT)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, **shared: Any) -> Axes:
    """Axes at a place in inches: for matplotlib to find one takes it as long again as to draw."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up), **shared)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(RULE)
    axis.tick_params(colors=FAINT, labelsize=8)
    axis.xaxis.label.set(color=FAINT, fontsize=9)
    axis.yaxis.label.set(color=FAINT, fontsize=9)


def _range(values: NDArray[np.floating]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = max(0.04 * (high - low), 0.1)
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Logarithms of powers of ten, few of them, or of 1, 2 and 5 times powers where the range is short."""
    powers = range(math.floor(low), math.ceil(high))
    steps = (1, 2, 5) if high - low <= 2.5 else (1,)
    every = math.ceil((high - low) / 6)
    found = [power + math.log10(step) for power in powers if power % every == 0 for step in steps]
    return [at for at in found if low <= at <= high]


def _share(power: float) -> str:
    percent = 100 * 10**power
    return f"{percent:.6f}".rstrip("0").rstrip(".") + "%" if percent >= 1e-6 else f"{percent:.0e}%"


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    # matplotlib writes its version into the file otherwise: the same picture would differ between machines.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
