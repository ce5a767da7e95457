"""SSIM against its definition written out in float64, and against scikit-image and pytorch-msssim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from sdvae.metrics.ssim import MS_SSIM_MIN_PX, ms_ssim, ssim, ssim_uniform


def pair(height: int, width: int, num: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """8-bit pictures with flat, striped and random areas, and versions of them with noise."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (num, 3, height, width)).astype(float)
    levels[:, :, : height // 2] = 255 * (np.arange(width) // 8 % 2)  # stripes of black and white
    levels[:, :, :, : width // 3] = np.array([250, 5, 128])[:, None, None]
    noisy = (levels + rng.normal(0, 12, levels.shape)).clip(0, 255).round()
    x, recon = (torch.from_numpy(each).float() / 255 for each in (levels, noisy))
    return recon, x


def by_definition(x: NDArray[np.float64], y: NDArray[np.float64], window: NDArray[np.float64], unbias: float) -> float:
    """One channel, two-dimensional window, each position by itself."""
    side = len(window)
    a, b = sliding_window_view(x, (side, side)), sliding_window_view(y, (side, side))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("ijkl,kl->ij", values, window)

    mean_a, mean_b = mean(a), mean(b)
    centred_a, centred_b = a - mean_a[..., None, None], b - mean_b[..., None, None]
    var_a, var_b, cov = (unbias * mean(v) for v in (centred_a**2, centred_b**2, centred_a * centred_b))
    c1, c2 = 0.01**2, 0.03**2
    full = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(full.mean())


def expected(recon: Tensor, x: Tensor, window: NDArray[np.float64], unbias: float = 1.0) -> list[float]:
    a, b = x.double().numpy(), recon.double().numpy()
    return [float(np.mean([by_definition(a[n, c], b[n, c], window, unbias) for c in range(3)])) for n in range(len(a))]


def gaussian() -> NDArray[np.float64]:
    row = np.exp(-(np.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))
    return np.asarray(np.outer(row, row) / row.sum() ** 2)


@pytest.mark.parametrize("size", [(11, 11), (12, 40), (83, 37)])
def test_ssim_is_its_definition(size: tuple[int, int]) -> None:
    recon, x = pair(*size)
    assert ssim(recon, x).tolist() == pytest.approx(expected(recon, x, gaussian()), abs=2e-6)


@pytest.mark.parametrize("size", [(7, 7), (8, 40), (83, 37)])
def test_the_uniform_variant_is_its_definition(size: tuple[int, int]) -> None:
    recon, x = pair(*size)
    window = np.full((7, 7), 1 / 49)
    assert ssim_uniform(recon, x).tolist() == pytest.approx(expected(recon, x, window, 49 / 48), abs=2e-6)


def test_neither_batch_nor_strips_change_the_value() -> None:
    recon, x = pair(300, 520, num=5)  # several strips, and more images than one pass takes
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    reference = [
        structural_similarity(
            a, b, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(x.double().numpy(), recon.double().numpy(), strict=True)
    ]
    assert ssim(recon, x).tolist() == pytest.approx(reference, abs=2e-6)
    for function in (ssim, ssim_uniform, ms_ssim):
        together, alone = function(recon, x), torch.cat([function(recon[n : n + 1], x[n : n + 1]) for n in range(5)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        assert together.dtype == torch.float64 and together.shape == (5,)


@pytest.mark.parametrize("size", [(161, 161), (176, 176), (163, 250), (192, 177)])
def test_ms_ssim_equals_pytorch_msssim_also_for_odd_sides(size: tuple[int, int]) -> None:
    package = pytest.importorskip("pytorch_msssim")
    recon, x = pair(*size)
    reference = package.ms_ssim(recon.double(), x.double(), data_range=1.0, size_average=False)
    torch.testing.assert_close(ms_ssim(recon, x), reference, rtol=0, atol=5e-6)


def test_ms_ssim_clamps_negative_contrast_terms() -> None:
    x = pair(MS_SSIM_MIN_PX, MS_SSIM_MIN_PX, num=1)[1]
    assert float(ssim(1 - x, x)) < 0  # the negative of a picture
    assert ms_ssim(1 - x, x).tolist() == [0.0]


@pytest.mark.parametrize("function", [ssim, ssim_uniform, ms_ssim])
def test_equal_images_give_exactly_one(function: object) -> None:
    assert callable(function)
    x = pair(170, 190)[1]
    assert function(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-7)
