"""Names there and back, for any configuration; the names of Stable Diffusion's autoencoder; what shapes say."""

from __future__ import annotations

import itertools
import random
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from sdvae.checkpoints.infer import infer_fields
from sdvae.checkpoints.keys import from_ldm, tidy, to_ldm
from sdvae.errors import CheckpointError

SD1 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def random_fields(seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    levels = dice.randint(1, 5)
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [dice.choice((4, 8, 12)) for _ in range(levels)],
        "layers_per_block": dice.randint(1, 3),
        "latent_channels": dice.choice((1, 4, 7, 16)),
        "in_channels": dice.choice((1, 3, 4)),
        "out_channels": dice.choice((1, 3, 4)),
        "mid_block_add_attention": dice.random() < 0.7,
        "use_quant_conv": dice.random() < 0.7,
        "use_post_quant_conv": dice.random() < 0.7,
    }


def state_of(fields: dict[str, Any], device: str = "cpu") -> dict[str, torch.Tensor]:
    with torch.device(device):
        return dict(StockAutoencoderKL(**fields, norm_num_groups=2).state_dict())


def shapes_of(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expand(template: str) -> list[str]:
    parts = re.split(r"\{(.*?)\}", template)
    return ["".join(choice) for choice in itertools.product(*(part.split(",") for part in parts))]


def sd1_names() -> dict[str, str]:
    """LDM -> diffusers, of Stable Diffusion 1.x, as the sources of the two classes name their modules."""
    lines = (Path(__file__).parent / "data" / "sd1_names.txt").read_text().splitlines()
    stems = [pair for line in lines if line[0] != "#" for pair in zip(*map(expand, line.split()), strict=True)]
    return {f"{ldm}.{end}": f"{new}.{end}" for ldm, new in stems for end in ("weight", "bias")}


def legacy(name: str) -> str:
    for new, old in LEGACY.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name


# There and back


@pytest.mark.parametrize("seed", range(30))
def test_names_shapes_and_values_come_back_for_any_configuration(seed: int) -> None:
    fields = random_fields(seed)
    tensors = state_of(fields)
    ldm = to_ldm(tensors)
    assert len(ldm) == len(tensors)
    back = from_ldm(ldm)
    assert shapes_of(back) == shapes_of(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    again = to_ldm(back)
    assert list(again) == list(ldm) and shapes_of(again) == shapes_of(ldm)
    assert all(torch.equal(again[name], tensor) for name, tensor in ldm.items())


@pytest.mark.parametrize("seed", range(30))
def test_the_converter_of_diffusers_agrees_about_any_configuration(seed: int) -> None:
    fields = random_fields(seed)
    tensors = state_of(fields)
    theirs = convert_ldm_vae_checkpoint(dict(to_ldm(tensors)), fields)
    assert shapes_of(theirs) == shapes_of(tensors)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_attention_is_taken_in_both_shapes_and_both_generations_of_names() -> None:
    tensors = state_of(random_fields(0) | {"mid_block_add_attention": True})
    ldm = to_ldm(tensors)
    matrices = [name for name in ldm if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)]
    assert len(matrices) == 8 and all(ldm[name].shape[2:] == (1, 1) for name in matrices)
    linear = {name: tensor.reshape(tensor.shape[:2]) if name in matrices else tensor for name, tensor in ldm.items()}
    assert shapes_of(from_ldm(linear)) == shapes_of(tensors)
    convolved = {n: t[..., None, None] if t.ndim == 2 else t for n, t in tensors.items()}
    for variant in (tensors, convolved, {legacy(name): tensor for name, tensor in tensors.items()}):
        assert shapes_of(to_ldm(variant)) == shapes_of(ldm)


@pytest.mark.parametrize("device", ["meta", "numpy"])
def test_names_and_shapes_are_enough(device: str) -> None:
    tensors: dict[str, Any] = state_of(random_fields(3), "meta")
    if device == "numpy":
        tensors = {name: np.zeros(tensor.shape) for name, tensor in tensors.items()}
    assert shapes_of(from_ldm(to_ldm(tensors))) == shapes_of(tensors)


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("encoder.down.0.attn.0.q.weight", from_ldm),  # attention beside the middle: no AutoencoderKL has it
        ("encoder.down.1.block.0.conv_shortcut.weight", from_ldm),
        ("decoder.up.123456789.block.0.norm1.weight", from_ldm),
        ("quant_conv.weight_scale", from_ldm),
        ("bn.running_mean", from_ldm),
        ("encoder.down_blocks.0.attentions.0.to_q.weight", to_ldm),
        ("encoder.mid_block.attentions.0.query.weight", to_ldm),  # beside to_q, so it stays what it is
        ("quantize.embedding.weight", to_ldm),
    ],
)
def test_keys_of_something_else_are_named(name: str, convert: Any) -> None:
    tensors = state_of(random_fields(0) | {"mid_block_add_attention": True}, "meta")
    tensors = to_ldm(tensors) if convert is from_ldm else tensors
    with pytest.raises(
        CheckpointError, match=rf"^no autoencoder with (LDM|diffusers) keys has these: {re.escape(name)}$"
    ):
        convert(tensors | {name: torch.zeros(1)})


# The autoencoder of Stable Diffusion


