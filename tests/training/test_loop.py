"""Whole runs of the trainer, small but real."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdvae.checkpoints.store import load_autoencoder
from sdvae.config import read_config
from sdvae.errors import ConfigError, ImageError, OutputExistsError, TrainingError
from sdvae.training import loop
from sdvae.training.config import LossConfig, TrainConfig
from sdvae.training.loop import train

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def checkpoint_weights(run_dir: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "init": "linear"}, {"precision": "bf16"}])
def test_three_steps_and_three_resumed_equal_six_bit_for_bit(make_config, changes: dict[str, object]) -> None:
    whole, halves = make_config("whole", **changes), make_config("halves", **changes)
    train(whole)
    # the same run, stopped after step 3: the schedule is that of all six steps
    train(halves)
    shutil.rmtree(Path(halves.run_dir) / "vae")
    shutil.rmtree(Path(halves.run_dir) / "checkpoints" / "step-00000006")
    torch.rand(5)  # whatever happens in the process between must not matter
    result = train(halves, resume=True)

    assert result.steps == 6
    assert_equal(checkpoint_weights(whole.run_dir, 6), checkpoint_weights(halves.run_dir, 6))
    assert_equal(weights_of(Path(whole.run_dir) / "vae"), weights_of(result.vae_dir))
    assert (Path(whole.run_dir) / "vae/config.json").read_text() == (result.vae_dir / "config.json").read_text()
    logged = [json.loads(line) for line in (Path(halves.run_dir) / "metrics.jsonl").read_text().splitlines()]
    # what the first attempt logged after step 3 is not there twice
    assert [row["step"] for row in logged] == [2, 4, 6, 6] and math.isfinite(logged[-1]["val/psnr"])


def test_a_run_that_starts_anew_at_step_3_differs(make_config) -> None:
    """Control of the test above: it would see a position or random state that is not restored."""
    config = make_config()
    train(config)
    six = checkpoint_weights(config.run_dir, 6)
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "step-00000006")
    original = loop.load_checkpoint

    def forget_position(accelerator, checkpoint):  # type: ignore[no-untyped-def]
        original(accelerator, checkpoint)
        accelerator._custom_objects[1].num_samples = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_checkpoint", forget_position)
        train(config, resume=True)
    seven = checkpoint_weights(config.run_dir, 6)
    assert any(not torch.equal(six[name], seven[name]) for name in six)


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
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert list((run_dir / "tensorboard").iterdir())
    with Image.open(run_dir / "samples" / "step-00000006.png") as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 2 * 48  # two held-out images of 64 x 48, three pictures each


def test_old_checkpoints_are_dropped(make_config) -> None:
    config = make_config(checkpoint_every=1, num_checkpoints=2)
    train(config)
    names = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(make_config, monkeypatch) -> None:
    config = make_config(checkpoint_every=1, num_checkpoints=9)
    original, calls = loop.generator_loss, []

    def poisoned(*args):  # type: ignore[no-untyped-def]
        total, terms = original(*args)
        calls.append(1)
        return (total * float("nan"), terms) if len(calls) == 4 else (total, terms)

    seen: list[loop._Run] = []
    monkeypatch.setattr(loop, "generator_loss", poisoned)
    monkeypatch.setattr(loop._Run, "_write_description", lambda self: seen.append(self))
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*step-00000003"):
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


def test_a_damaged_training_image_stops_with_its_name(make_config, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"damaged/\d\.png"):
        train(make_config(data={"path": str(folder)}))


def test_gradient_checkpointing_and_worker_processes_change_no_weight(make_config) -> None:
    plain, other = make_config("plain"), make_config("other", gradient_checkpointing=True, data={"num_workers": 2})
    assert_equal(weights_of(train(plain).vae_dir), weights_of(train(other).vae_dir))


def test_accumulating_two_passes_gives_the_gradient_of_the_joined_batch(make_config) -> None:
    joined = replace(make_config("joined", steps=1, batch_size=4), loss=LossConfig(rec="l2", sample_posterior=False))
    split = replace(make_config("split", steps=1, accumulation=2), loss=LossConfig(rec="l2", sample_posterior=False))
    norms = []
    for config in (joined, split):
        train(config)
        rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        norms.append([row["train/grad_norm"] for row in rows if "train/grad_norm" in row][0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
