"""A picture to judge a VAE by: an original, what became of it and the difference side by side, one image a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "DIFFERENCE_GAIN",
    "DIFFERENCE_LABEL",
    "MAX_ROWS",
    "SheetRow",
    "contact_sheet",
    "difference",
    "make_tile",
    "sheet_row",
]

MAX_ROWS = 16  # more would make a picture that nobody looks through
MAX_TILE_PX = 384  # photographs are scaled down to fit a square of this side, never up
DIFFERENCE_GAIN = 4
DIFFERENCE_LABEL = f"difference x {DIFFERENCE_GAIN}"

_MARGIN, _GAP, _ROW_GAP = 24, 8, 22
_TITLE_SIZE, _TEXT_SIZE = 22, 15
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 26, 30), (112, 118, 128)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class SheetRow:
    """One image of the sheet, scaled down already, so that a long list of large images needs little memory."""

    labels: tuple[str, ...]  # of the columns; the same in every row of a sheet
    tiles: tuple[Image.Image, ...]  # one per label, all of one size; see `make_tile`
    name: str
    details: str


def sheet_row(original: Pixels, reconstruction: Pixels, name: str, details: str) -> SheetRow:
    """A row of three columns from two images of one size. original, reconstruction: (H, W, 3) uint8, sRGB."""
    pictures = (original, reconstruction, difference(original, reconstruction))
    return SheetRow(
        labels=("original", "reconstruction", DIFFERENCE_LABEL),
        tiles=tuple(make_tile(picture) for picture in pictures),
        name=name,
        details=details,
    )


def difference(original: Pixels, reconstruction: Pixels) -> Pixels:
    """What the two differ by, DIFFERENCE_GAIN times as strong, clipped. All (H, W, 3) uint8."""
    distance = np.abs(original.astype(np.int16) - reconstruction) * DIFFERENCE_GAIN
    clipped: Pixels = distance.clip(0, 255).astype(np.uint8)
    return clipped


def make_tile(pixels: Pixels) -> Image.Image:
    """A picture as it stands in a row: scaled down to fit MAX_TILE_PX. pixels: (H, W, 3) uint8, sRGB."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((MAX_TILE_PX, MAX_TILE_PX), Image.Resampling.LANCZOS)
    return image


def contact_sheet(rows: Sequence[SheetRow], title: str, subtitle: str) -> Pixels:
    """The sheet as pixels, (H, W, 3) uint8.

    rows: at least one, at most MAX_ROWS, all with the same labels, which head the columns.
    """
    labels = rows[0].labels
    if any(row.labels != labels for row in rows):
        raise ValueError(f"rows of one sheet have different columns: {sorted({row.labels for row in rows})}")
    tile_width = max(row.tiles[0].width for row in rows)
    fonts = {size: ImageFont.load_default(size) for size in (_TITLE_SIZE, _TEXT_SIZE)}
    text_width = int(max(fonts[_TITLE_SIZE].getlength(title), fonts[_TEXT_SIZE].getlength(subtitle)))
    width = 2 * _MARGIN + max(len(labels) * (tile_width + _GAP) - _GAP, text_width)
    line = _TEXT_SIZE + 8
    top = _MARGIN + _TITLE_SIZE + 10 + line + 14  # of the column names
    height = top + line + sum(row.tiles[0].height + line + _ROW_GAP for row in rows) - _ROW_GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, fonts[_TITLE_SIZE])
    draw.text((_MARGIN, _MARGIN + _TITLE_SIZE + 10), subtitle, _FAINT, fonts[_TEXT_SIZE])
    lefts = [_MARGIN + column * (tile_width + _GAP) for column in range(len(labels))]
    for left, label in zip(lefts, labels, strict=True):
        draw.text((left, top), label, _INK, fonts[_TEXT_SIZE])
    y = top + line
    for row in rows:
        for left, tile in zip(lefts, row.tiles, strict=True):
            sheet.paste(tile, (left, y))
        y += row.tiles[0].height + 6
        _caption(draw, row, y, width, fonts[_TEXT_SIZE])
        y += line - 6 + _ROW_GAP
    return np.array(sheet)


def _caption(draw: ImageDraw.ImageDraw, row: SheetRow, y: int, width: int, font: Any) -> None:
    """The details at the left, the name after them, shortened where the sheet is too narrow."""
    draw.text((_MARGIN, y), row.details, _INK, font)
    left = _MARGIN + font.getlength(row.details + "   ")
    name = row.name
    while name and left + font.getlength(name) > width - _MARGIN:
        name = "..." + name.removeprefix("...")[1:] if len(name) > 4 else ""
    draw.text((left, y), name, _FAINT, font)
