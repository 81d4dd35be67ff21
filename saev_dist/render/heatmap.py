"""PURE. A feature's score on every patch, drawn on the picture.

The drawing is saev's (saev/imaging.py, `add_highlights`): the colour map "plasma" at `score / upper`, laid over each
patch with opacity `0.9 * score / upper`, `upper` being the feature's largest score.

Names: `p` patches, `hwc` height, width and RGB, uint8.
"""

import numpy as np
from numpy.typing import NDArray

from saev_dist.render.geometry import Placement

OPACITY = 0.9
PAPER = 245


def highlight(
    picture_hwc: NDArray[np.uint8],
    values_p: NDArray[np.float32],
    upper: float,
    place: Placement,
    colours_c3: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """Lay a feature's scores over a picture.

    Args:
        picture_hwc: as shown to the model, of `place.size`.
        values_p: float32 (n_patches,), row by row. Scores below zero (a raw TopK has them) count as zero.
        upper: score of full strength, above zero.
        place: the patch grid.
        colours_c3: `plots.plasma()`; to make it here would have each drawing process import matplotlib.

    Returns:
        uint8, of the picture's shape.
    """
    height, width = picture_hwc.shape[:2]
    share_rc = np.clip(values_p.reshape(place.n_rows, place.n_cols) / upper, 0, 1)
    colour_rc3 = (colours_c3[np.minimum((share_rc * 256).astype(np.int64), 255)] * 255).astype(np.uint16)
    alpha_rc1 = (OPACITY * share_rc * 255).astype(np.uint16)[:, :, None]
    # A cell more at the right and below, of alpha 0: for pixels behind the last patch, which belong to none.
    weighted_rc3 = np.pad(colour_rc3 * alpha_rc1, ((0, 1), (0, 1), (0, 0)))
    left_rc3 = np.pad(np.repeat(255 - alpha_rc1, 3, axis=2), ((0, 1), (0, 1), (0, 0)), constant_values=255)
    row_h, col_w = _cells(height, place.patch, place.n_rows), _cells(width, place.patch, place.n_cols)
    mixed_hwc: NDArray[np.uint16] = picture_hwc * left_rc3[:, col_w][row_h]  # at most 255 * 255 + 127: 16 bits
    mixed_hwc += (weighted_rc3[:, col_w] + np.uint16(127))[row_h]
    return (mixed_hwc // 255).astype(np.uint8)


def plain(place: Placement) -> NDArray[np.uint8]:
    """A ground for heatmaps where there is no picture."""
    width, height = place.size
    return np.full((height, width, 3), PAPER, np.uint8)


def _cells(n_px: int, patch: float, n_cells: int) -> NDArray[np.int64]:
    """The cell that the middle of each pixel lies in; `n_cells` for pixels behind the last."""
    return np.minimum(((np.arange(n_px) + 0.5) / patch).astype(np.int64), n_cells)
