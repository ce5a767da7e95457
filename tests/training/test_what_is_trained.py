"""Which weights move, from which start, in which precision; and that training does what it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdvae.checkpoints.store import load_autoencoder
from sdvae.errors import ConfigError
from sdvae.training import loop
from sdvae.training.config import KLConfig, LogvarConfig, LossConfig
from sdvae.training.loop import train

WEIGHTS = "diffusion_pytorch_model.safetensors"


def rows_of(run_dir: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("trained", "moving"),
    [
        ("decoder", ("post_quant_conv.", "decoder.")),
        ("encoder", ("quant_conv.", "encoder.")),
        ("last_blocks", ("decoder.up_blocks.3.", "decoder.conv_norm_out.", "decoder.conv_out.")),
    ],
)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_moves(
    make_config: Any, adversarial: Any, vae_path: Path, trained: str, moving: tuple[str, ...]
) -> None:
    config = replace(
        make_config(trained=trained, init=str(vae_path), lr=1e-2, loss={"adversarial": adversarial()}), model={}
    )
    result = train(config)
    before, after = load_file(vae_path / WEIGHTS), load_file(result.vae_dir / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(moving)}


@pytest.mark.parametrize("trained", ["all", "decoder", "encoder", "last_blocks"])
def test_every_trainable_parameter_is_in_exactly_one_optimizer(
    make_config: Any, adversarial: Any, trained: str
) -> None:
    loss = {"adversarial": adversarial(), "logvar": LogvarConfig(learned=True)}
    run = loop._Run(make_config(trained=trained, loss=loss), resume=False, overwrite=False)
    owned = [
        id(parameter)
        for optimizer in (run.optimizer, run.d_optimizer)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    trainable = [id(p) for module in (run.module, run.discriminator) for p in module.parameters() if p.requires_grad]
    assert sorted(owned) == sorted(trainable) and len(set(owned)) == len(owned)
    assert id(run.generator.logvar) in owned


def test_a_learned_logvar_moves_and_a_fixed_one_does_not(make_config: Any) -> None:
    def logvar_of(learned: bool) -> list[float]:
        loss = {"logvar": LogvarConfig(init=0.5, learned=learned)}
        config = make_config(f"learned-{learned}", lr=1e-2, log_every=1, loss=loss)
        train(config)
        return [row["train/output_logvar"] for row in rows_of(config.run_dir) if "train/output_logvar" in row]

    assert len(set(logvar_of(False))) == 1
    # the reconstruction is better than exp(0.5) says, so it falls
    learned = logvar_of(True)
    assert sorted(learned, reverse=True) == learned and learned[-1] < 0.5


def test_weights_optimizer_and_averages_stay_float32_under_bf16(make_config: Any, adversarial: Any) -> None:
    """And move by less than bf16 can express: a weight of 1 has neighbours at a distance of 0.004 there."""
    config = make_config(precision="bf16", lr=1e-5, steps=2, warmup_steps=0, loss={"adversarial": adversarial()})
    run = loop._Run(config, resume=False, overwrite=False)
    weight = run.vae.decoder.conv_norm_out.weight
    with loop.stop_on_signals() as request:
        run.train(request)
    tensors = [*run.module.parameters(), *run.discriminator.parameters(), *run.ema.averages]
    for optimizer in (run.optimizer, run.d_optimizer):
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert 0 < float((run.vae.decoder.conv_norm_out.weight.detach() - 1).abs().max()) < 1e-3
    assert weight.dtype == torch.float32


def test_training_starts_from_another_vae_and_contradictions_are_named(make_config: Any, vae_path: Path) -> None:
    config = replace(make_config(init=str(vae_path), lr=1e-12, num_calibration_images=0), model={})
    result = train(config)
    before, after = load_file(vae_path / WEIGHTS), load_file(result.vae_dir / WEIGHTS)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-9
    assert load_autoencoder(result.vae_dir).config.shift_factor == 0.1, "its configuration comes with it"
    with pytest.raises(ConfigError, match=r"'model.latent_channels' is 8, but the VAE .* has 4; leave"):
        train(replace(config, model={"latent_channels": 8}), overwrite=True)


def test_a_run_of_another_architecture_is_not_resumed(make_config: Any) -> None:
    config = make_config()
    train(config)
    other = replace(config, model={**config.model, "block_out_channels": [8, 8, 16]})
    with pytest.raises(ConfigError, match=r"'model.block_out_channels' is \[8, 8, 16\], but the checkpoint .* has"):
        train(other, resume=True)


def photograph(path: Path) -> None:
    """A crop of a photograph of the package, at half size: edges, texture, colour."""
    from sdvae.checkpoints.read import bundled_path

    source = sorted((bundled_path().parent / "photos").glob("*.jpg"))[int(path.stem)]
    with Image.open(source) as image:
        image.convert("RGB").resize((image.width // 2, image.height // 2)).crop((40, 40, 104, 104)).save(path)


@pytest.mark.slow
def test_a_few_hundred_steps_overfit_a_handful_of_photographs(
    make_config: Any, adversarial: Any, perceptual: Any, tmp_path: Path
) -> None:
    """PSNR rises above 20 dB, LPIPS falls by half, and with the discriminator at work nothing diverges."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(4):
        photograph(folder / f"{index}.png")
    config = replace(
        make_config(
            steps=120,
            lr=4e-3,
            batch_size=4,
            warmup_steps=20,
            log_every=20,
            val_every=40,
            ema_decay=0.9,
            data={"path": str(folder), "val_path": str(folder), "crop_px": 64, "val_crop_px": None},
            loss={"perceptual": perceptual, "adversarial": adversarial(disc_start=70)},
        ),
        model={"block_out_channels": [16, 32, 32], "norm_num_groups": 4, "layers_per_block": 1},
    )
    train(config)
    rows = rows_of(config.run_dir)
    psnrs = [row["val/psnr"] for row in rows if "val/psnr" in row]
    lpips = [row["val/lpips"] for row in rows if "val/lpips" in row]
    assert psnrs[-1] > 20 and psnrs[-1] > psnrs[0] - 0.5
    assert lpips[-1] < lpips[0]
    training = [row for row in rows if "train/loss" in row]
    assert training[-1]["train/perceptual_loss"] < 0.5 * training[0]["train/perceptual_loss"]
    adversarial_rows = [row for row in training if "train/d_loss" in row]
    assert len(adversarial_rows) == 3 and all(np.isfinite(list(row.values())).all() for row in training)
    assert all(row["train/rec_loss"] < training[0]["train/rec_loss"] for row in adversarial_rows)


