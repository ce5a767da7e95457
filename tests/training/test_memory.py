"""The estimate is what torch allocates in a real step, costs nothing, and leaves everything alone."""

from __future__ import annotations

import copy
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from sdvae.features.lpips import LPIPS
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.build import build_autoencoder
from sdvae.training.config import (
    AdversarialConfig,
    DataConfig,
    LossConfig,
    PerceptualConfig,
    TrainConfig,
    TrainingConfig,
)
from sdvae.training.discriminator import DiscriminatorModule, NLayerDiscriminator
from sdvae.training.memory import estimate_memory
from sdvae.training.step import (
    Adversary,
    GeneratorModule,
    Reconstruction,
    discriminator_loss,
    generator_loss,
    select_trained,
)

MODEL: dict[str, Any] = {"block_out_channels": [8, 16, 16], "norm_num_groups": 2, "layers_per_block": 1}
LPIPS_ON = PerceptualConfig(weight=1.0, net="squeeze")  # the smallest net
ADVERSARIAL = AdversarialConfig(weight=0.5, disc_start=0, channels=8, num_layers=2, norm="group")


def make_config(loss: LossConfig | None = None, batch_size: int = 4, crop_px: int = 64, **training: Any) -> TrainConfig:
    return TrainConfig(
        run_dir="run",
        data=DataConfig(path="photos", crop_px=crop_px),
        model=MODEL,
        loss=loss or LossConfig(),
        training=TrainingConfig(**{"batch_size": batch_size, "steps": 10, "cpu": True, **training}),
    )


def make_vae(trained: str = "all") -> AutoencoderKL:
    vae = build_autoencoder(MODEL, 0)
    select_trained(vae, trained)
    return vae


def build_random_lpips() -> LPIPS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        package = lpips.LPIPS(pretrained=False, pnet_rand=True, net="squeeze", verbose=False)
    heads = [head.model[-1].weight.detach() for head in package.lins]
    return LPIPS(package.net, package.scaling_layer, heads, min_px=17)


