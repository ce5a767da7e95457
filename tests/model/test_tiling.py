"""Blended tiling gives what diffusers' tiling gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdvae.model.tiling import blended_tiles

SHAPES = [  # height, width: with tiles of 32 px that start every 24 px
    (64, 64),  # the last tile is 16 px
    (56, 56),  # the last tile is 8 px, one latent position
    (48, 120),  # whole steps
    (40, 32),  # tiles in one direction only
    (32, 40),
    (16, 88),  # smaller than a tile in one direction
    (61, 83),  # sides that no power of two divides
]


@pytest.fixture
def pair(make_pair: Any, levels: Any) -> Any:
    pair = make_pair(**levels(sample_size=32))
    for model in pair:
        model.enable_tiling()
    return pair


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours: Tensor, stock: Tensor, *, tolerance: float = 1e-6) -> None:
    assert ours.shape == stock.shape
    assert (ours.double() - stock.double()).abs().max() <= tolerance * stock.abs().max()


@pytest.mark.parametrize("height, width", SHAPES)
def test_tiled_encoding_equals_the_stock_one(pair: Any, height: int, width: int) -> None:
    x = noise(2, 3, height, width)
    with torch.inference_mode():
        ours, stock = pair.encode(x)
        assert_equal(ours, stock)
        pair.ours.disable_tiling()
        whole, _ = pair.encode(x)
    assert (whole - ours).abs().max() > 1e-3 * ours.abs().max()  # there really were tiles


@pytest.mark.parametrize("height, width", [(8, 8), (7, 7), (6, 15), (5, 4), (4, 5), (2, 11), (9, 13)])
def test_tiled_decoding_equals_the_stock_one(pair: Any, height: int, width: int) -> None:
    z = noise(2, 4, height, width)
    with torch.inference_mode():
        ours, stock = pair.decode(z)
        assert ours.shape == (2, 3, 8 * height, 8 * width)
        assert_equal(ours, stock)
        pair.ours.disable_tiling()
        whole, _ = pair.decode(z)
    assert (whole - ours).abs().max() > 1e-3 * ours.abs().max()


def test_only_images_larger_than_a_tile_are_cut(pair: Any) -> None:
    runs = []
    for part in (pair.ours.encoder, pair.ours.decoder):
        part.register_forward_pre_hook(lambda _, inputs: runs.append(tuple(inputs[0].shape[2:])))
    with torch.inference_mode():
        pair.ours.encode(noise(1, 3, 32, 24))
        pair.ours.decode(noise(1, 4, 4, 3))
        assert runs == [(32, 24), (4, 3)]
        pair.ours.encode(noise(1, 3, 32, 40))
        assert runs[2:] == [(32, 32), (32, 16), (8, 32), (8, 16)]


def test_disabling_tiling_gives_the_whole_pass_again(pair: Any) -> None:
    x = noise(1, 3, 64, 48)
    with torch.inference_mode():
        tiled, _ = pair.encode(x)
        for model in (pair.ours, pair.stock):
            assert model.use_tiling
            model.disable_tiling()
            assert not model.use_tiling
        whole, stock_whole = pair.encode(x)
        assert_equal(whole, stock_whole)
        assert not torch.equal(whole, tiled)


def test_the_tile_size_comes_from_sample_size_and_can_be_changed_as_with_the_stock_one(pair: Any) -> None:
    assert (pair.ours.tile_sample_min_size, pair.ours.tile_latent_min_size) == (32, 4)
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(pair.ours, name) == getattr(pair.stock, name)
    for model in (pair.ours, pair.stock):
        model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 48, 6, 0.5
    with torch.inference_mode():
        assert_equal(*pair.encode(noise(1, 3, 96, 72)))
        assert_equal(*pair.decode(noise(1, 4, 12, 9)))


@pytest.mark.parametrize("fields", [{"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}])
def test_tiling_without_quant_convs_equals_the_stock_one(make_pair: Any, levels: Any, fields: dict[str, Any]) -> None:
    pair = make_pair(**levels(sample_size=32, **fields))
    for model in pair:
        model.enable_tiling()
    with torch.inference_mode():
        assert_equal(*pair.encode(noise(1, 3, 64, 56)))
        assert_equal(*pair.decode(noise(1, 16, 8, 7)))


def test_tiling_and_slicing_together_equal_the_stock_ones(pair: Any) -> None:
    for model in (pair.ours, pair.stock):
        model.enable_slicing()
    with torch.inference_mode():
        assert_equal(*pair.encode(noise(3, 3, 64, 40)))
        assert_equal(*pair.decode(noise(3, 4, 5, 8)))


@pytest.mark.parametrize(
    "to, tolerance",
    [
        ({"memory_format": torch.channels_last}, 1e-6),
        ({"dtype": torch.float64}, 1e-13),
        ({"dtype": torch.bfloat16}, 2.0**-7),
    ],
    ids=["channels_last", "float64", "bfloat16"],
)
def test_tiling_in_other_formats_equals_the_stock_one(pair: Any, to: dict[str, Any], tolerance: float) -> None:
    for model in (pair.ours, pair.stock):
        nn.Module.to(model, **to)
    with torch.inference_mode():
        assert_equal(*pair.encode(noise(2, 3, 64, 56).to(**to)), tolerance=tolerance)
        assert_equal(*pair.decode(noise(2, 4, 8, 7).to(**to)), tolerance=tolerance)


def test_gradients_go_through_tiles(pair: Any) -> None:
    x = noise(1, 3, 56, 40).requires_grad_()
    moments = pair.ours.encode(x).latent_dist.parameters
    moments.square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=1) > 0).all()  # every pixel counts


# The blending itself


def test_tiles_of_a_pointwise_map_give_the_map_of_the_whole() -> None:
    x = noise(2, 3, 21, 34)
    tiled = blended_tiles(torch.tanh, x, tile=8, stride=6, out_stride=6, blend=2)
    assert_equal(tiled, torch.tanh(x))


def test_the_seam_is_a_linear_ramp_from_one_tile_to_the_next() -> None:
    levels = iter([0.0, 1.0])
    tiled = blended_tiles(
        lambda part: torch.full_like(part, next(levels)), torch.zeros(1, 1, 8, 14), 8, 8, out_stride=8, blend=4
    )
    assert tiled[0, 0, 0].tolist() == [0.0] * 8 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 2
