"""Whole runs of the trainer, small but real."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from contextlib import nullcontext
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
from sdvae.data.loader import StreamedData
from sdvae.errors import ConfigError, MissingWeightsError, OutputExistsError, TrainingError
from sdvae.training import loop
from sdvae.training.build import build_autoencoder
from sdvae.training.config import EquivarianceConfig, LatentNoiseConfig, LogvarConfig, PerceptualConfig, TrainConfig
from sdvae.training.data import open_data
from sdvae.training.loop import train
from sdvae.training.monitoring.validation import Validator

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def checkpoint_weights(run_dir: str, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def rows_of(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def curves_of(config: TrainConfig) -> list[dict[str, float]]:
    """What was logged, without how fast it went."""
    return [
        {name: row[name] for name in row if "second" not in name and "_per_s" not in name} for row in rows_of(config)
    ]


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


def as_stream(photos: Path, folder: Path, source: str) -> dict[str, Any]:
    """Settings for the photographs in two shards, tar files or parquet files, read in order through a small buffer."""
    folder.mkdir()
    for shard in range(2):
        part = sorted(photos.iterdir())[shard::2]
        if source == "webdataset":
            pytest.importorskip("webdataset")
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for path in part:
                    tar.add(path, arcname=path.name)
        else:
            datasets = pytest.importorskip("datasets")
            cells = {"image": [{"bytes": path.read_bytes(), "path": None} for path in part]}
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict(cells, features=features).to_parquet(folder / f"{shard}.parquet")
    settings = {"source": source, "path": str(folder), "streaming": source == "datasets", "shuffle_buffer": 3}
    return {**settings, "val_path": str(photos)}


@pytest.mark.parametrize(("source", "num_workers"), [("webdataset", 2), ("datasets", 0)])
def test_three_steps_of_a_stream_and_three_resumed_equal_six(
    make_config, photos: Path, tmp_path: Path, source: str, num_workers: int
) -> None:
    """12 samples of 7: across the end of an epoch, with samples waiting in the buffer when it stops."""
    config = make_config(data={**as_stream(photos, tmp_path / "stream", source), "num_workers": num_workers})
    train(config)
    six = checkpoint_weights(config.run_dir, 6)
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "step-00000006")
    train(config, resume=True)
    assert_equal(six, checkpoint_weights(config.run_dir, 6))
    # control: from the start of the stream, other weights come out
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "step-00000006")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedData, "load_state_dict", lambda self, state: None)
        train(config, resume=True)
    again = checkpoint_weights(config.run_dir, 6)
    assert any(not torch.equal(six[name], again[name]) for name in six)


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


@pytest.mark.parametrize(
    ("metric", "made_up"),
    [
        ("psnr", [10.0, 30.0, 20.0, 25.0, 29.0, 15.0, 22.0]),
        ("lpips", [0.5, 0.1, 0.4, 0.2, 0.3, 0.6, 0.2]),
    ],
)
def test_old_checkpoints_are_dropped_and_the_best_is_kept(
    make_config, perceptual, monkeypatch, metric: str, made_up: list[float]
) -> None:
    """The metric of each validation is made up, so that the second is the best; everything else is real."""
    values, original = iter(made_up), Validator.run
    monkeypatch.setattr(Validator, "run", lambda *a, **kw: replace(original(*a, **kw), **{metric: next(values)}))
    loss = {"perceptual": perceptual} if metric == "lpips" else {}
    config = make_config(
        checkpoint_every=1, num_checkpoints=2, val_every=1, ema_decay=0.0, best_metric=metric, loss=loss
    )
    result = train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    assert names == ["step-00000002", "step-00000005", "step-00000006"]
    expected = {"step": 2, "metric": metric, "value": made_up[1]}
    assert json.loads((checkpoints / "best.json").read_text()) == expected
    assert result.best_step == 2
    best, last = weights_of(Path(config.run_dir) / "vae-best"), weights_of(result.vae_dir)
    own = checkpoint_weights(config.run_dir, 2)
    assert all(torch.equal(best[name], own[f"vae.{name}"]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)

    shutil.rmtree(checkpoints / "step-00000006")
    assert train(config, resume=True).best_step == 2, "a resumed run knows what it has to beat"
    assert json.loads((checkpoints / "best.json").read_text()) == expected
    assert sorted(path.name for path in checkpoints.glob("step-*")) == names


def test_what_is_validated_and_written_is_the_average_over_updates_of_the_generator(make_config, adversarial) -> None:
    """One tick per update: not per pass, not for the discriminator's, and validation moves nothing."""
    config = make_config(
        lr=1e-2, accumulation=2, val_every=2, checkpoint_every=1, num_checkpoints=9, loss={"adversarial": adversarial()}
    )
    result = train(config)
    averages = [{name: value.double() for name, value in build_autoencoder(config.model, 0).state_dict().items()}]
    for step in range(6):
        decay, own = (1 + step) / (10 + step), checkpoint_weights(config.run_dir, step + 1)
        averages.append(
            {name: decay * value + (1 - decay) * own[f"vae.{name}"] for name, value in averages[-1].items()}
        )
    for folder, step in (("vae", 6), ("vae-best", result.best_step)):
        written = weights_of(Path(config.run_dir) / folder)
        assert written.keys() == averages[step].keys()
        for name, value in written.items():
            torch.testing.assert_close(value.double(), averages[step][name], rtol=1e-5, atol=1e-6)
    vae, images = load_autoencoder(result.vae_dir), open_data(config.data, 0)[1]
    assert result.val_psnr == pytest.approx(Validator(images, config.data.val_crop_px).run(vae, nullcontext).psnr)


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
    config = make_config(steps=2)
    train(config)
    before = weights_of(Path(config.run_dir) / "vae")
    with pytest.raises(OutputExistsError, match="--resume"):
        train(config)
    train(replace(config, training=replace(config.training, steps=1, seed=1)), overwrite=True)
    after = weights_of(Path(config.run_dir) / "vae")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    names = {path.name for path in (Path(config.run_dir) / "checkpoints").glob("step-*")}
    assert names == {"step-00000001"}, "a checkpoint of the run before would be resumed from"


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


