"""Rescaling activations leaves the function as it was, and makes a VAE that overflows in float16 run in it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vaes import vae_fields

from sdvae.checkpoints.rewrite.fp16 import StreamScale, epsilon_effect, fp16_underflow, rescale_streams
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL

BOTH = StreamScale(encoder=12, decoder=12)
BACK = StreamScale(encoder=-12, decoder=-12)
CONV1 = "encoder.down_blocks.0.resnets.0", "decoder.up_blocks.1.resnets.1"
ATTENTIONS = "encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"


def make_vae(*widths: int, seed: int = 0, **fields: Any) -> AutoencoderKL:
    """A small autoencoder with activations of several units, as trained ones have, and with random norms and biases."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae = AutoencoderKL(**vae_fields(*widths, **fields))
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif any(part in name for part in (".conv_in.", ".conv1.", ".conv2.")):
                parameter *= 6
    return vae.eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae(32, 48)


def rescaled(vae: AutoencoderKL, scale: StreamScale) -> AutoencoderKL:
    return rebuilt(vae, rescale_streams(vae.state_dict(), dict(vae.config), scale))


def rebuilt(vae: AutoencoderKL, tensors: dict[str, Tensor]) -> AutoencoderKL:
    new = AutoencoderKL.from_config(dict(vae.config)).to(vae.dtype).eval()
    new.load_state_dict(tensors)
    return new


