"""What the drawing processes do: open one picture, lay heatmaps over it, write the files.

They import neither torch nor matplotlib, and get everything through `Drawing` (once, when they start) and `Task` (for each
image).
"""

import io
import multiprocessing
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saev_dist.data.images import load_picture, version_of
from saev_dist.files import replacing, writing
from saev_dist.render.geometry import Geometry, Placement
from saev_dist.render.heatmap import highlight, plain
from saev_dist.signals import be_deaf

Format = Literal["webp", "png"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is the same for all pictures of a replay."""

    out_dpath: Path
    """Directory that holds `features/`."""
    root: Path | None
    """Where the pictures are; None: there are none."""
    in_data_set: bool
    geometry: Geometry
    colours_c3: NDArray[np.float64]
    """Of heatmaps; see `plots.plasma`."""
    format: Format
    quality: int
    """Of WebP, 0 to 100."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One image and the features that are drawn on it."""

    img_i: int
    name: str
    """Of the picture, below the root or in the data set."""
    features: list[int]
    places: list[int]
    """This image's place among each feature's images."""
    uppers: list[float]
    """Each feature's largest score: the top of its colour scale."""
    values_mp: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What became of a task."""

    place: Placement
    n_bytes: list[tuple[int, int]]
    """Of each feature's picture and heatmap."""
    version: tuple[int, int] = (0, 0)
    """Of the picture's file, as `Pictures.version` has it."""


_drawing: Drawing | None = None


def start(drawing: Drawing) -> None:
    """Prepare this process."""
    global _drawing
    _drawing = drawing
    be_deaf()  # signals reach the whole group; the parent ends the pool
    threading.Thread(target=_leave_with_parent, daemon=True, name="parent").start()


def _leave_with_parent() -> None:
    """A killed parent leaves its pool waiting for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def draw(task: Task) -> Drawn:
    """Write the picture and its heatmap into each feature's folder.

    Raises:
        DataError: the picture cannot be decoded.
        RunError: the files cannot be written.
    """
    assert _drawing is not None
    version = (0, 0)
    if _drawing.root is None:
        place = _drawing.geometry.place(1, 1)
        picture_hwc = plain(place)
    else:
        if not _drawing.in_data_set:
            version = version_of(_drawing.root / task.name)
        picture = load_picture(_drawing.root, task.name, in_data_set=_drawing.in_data_set)
        place = _drawing.geometry.place(*picture.size)
        picture = picture.resize(place.resize, Image.Resampling.LANCZOS)
        picture_hwc = np.asarray(picture if place.crop is None else picture.crop(place.crop))
    original = _encoded(picture_hwc, _drawing)
    n_bytes = []
    for feature, order, upper, values_p in zip(task.features, task.places, task.uppers, task.values_mp, strict=True):
        dpath = _drawing.out_dpath / "features" / str(feature)
        with writing(dpath):
            dpath.mkdir(parents=True, exist_ok=True)
            picture_name, heatmap_name = file_names(order, task.img_i, _drawing.format)
            heatmap = _encoded(highlight(picture_hwc, values_p, upper, place, _drawing.colours_c3), _drawing)
            for name, content in ((picture_name, original), (heatmap_name, heatmap)):
                with replacing(dpath / name) as file:  # it is not fsynced: after a crash of the machine its size tells
                    file.write(content)
            n_bytes.append((len(original), len(heatmap)))
    return Drawn(place=place, n_bytes=n_bytes, version=version)


def file_names(place: int, img_i: int, format: Format) -> tuple[str, str]:
    """Names of an image's picture and heatmap inside a feature's folder."""
    stem = f"{place:03d}-{img_i}"
    return f"{stem}.{format}", f"{stem}-heatmap.{format}"


def _encoded(picture_hwc: NDArray[np.uint8], drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    if drawing.format == "webp":
        # Flat colours are smaller without loss, written seven times as fast, and have no halo.
        is_flat = drawing.root is None
        Image.fromarray(picture_hwc).save(buffer, "WEBP", quality=drawing.quality, method=2, lossless=is_flat)
    else:
        Image.fromarray(picture_hwc).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