def test_gradient_checkpointing_and_worker_processes_change_no_weight(make_config, adversarial) -> None:
    loss = {"adversarial": adversarial()}
    plain = make_config("plain", loss=loss)
    other = make_config("other", loss=loss, gradient_checkpointing=True, data={"num_workers": 2})
    assert_equal(weights_of(train(plain).vae_dir), weights_of(train(other).vae_dir))


def test_the_memory_layout_changes_curves_by_rounding_only(make_config, adversarial, perceptual) -> None:
    loss = {"adversarial": adversarial(), "perceptual": perceptual}
    curves = []
    for channels_last in (False, True):
        config = make_config(f"last-{channels_last}", channels_last=channels_last, log_every=1, loss=loss)
        train(config)
        curves.append(curves_of(config))
    assert len(curves[0]) == len(curves[1]) == 7
    for first, second in zip(*curves, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6)


def test_accumulating_two_passes_gives_the_gradients_of_the_joined_batch(make_config, adversarial) -> None:
    """Of both networks; without the balance and batch statistics, which are each pass's own."""
    gan = adversarial(disc_start=0, norm="group", adaptive=False)
    loss = {"sample_posterior": False, "adversarial": gan}
    joined = make_config("joined", steps=1, batch_size=4, loss=loss)
    split = make_config("split", steps=1, accumulation=2, loss=loss)
    for config in (joined, split):
        train(config)
    first, second = curves_of(joined)[0], curves_of(split)[0]
    assert {"train/grad_norm", "train/d_grad_norm", "train/loss", "train/d_loss"} <= set(first)
    assert first == pytest.approx(second, rel=1e-4)


def test_each_optimizer_follows_its_settings(make_config, adversarial, monkeypatch) -> None:
    """Learning rates by update: of the generator and, after three of them, of the discriminator, with its own warm-up.

    The adversarial loss sets in with the discriminator's updates.
    """
    rates: list[float] = []
    settings = set()
    original = loop.apply_updates

    def noted(updates, max_grad_norm, *args):  # type: ignore[no-untyped-def]
        for optimizer, _ in updates:
            (group,) = optimizer.param_groups
            rates.append(group["lr"])
            settings.add((type(optimizer), group["betas"], group["weight_decay"], max_grad_norm))
        return original(updates, max_grad_norm, *args)

    monkeypatch.setattr(loop, "apply_updates", noted)
    options = {"optimizer": "adamw", "betas": (0.5, 0.75), "weight_decay": 0.1, "max_grad_norm": 0.25}
    gan = adversarial(disc_start=3, lr=3.0e-3)
    config = make_config(lr=1e-3, schedule="linear", warmup_steps=2, log_every=1, loss={"adversarial": gan}, **options)
    train(config)
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 1.5e-3, 0.5e-3, 3e-3, 0.25e-3, 3e-3])
    assert settings == {(torch.optim.AdamW, (0.5, 0.75), 0.1, 0.25)}
    for name in ("g_loss", "adaptive_weight", "d_loss", "d_grad_norm"):
        assert [row["step"] for row in rows_of(config) if f"train/{name}" in row] == [4, 5, 6], name


def test_each_step_draws_its_own_transform_of_latent_and_image(make_config, monkeypatch) -> None:
    """Were only one of the two transformed, their sizes would differ."""
    drawn, original = [], loop.draw_transform

    def noted(*args):  # type: ignore[no-untyped-def]
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(loop, "draw_transform", noted)
    train(make_config(loss={"equivariance": EquivarianceConfig(probability=1.0, min_scale=0.3)}))
    assert len(drawn) == len(set(drawn)) == 6


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
    with pytest.raises(ConfigError, match="'data.crop_px' is 38; expected a multiple of 4"):
        train(make_config(data={"crop_px": 38}))
    with pytest.raises(ConfigError, match=r"data\.crop_px"):
        train(make_config(loss={"adversarial": adversarial(num_layers=4)}))
    small = {"perceptual": perceptual, "equivariance": EquivarianceConfig(probability=1.0)}
    with pytest.raises(ConfigError, match=r"LPIPS, which needs 31; raise 'data.crop_px'"):
        train(make_config(loss=small))