def test_the_names_of_stable_diffusion_are_those_of_the_two_classes() -> None:
    stock = state_of(SD1, "meta")
    names = sd1_names()
    assert len(names) == 248
    assert sum(tensor.numel() for tensor in stock.values()) == 83_653_863
    assert sorted(names.values()) == sorted(stock)
    ldm = to_ldm(stock)
    assert ldm.keys() == names.keys()
    assert from_ldm(ldm).keys() == stock.keys()
    assert {name for name, shape in shapes_of(ldm).items() if shape == (512, 512, 1, 1)} == {
        f"{side}.mid.attn_1.{part}.weight" for side in ("encoder", "decoder") for part in ("q", "k", "v", "proj_out")
    } | {name for name, shape in shapes_of(stock).items() if shape == (512, 512, 1, 1)}

    # a number in place of each tensor shows which is which
    tagged = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
    assert {name: tensor.item() for name, tensor in from_ldm(tagged).items()} == {
        new: float(i) for i, new in enumerate(names.values())
    }
    old = {legacy(new): torch.tensor([float(i)]) for i, new in enumerate(names.values())}
    assert sum(name not in stock for name in old) == 16
    assert {name: tensor.item() for name, tensor in to_ldm(old).items()} == {n: float(i) for i, n in enumerate(names)}


def test_the_list_of_names_is_what_diffusers_reads() -> None:
    names = sd1_names()
    tagged = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
    theirs = convert_ldm_vae_checkpoint(
        {name: t[..., None, None] if "attn_1" in name else t for name, t in tagged.items()}, SD1
    )
    assert {name: tensor.flatten()[0].item() for name, tensor in theirs.items()} == {
        new: float(i) for i, new in enumerate(names.values())
    }


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_diffusers_loads_our_ldm_file_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, seed: int
) -> None:
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network here")

    fields = random_fields(seed) | {"in_channels": 3, "out_channels": 3}
    stock = StockAutoencoderKL(**fields, norm_num_groups=2, scaling_factor=0.3)
    stock.save_config(tmp_path)
    save_file(
        {prefix + name: t.contiguous() for name, t in to_ldm(stock.state_dict()).items()}, tmp_path / "x.safetensors"
    )
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))  # type: ignore[arg-type]
    loaded = StockAutoencoderKL.from_single_file(str(tmp_path / "x.safetensors"), config=str(tmp_path))
    assert tried == []
    expected = stock.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.scaling_factor == 0.3


# What shapes say


@pytest.mark.parametrize("seed", range(30))
def test_the_configuration_is_read_from_shapes(seed: int) -> None:
    fields = random_fields(seed)
    assert infer_fields(shapes_of(state_of(fields, "meta"))) == fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.conv_in.weight": (8, 5, 3, 3)}, "latent_channels is 5 by decoder.conv_in; 4 by encoder.conv_out"),
        ({"quant_conv.weight": (6, 8, 1, 1)}, "latent_channels is 4 by decoder.conv_in; .*; 3 by quant_conv"),
        (
            {"decoder.up_blocks.0.resnets.0.conv1.weight": (9, 8, 3, 3)},
            r"block_out_channels is \[4, 8\] by encoder; \[4, 9\] by decoder",
        ),
        (
            {"decoder.up_blocks.2.resnets.0.conv1.weight": (4, 4, 3, 3)},
            r"block_out_channels is \[4, 8\] by encoder; \[4, 4, 8\] by decoder",
        ),
        (
            {"encoder.down_blocks.1.resnets.1.conv1.weight": (8, 8, 3, 3)},
            r"layers_per_block is 1 by encoder.down_blocks.0; 2 by encoder.down_blocks.1; 1 by decoder.up_blocks.0",
        ),
        (
            {"decoder.mid_block.attentions.0.to_q.weight": None},
            "mid_block_add_attention is True by encoder; False by decoder",
        ),
        ({"decoder.": None}, "has no decoder, only the encoder"),
        ({"encoder.": None}, "has no encoder, only the decoder"),
        ({"encoder.conv_in.": None}, "in_channels cannot be read from the tensors"),
    ],
)
def test_readings_that_contradict_each_other_are_both_shown(changes: dict[str, Any], message: str) -> None:
    fields = random_fields(0) | {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
    }
    shapes = shapes_of(state_of(fields, "meta"))
    for name, shape in changes.items():
        if shape:
            shapes[name] = shape
        elif name.startswith("decoder.mid_block"):
            shapes = {n: s for n, s in shapes.items() if not n.startswith("decoder.mid_block.attentions")}
        else:
            shapes = {n: s for n, s in shapes.items() if not n.startswith(name)}
    with pytest.raises(CheckpointError, match=message):
        infer_fields(shapes)


def test_what_training_left_is_dropped_and_what_newer_files_moved_is_put_back() -> None:
    names = ["encoder.conv_in.weight", "loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay"]
    names += ["model_ema.num_updates", "discriminator.main.0.weight", "encoder.quant_conv.bias"]
    kept, remarks = tidy(names)
    assert kept == {"encoder.conv_in.weight": "encoder.conv_in.weight", "encoder.quant_conv.bias": "quant_conv.bias"}
    assert "dropped 5 tensors that training left in the file: loss.logvar, ..." in remarks
    assert any("renamed `encoder.quant_conv.bias` to `quant_conv.bias`" in remark for remark in remarks)
    both = ["encoder.quant_conv.bias", "quant_conv.bias", "lossy.weight"]
    assert tidy(both) == ({name: name for name in both}, ())
