"""Each loss against an independent reference: another library's function, numpy, or autograd written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from sdvae.training.losses import (
    D_LOSSES,
    G_LOSSES,
    REC_LOSSES,
    LeCam,
    adaptive_weight,
    kl_loss,
    kl_weight_at,
    nll_loss,
    r1_penalty,
    ramp_at,
)


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", lambda d, delta: np.abs(d)),
        ("l2", lambda d, delta: d**2),
        ("huber", lambda d, delta: np.where(np.abs(d) < delta, d**2 / (2 * delta), np.abs(d) - delta / 2)),
        ("charbonnier", lambda d, delta: np.sqrt(d**2 + delta**2) - delta),
    ],
)
def test_reconstruction_losses_are_means_of_their_formula(name: str, expected) -> None:
    recon, x = images(0, 2, 3, 4, 5), images(1, 2, 3, 4, 5)
    by_hand = expected(recon.double().numpy() - x.double().numpy(), 0.7).mean()
    assert REC_LOSSES[name](recon, x, 0.7).item() == pytest.approx(by_hand, rel=1e-6)
    assert REC_LOSSES[name](x, x, 0.7).item() == pytest.approx(0, abs=1e-7)
    half = REC_LOSSES[name](recon.bfloat16(), x.bfloat16(), 0.7)
    assert half.dtype == torch.float32
    rounded = recon.bfloat16().double().numpy() - x.bfloat16().double().numpy()
    assert half.item() == pytest.approx(expected(rounded, 0.7).mean(), rel=1e-6)


def test_huber_is_torchs_over_delta_and_has_the_gradient_of_l1_far_out() -> None:
    recon, x = (5 * images(0, 2, 3, 4, 5)).requires_grad_(), images(1, 2, 3, 4, 5)
    loss = REC_LOSSES["huber"](recon, x, 0.1)
    assert loss.item() == pytest.approx(F.huber_loss(recon, x, delta=0.1).item() / 0.1, rel=1e-6)
    loss.backward()
    far = (recon - x).abs() > 0.1
    assert far.any() and torch.allclose(recon.grad[far], (recon - x)[far].sign() / recon.numel())


def test_kl_equals_the_divergence_of_torchs_distributions() -> None:
    moments, x = images(0, 3, 8, 4, 6).requires_grad_(), torch.zeros(3, 3, 32, 48)
    mean, logvar = moments.double().chunk(2, dim=1)
    reference = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(torch.zeros_like(mean), 1.0))
    assert kl_loss(moments, x).item() == pytest.approx(reference.sum().item() / 3 / (3 * 32 * 48), rel=1e-5)
    assert kl_loss(moments, x, "mean").item() == pytest.approx(reference.mean().item(), rel=1e-5)
    grads = [torch.autograd.grad(loss, moments)[0] for loss in (kl_loss(moments, x, "mean"), reference.mean())]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


def test_kl_in_the_papers_sum_form_keeps_its_ratio_to_the_reconstruction() -> None:
    """Their loss is sum |d| + weight * sum KL, ours mean |d| + weight * kl_loss: the same up to the image's size."""
    moments, recon, x = images(0, 2, 8, 2, 3), images(1, 2, 3, 16, 24), images(2, 2, 3, 16, 24)
    mean, logvar = moments.chunk(2, dim=1)
    papers_kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    papers = (recon - x).abs().sum() / 2 + 0.3 * papers_kl
    ours = REC_LOSSES["l1"](recon, x, 0.1) + 0.3 * kl_loss(moments, x)
    assert ours.item() == pytest.approx(papers.item() / (3 * 16 * 24), rel=1e-5)


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_free_bits_hold_each_element_of_each_image(form: str) -> None:
    moments, x = images(0, 2, 8, 3, 3).requires_grad_(), torch.zeros(2, 3, 24, 24)
    mean, logvar = moments.detach().chunk(2, dim=1)
    elements = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    expected = elements.clamp(min=0.5).sum().item() / 2 / (x[0].numel() if form == "sum" else elements[0].numel())
    loss = kl_loss(moments, x, form, free_bits=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # the joined batch has the mean of its parts, as several devices need
    parts = [kl_loss(moments[i : i + 1], x[i : i + 1], form, free_bits=0.5).item() for i in range(2)]
    assert loss.item() == pytest.approx(sum(parts) / 2, rel=1e-5)
    loss.backward()
    free = torch.cat([elements < 0.5] * 2, dim=1)
    assert free.any() and not free.all()
    assert torch.all(moments.grad[free] == 0) and torch.all(moments.grad[~free] != 0)


def test_ramps_at_their_corners() -> None:
    assert [ramp_at(step, 10, 4) for step in (0, 9, 10, 11, 13, 14, 99)] == [0, 0, 0, 0.25, 0.75, 1, 1]
    assert [ramp_at(step, 10, 0) for step in (9, 10, 11)] == [0, 1, 1]
    assert [kl_weight_at(step, 0.5, 4) for step in (0, 1, 4, 9)] == [0, 0.125, 0.5, 0.5]
    assert kl_weight_at(0, 0.5, 0) == 0.5


def test_learned_logvar_settles_at_the_log_of_the_error() -> None:
    """d/ds (rec e^-s + s) = 0 at s = log rec: with a sign or the added logvar lost, it would run away."""
    rec, logvar = torch.tensor(0.2), torch.tensor(math.log(0.2), requires_grad=True)
    loss = nll_loss(rec, logvar)
    assert loss.item() == pytest.approx(1 + math.log(0.2))
    loss.backward()
    assert logvar.grad.item() == pytest.approx(0, abs=1e-6)
    assert nll_loss(rec, torch.tensor(0.0)).item() == pytest.approx(0.2)


def softplus(values: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, values)


@pytest.mark.parametrize(
    ("name", "d_formula", "g_formula"),
    [
        ("hinge", lambda r, f: (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean()) / 2, lambda f: -f.mean()),
        ("vanilla", lambda r, f: (softplus(-r).mean() + softplus(f).mean()) / 2, lambda f: -f.mean()),
        (
            "least_squares",
            lambda r, f: (((r - 1) ** 2).mean() + (f**2).mean()) / 2,
            lambda f: ((f - 1) ** 2).mean() / 2,
        ),
    ],
)
def test_adversarial_losses_follow_their_formula(name: str, d_formula, g_formula) -> None:
    real, fake = 2 * images(0, 3, 1, 5, 5), 2 * images(1, 3, 1, 6, 6) - 0.5
    assert D_LOSSES[name](real, fake).item() == pytest.approx(
        d_formula(real.double().numpy(), fake.double().numpy()), rel=1e-5
    )
    assert G_LOSSES[name](fake).item() == pytest.approx(g_formula(fake.double().numpy()), rel=1e-5)
    # each side gains by moving its way
    eps = 1e-2
    assert D_LOSSES[name](torch.zeros(1) + eps, torch.zeros(1) - eps) < D_LOSSES[name](torch.zeros(1), torch.zeros(1))
    assert G_LOSSES[name](torch.zeros(1) + eps) < G_LOSSES[name](torch.zeros(1))
    assert D_LOSSES[name](real.half(), fake.half()).dtype == G_LOSSES[name](fake.half()).dtype == torch.float32


class Pair:
    """A generator and a discriminator of a few convolutions, and the two losses between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))
        self.judge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
        self.x = images(1, 2, 3, 8, 8)

    def gradients(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of both losses at the last layer."""
        recon = self.net(x)
        losses = (recon - x).abs().mean(), -self.judge(recon).mean()
        return [torch.autograd.grad(loss, self.net[-1].weight, retain_graph=True)[0] for loss in losses]


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    pair = Pair()
    grads = pair.gradients(pair.x)
    lengths = [math.sqrt((grad.double() ** 2).sum().item()) for grad in grads]
    weight = adaptive_weight(*grads, max_weight=1e4)
    assert weight.item() == pytest.approx(lengths[0] / (lengths[1] + 1e-4), rel=1e-6)
    assert weight.shape == () and not weight.requires_grad
    half = [grad.half().requires_grad_() for grad in grads]
    found = adaptive_weight(*half, max_weight=1e4)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.item() == pytest.approx(weight.item(), rel=1e-2)


def test_adaptive_weight_balances_the_two_gradients() -> None:
    pair = Pair()
    nll_grad, g_grad = pair.gradients(pair.x)
    weight = adaptive_weight(nll_grad, g_grad, max_weight=1e4)
    assert (weight * g_grad).norm().item() == pytest.approx(nll_grad.norm().item(), rel=0.01)


def test_adaptive_weight_is_clamped() -> None:
    pair = Pair()
    nll_grad, g_grad = pair.gradients(pair.x)
    free = adaptive_weight(nll_grad, g_grad, max_weight=1e4).item()
    assert adaptive_weight(nll_grad, g_grad, max_weight=free / 2).item() == pytest.approx(free / 2)
    # without a gradient of the adversarial loss, only 1e-4 and the clamp are left
    assert adaptive_weight(nll_grad, 0 * g_grad, max_weight=2.0).item() == 2.0


def test_adaptive_weight_in_the_papers_unit_is_larger_by_the_number_of_elements() -> None:
    pair = Pair()
    nll_grad, g_grad = pair.gradients(pair.x)
    count = pair.x[0].numel()
    ours = adaptive_weight(nll_grad, g_grad, max_weight=1e4 / count)
    papers = adaptive_weight(nll_grad * count, g_grad, max_weight=1e4)
    assert papers.item() == pytest.approx(ours.item() * count, rel=1e-5)


def test_adaptive_weight_of_cut_batches_is_that_of_the_joined_batch() -> None:
    """Gradients are averaged, not norms: norms of parts are longer than the norm of their mean."""
    pair = Pair()
    joined = adaptive_weight(*pair.gradients(pair.x), max_weight=1e4).item()
    first, other = pair.gradients(pair.x[:1]), torch.stack(pair.gradients(pair.x[1:]))
    cut = adaptive_weight(*first, max_weight=1e4, average=lambda grads: (grads + other) / 2)
    assert cut.item() == pytest.approx(joined, rel=1e-5)
    assert abs(adaptive_weight(*first, max_weight=1e4).item() / joined - 1) > 1e-3


def test_r1_of_a_known_discriminator() -> None:
    """logits = a * x, patchwise: the gradient is a in every element of the image, and d penalty / da = 2 * a * n."""
    a = torch.tensor(0.7, requires_grad=True)
    real = images(0, 2, 3, 4, 4).requires_grad_()
    penalty = r1_penalty((a * real).sum(dim=1, keepdim=True), real)
    assert penalty.item() == pytest.approx(0.49 * 48, rel=1e-5)
    penalty.backward()
    assert a.grad.item() == pytest.approx(2 * 0.7 * 48, rel=1e-5)
    assert real.grad is None or torch.all(real.grad == 0)


def test_lecam_follows_its_formula_and_its_averages_their_closed_form() -> None:
    lecam = LeCam(decay=0.9)
    averages = np.zeros(2)
    for seed in range(4):
        real, fake = images(seed, 2, 1, 3, 3) + 1, images(seed + 9, 2, 1, 3, 3) - 1
        expected = (np.maximum(0, real.numpy() - averages[1]) ** 2).mean() + (
            np.maximum(0, averages[0] - fake.numpy()) ** 2
        ).mean()
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-5)
        lecam.update(real.requires_grad_(), fake)
        averages = 0.9 * averages + 0.1 * np.array([real.mean().item(), fake.mean().item()])
    assert averages[0] > 0.1 and averages[1] < -0.1
    assert [lecam.real.item(), lecam.fake.item()] == pytest.approx(averages.tolist(), rel=1e-5)


def test_lecam_has_gradients_to_the_logits_and_state_to_be_saved() -> None:
    lecam, restored = LeCam(), LeCam()
    real, fake = images(0, 2, 1, 3, 3).requires_grad_(), images(1, 2, 1, 3, 3).requires_grad_()
    lecam.update(real, fake, average=lambda means: means + 1)  # stands for what another device adds
    assert lecam.real.item() == pytest.approx(0.01 * (real.mean().item() + 1), rel=1e-4)
    lecam(real, fake).backward()
    assert real.grad.abs().sum() > 0 and fake.grad.abs().sum() > 0
    assert not lecam.real.requires_grad and list(lecam.parameters()) == []
    restored.load_state_dict(lecam.state_dict())
    assert torch.equal(restored(real, fake), lecam(real, fake))
