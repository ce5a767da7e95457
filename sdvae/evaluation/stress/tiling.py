"""Where the blended tiles of a model meet in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdvae.data.images import Pixels

__all__ = ["Tiling"]


@dataclass(frozen=True)
class Tiling:
    """Pairs are (height, width), px."""

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
