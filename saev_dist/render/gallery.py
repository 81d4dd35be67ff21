"""PURE. The gallery: a page that opens from the disk, without a server or a network.

    visuals/index.html              `index_html`: the page, its style and its script
    visuals/data.js                 `data_js`: the statistics of every feature, and which have pictures
    visuals/features/<i>/data.js    `feature_js`: what the view of one feature needs; its pictures lie beside it

A page opened from the disk may not fetch files, but may load scripts. So data are scripts that hand over one JSON value:
numbers by column in base64, little-endian, and texts as JSON in ASCII without `<`, `>` and `&`, so that nothing in them
can end a script. The page writes texts with `textContent` only, and its content security policy lets no other script run
and no request leave the directory.

Names: `s` features, `p` patches, `h` bins.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from saev_dist.choose import FeatureTable

CARD_IMAGES = 4
"""Pictures of a feature on the first screen."""
MAX_BARS = 48
CloseUp = tuple[str, float, float, float, float]
"""A picture's file, and left, top, width and height of a frame on it, as shares of its own width and height."""

_ENVIRONMENT = Environment(
    loader=PackageLoader("saev_dist.render"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {"count": lambda n: f"{n:,}", "share": lambda x: f"{x:.1%}", "number": lambda x: f"{x:.10g}"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The run, for the header."""

    sae: str
    shards: str
    dataset: str
    fit: str
    """How its pictures were prepared."""
    family: str
    ckpt: str
    layer: int
    n_imgs: int
    n_left_out: int
    """Of those images, not read because their shards are bad."""
    n_patches: int
    """Of one image."""
    n_tokens: int
    d_sae: int
    l0: float
    n_dead: int
    normalized_mse: float | None
    rank_by: str
    top_k: int
    percentile: float
    precision: str
    version: str
    features: tuple[int, ...]
    """That were asked for by number."""
    flags: tuple[str, ...]
    """Of the `replay` that makes this gallery, but --run and --features."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TopImage:
    """One picture of a feature."""

    img_i: int
    score: float
    patch_i: int
    label: str
    path: str
    picture: str
    """File beside the feature's data.js: the picture as the model saw it."""
    heatmap: str
    """File beside it: the same picture with the heatmap drawn on it at full strength."""
    width: int
    height: int
    """Of both, px."""
    n_cols: int
    n_rows: int
    patch: float
    """Edge of a patch, px. They lie row by row, from the upper left corner."""
    values_p: NDArray[np.float32]
    """The feature's score on every patch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureView:
    """One feature."""

    feature: int
    upper: float
    """Score at full strength of the colour scale. It is read only where there are images."""
    edges_h: NDArray[np.float32]
    counts_h: NDArray[np.int64]
    """The histogram, as in `accumulators.histogram`."""
    images: Sequence[TopImage]
    """Strongest first; empty for a feature that never fired."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the first screen shows of a feature that was rendered."""

    feature: int
    heatmaps: tuple[str, ...]
    """Files in its folder, strongest first; none for a feature that never fired."""
    labels: tuple[str, ...]
    """Of those pictures."""
    close_ups: tuple[CloseUp, ...]
    """Of their winning patches, which the heatmaps all but hide; none where there is only a plain ground to see."""


def card(feature: int, images: Sequence[TopImage], *, close_ups: bool = True) -> Card:
    """The card of a feature with these images, strongest first."""
    shown = images[:CARD_IMAGES]
    return Card(
        feature=feature,
        heatmaps=tuple(image.heatmap for image in shown),
        labels=tuple(image.label for image in shown),
        close_ups=tuple(_close_up(image) for image in shown) if close_ups else (),
    )


def _close_up(image: TopImage) -> CloseUp:
    """The winning patch in the middle of a frame twice its size. At an edge the frame reaches over it: if the patch were
    moved in its frame, an edge in it would seem to be somewhere else than in the other close-ups."""
    row, column = divmod(image.patch_i, image.n_cols)
    return (
        image.picture,
        round((column - 0.5) * image.patch / image.width, 5),
        round((row - 0.5) * image.patch / image.height, 5),
        round(2 * image.patch / image.width, 5),
        round(2 * image.patch / image.height, 5),
    )


def index_html(facts: Facts) -> str:
    """The page, without data. The text can be encoded as UTF-8 whatever the paths in `facts` hold."""
    style, script = (_source(name) for name in ("style.css", "script.js"))
    readable = {
        # A path need not be text: Python passes its bytes on as lone surrogates, which no file in UTF-8 can hold.
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in asdict(facts).items()
    }
    return _ENVIRONMENT.get_template("index.html").render(
        facts=readable,
        style=Markup(style),
        script=Markup(script),
        style_hash=_sha256(style),
        script_hash=_sha256(script),
    )


def data_js(facts: Facts, table: FeatureTable, cards: Sequence[Card]) -> str:
    """`gallery = {...}`: columns of all features, and the cards of those with pictures.

    Columns are base64 of little-endian float32 (log10_freq, log10_mean, max, percentile) and float64 (n_active, exact up
    to 2^53), d_sae numbers each. A card is `[feature, [heatmap, …], [label, …], [close-up, …]]`.
    """
    columns = {
        "log10_freq": _base64(table.log10_freq_s, "<f4"),
        "log10_mean": _base64(table.log10_mean_s, "<f4"),
        "max": _base64(table.max_s, "<f4"),
        "percentile": _base64(table.percentile_s, "<f4"),
        "n_active": _base64(table.n_active_s, "<f8"),
    }
    content = {
        "d_sae": facts.d_sae,
        "n_tokens": facts.n_tokens,
        "features": facts.features,
        "flags": shlex.join(facts.flags),
        "columns": columns,
        "cards": [[c.feature, c.heatmaps, c.labels, c.close_ups] for c in cards],
    }
    return f"window.gallery = {_script_json(content)};\n"


def feature_js(view: FeatureView) -> str:
    """`galleryFeature({...})`: a feature's histogram and images.

    `histogram` holds `edges` and `counts` of at most `MAX_BARS` bars; an edge at infinity is null. An image's `values` are
    base64 of little-endian int16, one a patch; the score is that times `scale / 32767`, so zero is exact, negative
    scores are kept, and the error is below 2e-5 of the image's largest score.
    """
    edges, counts = coarse(view.edges_h, view.counts_h)
    content = {
        "feature": view.feature,
        "upper": view.upper if view.images else None,
        "histogram": {
            "edges": [float(edge) if np.isfinite(edge) else None for edge in edges],
            "counts": counts.tolist(),
        },
        "images": [_image(image) for image in view.images],
    }
    return f"galleryFeature({_script_json(content)});\n"


def coarse(
    edges_h: NDArray[np.float32], counts_h: NDArray[np.int64], max_bars: int = MAX_BARS
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Leave out the empty bins at both ends, and join neighbours, a power of two at a time, until few are left.

    Returns:
        edges (n_bars + 1,), a part of `edges_h`, and counts (n_bars,) with the same sum; no bars when all are empty.
    """
    filled = np.flatnonzero(counts_h)
    if not len(filled):
        return edges_h[:0], counts_h[:0]
    first, last = int(filled[0]), int(filled[-1]) + 1
    step = 1
    while -(-(last - first) // step) > max_bars:
        step *= 2
    starts = np.arange(first, last, step)
    counts = np.add.reduceat(counts_h[first:last], starts - first)
    return np.append(edges_h[starts], edges_h[min(int(starts[-1]) + step, len(counts_h))]), counts


def _image(image: TopImage) -> dict[str, Any]:
    assert image.values_p.shape == (image.n_cols * image.n_rows,)
    scale = float(np.abs(image.values_p).max()) or 1.0
    content = {key: value for key, value in vars(image).items() if key != "values_p"}
    steps_p = np.rint(image.values_p.astype(np.float64) * (32767 / scale))
    return content | {"scale": scale, "values": _base64(steps_p, "<i2")}


def _base64(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def _script_json(content: Any) -> str:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(name: str) -> str:
    assert _ENVIRONMENT.loader is not None
    return _ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0]


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
