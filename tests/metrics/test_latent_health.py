"""Streaming statistics of z against the same numbers computed at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
from torch import Tensor

from sdvae.metrics.latent_health import LatentHealth
from sdvae.metrics.moments import LatentMoments
from sdvae.model.posterior import DiagonalGaussian, Encoding


def with_posterior(z: Tensor, std: float | Tensor = 0.1) -> Encoding:
    logvar = 2 * torch.as_tensor(std).log().expand_as(z)
    return Encoding(z=z, posterior=DiagonalGaussian(torch.cat([z, logvar], dim=1)))


def plain(z: Tensor) -> Encoding:
    return Encoding(z=z, posterior=None)


def measured(*batches: Encoding, num_px: int = 64) -> LatentHealth:
    health = LatentHealth(batches[0].z.shape[1])
    for batch in batches:
        health.update(batch, num_px)
    return health


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed() -> list[Tensor]:
    """Batches of several sizes and shapes, channels far from normal and far from zero."""
    scale, shift = torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1), torch.tensor([0.0, 3000.0, -2.0]).view(1, 3, 1, 1)
    shapes = [(1, 3, 4, 6), (5, 3, 4, 6), (2, 3, 17, 9)]
    return [noise(*shape, seed=seed).exp() * scale + shift for seed, shape in enumerate(shapes)]


def column(health: dict[str, list[dict[str, float]]], name: str) -> list[float]:
    return [channel[name] for channel in health["channels"]]


def flat(value: object) -> list[float]:
    """All numbers of a nested value, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in flat(item)]
    return [float("nan") if value is None else float(value)] if isinstance(value, (int, float, type(None))) else []


def test_moments_of_channels_equal_scipy_over_all_positions() -> None:
    parts = skewed()
    health = measured(*map(plain, parts)).health()
    values = np.concatenate([part.double().numpy().swapaxes(0, 1).reshape(3, -1) for part in parts], axis=1)
    assert column(health, "mean") == pytest.approx(values.mean(axis=1), rel=1e-12)
    assert column(health, "std") == pytest.approx(values.std(axis=1), rel=1e-9)
    assert column(health, "skew") == pytest.approx(scipy.stats.skew(values, axis=1), rel=1e-8)
    assert column(health, "kurtosis") == pytest.approx(scipy.stats.kurtosis(values, axis=1), rel=1e-8)
    assert np.array(health["correlation"]) == pytest.approx(np.corrcoef(values), rel=1e-8, abs=1e-9)
    assert health["num_images"] == 8


def test_kl_equals_its_closed_form_and_torch_per_image_and_per_pixel() -> None:
    mean, std = noise(3, 2, 4, 5), noise(3, 2, 4, 5, seed=1).exp()
    health = measured(with_posterior(mean[:2], std[:2]), with_posterior(mean[2:], std[2:]), num_px=999).health()
    normal = torch.distributions.Normal(mean.double(), std.double())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert health["kl_nats"] == pytest.approx(float(kl.sum(dim=(1, 2, 3)).mean()), rel=1e-6)
    assert health["bits_per_pixel"] == pytest.approx(health["kl_nats"] / math.log(2) / 999)
    assert column(health, "kl") == pytest.approx(kl.mean(dim=(0, 2, 3)).tolist(), rel=1e-6)
    assert column(health, "posterior_std") == pytest.approx(std.double().mean(dim=(0, 2, 3)).tolist(), rel=1e-6)


def test_bits_per_pixel_are_a_mean_over_images_of_different_sizes() -> None:
    health = LatentHealth(1)
    small, large = with_posterior(noise(1, 1, 2, 2)), with_posterior(noise(1, 1, 8, 8))
    health.update(small, 100)
    health.update(large, 5000)
    each = [float(e.posterior.kl()) / math.log(2) for e in (small, large) if e.posterior]
    assert health.health()["bits_per_pixel"] == pytest.approx((each[0] / 100 + each[1] / 5000) / 2, rel=1e-6)


