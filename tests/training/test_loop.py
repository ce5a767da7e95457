"""Whole runs of the trainer, small but real."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdvae.checkpoints.store import load_autoencoder
from sdvae.config import read_config
from sdvae.errors import ConfigError, MissingWeightsError, OutputExistsError, TrainingError
from sdvae.training import loop
from sdvae.training.config import EquivarianceConfig, LatentNoiseConfig, LogvarConfig, PerceptualConfig, TrainConfig
from sdvae.training.loop import train
from sdvae.training.validation import Validator

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def checkpoint_weights(run_dir: str, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def rows_of(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated from a linear start": {"accumulation": 2, "init": "linear"},
    "bf16": {"precision": "bf16"},
    "discriminator from the start": {"loss": {"disc_start": 0, "norm": "group"}},
    # it sets in after the checkpoint that is resumed from; everything that has a state of its own
    "discriminator later": {"accumulation": 2, "loss": {"disc_start": 4, "lecam_weight": 0.1, "spectral_norm": True}},
    "discriminator with the checkpoint": {"loss": {"disc_start": 2, "lecam_weight": 0.1, "r1_weight": 1.0}},
    "decoder": {"trained": "decoder", "optimizer": "adamw", "weight_decay": 0.1},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_steps_and_three_resumed_equal_six_bit_for_bit(make_config, adversarial, perceptual, recipe: str) -> None:
    changes = dict(RECIPES[recipe])
    if "loss" in changes:
        changes["loss"] = {
            "adversarial": adversarial(**changes["loss"]),
            "perceptual": perceptual,
            "equivariance": EquivarianceConfig(probability=0.5, min_scale=1.0),
            "latent_noise": LatentNoiseConfig(std=0.1),
            "logvar": LogvarConfig(learned=True),
        }
    whole, halves = make_config("whole", **changes), make_config("halves", **changes)
    train(whole)
    # the same run, stopped after step 3: the schedule is that of all six steps
    train(halves)
    shutil.rmtree(Path(halves.run_dir) / "vae")
    shutil.rmtree(Path(halves.run_dir) / "checkpoints" / "step-00000006")
    torch.rand(5)  # whatever happens in the process between must not matter
    result = train(halves, resume=True)

    assert result.steps == 6
    names = ["model"] + ["model_1"] * ("loss" in changes)
    for name in names:
        assert_equal(checkpoint_weights(whole.run_dir, 6, name), checkpoint_weights(halves.run_dir, 6, name))
    assert_equal(weights_of(Path(whole.run_dir) / "vae"), weights_of(result.vae_dir))
    assert (Path(whole.run_dir) / "vae/config.json").read_text() == (result.vae_dir / "config.json").read_text()
    logged = [json.loads(line) for line in (Path(halves.run_dir) / "metrics.jsonl").read_text().splitlines()]
    # what the first attempt logged after step 3 is not there twice
    assert [row["step"] for row in logged] == [2, 4, 6, 6] and math.isfinite(logged[-1]["val/psnr"])


@pytest.mark.parametrize("forgotten", ["data", "averages", "discriminator", "random state"])
def test_a_resumed_run_that_forgets_something_differs(make_config, adversarial, forgotten: str) -> None:
    """Control of the test above: it would see a state that is not restored."""
    config = make_config(loss={"adversarial": adversarial()})
    train(config)
    six, vae = checkpoint_weights(config.run_dir, 6), weights_of(Path(config.run_dir) / "vae")
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "step-00000006")
    original = loop.load_checkpoint

    def forget(accelerator, checkpoint):  # type: ignore[no-untyped-def]
        discriminator = {name: value.clone() for name, value in accelerator._models[1].state_dict().items()}
        averages = [value.clone() for value in accelerator._custom_objects[0].averages]
        original(accelerator, checkpoint)
        if forgotten == "data":
            accelerator._custom_objects[1].data[0]["num_samples"] = 0
        elif forgotten == "averages":
            accelerator._custom_objects[0].averages = averages
        elif forgotten == "discriminator":
            accelerator._models[1].load_state_dict(discriminator)
        else:
            torch.manual_seed(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_checkpoint", forget)
        train(config, resume=True)
    again, vae_again = checkpoint_weights(config.run_dir, 6), weights_of(Path(config.run_dir) / "vae")
    changed = vae_again if forgotten == "averages" else again
    before = vae if forgotten == "averages" else six
    assert any(not torch.equal(before[name], changed[name]) for name in before)


def test_a_finished_run_is_a_folder_that_diffusers_loads_with_its_measured_scale(make_config) -> None:
    config = make_config()
    result = train(config)
    stock, info = diffusers.AutoencoderKL.from_pretrained(result.vae_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (
        stock.config.scaling_factor == result.scaling_factor == load_autoencoder(result.vae_dir).config.scaling_factor
    )
    # the measured factor brings latents of the training images to about unit variance
    with torch.inference_mode():
        z = torch.cat(
            [stock.encode(_x(path)).latent_dist.sample() for path in sorted(Path(config.data.path).glob("*"))]
        )
    assert 0.8 < float(z.std()) * result.scaling_factor < 1.25


def _x(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def test_training_lowers_the_loss(make_config) -> None:
    config = make_config(steps=60, lr=3e-3, log_every=10, warmup_steps=5)
    train(config)
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/rec_loss"] for row in rows if "train/rec_loss" in row]
    assert losses[-1] < 0.75 * losses[0]


def test_the_run_folder_describes_itself_and_its_config_trains_again(make_config) -> None:
    config = make_config()
    train(config)
    run_dir = Path(config.run_dir)
    assert read_config(TrainConfig, run_dir / "config.yaml") == config
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["num_train_images"] == 5
    names = [path.name for path in sorted((run_dir / "checkpoints").iterdir())]
    assert names == ["best.json", "step-00000003", "step-00000006"]
    assert list((run_dir / "tensorboard").glob("**/events*"))
    with Image.open(run_dir / "samples" / "step-00000006.png") as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 2 * 48  # two held-out images of 64 x 48, four pictures each


def test_old_checkpoints_are_dropped_and_the_best_is_kept(make_config, monkeypatch) -> None:
    """The PSNR of each validation is made up, so that the second is the best; everything else is real."""
    psnrs = iter([10.0, 30.0, 20.0, 25.0, 29.0, 15.0])
    original = Validator.run
    monkeypatch.setattr(Validator, "run", lambda *args, **kw: replace(original(*args, **kw), psnr=next(psnrs)))
    config = make_config(checkpoint_every=1, num_checkpoints=2, val_every=1, ema_decay=0.0)
    result = train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    assert names == ["step-00000002", "step-00000005", "step-00000006"]
    assert json.loads((checkpoints / "best.json").read_text()) == {"step": 2, "metric": "psnr", "value": 30.0}
    assert result.best_step == 2
    best, last = weights_of(Path(config.run_dir) / "vae-best"), weights_of(result.vae_dir)
    own = checkpoint_weights(config.run_dir, 2)
    assert all(torch.equal(best[name], own[f"vae.{name}"]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(make_config, monkeypatch) -> None:
    config = make_config(checkpoint_every=1, num_checkpoints=9)
    original, calls = loop.generator_loss, []

    def poisoned(*args):  # type: ignore[no-untyped-def]
        total, terms = original(*args)
        calls.append(1)
        bad = total * float("nan")
        return (bad, terms | {"loss": bad.detach()}) if len(calls) == 4 else (total, terms)

    seen: list[loop._Run] = []
    monkeypatch.setattr(loop, "generator_loss", poisoned)
    monkeypatch.setattr(loop._Run, "_write_description", lambda self: seen.append(self))
    with pytest.raises(TrainingError, match=r"step 4: loss is nan.*step-00000003"):
        train(config)
    now = {name: value.detach() for name, value in seen[0].module.state_dict().items()}
    assert_equal(checkpoint_weights(config.run_dir, 3), now)


def test_a_run_folder_is_not_overwritten_unasked(make_config) -> None:
    config = make_config(steps=1)
    train(config)
    before = weights_of(Path(config.run_dir) / "vae")
    with pytest.raises(OutputExistsError, match="--resume"):
        train(config)
    train(replace(config, training=replace(config.training, seed=1)), overwrite=True)
    after = weights_of(Path(config.run_dir) / "vae")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_resuming_where_nothing_is_names_the_folder(make_config) -> None:
    with pytest.raises(ConfigError, match="nothing to resume.*checkpoints"):
        train(make_config("empty"), resume=True)


def test_damaged_training_images_are_left_out_and_counted_until_there_are_too_many(
    make_config, photos: Path, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    held_out = sorted(folder.iterdir())
    held_out[1].write_bytes(held_out[1].read_bytes()[:200])
    config = make_config(data={"path": str(folder), "val_path": str(photos)}, steps=8)
    train(config)
    assert "left out: " in caplog.text and "1.png" in caplog.text
    assert rows_of(config)[-2]["train/num_unreadable"] > 0
    for path in held_out[2:]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match=r"of \d+ samples read are damaged .*\d\.png.*max_unreadable_ratio"):
        train(make_config("again", data={"path": str(folder), "val_path": str(photos)}, steps=1000))


def test_gradient_checkpointing_and_worker_processes_change_no_weight(make_config) -> None:
    plain, other = make_config("plain"), make_config("other", gradient_checkpointing=True, data={"num_workers": 2})
    assert_equal(weights_of(train(plain).vae_dir), weights_of(train(other).vae_dir))


def test_accumulating_two_passes_gives_the_gradient_of_the_joined_batch(make_config) -> None:
    loss = {"sample_posterior": False}
    joined = make_config("joined", steps=1, batch_size=4, loss=loss)
    split = make_config("split", steps=1, accumulation=2, loss=loss)
    norms = []
    for config in (joined, split):
        train(config)
        norms.append([row["train/grad_norm"] for row in rows_of(config) if "train/grad_norm" in row][0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_state_that_needs_attention_is_warned_of_in_words(make_config, caplog) -> None:
    """A KL weight of nought and a start far from the prior: logvar beyond its clamp from the first step on."""
    config = make_config(steps=12, log_every=1, warmup_steps=0)
    run = loop._Run(config, resume=False, overwrite=False)
    with torch.no_grad():
        run.vae.quant_conv.bias[run.vae.config.latent_channels :] = -40.0
    with loop.stop_on_signals() as request:
        run.train(request)
    assert "step 10: " in caplog.text and "log-variances are outside their clamp" in caplog.text
    assert rows_of(config)[0]["train/clamped_logvar"] > 0.9


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tensorbord",), "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        (("clearml",), "clearml, which is not installed: pip install clearml"),
    ],
)
def test_a_wrong_tracker_is_named_before_anything_is_written(make_config, names: tuple[str, ...], message: str) -> None:
    config = make_config(trackers=names)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.run_dir).exists()


def test_missing_perceptual_weights_are_an_error_with_every_place_tried(make_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SDVAE_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_config(loss={"perceptual": PerceptualConfig(weight=1.0)})
    with pytest.raises(MissingWeightsError) as caught:
        train(config)
    for part in ("nowhere", "torch", "https://", "loss.perceptual.weights_path", "loss.perceptual.weight=0"):
        assert part in str(caught.value)
    assert not Path(config.run_dir).exists()


def test_crops_too_small_for_a_network_are_named_before_the_run(make_config, adversarial, perceptual) -> None:
    with pytest.raises(ConfigError, match=r"data\.crop_px"):
        train(make_config(loss={"adversarial": adversarial(num_layers=4)}))
    small = {"perceptual": perceptual, "equivariance": EquivarianceConfig(probability=1.0)}
    with pytest.raises(ConfigError, match=r"LPIPS, which needs 31; raise 'data.crop_px'"):
        train(make_config(loss=small))
