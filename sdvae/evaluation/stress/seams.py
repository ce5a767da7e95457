"""Stress test: the model's own tiles against the pass without tiles. The meter is in seam_score.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import Pixels, round_to_8_bits
from sdvae.errors import ConfigError
from sdvae.evaluation.stress.passes import Images, Note, levels, no_note, reconstruct
from sdvae.evaluation.stress.seam_score import SEAM_THRESHOLD, SeamScore, colour_step, seam_score

__all__ = ["Tiling", "seams"]

_MAX_PX = 1024  # of larger images the centre is taken: the pass without tiles has to fit into memory


@dataclass(frozen=True)
class Tiling:
    """Where the blended tiles of a model meet in an image. Pairs are (height, width), px."""

    tile: tuple[int, int]
    stride: tuple[int, int]  # from tile to tile; what they overlap is blended

    @staticmethod
    def of(model: Any) -> Tiling:
        if hasattr(model, "tile_sample_stride_height"):  # AutoencoderDC
            return Tiling(
                (model.tile_sample_min_height, model.tile_sample_min_width),
                (model.tile_sample_stride_height, model.tile_sample_stride_width),
            )
        tile = model.tile_sample_min_size  # AutoencoderKL, ours and stock, and AutoencoderTiny
        stride = tile - int(tile * model.tile_overlap_factor)
        return Tiling((tile, tile), (stride, stride))

    def describe(self) -> str:
        return f"{self.tile[1]} x {self.tile[0]} px"

    def canvas(self, pixels: Pixels) -> Pixels:
        """pixels, continued by mirroring along the longer side unless two whole tiles fit along one; else unchanged."""
        sides = pixels.shape[:2]
        lacking = [tile + stride - side for tile, stride, side in zip(self.tile, self.stride, sides, strict=True)]
        if min(lacking) <= 0:
            return pixels
        longer = int(np.argmax(sides))
        return np.pad(
            pixels, [(0, lacking[axis] if axis == longer else 0) for axis in range(2)] + [(0, 0)], "symmetric"
        )

    def lines(self, sides: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Rows and columns where the ramps between tiles begin, have their middle and end."""
        rows, columns = (
            sorted({start + part for start in self._starts(axis, side) for part in (0, blend // 2, blend)})
            for axis, (side, blend) in enumerate(zip(sides, self._blends(), strict=True))
        )
        return rows, columns

    def middles(self, sides: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Rows and columns in the middle of the ramps."""
        rows, columns = (
            [start + blend // 2 for start in self._starts(axis, side)]
            for axis, (side, blend) in enumerate(zip(sides, self._blends(), strict=True))
        )
        return rows, columns

    def _starts(self, axis: int, side: int) -> range:
        return range(self.stride[axis], side, self.stride[axis])

    def _blends(self) -> list[int]:
        return [tile - stride for tile, stride in zip(self.tile, self.stride, strict=True)]


@torch.inference_mode()
def seams(
    subject: OpenedVae,
    images: Images,
    *,
    note: Note = no_note,
) -> list[dict[str, Any]]:
    """The model's own tiles against the pass without tiles.

    Images in which two whole tiles do not fit are continued by mirroring along their longer side. Returns: for
    `blended`, the one mode that there is, `score` (the largest seam score of an image where tiles meet; above
    `threshold` it is a seam), `median_score`, `num_visible` (images with a seam), `colour_step` (the largest
    difference of colour shift between neighbouring tiles, grey levels), `max_difference` (of x in [-1, 1], anywhere)
    and `num_images`. Empty, with a note, for a model without tiles.
    """
    try:
        with subject.tiled("blended"):
            tiling = Tiling.of(subject.model)
    except ConfigError as error:
        note(f"Seams: not measured; {error}.")
        return []
    found: list[SeamScore] = []
    difference = colour = 0.0
    num_mirrored = num_small = 0
    for _, pixels in images:
        piece = _centre(pixels)
        canvas = tiling.canvas(piece)
        num_mirrored += canvas is not piece
        x = levels(canvas, subject) * 2 - 1
        with subject.tiled("off"):
            whole = reconstruct(subject, x)
        with subject.tiled("blended"):
            tiled = reconstruct(subject, x)
        difference = max(difference, float((tiled - whole).abs().max()))
        image, reference = _grey_levels(tiled), _grey_levels(whole)
        rows, columns = tiling.middles(canvas.shape[:2])
        colour = max(colour, colour_step(image, reference, rows=rows, columns=columns))
        rows, columns = tiling.lines(canvas.shape[:2])
        try:
            found.append(seam_score(image, reference, rows=rows, columns=columns))
        except ConfigError:
            num_small += 1
    if num_mirrored:
        note(
            f"Seams: {num_mirrored} of {len(images)} images hold no two tiles of {tiling.describe()}, "
            "and were continued by mirroring."
        )
    if num_small:
        note(f"Seams: {num_small} of {len(images)} images are too small to say what a usual line in them is.")
    worst = max(found, key=lambda each: each.score, default=None)
    if worst is not None:
        line = (
            f"the strongest line where they meet, {worst.step:.2f} grey levels, is {'a' if worst.found else 'no'} seam"
        )
        note(f"Seams: blended tiles shift colours against each other by up to {colour:.2f} grey levels; {line}.")
    return [
        {
            "mode": "blended",
            "score": worst.score if worst else None,
            "median_score": float(np.median([each.score for each in found])) if found else None,
            "threshold": SEAM_THRESHOLD,
            "num_visible": sum(each.found for each in found),
            "colour_step": colour,
            "max_difference": difference,
            "num_images": len(images),
        }
    ]


def _centre(pixels: Pixels) -> Pixels:
    top, left = (max(0, (length - _MAX_PX) // 2) for length in pixels.shape[:2])
    return pixels[top : top + _MAX_PX, left : left + _MAX_PX]


def _grey_levels(recon: Tensor) -> NDArray[np.float64]:
    """(1, 3, H, W), [-1, 1] -> (H, W, 3), 0..255, rounded."""
    levels: NDArray[np.float64] = (round_to_8_bits(recon)[0].permute(1, 2, 0).cpu().double() * 255).numpy()
    return levels
