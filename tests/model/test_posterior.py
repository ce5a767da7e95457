"""The posterior: equal to diffusers' DiagonalGaussianDistribution, and to the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sdvae.model.posterior import LOGVAR_MAX, LOGVAR_MIN, DiagonalGaussian


def make_moments(batch: int = 3, channels: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 2 * channels, 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(posterior: DiagonalGaussian) -> Any:
    return Normal(posterior.mean.double(), posterior.std.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_parts_equal_the_stock_ones(dtype: torch.dtype) -> None:
    moments = make_moments(dtype=dtype)
    ours, stock = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(stock, name))
    assert ours.moments is ours.parameters is moments
    assert torch.equal(ours.mode(), stock.mode())
    assert torch.equal(ours.mode(), moments[:, :4])


def test_logvar_is_clamped_as_with_the_stock_one_and_moments_are_not() -> None:
    moments = torch.tensor([0.0, 0.0, -1e9, 1e9]).view(1, 4, 1, 1)
    ours, stock = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    assert ours.logvar.flatten().tolist() == stock.logvar.flatten().tolist() == [-30.0, 20.0]
    assert [LOGVAR_MIN, LOGVAR_MAX] == [-30.0, 20.0]
    assert torch.equal(ours.std, stock.std) and ours.std.isfinite().all() and (ours.std > 0).all()
    assert torch.equal(ours.moments, moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seeds", [(7,), (1, 2, 3)], ids=["one generator", "one per image"])
def test_a_seeded_draw_equals_the_stock_one(seeds: tuple[int, ...], dtype: torch.dtype) -> None:
    moments = make_moments(dtype=dtype)
    ours, stock = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    if len(seeds) == 1:
        assert torch.equal(ours.sample(seeded(7)[0]), stock.sample(seeded(7)[0]))
    # diffusers takes a list of one for the whole batch
    draw = ours.sample(generator=seeded(*seeds))
    assert torch.equal(draw, stock.sample(generator=seeded(*seeds)))
    assert draw.dtype == dtype


def test_without_a_generator_the_draw_follows_the_global_seed() -> None:
    moments, draws = make_moments(), []
    with torch.random.fork_rng(devices=[]):
        for posterior in (DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)):
            torch.manual_seed(3)
            draws += [posterior.sample(), posterior.sample()]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_generators_per_image_draw_each_image_as_if_it_were_alone() -> None:
    moments = make_moments()
    together = DiagonalGaussian(moments).sample(seeded(5, 6, 7))
    for i, generator in enumerate(seeded(5, 6, 7)):
        assert torch.equal(together[i : i + 1], DiagonalGaussian(moments[i : i + 1]).sample(generator))


def test_a_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        DiagonalGaussian(make_moments()).sample(seeded(1, 2))


def test_draws_have_the_mean_and_the_deviation_of_the_posterior() -> None:
    posterior = DiagonalGaussian(torch.tensor([2.0, -1.0]).repeat(10000, 1).view(10000, 2, 1, 1))
    draws = posterior.sample(seeded(0)[0])
    assert draws.mean().item() == pytest.approx(2.0, abs=0.02)  # 3 standard errors
    assert draws.std().item() == pytest.approx(2.718281828**-0.5, abs=0.015)


def test_the_draw_is_differentiable_in_mean_and_logvar() -> None:
    moments = make_moments().requires_grad_()
    (gradient,) = torch.autograd.grad(DiagonalGaussian(moments).sample(seeded(0)[0]).sum(), moments)
    assert torch.equal(gradient[:, :4], torch.ones(3, 4, 5, 6))
    assert (gradient[:, 4:] != 0).all()


def test_kl_equals_the_stock_one_and_the_definition() -> None:
    moments, other = make_moments(), make_moments(seed=1)
    ours, stock = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    prior = Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    assert ours.kl().shape == (3,)
    torch.testing.assert_close(ours.kl(), stock.kl(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours.kl().double(), kl_divergence(normal(ours), prior).sum(dim=(1, 2, 3)), rtol=1e-5, atol=0
    )
    against, stock_against = ours.kl(DiagonalGaussian(other)), stock.kl(DiagonalGaussianDistribution(other))
    torch.testing.assert_close(against, stock_against, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        against.double(),
        kl_divergence(normal(ours), normal(DiagonalGaussian(other))).sum(dim=(1, 2, 3)),
        rtol=1e-5,
        atol=0,
    )
    assert ours.kl(ours).abs().max() < 1e-4
    assert DiagonalGaussian(torch.zeros(2, 8, 5, 6)).kl().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dims", [(1, 2, 3), (1,), (2, 3)])
def test_nll_equals_the_stock_one_and_the_definition(dims: tuple[int, ...]) -> None:
    moments, z = make_moments(), make_moments(seed=2)[:, :4]
    ours, stock = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    nll = ours.nll(z, dims=dims)
    torch.testing.assert_close(nll, stock.nll(z, dims=dims), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nll.double(), -normal(ours).log_prob(z.double()).sum(dim=dims), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.nll(z), stock.nll(z), rtol=1e-6, atol=0)


def test_encode_of_the_model_gives_this_posterior(tiny_vae: Any) -> None:
    with torch.inference_mode():
        posterior = tiny_vae.encode(torch.zeros(2, 3, 16, 24)).latent_dist
    assert type(posterior) is DiagonalGaussian
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 2, 3)
