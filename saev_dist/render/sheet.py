"""PURE. The contact sheet: a row per feature, its strongest patches and the images that they lie in.

Names: `hwc` height, width and RGB of a picture, uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

LABEL_PX = 168
FRAME_PX = 2  # around an outline, and between a patch and its image
TILE_PX = 96  # width and height of a tile
GAP_PX = 10  # around a slot
HEADER_PX = 19  # a line of the header
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (105, 105, 105)


@dataclass(frozen=True, eq=False)
class Slot:
    """An image and the box in it that gave the score."""

    image_hwc: Picture
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the image; right and bottom are exclusive. It may reach over an edge."""


@dataclass(frozen=True, eq=False)
class Row:
    """What a feature shows."""

    title: str
    lines: tuple[str, ...]
    """Short facts under the title."""
    slots: Sequence[Slot]
    """Strongest first."""


def contact_sheet(rows: Sequence[Row], header: Sequence[str] = ()) -> Picture:
    """Draw the rows below the lines of the header.

    A slot is two square tiles: the box, enlarged, and the image with the box outlined.

    Args:
        rows: the features; rows may differ in length.
        header: lines above the rows; the first stands out.

    Returns:
        uint8 (height, width, 3). The width follows from the longest row, the height from the number of rows.
    """
    title_font, text_font = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    slot_px = 2 * TILE_PX + FRAME_PX + GAP_PX
    width = LABEL_PX + max((len(row.slots) for row in rows), default=0) * slot_px
    header_px = GAP_PX + HEADER_PX * len(header) + GAP_PX * bool(header)
    sheet = Image.new("RGB", (width, header_px + len(rows) * (TILE_PX + GAP_PX)), PAPER)
    draw = ImageDraw.Draw(sheet)

    for i, line in enumerate(header):
        font, colour = (text_font, FAINT) if i else (title_font, INK)
        draw.text((GAP_PX, GAP_PX + i * HEADER_PX), line, font=font, fill=colour)
    for row_i, row in enumerate(rows):
        top = header_px + row_i * (TILE_PX + GAP_PX)
        draw.text((GAP_PX, top), row.title, font=title_font, fill=INK)
        for i, line in enumerate(row.lines):
            draw.text((GAP_PX, top + 23 + 17 * i), line, font=text_font, fill=FAINT)
        for slot_i, slot in enumerate(row.slots):
            left = LABEL_PX + slot_i * slot_px
            sheet.paste(_enlarged(slot), (left, top))
            sheet.paste(_outlined(slot), (left + TILE_PX + FRAME_PX, top))
    return np.asarray(sheet)


def _enlarged(slot: Slot) -> Image.Image:
    """The box alone; pixels outside the image repeat its edge."""
    left, top, right, bottom = slot.box
    height, width = slot.image_hwc.shape[:2]
    rows = np.clip(np.arange(top, bottom), 0, height - 1)
    columns = np.clip(np.arange(left, right), 0, width - 1)
    patch = Image.fromarray(slot.image_hwc[np.ix_(rows, columns)])
    return patch.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)


def _outlined(slot: Slot) -> Image.Image:
    """The whole image, with a white line around the box and a black one around that: seen on any ground."""
    height, width = slot.image_hwc.shape[:2]
    tile = Image.fromarray(slot.image_hwc).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
    left, top, right, bottom = slot.box
    x0, x1 = round(left * TILE_PX / width), round(right * TILE_PX / width) - 1
    y0, y1 = round(top * TILE_PX / height), round(bottom * TILE_PX / height) - 1
    # The lines lie outside of the box, so that nothing in it is hidden; at the image's edge they move inwards.
    for margin, colour in ((2 * FRAME_PX, (0, 0, 0)), (FRAME_PX, (255, 255, 255))):
        edge = 2 * FRAME_PX - margin
        last = TILE_PX - 1 - edge
        corners = (max(x0 - margin, edge), max(y0 - margin, edge), min(x1 + margin, last), min(y1 + margin, last))
        ImageDraw.Draw(tile).rectangle(corners, outline=colour, width=FRAME_PX)
    return tile
