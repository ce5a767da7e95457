"""The linear start: it must be about as good as the best linear transform, and able to learn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.build import build_autoencoder
from sdvae.training.linear_init import linear_init

MODEL = {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 2, "mid_block_add_attention": False}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Noise with the spectrum of photographs (amplitude 1 / frequency) and correlated channels, (16, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)[None]).clamp(min=1 / 64)
    noise = torch.randn(16, 3, 64, 64, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(64, 64))
    mixed = torch.einsum("ck,bkhw->bchw", torch.tensor([[1.0, 0.2, 0.1], [1.0, -0.1, 0.1], [1.0, 0.0, -0.2]]), noise)
    return (0.4 * mixed / mixed.std()).clamp(-1, 1)


def mse(vae: AutoencoderKL, x: Tensor) -> float:
    with torch.inference_mode():
        return F.mse_loss(vae.decode(vae.encode(x).latent_dist.mode()).sample, x).item()


def best_linear_mse_per_block(x: Tensor, size: int, count: int) -> float:
    """Error of the best linear projection of blocks of pixels to `count` numbers."""
    blocks = F.pixel_unshuffle(x, size).transpose(0, 1).flatten(1).double()
    return float(torch.linalg.eigvalsh(torch.cov(blocks))[:-count].sum() / len(blocks))


@pytest.mark.parametrize(
    "changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}, {"layers_per_block": 2}]
)
def test_it_starts_near_the_best_linear_projection_of_blocks(x: Tensor, changes: dict[str, object]) -> None:
    vae = build_autoencoder({**MODEL, **changes}, seed=0)
    random = mse(vae, x)
    linear_init(vae, x, torch.Generator().manual_seed(0))
    start, linear = mse(vae, x), best_linear_mse_per_block(x, 8, 4)
    assert start < 1.25 * linear
    assert start < random / 2.5


def test_z_starts_with_about_unit_variance_and_a_narrow_posterior(x: Tensor) -> None:
    vae = build_autoencoder(MODEL, seed=0)
    linear_init(vae, x, torch.Generator().manual_seed(0))
    posterior = vae.encode(x).latent_dist
    assert ((posterior.mean.std(dim=(0, 2, 3)) - 1).abs() < 0.2).all()
    assert posterior.std.mean().item() == pytest.approx(math.exp(-3), rel=1e-3)


def test_gradients_reach_every_residual_branch_and_the_loss_falls(x: Tensor) -> None:
    vae = build_autoencoder(MODEL, seed=0)
    linear_init(vae, x, torch.Generator().manual_seed(0))
    before = mse(vae, x)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-5)
    for _ in range(15):
        optimizer.zero_grad()
        F.mse_loss(vae.decode(vae.encode(x[:4]).latent_dist.mode()).sample, x[:4]).backward()
        optimizer.step()
    still = [
        name for name, parameter in vae.named_parameters() if name.endswith("conv2.weight") and not parameter.any()
    ]
    assert still == []
    assert mse(vae, x) < before


def test_it_is_reproducible(x: Tensor) -> None:
    first, second = (
        build_autoencoder(MODEL, seed=seed) for seed in (0, 1)
    )  # no weight of the random start remains ...
    for vae in (first, second):
        linear_init(vae, x, torch.Generator().manual_seed(0))
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_it_refuses_a_single_level(x: Tensor) -> None:
    vae = build_autoencoder({"block_out_channels": [16], "norm_num_groups": 2}, seed=0)
    with pytest.raises(ConfigError, match="at least two levels"):
        linear_init(vae, x, torch.Generator())
