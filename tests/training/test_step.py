"""The mathematics of a step: losses against their definitions, schedule, EMA."""

from __future__ import annotations

import math

import pytest
import torch

from sdvae.model.posterior import DiagonalGaussian
from sdvae.training.config import LossConfig
from sdvae.training.ema import EMA, ema_decay_at
from sdvae.training.losses import kl_loss, l1_loss, l2_loss
from sdvae.training.step import GeneratorModule, Reconstruction, generator_loss, lr_at


def test_losses_are_means_per_image_element() -> None:
    recon, x = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    assert l1_loss(recon, x).item() == pytest.approx(2.5 / 3)
    assert l2_loss(recon, x).item() == pytest.approx(2.25 / 3)


def test_kl_of_a_known_gaussian() -> None:
    mean, logvar = 2.0, math.log(0.25)
    moments = torch.tensor([mean, logvar]).view(1, 2, 1, 1).repeat(2, 1, 3, 5)
    by_hand = 0.5 * (mean**2 + 0.25 - 1 - logvar) * 15
    x = torch.zeros(2, 3, 24, 40)
    assert kl_loss(moments, x).item() == pytest.approx(by_hand / x[0].numel(), rel=1e-6)
    assert DiagonalGaussian(moments).kl().tolist() == pytest.approx([by_hand] * 2, rel=1e-6)


def test_every_term_reaches_every_parameter(tiny_vae) -> None:
    module = GeneratorModule(tiny_vae)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    total, terms = generator_loss(Reconstruction(*module(x)), x, LossConfig(rec="l1", kl_weight=0.1))
    total.backward()
    assert terms["loss"].item() == pytest.approx(terms["rec_loss"].item() + 0.1 * terms["kl_loss"].item(), rel=1e-6)
    # a bias in front of a GroupNorm with one channel a group would have none; here every parameter has one
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_a_plain_autoencoder_draws_nothing(tiny_vae) -> None:
    x = torch.rand(1, 3, 32, 32)
    module = GeneratorModule(tiny_vae, sample_posterior=False)
    assert torch.equal(module(x)[0], module(x)[0])
    drawing = GeneratorModule(tiny_vae)
    assert not torch.equal(drawing(x)[0], drawing(x)[0])


def test_schedule_at_its_corners() -> None:
    at = {
        step: lr_at(step, lr=1.0, steps=110, warmup_steps=10, final_lr_ratio=0.1) for step in (0, 9, 10, 60, 110, 500)
    }
    assert at == pytest.approx({0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1})
    assert lr_at(70, lr=2.0, steps=100, warmup_steps=0, final_lr_ratio=1.0) == 2.0


def test_ema_equals_its_closed_form() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = EMA([parameter], decay=0.15), parameter.detach().double()
    for step in range(5):
        with torch.no_grad():
            parameter += torch.tensor([0.5, 1.0])
        ema.update([parameter])
        decay = ema_decay_at(step, 0.15)
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    assert ema.averages[0].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert [ema_decay_at(step, 0.15) for step in range(3)] == pytest.approx([0.1, 0.15, 0.15])


def test_ema_state_round_trips_and_keeps_its_tick() -> None:
    first, second = (EMA([torch.nn.Parameter(torch.full((2,), value))], decay=0.9) for value in (1.0, 5.0))
    for _ in range(4):
        first.update([torch.nn.Parameter(torch.zeros(2))])
    second.load_state_dict(first.state_dict())
    assert second.num_updates == 4 and torch.equal(first.averages[0], second.averages[0])
