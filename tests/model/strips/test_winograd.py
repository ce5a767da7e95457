"""Tiles of Winograd's convolution against torch's own in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.model.strips import winograd
from sdvae.model.strips.winograd import (
    CONVOLUTION,
    STEP,
    UPSAMPLING,
    Scratch,
    TileTransform,
    tile_convolution,
    toom_cook,
)

KINDS = {"convolution": CONVOLUTION, "upsampling": UPSAMPLING}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """x: (H, W, C). Returns: (H_out, W_out, C_out), float64."""
    image = x.permute(2, 0, 1)[None]
    if kind == "upsampling":
        image = F.interpolate(image, scale_factor=2.0, mode="nearest")
    return F.conv2d(image, weight, bias, padding=1)[0].permute(1, 2, 0)


def in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, transform: TileTransform, scratch: Scratch) -> Tensor:
    """x: (H, W, C), in whole tiles. All in float32."""
    x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    out = torch.full((transform.phases * x.shape[0], transform.phases * x.shape[1], len(weight)), torch.nan)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
    tile_convolution(padded, transform.of_weight(weight), bias, transform, scratch, out)
    return out


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the standard deviation of what was expected."""
    return float((actual - expected).abs().max() / expected.std())


@pytest.mark.parametrize(
    ("points", "num_outputs", "num_taps"),
    [
        (winograd.POINTS_OF_THREE_TAPS, 4, 3),
        (winograd.POINTS_OF_TWO_TAPS, 4, 2),
        ((0.0, 1.0, -1.0, 2.0, -2.0), 4, 3),
        ((0.0, 1.0, -1.0), 2, 3),
        ((0.5, 3.0, -1.0), 2, 3),
        ((0.25, -4.0), 2, 2),
    ],
)
def test_toom_cook_correlates_any_signal_with_any_taps(points: Any, num_outputs: int, num_taps: int) -> None:
    size = num_outputs + num_taps - 1
    a, g, b = toom_cook(points, num_outputs, num_taps)
    assert (a.shape, g.shape, b.shape) == ((num_outputs, size), (size, num_taps), (size, size))
    assert a.dtype == g.dtype == b.dtype == torch.float64
    for seed in range(3):
        taps, signal = noise(num_taps, seed=seed), noise(size, seed=seed + 10)
        expected = torch.stack([signal[i : i + num_taps] @ taps for i in range(num_outputs)])
        torch.testing.assert_close(a @ ((g @ taps) * (b @ signal)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "channels", "out_channels"),
    [(4, 4, 64, 64), (4, 40, 64, 96), (12, 8, 80, 64), (32, 300, 64, 64), (8, 4 * 70, 128, 64), (64, 32, 64, 1)],
)
def test_tiles_give_what_torch_gives_in_float64(
    kind: str, with_bias: bool, height: int, width: int, channels: int, out_channels: int
) -> None:
    x, weight = noise(height, width, channels), noise(out_channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    bias = noise(out_channels, seed=2) if with_bias else None
    x, weight, bias = x.float().double(), weight.float().double(), None if bias is None else bias.float().double()
    expected = reference(x, weight, bias, kind)
    assert error(in_tiles(x, weight, bias, KINDS[kind], Scratch()), expected) <= 2e-5  # seen: 1.3e-5


def test_scratch_that_served_another_size_before_changes_nothing() -> None:
    scratch = Scratch()
    for height, width, channels in ((16, 16, 96), (4, 8, 64), (24, 32, 128)):
        x, weight = noise(height, width, channels), noise(64, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
        for transform in (CONVOLUTION, UPSAMPLING):
            used = in_tiles(x, weight, None, transform, scratch)
            assert torch.equal(used, in_tiles(x, weight, None, transform, Scratch()))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_written_into_a_part_of_a_larger_image_and_nowhere_else(kind: str) -> None:
    x, weight = noise(8, 12, 64), noise(64, 64, 3, 3, seed=1) / 24
    transform = KINDS[kind]
    rows, columns = 8 * transform.phases, 12 * transform.phases
    large = torch.full((rows + 4, columns + 6, 64), 7.0)
    place = large[1 : 1 + rows, 2 : 2 + columns]
    padded = F.pad(x.float(), (0, 0, 1, 1, 1, 1)).contiguous()
    tile_convolution(padded, transform.of_weight(weight.float()), None, transform, Scratch(), place)
    assert torch.equal(place, in_tiles(x, weight, None, transform, Scratch()))
    place.fill_(7.0)
    assert bool((large == 7.0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_our_points_are_at_least_twice_as_exact_as_the_usual_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = F.silu(noise(32, 64, 256)), noise(64, 256, 3, 3, seed=1) / (9 * 256) ** 0.5
    x, weight = x.float().double(), weight.float().double()
    expected = reference(x, weight, None, kind)
    ours = error(in_tiles(x, weight, None, KINDS[kind], Scratch()), expected)
    monkeypatch.setattr(winograd, "POINTS_OF_THREE_TAPS", (0.0, 1.0, -1.0, 2.0, -2.0))
    monkeypatch.setattr(winograd, "POINTS_OF_TWO_TAPS", (0.0, 1.0, -1.0, 2.0))
    usual = {"convolution": winograd._convolution, "upsampling": winograd._upsampling}[kind]()
    theirs = error(in_tiles(x, weight, None, usual, Scratch()), expected)
    # seen: 8e-6 against 36e-6 for the convolution, 11e-6 against 24e-6 for the upsampling
    assert ours <= 2e-5 and theirs >= 2 * ours


def test_a_tile_has_the_number_of_products_that_is_stated() -> None:
    weight = noise(5, 3, 3, 3).float()
    assert CONVOLUTION.of_weight(weight).shape == (36, 3, 5) and UPSAMPLING.of_weight(weight).shape == (100, 3, 5)
    assert CONVOLUTION.of_weight(weight).dtype == torch.float32 and STEP == 4
