"""PURE. A feature's score on every patch, drawn on the picture.

The drawing is saev's (saev/imaging.py, `add_highlights`): the colour map "plasma" at `score / upper`, laid over each
patch with opacity `0.9 * score / upper`, `upper` being the feature's largest score.

Names: `p` patches, `hwc` height, width and RGB, uint8.
"""

import functools

import matplotlib
import numpy as np
from numpy.typing import NDArray

from saev_dist.render.geometry import Placement

OPACITY = 0.9
PAPER = 245


def highlight(
    picture_hwc: NDArray[np.uint8], values_p: NDArray[np.float32], upper: float, place: Placement
) -> NDArray[np.uint8]:
    """Lay a feature's scores over a picture.

    Args:
        picture_hwc: as shown to the model, of `place.size`.
        values_p: float32 (n_patches,), row by row. Scores below zero (a raw TopK has them) count as zero.
        upper: score of full strength, above zero.
        place: the patch grid.

    Returns:
        uint8, of the picture's shape.
    """
    height, width = picture_hwc.shape[:2]
    share_rc = np.clip(values_p.reshape(place.n_rows, place.n_cols) / upper, 0, 1)
    colour_rc3 = (plasma()[np.minimum((share_rc * 256).astype(np.int64), 255)] * 255).astype(np.uint8)
    alpha_rc = (OPACITY * share_rc * 255).astype(np.int64)

    row_h, col_w = _cells(height, place.patch, place.n_rows), _cells(width, place.patch, place.n_cols)
    # Pixels right of and below the last patch belong to none; they look up a cell and get alpha 0.
    alpha_hw = alpha_rc[np.ix_(np.minimum(row_h, place.n_rows - 1), np.minimum(col_w, place.n_cols - 1))]
    alpha_hw[row_h >= place.n_rows] = 0
    alpha_hw[:, col_w >= place.n_cols] = 0
    colour_hwc = colour_rc3[np.ix_(np.minimum(row_h, place.n_rows - 1), np.minimum(col_w, place.n_cols - 1))].astype(np.int64)
    alpha_hw1 = alpha_hw[:, :, None]
    mixed_hwc: NDArray[np.int64] = (picture_hwc.astype(np.int64) * (255 - alpha_hw1) + colour_hwc * alpha_hw1 + 127) // 255
    return mixed_hwc.astype(np.uint8)


def plain(place: Placement) -> NDArray[np.uint8]:
    """A ground for heatmaps where there is no picture."""
    width, height = place.size
    return np.full((height, width, 3), PAPER, np.uint8)


@functools.cache
def plasma() -> NDArray[np.float64]:
    """The colour map as 256 colours, (256, 3), in 0 … 1."""
    colours: NDArray[np.float64] = matplotlib.colormaps["plasma"](np.arange(256))[:, :3]
    return colours


def _cells(n_px: int, patch: float, n_cells: int) -> NDArray[np.int64]:
    """The cell that the middle of each pixel lies in; `n_cells` for pixels behind the last."""
    return np.minimum(((np.arange(n_px) + 0.5) / patch).astype(np.int64), n_cells)