def split(parts: Sequence[Encoding], sizes: Sequence[int]) -> list[LatentHealth]:
    done, start = [], 0
    for size in sizes:
        done.append(measured(*parts[start : start + size]))
        start += size
    return done


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_neither_batches_nor_the_order_of_merging_matter(order: tuple[int, ...]) -> None:
    z = [part.float() for part in (noise(6, 3, 20, 18) * 2 + 40).split(1)]
    at_once = measured(with_posterior(torch.cat(z))).health(0.5, 1.0)
    parts = split([with_posterior(each) for each in z], (1, 3, 2))
    merged = LatentHealth(3)
    for index in order:  # an empty one is merged too
        merged.merge({name: np.array(a) for name, a in parts[index].state().items()})
    assert flat(merged.health(0.5, 1.0)) == pytest.approx(flat(at_once), rel=1e-8, abs=1e-9, nan_ok=True)
    assert merged.health(0.5, 1.0)["notes"] == at_once["notes"] != []


def test_the_state_does_not_grow() -> None:
    few, many = (measured(*[with_posterior(noise(1, 2, 16, 16))] * n).state() for n in (1, 5))
    assert {name: a.shape for name, a in few.items()} == {name: a.shape for name, a in many.items()}


def test_merging_one_more_image_changes_nothing_that_was_measured() -> None:
    health = measured(plain(noise(2, 2, 16, 16)))
    before = health.state()
    frozen = {name: array.copy() for name, array in before.items()}
    health.update(plain(noise(1, 2, 16, 16, seed=3)), 64)
    assert all(np.array_equal(before[name], frozen[name]) for name in frozen)


def test_white_noise_has_a_flat_spectrum_and_no_autocorrelation() -> None:
    health = measured(plain(noise(40, 2, 112, 120) * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1) + 5)).health()
    assert health["power_spectrum"]["frequency"] == [ring / 16 for ring in range(1, 9)]
    power = np.array(health["power_spectrum"]["power"])  # 1960 windows, 8 frequencies or more in each ring
    assert power[0] == pytest.approx(1.0, rel=0.04)
    assert power[1] == pytest.approx(9.0, rel=0.04)
    assert health["autocorrelation"] == pytest.approx([0.0] * 4, abs=0.01)
    assert health["notes"] == []


def test_a_spectrum_has_its_peak_at_the_frequency_of_a_wave() -> None:
    wave = torch.sin(2 * math.pi * 5 / 16 * torch.arange(32)).expand(1, 1, 32, 32)
    power = measured(plain(wave)).health()["power_spectrum"]["power"][0]
    assert int(np.argmax(power)) + 1 == 5
    assert power[4] > 100 * power[1]
    turned = measured(plain(wave.transpose(2, 3))).health()["power_spectrum"]["power"][0]
    assert turned == pytest.approx(power)


def test_autocorrelation_equals_numpy_over_all_pairs_and_a_level_per_image_has_one() -> None:
    z = torch.from_numpy(scipy.signal.lfilter([1.0], [1.0, -0.7], noise(3, 1, 12, 30).numpy(), axis=3)).float()
    found = measured(plain(z[:1]), plain(z[1:])).health()["autocorrelation"]
    values = z.double().numpy()[:, 0]
    for distance, value in zip((1, 2, 4, 8), found, strict=True):
        across = np.corrcoef(values[..., :-distance].ravel(), values[..., distance:].ravel())[0, 1]
        down = np.corrcoef(values[:, :-distance].ravel(), values[:, distance:].ravel())[0, 1]
        assert value == pytest.approx((across + down) / 2, rel=1e-9)
    levels = noise(5, 2, 1, 1).expand(5, 2, 9, 9)
    assert measured(plain(levels)).health()["autocorrelation"] == pytest.approx([1.0] * 4)


def test_a_distance_that_no_image_spans_has_no_autocorrelation() -> None:
    assert measured(plain(noise(2, 1, 4, 4))).health()["autocorrelation"][2:] == [None, None]


def test_images_below_the_window_are_left_out_of_the_spectrum_and_counted() -> None:
    assert measured(plain(noise(2, 1, 15, 40))).health()["power_spectrum"] is None
    mixed = measured(plain(noise(2, 1, 15, 40) * 100), plain(noise(3, 1, 16, 16))).health()
    assert mixed["power_spectrum"]["num_images"] == 3
    assert max(mixed["power_spectrum"]["power"][0]) < 10
    assert any("2 of 5 images are smaller than 16 x 16" in note for note in mixed["notes"])


