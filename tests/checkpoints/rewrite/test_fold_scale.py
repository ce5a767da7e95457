"""Folding a scale into the weights leaves latents, posterior and images as they were."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vaes import vae_fields

from sdvae.checkpoints.rewrite.fold_scale import check_fold, checked_scale, fold_problem, fold_scale
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.scale import LatentScale

REFERENCE = 0.18215
PER_CHANNEL = {"latents_mean": [-1.6, 0.4, 2.5, 0.0], "latents_std": [8.4, 5.2, 4.0, 0.7], "scaling_factor": 0.5}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def random_vae(seed: int = 0, **fields: Any) -> AutoencoderKL:
    """A small autoencoder with a configuration, norms and biases drawn from the seed."""
    draw = random.Random(seed)
    groups, levels = draw.choice([2, 4]), draw.choice([1, 2, 3])
    widths = [groups * draw.choice([2, 4, 6]) for _ in range(levels)]
    others: dict[str, Any] = {
        "layers_per_block": draw.choice([1, 2]),
        "norm_num_groups": groups,
        "mid_block_add_attention": draw.random() < 0.5,
        "use_quant_conv": draw.random() < 0.5,
        "use_post_quant_conv": draw.random() < 0.5,
        "act_fn": draw.choice(["silu", "gelu"]),
    } | fields
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae = AutoencoderKL(**vae_fields(*others.pop("block_out_channels", widths), **others))
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return vae.eval()


def rebuilt(tensors: dict[str, Tensor], fields: dict[str, Any]) -> AutoencoderKL:
    vae = AutoencoderKL(**{name: value for name, value in fields.items() if not name.startswith("_")})
    vae.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    return vae.eval()


def folded(vae: AutoencoderKL, **options: Any) -> AutoencoderKL:
    return rebuilt(*fold_scale(vae.state_dict(), dict(vae.config), **{"scaling_factor": REFERENCE} | options))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


def scalar_latents(z: Tensor, scaling_factor: float, shift_factor: float | None) -> Tensor:
    return (z - (shift_factor or 0.0)) * scaling_factor


SCALES: list[dict[str, Any]] = [
    {"scaling_factor": 0.31, "shift_factor": 0.1},
    {"scaling_factor": 1.7},
    PER_CHANNEL,
]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", SCALES, ids=["shift", "scale", "per channel"])
def test_a_fold_keeps_latents_posterior_and_images(seed: int, scale: dict[str, Any]) -> None:
    vae = random_vae(seed, **scale)
    add = not vae.config.use_post_quant_conv
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        vae.to(dtype)
        new = folded(vae, shift_factor=0.2, add_quant_convs=add)
        check = check_fold(vae, new, images(dtype))
        assert max(check.latents_error, check.std_error, check.recon_error) < tolerance, (dtype, check)
        assert check.problem is None
    assert (new.config.scaling_factor, new.config.shift_factor) == (REFERENCE, 0.2)
    assert new.config.latents_mean is None and new.config.latents_std is None


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("post_quant", [True, False])
def test_programs_with_a_hard_coded_scale_get_the_latents_of_the_old_scale(quant: bool, post_quant: bool) -> None:
    vae = random_vae(3, scaling_factor=0.31, use_quant_conv=quant, use_post_quant_conv=post_quant).double()
    new, x = folded(vae), images(torch.float64)
    assert (new.config.use_quant_conv, new.config.use_post_quant_conv) == (quant, post_quant)
    with torch.no_grad():
        latents = scalar_latents(vae.encode(x).latent_dist.mean, 0.31, None)
        assert torch.allclose(new.encode(x).latent_dist.mean * REFERENCE, latents, atol=1e-12)
        assert not torch.allclose(vae.encode(x).latent_dist.mean * REFERENCE, latents, atol=1e-2)
        assert torch.allclose(new.decode(latents / REFERENCE).sample, vae.decode(latents / 0.31).sample, atol=1e-10)


def test_per_channel_latents_are_those_of_pipelines_that_read_mean_and_std() -> None:
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    mean, std = (torch.tensor(PER_CHANNEL[n]).double().view(1, 4, 1, 1) for n in ("latents_mean", "latents_std"))
    latents = checked_scale(PER_CHANNEL, 4).to_latents(z)
    assert torch.allclose(latents, (z - mean) * 0.5 / std, atol=1e-6)
    assert torch.allclose(latents * std / 0.5 + mean, z, atol=1e-6)  # decoding


def test_a_missing_scale_is_the_default_of_the_class() -> None:
    assert checked_scale({}, 4) == LatentScale(scaling_factor=0.18215)


def test_without_post_quant_conv_a_shift_is_refused_because_of_the_border() -> None:
    vae = random_vae(1, **NO_QUANT, scaling_factor=0.36, shift_factor=0.3)
    with pytest.raises(CheckpointError, match="pads z with zeros.*Add quant convs") as refusal:
        folded(vae)
    named = re.search(r"shift_factor (\S+), which needs no offset", str(refusal.value))
    assert named is not None
    for shift_factor in (float(named[1]), 0.36 * 0.3 / REFERENCE):  # the second is rounded in another order
        check = check_fold(vae, folded(vae, shift_factor=shift_factor), images())
        assert max(check.latents_error, check.recon_error) < 1e-5

    tensors, fields = fold_scale(vae.state_dict(), dict(vae.config), scaling_factor=0.36, shift_factor=0.3)
    weight = tensors["decoder.conv_in.weight"]
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"] + 0.3 * weight.sum((1, 2, 3))
    tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"] - torch.tensor([0.3] * 4 + [0.0] * 4)
    naive = check_fold(vae, rebuilt(tensors, fields | {"shift_factor": None}), images())
    assert naive.latents_error < 1e-6 and naive.recon_error > 1e-3


@pytest.mark.parametrize("quant", [True, False])
def test_added_quant_convs_carry_the_shift_exactly(quant: bool) -> None:
    vae = random_vae(1, use_quant_conv=quant, use_post_quant_conv=False, **PER_CHANNEL).double()
    new = folded(vae, add_quant_convs=True)
    assert new.quant_conv is not None and new.post_quant_conv is not None
    check = check_fold(vae, new, images(torch.float64))
    assert max(check.latents_error, check.std_error, check.recon_error) < 1e-10


def test_a_shift_needs_only_post_quant_conv() -> None:
    vae = random_vae(1, use_quant_conv=False, use_post_quant_conv=True, shift_factor=0.3).double()
    assert check_fold(vae, folded(vae), images(torch.float64)).recon_error < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_folding_twice_is_folding_once(seed: int) -> None:
    vae = random_vae(seed, use_post_quant_conv=True, **PER_CHANNEL)
    tensors, fields = fold_scale(vae.state_dict(), dict(vae.config), scaling_factor=REFERENCE, shift_factor=0.1)
    again, fields_again = fold_scale(tensors, fields, scaling_factor=REFERENCE, shift_factor=0.1)
    assert fields_again == fields
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("seed", range(4))
def test_folding_back_restores_the_weights(seed: int) -> None:
    vae = random_vae(seed, use_post_quant_conv=True, scaling_factor=0.7, shift_factor=-0.4)
    before = vae.state_dict()
    back, fields = fold_scale(
        *fold_scale(before, dict(vae.config), scaling_factor=REFERENCE), scaling_factor=0.7, shift_factor=-0.4
    )
    assert fields == dict(vae.config)
    assert max(float((back[name] - before[name]).abs().max()) for name in before) < 1e-6


def test_a_fold_leaves_its_input_as_it_is() -> None:
    vae = random_vae(2, use_post_quant_conv=True, **PER_CHANNEL)
    tensors, fields = vae.state_dict(), dict(vae.config)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    fold_scale(tensors, fields, scaling_factor=REFERENCE, add_quant_convs=True)
    assert fields == dict(vae.config)
    assert tensors.keys() == copies.keys() and all(torch.equal(tensors[name], copies[name]) for name in copies)


def test_a_fold_commutes_with_save_and_load(tmp_path: Path) -> None:
    vae = random_vae(5, use_post_quant_conv=False, scaling_factor=0.31, shift_factor=0.1)
    options = {"shift_factor": 0.2, "add_quant_convs": True}
    first = load_autoencoder(save_autoencoder(folded(vae, **options), tmp_path / "folded"))
    last = folded(load_autoencoder(save_autoencoder(vae, tmp_path / "plain")), **options)
    assert first.config.scaling_factor == last.config.scaling_factor == REFERENCE
    assert first.config.use_post_quant_conv and first.config.shift_factor == last.config.shift_factor == 0.2
    ours, theirs = first.state_dict(), last.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_is_kept_and_costs_one_rounding(dtype: torch.dtype, unit: float) -> None:
    vae = random_vae(2, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.31).to(dtype)
    exact, _ = fold_scale(
        {n: t.double() for n, t in vae.state_dict().items()}, dict(vae.config), scaling_factor=REFERENCE
    )
    tensors, _ = fold_scale(vae.state_dict(), dict(vae.config), scaling_factor=REFERENCE)
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), exact[name], rtol=unit, atol=2**-25), name


@pytest.mark.parametrize("factor", [0, -0.2, math.nan, math.inf, True, "0.2", None])
def test_an_impossible_factor_is_refused_wherever_it_stands(factor: Any) -> None:
    vae = random_vae(2)
    with pytest.raises(ConfigError, match="scaling_factor to fold into is .*; expected a finite number above 0"):
        folded(vae, scaling_factor=factor)
    with pytest.raises(ConfigError, match="scaling_factor is .*; expected a finite number above 0"):
        fold_scale(vae.state_dict(), dict(vae.config) | {"scaling_factor": factor}, scaling_factor=REFERENCE)
    with pytest.raises(ConfigError, match=r"latents_std\[2\] is"):
        stds = {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, factor, 1.0]}
        fold_scale(vae.state_dict(), dict(vae.config) | stds, scaling_factor=REFERENCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift_factor": math.nan}, "shift_factor is nan"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "a list of 4 numbers"),
        ({"latents_mean": 0.5, "latents_std": [1.0] * 4}, "a list of 4 numbers"),
        ({"latents_std": [1.0] * 4}, "latents_std is given without latents_mean"),
        ({"latents_mean": [1.0] * 4}, "latents_mean is given without latents_std"),
        ({**PER_CHANNEL, "shift_factor": 0.1}, "SDXL pipelines read only the latter"),
    ],
)
def test_fields_that_state_no_one_scale_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_scale(fields, 4)


def test_half_a_vae_and_weights_that_overflow_are_refused() -> None:
    vae = random_vae(2, use_quant_conv=True, use_post_quant_conv=True)
    tensors, fields = vae.state_dict(), dict(vae.config)
    for part in ("encoder", "decoder"):
        half = {name: tensor for name, tensor in tensors.items() if name.startswith(part)}
        with pytest.raises(CheckpointError, match="a scale is folded into whole VAEs"):
            fold_scale(half, fields, scaling_factor=REFERENCE)
    with pytest.raises(CheckpointError, match=r"quant_conv.weight is \(7, 8, 1, 1\); expected 4 axes, and 8 in axis 0"):
        wrong = tensors | {"quant_conv.weight": torch.ones(7, 8, 1, 1)}
        fold_scale(wrong, fields, scaling_factor=REFERENCE)
    with pytest.raises(CheckpointError, match=r"quant_conv\..* would reach .* of float16; convert to float32 first"):
        fold_scale({n: t.half() for n, t in tensors.items()}, fields, scaling_factor=1e-7)


def test_a_log_variance_that_meets_its_clamp_is_a_problem() -> None:
    vae = random_vae(4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.31)
    with torch.no_grad():
        vae.quant_conv.bias[5] -= 31.0
    check = check_fold(vae, folded(vae), images())
    assert check.logvar_min < -30
    assert check.std_error > 0.1  # so the fold is really wrong there
    assert check.problem is not None and "log variance of channel 1 is -3" in check.problem


def test_a_vae_that_gives_nan_is_a_problem() -> None:
    vae = random_vae(4, scaling_factor=0.31)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = math.nan
    assert "NaN" in str(check_fold(vae, folded(vae), images()).problem)


@pytest.mark.parametrize(
    ("low", "high", "k", "exact"),
    [
        (-20.0, 5.0, 2.0, True),
        (-30.0, 5.0, 2.0, False),  # at the clamp before, not after
        (-29.0, 5.0, 0.5, False),  # only after
        (-20.0, 20.0, 0.5, False),
        (-20.0, 19.0, 2.0, False),
        (-40.0, 40.0, 1.0, True),  # nothing changes
        (math.nan, 1.0, 2.0, False),
    ],
)
def test_a_fold_is_exact_only_inside_the_clamp_before_and_after(low: float, high: float, k: float, exact: bool) -> None:
    ranges = torch.tensor([-1.0, low]), torch.tensor([1.0, high])
    problem = fold_problem(*ranges, torch.tensor([3.0, k]))
    assert (problem is None) == exact