@torch.no_grad()
def outputs(vae: AutoencoderKL, size: int = 32) -> Tensor:
    """Moments of z and the image decoded from noise, of one batch, as one flat tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    ratio = vae.spatial_compression_ratio
    z = torch.randn(2, 4, size // ratio, size // ratio, generator=generator)
    moments = vae.encode(x.to(vae.dtype)).latent_dist.moments
    return torch.cat([moments.double().flatten(), vae.decode(z.to(vae.dtype)).sample.double().flatten()])


def difference(a: AutoencoderKL, b: AutoencoderKL) -> float:
    return float((outputs(a) - outputs(b)).abs().max())


def test_a_stream_that_overflows_float16_is_repaired(vae: AutoencoderKL) -> None:
    large = rescaled(vae, BOTH)
    assert difference(large, vae) < 1e-4
    for network in ("encoder", "decoder"):
        half = rescaled(vae, StreamScale(**{network: 12})).half()
        assert not outputs(half).isfinite().all(), network
    repaired = rescaled(large, BACK)
    assert difference(repaired, large) < 1e-4
    assert difference(repaired.half(), vae) < 1e-2


@pytest.mark.parametrize("block", [*CONV1, *ATTENTIONS])
def test_a_block_that_overflows_inside_is_repaired(vae: AutoencoderKL, block: str) -> None:
    exponent = 15
    large = rescaled(vae, StreamScale(blocks={block: exponent}))
    assert difference(large, vae) < 1e-5
    assert not outputs(rebuilt(large, large.state_dict()).half()).isfinite().all()
    repaired = rescaled(large, StreamScale(blocks={block: -exponent}))
    assert difference(repaired.half(), vae) < 1e-2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_queries_and_keys_are_balanced_against_each_other(vae: AutoencoderKL, attention: str) -> None:
    large = rescaled(vae, StreamScale(blocks={f"{attention}.to_q": 15}))
    assert difference(large, vae) < 1e-5
    changed = {n for n, t in large.state_dict().items() if not torch.equal(t, vae.state_dict()[n])}
    assert changed == {f"{attention}.{part}.{kind}" for part in ("to_q", "to_k") for kind in ("weight", "bias")}
    assert not outputs(rebuilt(large, large.state_dict()).half()).isfinite().all()


def test_scaling_the_first_convolution_alone_changes_the_function(vae: AutoencoderKL) -> None:
    tensors = vae.state_dict()
    for name in [n for n in tensors if ".conv_in." in n]:
        tensors[name] = tensors[name] * 2.0**12
    assert difference(rebuilt(vae, tensors), vae) > 1e-2


def random_scale(vae: AutoencoderKL, seed: int, lowest: int) -> StreamScale:
    draw = random.Random(seed)
    names = sorted({n.rsplit(".", 2)[0] for n in vae.state_dict() if n.endswith(("conv1.weight", "to_v.weight"))})
    return StreamScale(
        encoder=draw.randint(lowest, 12),
        decoder=draw.randint(lowest, 12),
        blocks={name: draw.randint(lowest, 12) for name in names if draw.random() < 0.5},
    )


def random_vae(seed: int) -> AutoencoderKL:
    draw = random.Random(seed)
    return make_vae(
        *(4 * draw.choice([2, 4, 6]) for _ in range(draw.choice([1, 2, 3]))),
        seed=seed,
        layers_per_block=draw.choice([1, 2]),
        norm_num_groups=draw.choice([2, 4]),
        mid_block_add_attention=draw.random() < 0.7,
        use_quant_conv=draw.random() < 0.5,
        use_post_quant_conv=draw.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_function_stays_the_same(seed: int) -> None:
    vae = random_vae(seed)
    assert difference(rescaled(vae, random_scale(vae, seed, lowest=0)), vae) < 1e-5
    vae.double()
    new = rescaled(vae, random_scale(vae, seed, lowest=-12))
    for module in [*vae.modules(), *new.modules()]:
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 0.0  # the one term that a scale does not cancel
    assert difference(new, vae) < 1e-10


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opposite_exponents_restore_the_bits(seed: int, dtype: torch.dtype) -> None:
    vae = random_vae(seed).to(dtype)
    scale, fields = random_scale(vae, seed, lowest=-12), dict(vae.config)
    back = StreamScale(encoder=-scale.encoder, decoder=-scale.decoder, blocks={n: -e for n, e in scale.blocks.items()})
    tensors = vae.state_dict()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    new = rescale_streams(tensors, fields, scale)
    restored = rescale_streams(new, fields, back)
    assert any(not torch.equal(new[name], tensors[name]) for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(restored[name], tensor) and restored[name].dtype == dtype
        assert torch.equal(tensor, copies[name])  # and the input was not modified


def test_a_rescaling_commutes_with_save_and_load(vae: AutoencoderKL, tmp_path: Path) -> None:
    scale = StreamScale(encoder=-3, decoder=2, blocks={CONV1[0]: -2, ATTENTIONS[1]: 4})
    first = load_autoencoder(save_autoencoder(rescaled(vae, scale), tmp_path / "rescaled")).state_dict()
    last = rescaled(load_autoencoder(save_autoencoder(vae, tmp_path / "plain")), scale).state_dict()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_exponents_of_zero_change_nothing(vae: AutoencoderKL) -> None:
    tensors = vae.state_dict()
    same = rescale_streams(tensors, dict(vae.config), StreamScale(blocks={CONV1[0]: 0}))
    assert all(same[name] is tensors[name] for name in tensors)


@pytest.mark.parametrize("exponent", [1.0, True, 65, -65, "3"])
def test_an_exponent_is_a_whole_number_of_sensible_size(exponent: Any) -> None:
    with pytest.raises(ConfigError, match="StreamScale.decoder is .*; expected a whole number"):
        StreamScale(decoder=exponent)
    with pytest.raises(ConfigError, match=r"StreamScale.blocks.encoder is"):
        StreamScale(blocks={"encoder": exponent})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("encoder.down_block.0.resnets.0", "did you mean 'encoder.down_blocks.0.resnets.0'"),
        ("encoder.down_blocks.0.resnets.7", "no block 'encoder.down_blocks.0.resnets.7'"),
        ("encoder.conv_in", "no block 'encoder.conv_in'"),
    ],
)
def test_an_unknown_block_is_refused(vae: AutoencoderKL, block: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rescaled(vae, StreamScale(blocks={block: 1}))


@pytest.mark.parametrize(
    "lost",
    ["encoder.conv_norm_out", "decoder.up_blocks.0.resnets.1.norm2", "encoder.mid_block.attentions.0.group_norm"],
)
def test_a_layout_without_a_norm_is_refused(vae: AutoencoderKL, lost: str) -> None:
    tensors = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(lost)}
    with pytest.raises(CheckpointError, match=f"1 layers are missing, first {re.escape(lost)}"):
        rescale_streams(tensors, dict(vae.config), StreamScale(encoder=-1))


@pytest.mark.parametrize("name", ["encoder.skip.weight", "decoder.conv_in.weight_g", "encoder.mid_block.attn.weight"])
def test_a_layer_that_a_scale_might_pass_through_is_refused(vae: AutoencoderKL, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"1 tensors are not of AutoencoderKL, first {name}"):
        rescale_streams(vae.state_dict() | {name: torch.ones(1)}, dict(vae.config), BACK)


def test_other_block_types_are_refused(vae: AutoencoderKL) -> None:
    fields = dict(vae.config) | {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}
    with pytest.raises(CheckpointError, match="AttnUpDecoderBlock2D.*only 'UpDecoderBlock2D' can be rescaled"):
        rescale_streams(vae.state_dict(), fields, BACK)


@pytest.mark.parametrize(("exponent", "message"), [(20, "would reach .* of float16"), (-20, "too small for float16")])
def test_weights_that_their_type_cannot_hold_are_refused(vae: AutoencoderKL, exponent: int, message: str) -> None:
    tensors = {name: tensor.half() for name, tensor in vae.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"encoder.conv_in.weight.*{message}.*convert to float32 first"):
        rescale_streams(tensors, dict(vae.config), StreamScale(encoder=exponent))


@pytest.mark.parametrize("exponent", [-8, -3, 0, 4, 12])
def test_the_effect_of_epsilon_is_what_a_group_norm_shows(exponent: int) -> None:
    x = 0.02 * torch.randn(1, 4, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance, s = float(x.var(unbiased=False)), 2.0**exponent
    ratio = F.group_norm(s * x, 1, eps=1e-6) / F.group_norm(x, 1, eps=1e-6)
    assert abs(float(ratio.mean()) - 1) == pytest.approx(epsilon_effect(variance, exponent), rel=1e-6, abs=1e-12)
    if exponent > -4:
        first_order = 1e-6 / (2 * variance) * abs(1 - 1 / s**2)
        assert epsilon_effect(variance, exponent) == pytest.approx(first_order, rel=0.15)


def test_a_constant_group_does_not_feel_epsilon() -> None:
    assert epsilon_effect(0.0, -12) == 0


def test_underflow_counts_values_below_the_normal_range_of_float16() -> None:
    tensors = {
        "fine": torch.tensor([0.0, 2.0**-14, -1.0]),
        "mixed": torch.tensor([0.0, 2.0**-15, -(2.0**-30), 1.0, 1.0]),
        "zero": torch.zeros(3),
        "half": torch.tensor([2.0**-20, 1.0]).half(),
    }
    assert fp16_underflow(tensors) == {"mixed": 0.5, "half": 0.5}
