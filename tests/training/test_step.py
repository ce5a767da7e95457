"""The mathematics of a step: what the terms add up to, where gradients go, updates, schedule, EMA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sdvae.features.lpips import build_lpips
from sdvae.training.config import (
    AdversarialConfig,
    EquivarianceConfig,
    KLConfig,
    LatentNoiseConfig,
    LogvarConfig,
    LossConfig,
    PerceptualConfig,
    TrainingConfig,
)
from sdvae.training.discriminator import DiscriminatorModule, NLayerDiscriminator
from sdvae.training.ema import EMA, ema_decay_at
from sdvae.training.equivariance import Transform
from sdvae.training.losses import LeCam
from sdvae.training.step import (
    Adversary,
    GeneratorModule,
    Reconstruction,
    apply_updates,
    discriminator_loss,
    generator_loss,
    lr_at,
    select_trained,
)

GAN = AdversarialConfig(weight=0.5, disc_start=0, channels=8, num_layers=2)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def adversary_of(module: GeneratorModule, config: AdversarialConfig = GAN) -> Adversary:
    torch.manual_seed(5)
    net = NLayerDiscriminator(channels=config.channels, num_layers=config.num_layers, norm=config.norm)
    return Adversary(DiscriminatorModule(net), module.last_layer, LeCam() if config.lecam_weight else None)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_every_term_reaches_every_parameter(tiny_vae, x) -> None:
    config = LossConfig(rec="l1", kl=KLConfig(weight=0.1))
    module = GeneratorModule(tiny_vae, config)
    total, terms = generator_loss(Reconstruction(*module(x)), x, config, step=0)
    total.backward()
    assert terms["loss"].item() == pytest.approx(terms["rec_loss"].item() + 0.1 * terms["kl_loss"].item(), rel=1e-6)
    # a bias in front of a GroupNorm with one channel a group would have none; here every parameter has one
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_a_plain_autoencoder_draws_nothing(tiny_vae, x) -> None:
    module = GeneratorModule(tiny_vae, LossConfig(sample_posterior=False))
    assert torch.equal(module(x)[0], module(x)[0])
    drawing = GeneratorModule(tiny_vae)
    assert not torch.equal(drawing(x)[0], drawing(x)[0])


def test_lpips_moves_the_autoencoder_and_leaves_its_own_network_alone(
    tiny_vae, x, perceptual: PerceptualConfig
) -> None:
    """The loss is LPIPS alone, so a term that was computed without gradient would leave nothing to backpropagate."""
    network = build_lpips(perceptual.net, perceptual.weights_path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = LossConfig(rec_weight=0.0, kl=KLConfig(weight=0.0), perceptual=replace(perceptual, weight=2.0))
    module = GeneratorModule(tiny_vae, config)
    total, terms = generator_loss(Reconstruction(*module(x)), x, config, 0, network)
    total.backward()
    assert terms["loss"].item() == pytest.approx(2.0 * terms["perceptual_loss"].item(), rel=1e-6)
    norms = {name: float(grad.norm()) for name, grad in gradients(module).items()}
    assert norms["vae.decoder.conv_out.weight"] > 1e-4 and norms["vae.encoder.conv_in.weight"] > 1e-6
    assert gradients(network) == {}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_features_of_the_target_are_computed_once(tiny_vae, x, perceptual: PerceptualConfig) -> None:
    network = build_lpips(perceptual.net, perceptual.weights_path)
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    seen: list[bool] = []
    first.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].requires_grad))
    config = LossConfig(perceptual=perceptual, adversarial=GAN)
    module = GeneratorModule(tiny_vae, config)
    generator_loss(Reconstruction(*module(x)), x, config, 0, network, adversary_of(module))[0].backward()
    assert sorted(seen) == [False, True]


def test_the_passes_of_generator_and_discriminator_leave_no_gradient_in_the_other(tiny_vae, x) -> None:
    config = LossConfig(adversarial=replace(GAN, r1_weight=1.0, lecam_weight=1.0))
    module = GeneratorModule(tiny_vae, config)
    adversary = adversary_of(module, config.adversarial)
    discriminator = adversary.module
    for _ in range(2):  # the second time, optimizers have gradients of the first to forget
        output = Reconstruction(*module(x))
        generator_loss(output, x, config, 0, adversary=adversary)[0].backward()
        assert gradients(discriminator) == {}
        generator_gradients = gradients(module)
        discriminator_loss(discriminator, output.recon, x, config.adversarial, adversary)[0].backward()
        after = gradients(module)
        assert all(torch.equal(after[name], grad) for name, grad in generator_gradients.items())
        assert len(gradients(discriminator)) == len(list(discriminator.parameters()))
        assert all(parameter.requires_grad for parameter in discriminator.parameters())
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (module, discriminator)]
        apply_updates([(opt, [p for g in opt.param_groups for p in g["params"]]) for opt in optimizers], 1.0)
        assert gradients(module) == gradients(discriminator) == {}


@pytest.mark.parametrize(("learned", "loss_scale"), [(False, 1.0), (True, 1024.0)])
def test_loss_and_gradients_under_a_discriminator_are_those_of_plain_autograd(
    tiny_vae, x, perceptual: PerceptualConfig, learned: bool, loss_scale: float
) -> None:
    """The balance takes gradients apart at the reconstruction; here the same sum is differentiated in one piece."""
    network = build_lpips(perceptual.net, perceptual.weights_path)
    config = LossConfig(
        rec="l1",
        perceptual=perceptual,
        kl=KLConfig(weight=0.01),
        adversarial=replace(GAN, max_adaptive_weight=1e9, ramp_steps=4),
        logvar=LogvarConfig(init=0.3, learned=learned),
        sample_posterior=False,
    )
    module = GeneratorModule(tiny_vae, config)
    adversary = adversary_of(module)
    adversary.loss_scale = loss_scale
    total, terms = generator_loss(Reconstruction(*module(x)), x, config, 1, network, adversary)
    total.backward()
    found = gradients(module)
    module.zero_grad()

    recon, moments, logvar = module(x)
    rec = (recon - x).abs().mean() + perceptual.weight * network(recon, x).mean()
    nll = rec / logvar.exp() + logvar
    g_loss = -adversary.module.net(recon).mean()
    last = tiny_vae.decoder.conv_out.weight
    nll_grad, g_grad = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, g_loss))
    weight = nll_grad.norm() / (g_grad.norm() + 1e-4)
    mean, log_variance = moments.chunk(2, dim=1)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / x.numel()
    expected = nll + 0.01 * kl + 0.5 * (1 / 4) * weight * g_loss  # a quarter of the ramp is behind
    expected.backward()
    assert total.item() == terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["adaptive_weight"].item() == pytest.approx(weight.item() * x[0].numel(), rel=1e-4)
    for name, grad in gradients(module).items():
        assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-7), name
    assert ("logvar" in found) == learned


def test_the_balance_is_clamped_in_the_unit_of_the_papers(tiny_vae, x) -> None:
    config = LossConfig(adversarial=replace(GAN, max_adaptive_weight=0.5))
    module = GeneratorModule(tiny_vae, config)
    _, terms = generator_loss(Reconstruction(*module(x)), x, config, 0, adversary=adversary_of(module))
    assert terms["adaptive_weight"].item() == pytest.approx(0.5)


def test_the_discriminators_pass_moves_the_averages_of_lecam_once_to_the_mean_over_devices(tiny_vae, x) -> None:
    config = replace(GAN, lecam_weight=1.0)
    adversary = adversary_of(GeneratorModule(tiny_vae), config)
    adversary.average = lambda means: means + 1.0  # as if the other devices had larger ones
    assert adversary.lecam is not None
    _, terms = discriminator_loss(adversary.module, -x, x, config, adversary)
    averages = [adversary.lecam.real.item(), adversary.lecam.fake.item()]
    expected = [0.01 * (terms[name].item() + 1.0) for name in ("logits_real", "logits_fake")]
    assert averages == pytest.approx(expected)


def test_before_it_sets_in_the_discriminator_is_not_touched(tiny_vae, x) -> None:
    config = LossConfig(adversarial=replace(GAN, disc_start=10), sample_posterior=False)
    module = GeneratorModule(tiny_vae, config)
    adversary = adversary_of(module)
    calls: list[Any] = []
    adversary.module.net.main[0].register_forward_hook(lambda *args: calls.append(args))
    early, terms = generator_loss(Reconstruction(*module(x)), x, config, 9, adversary=adversary)
    plain, _ = generator_loss(Reconstruction(*module(x)), x, replace(config, adversarial=AdversarialConfig()), 9)
    assert calls == [] and "g_loss" not in terms and early.item() == plain.item()
    generator_loss(Reconstruction(*module(x)), x, config, 10, adversary=adversary)
    assert len(calls) == 1


def test_equivariance_compares_with_the_image_treated_alike(tiny_vae, x) -> None:
    config = LossConfig(equivariance=EquivarianceConfig(probability=1.0), sample_posterior=False)
    module = GeneratorModule(tiny_vae, config)
    transform = Transform(scale=0.5, quarter_turns=1)
    recon, moments, _ = module(x, transform)
    assert recon.shape == transform.to_image(x, 8).shape == (2, 3, 16, 16) and moments.shape == (2, 8, 4, 4)
    expected = tiny_vae.decode(transform.to_z(tiny_vae.encode(x).latent_dist.mode())).sample
    assert torch.allclose(recon, expected, atol=1e-6)


def test_latent_noise_changes_what_is_decoded_and_not_the_posterior(tiny_vae, x) -> None:
    quiet = GeneratorModule(tiny_vae, LossConfig(sample_posterior=False))
    noisy = GeneratorModule(tiny_vae, LossConfig(sample_posterior=False, latent_noise=LatentNoiseConfig(std=0.5)))
    assert torch.equal(quiet(x)[1], noisy(x)[1]) and not torch.equal(quiet(x)[0], noisy(x)[0])


@pytest.mark.parametrize(
    ("trained", "prefixes"),
    [
        ("all", ("encoder.", "quant_conv.", "post_quant_conv.", "decoder.")),
        ("encoder", ("encoder.", "quant_conv.")),
        ("decoder", ("post_quant_conv.", "decoder.")),
        ("last_blocks", ("decoder.up_blocks.2.", "decoder.up_blocks.3.", "decoder.conv_")),
    ],
)
def test_gradients_reach_the_trained_part_and_nothing_else(
    tiny_vae, x, trained: str, prefixes: tuple[str, ...]
) -> None:
    select_trained(tiny_vae, trained, num_last_blocks=2)
    config = LossConfig(adversarial=GAN, kl=KLConfig(weight=0.1))
    module = GeneratorModule(tiny_vae, config)
    generator_loss(Reconstruction(*module(x)), x, config, 0, adversary=adversary_of(module))[0].backward()
    expected = {name for name, _ in tiny_vae.named_parameters() if name.startswith(prefixes)} - {
        f"decoder.conv_in.{name}" for name in ("weight", "bias") if trained == "last_blocks"
    }
    assert {name for name, parameter in tiny_vae.named_parameters() if parameter.grad is not None} == expected
    module.train()
    assert tiny_vae.encoder.training == (trained in ("all", "encoder"))


def test_a_frozen_encoder_keeps_no_activations(tiny_vae, x) -> None:
    def saved_by_encoding() -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module = GeneratorModule(tiny_vae, LossConfig(sample_posterior=False))
            handle = tiny_vae.decoder.register_forward_pre_hook(lambda *args: totals.append(count))
            module(x)
            handle.remove()
        return totals[-1]

    totals: list[int] = []
    assert saved_by_encoding() > 20
    select_trained(tiny_vae, "decoder")
    assert saved_by_encoding() <= 2  # of post_quant_conv, which is trained


def test_updates_clip_each_optimizer_by_its_own_norm_and_unscale_both_by_one_scale() -> None:
    def run(scaler: torch.amp.GradScaler | None) -> tuple[list[float], list[torch.Tensor]]:
        weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
        optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
        loss = (weights[0] * torch.tensor([3.0, 4.0])).sum() + (weights[1] * torch.tensor([0.3, 0.4])).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        norms = apply_updates([(o, [w]) for o, w in zip(optimizers, weights, strict=True)], 1.0, scaler)
        assert all(weight.grad is None for weight in weights)
        return norms, [weight.detach() for weight in weights]

    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)):
        norms, weights = run(scaler)
        assert norms == pytest.approx([5.0, 0.5])
        assert weights[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
        assert weights[1].tolist() == pytest.approx([-0.3, -0.4], rel=1e-5)


def test_an_objection_stops_updates_before_anything_moves() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.sum().backward()

    def object_to(norms: list[float]) -> None:
        raise ValueError(str(norms))

    with pytest.raises(ValueError, match="1.41"):
        apply_updates([(torch.optim.SGD([weight], lr=1.0), [weight])], None, before=object_to)
    assert weight.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.1 + 0.9 * 0.853553, 60: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_schedule_at_its_corners(schedule: Any, expected: dict[int, float]) -> None:
    ratio = 0.0 if schedule == "constant" else 0.1
    options = TrainingConfig(lr=1.0, steps=110, warmup_steps=10, schedule=schedule, final_lr_ratio=ratio)
    assert {step: lr_at(step, options) for step in expected} == pytest.approx(expected)
    # a discriminator that sets in at step 100 warms up there, and ends with the run
    assert lr_at(100, options, lr=2.0, first_step=100) == pytest.approx(0.2)
    assert lr_at(110, replace(options, warmup_steps=0), first_step=100) == pytest.approx(expected[110])


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
