"""Sizes: crop and resize pixels for training and for a fixed size, pad tensors to a multiple and back.

Pixels are (H, W, 3) uint8 or uint16 as `images.read_image` gives them; resizing keeps the bit depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdvae.data.images import DEFAULT_MAX_PIXELS, Pixels, Place
from sdvae.errors import ImageError

__all__ = ["Padding", "RandomCrop", "pad_to_multiple", "resize_and_crop", "unpad"]


@dataclass(frozen=True)
class Padding:
    """Pixels added at each side."""

    top: int
    left: int
    bottom: int
    right: int


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, Padding]:
    """Repeat the last row and column until height and width are multiples of `multiple`.

    x: (..., H, W), any dtype. Nothing to add: x itself comes back, not a copy. Inverse: unpad.
    """
    height, width = x.shape[-2:]
    padding = Padding(top=0, left=0, bottom=-height % multiple, right=-width % multiple)
    # Not torch.nn.functional.pad: its replicate mode takes no integers and only 3 or 4 dimensions.
    if padding.bottom:
        x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], padding.bottom, width)], dim=-2)
    if padding.right:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], padding.right)], dim=-1)
    return x, padding


def unpad(x: Tensor, height: int, width: int) -> Tensor:
    """The top left height x width of x (..., H, W), as a view: what pad_to_multiple was given."""
    if height > x.shape[-2] or width > x.shape[-1]:
        raise ValueError(f"cannot cut {height} x {width} (height x width) out of {tuple(x.shape)}")
    return x[..., :height, :width]


def resize_and_crop(pixels: Pixels, size: int, crop: Literal["center", "none"], place: Place | None = None) -> Pixels:
    """Bring the short side to `size` px with an antialiased Lanczos filter; "center" also cuts out the central square.

    pixels: (H, W, 3) uint8 or uint16. place: of the picture in them, where it came reduced.
    Returns the same dtype: (size, size, 3) for "center", and for "none" the long side in proportion, at least `size`.
    Pixels that have the size already come back unchanged.
    Raises: ImageError where a long strip would grow beyond DEFAULT_MAX_PIXELS.
    """
    height, width = pixels.shape[:2] if place is None else (place.height, place.width)
    short = min(height, width)
    if crop == "center":
        top, left = (height - short) // 2, (width - short) // 2
        if place is not None:
            return _resize(pixels, size, size, place.box(left, top, short, short))
        return _square(pixels, top, left, short, size)
    new_height, new_width = (max(size, round(side * size / short)) for side in (height, width))
    if new_height * new_width > DEFAULT_MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} px scaled to a short side of {size} would be {new_width} x {new_height}, "
            f"more than {DEFAULT_MAX_PIXELS:,} pixels: crop it instead (crop 'center')"
        )
    return _resize(pixels, new_height, new_width, None if place is None else place.box(0, 0, width, height))


def _square(pixels: Pixels, top: int, left: int, side: int, size: int) -> Pixels:
    """The square of `side` px at (top, left), scaled to `size`. What lies outside, however long, is not scaled."""
    if side == size:
        return pixels[top : top + side, left : left + side]
    return _resize(pixels, size, size, box=(left, top, left + side, top + side))


def _resize(pixels: Pixels, height: int, width: int, box: tuple[float, float, float, float] | None = None) -> Pixels:
    if box is None and pixels.shape[:2] == (height, width):
        return pixels
    if pixels.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box))
    # Pillow has no 16-bit colour: each channel goes through 32-bit floats, which hold 16 bits exactly.
    resized = np.empty((height, width, 3), dtype=np.uint16)
    for channel in range(3):
        plane = Image.fromarray(pixels[..., channel].astype(np.float32))
        scaled = np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS, box))
        resized[..., channel] = np.rint(scaled).clip(0, 65535)  # Lanczos overshoots at edges
    return resized


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Cuts random squares for training, all of one size; resizing is antialiased (Lanczos).

    - native: a square at the image's own resolution. An image smaller than that is cut to its short side and enlarged.
    - resized: the short side is brought to `resize_px` first.
    - random_resized: a square whose side is a random part of the short side, from `min_ratio` to all of it, evenly
      drawn, and then scaled.
    Its place is drawn evenly from all that lie within the image.
    """

    crop_px: int  # side of what comes out
    kind: Literal["native", "resized", "random_resized"] = "native"
    resize_px: int | None = None  # resized; None: crop_px; not below crop_px
    min_ratio: float = 0.5  # random_resized; above 0, up to 1
    flip: bool = True  # mirror half of them left to right

    @property
    def min_side_px(self) -> int | None:
        """To this short side an image may be reduced while it is decoded, and no crop loses resolution by it.

        None: it must stay whole. One number for all crops, not one for each random_resized: so an image that is kept
        decoded gives the same crops as one that is read again.
        """
        if self.kind == "native":
            return None
        if self.kind == "resized":
            return self.resize_px or self.crop_px
        return math.ceil(self.crop_px / self.min_ratio)

    def __call__(self, pixels: Pixels, generator: np.random.Generator) -> Pixels:
        """A piece of pixels (H, W, 3), uint8 or uint16: (crop_px, crop_px, 3), contiguous, its own memory.

        All randomness is the generator's.
        """
        square = self._piece(pixels, generator)
        mirrored = self.flip and generator.random() < 0.5
        return np.array(square[:, ::-1] if mirrored else square, order="C")

    def _piece(self, pixels: Pixels, generator: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        short = min(height, width)
        if self.kind == "resized":
            return self._piece_of_resized(pixels, generator)
        if self.kind == "random_resized":
            side = max(1, round(generator.uniform(self.min_ratio, 1.0) * short))
        else:
            side = min(self.crop_px, short)
        top, left = (int(generator.integers(length - side + 1)) for length in (height, width))
        return _square(pixels, top, left, side, self.crop_px)

    def _piece_of_resized(self, pixels: Pixels, generator: np.random.Generator) -> Pixels:
        """What a crop of the resized image would be, with only the crop resized: its box is laid back into `pixels`."""
        size = self.crop_px
        lengths = pixels.shape[:2]
        target = self.resize_px or size
        scaled = [max(target, round(length * target / min(lengths))) for length in lengths]
        top, left = (int(generator.integers(length - size + 1)) for length in scaled)
        if scaled == list(lengths):
            return pixels[top : top + size, left : left + size]
        y0, x0, y1, x1 = (
            min((start + end) * length / new, length)  # rounding must not lead out of the picture
            for end in (0, size)
            for start, length, new in zip((top, left), lengths, scaled, strict=True)
        )
        return _resize(pixels, size, size, box=(x0, y0, x1, y1))
