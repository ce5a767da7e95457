"""PSNR against its definition and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdvae.evaluation.metrics import psnr


def test_psnr_of_a_constant_error_has_its_closed_form() -> None:
    image = np.full((5, 7, 3), 100, dtype=np.uint8)
    assert psnr(image, image + np.uint8(1)) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    assert psnr(image, image - np.uint8(10)) == pytest.approx(20 * math.log10(25.5))


def test_psnr_does_not_wrap_around_where_the_error_is_large() -> None:
    black, white = np.zeros((4, 4, 3), dtype=np.uint8), np.full((4, 4, 3), 255, dtype=np.uint8)
    assert psnr(black, white) == psnr(white, black) == pytest.approx(0.0)


def test_psnr_averages_squares_over_pixels_and_channels_and_falls_with_the_error() -> None:
    generator = np.random.default_rng(0)
    image, other = generator.integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    mse = np.mean((image.astype(float) - other) ** 2)
    assert psnr(image, other) == pytest.approx(10 * math.log10(255**2 / mse))
    closer = ((image.astype(int) + other) // 2).astype(np.uint8)
    assert psnr(image, other) < psnr(image, closer) < psnr(image, image) == math.inf


def test_psnr_refuses_what_it_does_not_mean() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        psnr(image, image[:3])
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        psnr(image, image.astype(np.float32))  # type: ignore[arg-type]