def test_every_curve_is_logged(make_config: Any, adversarial: Any, perceptual: Any) -> None:
    config = make_config(loss={"adversarial": adversarial(r1_weight=0.1, lecam_weight=0.1), "perceptual": perceptual})
    train(config)
    *_, last, validation = rows_of(config.run_dir)
    names = (
        "loss rec_loss perceptual_loss kl_loss output_logvar g_loss d_loss adaptive_weight logits_real logits_fake "
        "r1_penalty lecam grad_norm d_grad_norm posterior_std clamped_logvar lr images_per_s seconds_per_step"
    )
    assert {f"train/{name}" for name in names.split()} <= set(last)
    assert {"val/psnr", "val/lpips", "val/kl"} <= set(validation)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch about itself
def test_compiled_training_gives_nearly_the_same_weights(make_config: Any, adversarial: Any, monkeypatch: Any) -> None:
    """Through everything of torch.compile but its code generator, which takes a minute."""
    compile_module = torch.nn.Module.compile
    compiled: list[torch.nn.Module] = []

    def compile_without_code(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code)
    loss = {"adversarial": adversarial(), "sample_posterior": False}
    configs = [make_config(f"compiled-{on}", steps=2, loss=loss, compile=on) for on in (False, True)]
    a, b = (load_file(train(config).vae_dir / WEIGHTS) for config in configs)
    first, second = (rows_of(config.run_dir)[0] for config in configs)
    for name in ("loss", "grad_norm", "d_grad_norm", "adaptive_weight"):
        assert first[f"train/{name}"] == pytest.approx(second[f"train/{name}"], rel=1e-3)
    assert len(compiled) == 1 and a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_kl_weight_and_latent_follow_each_other(make_config: Any) -> None:
    """A heavier KL gives a smaller KL: the weight acts, and warm-up delays it."""

    def kl_of(name: str, kl: KLConfig) -> float:
        config = make_config(name, steps=40, lr=3e-3, log_every=40, loss={"kl": kl})
        train(config)
        return rows_of(config.run_dir)[0]["train/kl_loss"]

    light, heavy = kl_of("light", KLConfig(weight=1e-6)), kl_of("heavy", KLConfig(weight=1.0))
    delayed = kl_of("delayed", KLConfig(weight=1.0, warmup_steps=10_000))
    assert heavy < 0.7 * light and delayed == pytest.approx(light, rel=0.1)


def test_defaults_of_the_loss_are_a_plain_autoencoder() -> None:
    config = LossConfig()
    assert config.perceptual.weight == config.adversarial.weight == config.equivariance.probability == 0
