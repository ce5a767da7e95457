"""A new kind of block, in this one file: with `in_strips` beside its `forward`, everything else follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_strips import TINY_STRIPS
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.layers import GroupNorm, Upsample2D, silu
from sdvae.model.strips.maps import Rows
from sdvae.model.strips.passes import Strips, streamed
from sdvae.model.strips.plan import plan_pass


class InvertedBottleneck(nn.Module):
    """A depthwise 7x7 convolution, then two pointwise ones with four times the width between, beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm1 = GroupNorm(groups, channels)
        self.widen = nn.Conv2d(channels, 4 * channels, 1)
        self.norm2 = GroupNorm(2 * groups, 4 * channels)  # another number of groups than the network has
        self.narrow = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.widen(self.norm1(self.depthwise(x)))
        return self.narrow(silu(self.norm2(h))) + x

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        h = strips.keep(strips.conv(x, self.depthwise))
        h = strips.keep(strips.conv(h, self.widen, self.norm1))
        return strips.store(strips.conv(h, self.narrow, self.norm2, silu, shortcut=(x, None)), last_use=True)


class Louder(InvertedBottleneck):
    """Changes `forward` alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PixelShuffleUpsample(nn.Module):
    """Does not say how it is computed in strips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), 2)


@pytest.fixture
def vae(make_pair: Any, levels: Any) -> AutoencoderKL:
    return make_pair(**levels(8, 64, groups=8)).ours  # type: ignore[no-any-return]


def with_new_blocks(vae: AutoencoderKL, kind: type[InvertedBottleneck] = InvertedBottleneck) -> AutoencoderKL:
    torch.manual_seed(3)
    vae.encoder.down_blocks[1].resnets.append(kind(64, 8))
    vae.decoder.up_blocks[0].resnets[1] = kind(64, 8)
    return vae.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_strips_give_what_forward_gives(vae: AutoencoderKL, max_bytes: int | None) -> None:
    with_new_blocks(vae)
    for network, x in ((vae.encoder, noise(1, 3, 62, 44)), (vae.decoder, noise(1, 4, 33, 22))):
        expected = network(x)
        for sizes in (TINY_STRIPS, replace(TINY_STRIPS, least_rows=24)):
            actual = streamed(network, x, max_bytes, sizes=sizes)
            assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@torch.no_grad()
def test_memory_and_multiplications_of_the_block_are_in_the_plan(make_pair: Any, levels: Any) -> None:
    vae = make_pair(**levels(8, 64, groups=8, mid_block_add_attention=False)).ours.double()
    z = noise(1, 4, 64, 48).double()  # in which no weights are kept for the next pass
    sizes = replace(TINY_STRIPS, scratch_bytes=0, weight_bytes=0, strip_copies=0)
    before = plan_pass(vae.decoder, z, sizes=sizes)
    after = plan_pass(with_new_blocks(vae).decoder, z, sizes=sizes)
    small_map = 8 * 64 * 64 * 48  # bytes of 64 channels before the upsampling; its result is four times as large
    assert before.most_bytes == (4 + 4 / 8) * small_map  # the first block of the last level, with 8 channels inside
    assert after.most_bytes == (1 + 1 + 4) * small_map  # what the shortcut needs, the depthwise result, the hidden map
    assert after.least_bytes == before.least_bytes == small_map  # nothing but the input of the block need be stored
    # two 3x3 convolutions are gone; those of the new block are never computed in tiles
    assert before.tiled_multiplications - after.tiled_multiplications == 2 * 9 * 64 * 64 * 64 * 48


@torch.no_grad()
def test_the_model_takes_strips_by_itself_and_keeps_to_the_memory_that_the_plan_names(vae: AutoencoderKL) -> None:
    z = noise(1, 4, 33, 22)
    expected = with_new_blocks(vae).decode(z).sample
    vae.enable_tiling("exact")
    torch.testing.assert_close(vae.decode(z).sample, expected, rtol=0, atol=1e-4)
    vae.enable_tiling("exact", max_memory_bytes=1)
    with pytest.raises(ConfigError, match="decoding 44 x 66 px exactly takes"):
        vae.decode(z)


@torch.no_grad()
@pytest.mark.parametrize("part", ["Louder", "PixelShuffleUpsample"])
def test_a_block_that_does_not_say_how_runs_as_it_is_and_exact_names_it(vae: AutoencoderKL, part: str) -> None:
    if part == "Louder":
        with_new_blocks(vae, Louder)
    else:
        vae.decoder.up_blocks[0].upsamplers[0] = PixelShuffleUpsample(64)
    z = noise(1, 4, 33, 22)
    expected = vae.decode(z).sample
    vae.execution = replace(vae.execution, fast=True, fast_from=0)
    assert torch.equal(vae.decode(z).sample, expected)
    vae.enable_tiling("exact")
    with pytest.raises(ConfigError, match=f"exact tiling is not possible with {part} in the place of a layer"):
        vae.decode(z)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"stride": (2, 2)}, {"padding": (0, 0)}, {"dilation": (2, 2)}, {"padding_mode": "reflect"}],
    ids=lambda change: next(iter(change)),
)
def test_a_convolution_with_another_window_is_named(vae: AutoencoderKL, change: dict[str, Any]) -> None:
    upsample = vae.decoder.up_blocks[0].upsamplers[0]
    assert isinstance(upsample, Upsample2D)
    for name, value in change.items():
        setattr(upsample.conv, name, value)
    vae.enable_tiling("exact")
    with pytest.raises(ConfigError, match="with the convolution up_blocks.0.upsamplers.0.conv, which is no longer"):
        vae.decode(noise(1, 4, 8, 8))