def allocated_bytes(config: TrainConfig, trained: str, trace_path: Path) -> int:
    """Most bytes that torch's allocator handed out at once in a real step, by the record it keeps itself."""
    vae = make_vae(trained)
    if config.training.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    module = GeneratorModule(vae, config.loss)
    perceptual = build_random_lpips() if config.loss.perceptual.weight else None
    adversary, nets = None, [module]
    if config.loss.adversarial.weight:
        gan = config.loss.adversarial
        net = NLayerDiscriminator(channels=gan.channels, num_layers=gan.num_layers, norm=gan.norm)
        adversary = Adversary(DiscriminatorModule(net), module.last_layer)
        nets.append(adversary.module)
    for parameter in (parameter for net in nets for parameter in net.parameters() if parameter.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    lower = torch.autocast("cpu", torch.bfloat16) if config.training.precision == "bf16" else nullcontext()
    size = config.data.crop_px
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, lower:
        x = torch.rand(config.training.batch_size, 3, size, size)
        output = Reconstruction(*(tensor.float() for tensor in module(x)))
        generator_loss(output, x, config.loss, 9, perceptual, adversary)[0].backward()
        if adversary is not None:
            discriminator_loss(adversary.module, output.recon, x, config.loss.adversarial, adversary)[0].backward()
    profiler.export_chrome_trace(str(trace_path))
    events = [event for event in json.loads(trace_path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


# Elsewhere torch computes convolutions of bfloat16 in copies of float32, which no device does that one would train on.
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no AVX-512: no convolutions in bfloat16"
)


@pytest.mark.parametrize(
    ("loss", "trained", "training"),
    [
        pytest.param(LossConfig(), "all", {}, id="plain"),
        pytest.param(LossConfig(), "all", {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(LossConfig(), "all", {"precision": "bf16"}, id="bf16", marks=needs_bf16),
        pytest.param(LossConfig(), "decoder", {}, id="decoder"),
        pytest.param(LossConfig(), "encoder", {}, id="encoder"),
        pytest.param(LossConfig(perceptual=LPIPS_ON), "all", {}, id="lpips"),
        pytest.param(LossConfig(perceptual=LPIPS_ON, adversarial=ADVERSARIAL), "all", {}, id="lpips and discriminator"),
        pytest.param(LossConfig(adversarial=replace(ADVERSARIAL, r1_weight=1.0)), "last_blocks", {}, id="R1"),
    ],
)
def test_the_estimate_is_what_torch_allocates(loss: LossConfig, trained: str, training: Any, tmp_path: Path) -> None:
    config = make_config(loss, **training)
    estimate = estimate_memory(config, make_vae(trained))
    # what is there before the step begins: with a batch that needs next to nothing only that is left
    held = estimate.weights + estimate.gradients + estimate.optimizer + estimate.averaged_weights
    if loss.perceptual.weight:
        held += 4 * sum(parameter.numel() for parameter in build_random_lpips().parameters())
    if loss.adversarial.weight:
        net = NLayerDiscriminator(channels=8, num_layers=2, norm="group")
        held += (4 + 4 + 8) * sum(parameter.numel() for parameter in net.parameters())
    allocated = allocated_bytes(config, trained, tmp_path / "trace.json")
    assert estimate.total - held == pytest.approx(allocated, rel=0.02)


def test_what_is_held_follows_from_the_number_of_parameters() -> None:
    vae = make_vae("decoder")
    count = sum(parameter.numel() for parameter in vae.parameters())
    trained = sum(parameter.numel() for parameter in vae.parameters() if parameter.requires_grad)
    assert 0 < trained < count
    estimate = estimate_memory(make_config(), vae)
    assert (estimate.weights, estimate.gradients, estimate.averaged_weights) == (4 * count, 4 * trained, 4 * trained)
    assert (estimate.optimizer, estimate.perceptual, estimate.discriminator) == (8 * trained, 0, 0)
    spare = estimate_memory(make_config(optimizer="adamw8bit", ema_decay=0.0), vae)
    assert (spare.optimizer, spare.averaged_weights) == (2 * trained, 0)
    assert estimate.total - spare.total == 10 * trained
    assert estimate.to_json()["total"] == estimate.total == sum(list(estimate.to_json().values())[:-1])


def test_each_saving_saves() -> None:
    vae, plain = make_vae(), make_config()
    activations = estimate_memory(plain, vae).activations

    def ratio(config: TrainConfig, trained: str = "all") -> float:
        return estimate_memory(config, make_vae(trained)).activations / activations

    assert ratio(make_config(batch_size=8)) == pytest.approx(2.0, rel=0.02)
    assert ratio(make_config(gradient_checkpointing=True)) < 0.6
    assert ratio(plain, "last_blocks") < ratio(plain, "decoder") < 0.8
    on_cpu, on_cuda = (ratio(make_config(precision="bf16", cpu=cpu)) for cpu in (True, False))
    assert 0.45 < on_cpu < 0.6 < on_cuda < 0.95  # norms in float32 on CUDA
    assert ratio(make_config(precision="fp16", cpu=False)) == pytest.approx(on_cuda)
    assert ratio(make_config(precision="bf16", cpu=False, gradient_checkpointing=True)) < 0.6


def test_a_discriminator_that_never_sets_in_is_held_and_does_no_work() -> None:
    net = NLayerDiscriminator(channels=8, num_layers=2, norm="group")
    held = 16 * sum(parameter.numel() for parameter in net.parameters())
    late = LossConfig(adversarial=replace(ADVERSARIAL, disc_start=10))
    assert estimate_memory(make_config(late), make_vae()).discriminator == held
    begins = LossConfig(adversarial=replace(ADVERSARIAL, disc_start=9))
    assert estimate_memory(make_config(begins), make_vae("last_blocks")).discriminator > held


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_nothing_is_changed_drawn_or_allocated(gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # else an operator that is not known without values is run on zeros
    monkeypatch.setattr(FakeTensorMode, "can_run_unsafe_fallback", lambda self, operator: False)
    vae = make_vae("decoder").eval()
    weights, state = copy.deepcopy(vae.state_dict()), torch.get_rng_state()
    flags = [(parameter.requires_grad, parameter.grad) for parameter in vae.parameters()]
    loss = LossConfig(perceptual=PerceptualConfig(weight=1.0), adversarial=ADVERSARIAL)
    config = make_config(loss, batch_size=8, crop_px=32768, gradient_checkpointing=gradient_checkpointing)
    assert estimate_memory(config, vae).total > 5 * 2**40  # far beyond any machine
    assert not vae.is_gradient_checkpointing and not any(module.training for module in vae.modules())
    assert [(parameter.requires_grad, parameter.grad) for parameter in vae.parameters()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(type(parameter) is torch.nn.Parameter for parameter in vae.parameters())
