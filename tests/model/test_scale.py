"""z <-> latents: what a configuration states, and that the two directions undo each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdvae.model.network import AutoencoderConfig
from sdvae.model.posterior import DiagonalGaussian
from sdvae.model.scale import LatentScale

PER_CHANNEL = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 4.0, 0.5]}
CONFIGS: dict[str, dict[str, Any]] = {
    "scaling_factor alone": {"scaling_factor": 0.18215},
    "with shift_factor": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "per channel": {"scaling_factor": 0.5, **PER_CHANNEL},
    "per channel, shift_factor ignored": {"scaling_factor": 0.5, "shift_factor": 0.3, **PER_CHANNEL},
    "latents_mean alone is ignored": {"scaling_factor": 0.5, "latents_mean": [1.0] * 4},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(z: Tensor, config: dict[str, Any]) -> Tensor:
    """As diffusers' pipelines do it: of Stable Diffusion XL with mean and std, of Stable Diffusion 3 without."""
    if "latents_std" not in config:
        return (z - config.get("shift_factor", 0.0)) * config["scaling_factor"]
    mean, std = (torch.tensor(config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    return (z - mean) * config["scaling_factor"] / std


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5)], ids=["one image", "a batch"])
def test_latents_are_those_of_the_pipelines_and_give_z_back(name: str, shape: tuple[int, ...]) -> None:
    scale, z = LatentScale.of(CONFIGS[name]), normal(*shape)
    latents = scale.to_latents(z)
    torch.testing.assert_close(latents, by_hand(z, CONFIGS[name]))
    torch.testing.assert_close(scale.to_z(latents), z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    scale, z = LatentScale.of(CONFIGS["per channel"]), normal(4, 3, 5).to(dtype)
    assert scale.to_latents(z).dtype == scale.to_z(z).dtype == dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_the_posterior_of_latents_is_that_of_scaled_draws(name: str) -> None:
    scale, posterior, z = (
        LatentScale.of(CONFIGS[name]),
        DiagonalGaussian(normal(2, 8, 4, 4)),
        normal(2, 4, 4, 4, seed=1),
    )
    scaled = scale.to_latents_posterior(posterior)
    # a change of variables moves the log-density by the log of the gain, for each of the 64 elements of an image
    gain = scale.affine()[1].float().expand(4, 4, 4)
    torch.testing.assert_close(scaled.nll(scale.to_latents(z)), posterior.nll(z) + gain.log().sum(), rtol=1e-5, atol=0)


def test_without_a_scaling_factor_z_are_latents() -> None:
    z = normal(4, 3, 5)
    for config in ({}, {"scaling_factor": None, "shift_factor": None}):  # such as AutoencoderTiny
        assert torch.equal(LatentScale.of(config).to_latents(z), z)


def test_the_configuration_of_a_network_states_its_scale() -> None:
    config = AutoencoderConfig(shift_factor=1, latents_mean=(0, 1, 2, 3), latents_std=(1, 1, 1, 2))
    assert LatentScale.of(config) == LatentScale(
        scaling_factor=0.18215, shift_factor=1.0, latents_mean=(0.0, 1.0, 2.0, 3.0), latents_std=(1.0, 1.0, 1.0, 2.0)
    )