def test_a_channel_that_ignores_the_image_is_dead_in_any_unit_of_z() -> None:
    mean = noise(4, 3, 8, 8)
    mean[:, 1] *= 0.05  # variance 0.0025, posterior variance 1: dead as Burda et al. have it
    std = torch.tensor([0.1, 1.0, 0.1]).view(1, 3, 1, 1)
    for unit in (1.0, 1e-3):
        health = measured(with_posterior(mean * unit, std * unit)).health()
        assert column(health, "active") == [True, False, True]
        assert health["num_active"] == 2
        assert any("dead channel 1 of 3" in note for note in health["notes"])
    assert column(measured(with_posterior(mean, torch.tensor(0.01))).health(), "active") == [True] * 3


@pytest.mark.parametrize("jitter", [False, True])
def test_a_constant_channel_is_dead_without_a_posterior_and_has_no_correlation(jitter: bool) -> None:
    z = noise(7, 2, 9, 13)
    level = torch.tensor(0.1)  # or its neighbour, as rounding inside a network gives it
    z[:, 1] = torch.where((z[:, 1] > 0) & jitter, torch.nextafter(level, torch.tensor(1.0)), level)
    health = measured(*[plain(each) for each in z.split(3)]).health()
    assert column(health, "active") == [True, False]
    assert health["correlation"][0][1] is None and health["correlation"][1][1] is None
    assert health["channels"][1]["std"] == 0
    assert health["channels"][1]["skew"] is None and health["channels"][1]["kurtosis"] is None
    assert health["kl_nats"] is None and health["bits_per_pixel"] is None
    assert column(health, "posterior_std") == [None, None]


def test_suggested_scale_and_shift_make_draws_of_mean_0_and_variance_1() -> None:
    mean = noise(6, 2, 16, 16) * torch.tensor([2.0, 4.0]).view(1, 2, 1, 1) + torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    encoding = with_posterior(mean, 2.0)
    suggested = measured(encoding).health()["suggested"]
    draws = torch.cat([encoding.draw([torch.Generator().manual_seed(seed)] * 6) for seed in range(1, 11)])
    latents = (draws - suggested["shift_factor"]) * suggested["scaling_factor"]
    assert float(latents.std()) == pytest.approx(1.0, abs=0.01)
    assert float(latents.mean()) == pytest.approx(0.0, abs=0.01)
    moments = LatentMoments(2)
    moments.update(mean.double().numpy(), None)
    found = measured(plain(mean)).health()["suggested"]["scaling_factor"]
    assert found == pytest.approx(moments.scaling_factor().value)


@pytest.mark.parametrize(
    ("configured", "words"),
    [((0.5, None), []), ((0.53, None), ["standard deviation of 1.06"]), ((0.5, 1.0), ["off centre by -0.5"])],
)
def test_a_configured_scale_or_shift_that_is_off_is_noted(
    configured: tuple[float, float | None], words: list[str]
) -> None:
    z = noise(4, 2, 16, 16)
    notes = measured(plain((z - z.mean()) / z.std(correction=0) * 2)).health(*configured)["notes"]
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


def test_correlated_channels_heavy_tails_and_a_narrow_posterior_are_noted() -> None:
    z = noise(4, 3, 16, 16)
    z[:, 2] = -z[:, 0] + 0.5 * z[:, 2]
    z[:, 1] = z[:, 1] ** 5
    notes = " | ".join(measured(with_posterior(z, 1e-4)).health()["notes"])
    assert "1 pair of channels correlate by more than 0.5, most of all 0 and 2 (-0.8" in notes
    assert "heavy tails in channel 1:" in notes
    assert "nearly a point" in notes


def test_images_without_finite_latents_are_counted_and_poison_nothing() -> None:
    z = noise(3, 2, 16, 16)
    good = measured(with_posterior(z[:2])).health()
    z[2, 0, 0, 0] = math.inf
    health = measured(with_posterior(z)).health()
    assert flat(health["channels"]) == flat(good["channels"])
    assert (health["num_images"], health["num_not_finite"]) == (2, 1)
    assert any("1 images gave latents that are not finite" in note for note in health["notes"])


def test_nothing_measured_gives_no_numbers_and_says_so() -> None:
    health = measured(plain(torch.full((2, 2, 4, 4), math.nan))).health(1.0)
    assert health["notes"] == ["none of 2 images gave finite latents"]
    assert column(health, "std") == [None, None] and health["suggested"]["scaling_factor"] is None
