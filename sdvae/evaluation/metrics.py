"""Metrics of single images. Each says its unit and which direction is better. Numpy only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["psnr"]


def psnr(image: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit pixels: 10 * log10(255^2 / MSE) over all pixels and channels.

    image, reconstruction: of one shape, uint8. Returns: dB, higher is better; infinity for equal images.
    """
    if image.dtype != np.uint8 or reconstruction.dtype != np.uint8 or image.shape != reconstruction.shape:
        raise ValueError(
            f"expected two uint8 arrays of one shape, got {image.dtype} {image.shape} and "
            f"{reconstruction.dtype} {reconstruction.shape}"
        )
    difference = image.astype(np.int16) - reconstruction  # int16: uint8 would wrap around
    mse = float(np.square(difference, dtype=np.int32).mean(dtype=np.float64))
    return 10.0 * math.log10(255.0**2 / mse) if mse > 0 else math.inf
