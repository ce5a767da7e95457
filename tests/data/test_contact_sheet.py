"""The contact sheet shows what it says, at a bounded size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdvae.data.contact_sheet import DIFFERENCE_GAIN, MAX_TILE_PX, SheetRow, contact_sheet, make_tile, sheet_row


def test_a_row_shows_both_images_and_their_amplified_difference() -> None:
    original = np.full((20, 30, 3), 100, dtype=np.uint8)
    reconstruction = original.copy()
    reconstruction[:10, :, 0] += 5
    reconstruction[10:, :, 1] -= 90
    row = sheet_row(original, reconstruction, "a.png", "30 dB")
    first, second, difference = (np.asarray(tile) for tile in row.tiles)
    assert np.array_equal(first, original) and np.array_equal(second, reconstruction)
    assert difference[0, 0].tolist() == [5 * DIFFERENCE_GAIN, 0, 0]
    assert difference[-1, -1].tolist() == [0, 255, 0]  # clipped, not wrapped around


def test_the_sheet_holds_its_rows_side_by_side_and_large_images_are_scaled_down() -> None:
    red, blue = np.zeros((2, 600, 2000, 3), dtype=np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    rows = [sheet_row(red, blue, "a name " * 60, "1.00 dB"), sheet_row(red[:50, :40], blue[:50, :40], "b", "2.00 dB")]
    assert rows[0].tiles[0].size == (MAX_TILE_PX, 115) and rows[1].tiles[0].size == (40, 50)
    sheet = contact_sheet(rows, "VAE x", "PSNR 1.50 dB")
    height, width = sheet.shape[:2]
    assert sheet.dtype == np.uint8 and width < 3.3 * MAX_TILE_PX and height < 400
    reds, blues = (np.argwhere((sheet == colour).all(axis=-1)) for colour in ([255, 0, 0], [0, 0, 255]))
    assert len(reds) == len(blues) == MAX_TILE_PX * 115 + 40 * 50
    assert reds[:, 1].max() < blues[:, 1].max()
    magenta = (sheet == [255, 0, 255]).all(axis=-1)  # the difference
    assert magenta.sum() == len(reds)
    assert (sheet[:, -20:] == 255).all()  # the long name does not run over the edge


COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "cyan": (0, 255, 255), "gold": (255, 215, 0)}


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_sheet_has_as_many_columns_as_its_rows(count: int) -> None:
    labels = tuple(COLOURS)[:count]
    tiles = tuple(make_tile(np.full((30, 120, 3), COLOURS[label], dtype=np.uint8)) for label in labels)
    sheet = contact_sheet([SheetRow(labels=labels, tiles=tiles, name="a", details="")] * 2, "", "")
    lefts = []
    for label in labels:
        places = np.argwhere((sheet == COLOURS[label]).all(axis=-1))
        assert len(places) == 2 * 30 * 120
        lefts.append(places[:, 1].min())
    assert lefts == sorted(lefts) and (np.diff(lefts) > 120).all()
    heads = sheet[: places[:, 0].min()]  # a word stands over each column
    assert all((heads[:, left : left + 120] < 128).any() for left in lefts)
    assert (sheet[:, -20:] == 255).all() and sheet.shape[1] < lefts[-1] + 120 + 30


def test_rows_of_different_columns_make_no_sheet() -> None:
    row = sheet_row(*np.zeros((2, 8, 8, 3), dtype=np.uint8), "a", "")
    other = dataclasses.replace(row, labels=("original", "averaged weights", "difference"))
    with pytest.raises(ValueError, match="different columns.*averaged weights"):
        contact_sheet([row, other], "", "")
