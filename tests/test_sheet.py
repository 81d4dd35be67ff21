"""The contact sheet shows the right pixels, marks the right place, and changes nothing that it is given."""

import numpy as np
import pytest
from numpy.typing import NDArray

from saev_dist.render.sheet import Row, Slot, contact_sheet

WHITE, BLACK = [255, 255, 255], [0, 0, 0]
COLOUR = [10, 200, 90]


def image(colour: list[int], px: int = 96) -> NDArray[np.uint8]:
    return np.full((px, px, 3), colour, np.uint8)


def row(*slots: Slot) -> Row:
    return Row("feature 7", ("fires on 1.00%",), slots)


def tiles(sheet: NDArray[np.uint8], tile_px: int = 96) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The enlarged box and the outlined image of the only slot, from the sheet's right end."""
    gap, between = 10, 2
    right = sheet[:tile_px, -gap - tile_px : -gap]
    return sheet[:tile_px, -gap - 2 * tile_px - between : -gap - tile_px - between], right


def sheet_of(slot: Slot) -> NDArray[np.uint8]:
    """A sheet without header, whose first row starts at the first pixel below the top margin."""
    whole = contact_sheet([row(slot)])
    return whole[whole.shape[0] - 96 - 10 :]


def test_size_follows_from_rows_and_their_slots() -> None:
    slot = Slot(image(COLOUR), (0, 0, 16, 16))
    one, two, wide = contact_sheet([row(slot)]), contact_sheet([row(slot)] * 2), contact_sheet([row(slot, slot)])
    assert one.dtype == np.uint8 and one.shape[2] == 3
    assert two.shape[0] > one.shape[0] and two.shape[1] == one.shape[1]
    assert wide.shape[1] > one.shape[1] and wide.shape[0] == one.shape[0]


def test_no_rows_and_rows_of_unequal_length_are_drawn() -> None:
    slot = Slot(image(COLOUR), (0, 0, 16, 16))
    assert contact_sheet([]).size > 0
    assert contact_sheet([row(slot, slot), row(), row(slot)]).shape[1] == contact_sheet([row(slot, slot)]).shape[1]


def test_the_enlarged_tile_shows_only_what_is_in_the_box() -> None:
    picture = image(BLACK)
    picture[40:56, 24:40] = COLOUR
    enlarged, _ = tiles(sheet_of(Slot(picture, (24, 40, 40, 56))))
    assert (enlarged == COLOUR).all()


def test_rows_and_columns_are_not_swapped() -> None:
    picture = image(BLACK)
    picture[8:24, 56:72] = COLOUR  # rows 8 … 23, columns 56 … 71
    enlarged, outlined = tiles(sheet_of(Slot(picture, (56, 8, 72, 24))))
    assert (enlarged == COLOUR).all()
    assert (outlined[8:24, 56:72] == COLOUR).all()


def test_the_outline_surrounds_the_box_and_hides_nothing_in_it() -> None:
    _, outlined = tiles(sheet_of(Slot(image(COLOUR), (40, 40, 56, 56))))
    assert (outlined[40:56, 40:56] == COLOUR).all()
    for edge in (outlined[39, 40:56], outlined[56, 40:56], outlined[40:56, 39], outlined[40:56, 56]):
        assert (edge == WHITE).all()
    for edge in (outlined[37, 40:56], outlined[58, 40:56], outlined[40:56, 37], outlined[40:56, 58]):
        assert (edge == BLACK).all()
    assert (outlined[:30] == COLOUR).all() and (outlined[66:] == COLOUR).all()


@pytest.mark.parametrize("box", [(-4, -4, 12, 12), (84, 84, 100, 100), (-4, 84, 12, 100)])
def test_a_box_over_the_edge_repeats_the_edge_and_stays_marked(box: tuple[int, int, int, int]) -> None:
    enlarged, outlined = tiles(sheet_of(Slot(image(COLOUR), box)))
    assert (enlarged == COLOUR).all()
    assert (outlined == WHITE).all(axis=2).any() and (outlined == BLACK).all(axis=2).any()


def test_images_of_any_size_fill_their_tile() -> None:
    picture = np.full((48, 192, 3), COLOUR, np.uint8)
    enlarged, outlined = tiles(sheet_of(Slot(picture, (96, 24, 112, 32))))
    assert (enlarged == COLOUR).all()
    assert (outlined[50:62, 50:54] == COLOUR).all()


def test_labels_and_header_are_drawn() -> None:
    slot = Slot(image(COLOUR), (0, 0, 16, 16))
    bare = contact_sheet([Row("", (), [slot])])
    assert (bare[:, :160] == WHITE).all()
    assert not (contact_sheet([row(slot)])[:, :160] == WHITE).all()
    headed = contact_sheet([row(slot)], header=("One", "Two"))
    assert headed.shape[0] > bare.shape[0]
    assert not (headed[: headed.shape[0] - bare.shape[0]] == WHITE).all()


def test_the_images_are_not_written_to() -> None:
    picture = image(COLOUR)
    picture.setflags(write=False)
    contact_sheet([row(Slot(picture, (0, 0, 16, 16)))])
    assert (picture == COLOUR).all()
