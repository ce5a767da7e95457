"""Calibrations: values against numpy over all latents, what they mean, and what becomes of config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdvae.calibration.measure import CalibrateOptions, calibrate
from sdvae.calibration.result import Calibration
from sdvae.calibration.write import check_writable, write_calibration
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.notes import NOTES_FIELD, update_config
from sdvae.checkpoints.opened import open_any_vae
from sdvae.checkpoints.store import bundled_path, load_autoencoder
from sdvae.data.images import image_to_x, read_image
from sdvae.data.sources.files import file_digest
from sdvae.data.sources.find import find_images
from sdvae.data.transforms import pad_to_multiple
from sdvae.errors import CheckpointError, ConfigError, ImageError
from sdvae.metrics.latent_health import LatentHealth
from sdvae.metrics.moments import Estimate
from sdvae.model.autoencoder import AutoencoderKL

Array = NDArray[np.float64]
MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
MakeVae = Callable[..., Path]

SIZES = {f"{index:02}.png": size for index, size in enumerate([(40, 24), (64, 64), (17, 33), (64, 64), (8, 96)])}


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", SIZES)


def folder_digest(folder: Path) -> str:
    """Of keys and bytes, in the order of the keys."""
    lines = (f"{image.key}\0{file_digest(image.path)}\n" for image in find_images(folder))
    return f"sha256:{sha256(''.join(lines).encode()).hexdigest()}"


def spread_out(vae: AutoencoderKL) -> None:
    """Channels of clearly different mean and std, and posteriors that hold a good part of the variance."""
    c = vae.config.latent_channels
    vae.quant_conv.weight[:c] *= torch.arange(1, c + 1).view(-1, 1, 1, 1) * 2
    vae.quant_conv.bias[:c] = torch.arange(c) * 1.5 - 1
    vae.quant_conv.bias[c:] = torch.linspace(-2, 0.5, c)


def all_latents(vae_path: Path, images: Path) -> tuple[list[Array], list[Array]]:
    """Mean and variance of the posteriors, (C, positions) for each image, one at a time."""
    vae = load_autoencoder(vae_path)
    means, variances = [], []
    for file in find_images(images):
        x, _ = pad_to_multiple(image_to_x(read_image(file.path).pixels), 8)
        with torch.no_grad():
            posterior = vae.encode(x[None]).latent_dist
        means.append(posterior.mean[0].double().flatten(1).numpy())
        variances.append(posterior.var[0].double().flatten(1).numpy())
    return means, variances


# --------------------------------------------------------------------------------------------------------------- values


def test_every_number_is_what_numpy_says_of_all_latents(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out, scaling_factor=0.7, shift_factor=0.3)
    found = calibrate(path, images)
    means, variances = all_latents(path, images)
    z, var = np.concatenate(means, axis=1), np.concatenate(variances, axis=1)  # (C, N)
    total = z.var() + var.mean()
    assert found.num_images == 5 and found.num_positions == z.shape[1]
    assert found.scaling_factor.value == pytest.approx(total**-0.5, rel=1e-5)
    assert found.shift_factor.value == pytest.approx(z.mean(), rel=1e-5)
    assert found.scaling_factor_of_modes is not None
    assert found.scaling_factor_of_modes.value == pytest.approx(1 / z.std(), rel=1e-5)
    assert found.scaling_factor_of_modes.value > 1.05 * found.scaling_factor.value  # or this test would see no bug
    stds = np.sqrt(z.var(axis=1) + var.mean(axis=1))
    assert [each.mean.value for each in found.channels] == pytest.approx(z.mean(axis=1), rel=1e-5)
    assert [each.std.value for each in found.channels] == pytest.approx(stds, rel=1e-5)
    assert [each.relative_std.value for each in found.channels] == pytest.approx(stds / total**0.5, rel=1e-5)
    assert found.present.std.value == pytest.approx(0.7 * total**0.5, rel=1e-5)
    assert found.present.mean.value == pytest.approx(0.7 * (z.mean() - 0.3), rel=1e-5)


def test_draws_have_the_std_that_is_computed_without_drawing(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out)
    means, variances = all_latents(path, images)
    z, std = np.concatenate(means, axis=1), np.sqrt(np.concatenate(variances, axis=1))
    draws = z + std * np.random.default_rng(0).normal(size=(400, *z.shape))
    assert calibrate(path, images).scaling_factor.value == pytest.approx(1 / draws.std(), rel=3e-3)


def test_the_definitions_are_those_of_an_evaluation(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out)
    subject = open_any_vae(path, torch.device("cpu"), torch.float32)
    health = LatentHealth(4)
    for file in find_images(images):
        x = image_to_x(read_image(file.path).pixels)
        health.update(subject.encode(x[None]), x.shape[1] * x.shape[2])
    suggested, found = health.health()["suggested"], calibrate(path, images)
    assert found.scaling_factor.value == pytest.approx(suggested["scaling_factor"], rel=1e-5)
    assert found.shift_factor.value == pytest.approx(suggested["shift_factor"], rel=1e-5)


def test_batches_workers_and_the_order_of_images_change_only_rounding(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out)
    one = calibrate(path, images, options=CalibrateOptions(batch_size=1, workers=1))
    many = calibrate(path, images, options=CalibrateOptions(batch_size=4, workers=3))
    turned = calibrate(path, list(reversed(find_images(images))))
    for other in (many, turned):
        assert _numbers(other) == pytest.approx(_numbers(one), rel=1e-4)
    assert write_calibration(path, one, per_channel=True).changed
    for other in (one, many):
        assert not write_calibration(path, other, per_channel=True).changed
    assert one.images_digest == many.images_digest == folder_digest(images)


def _numbers(found: Calibration) -> list[float]:
    estimates = [found.scaling_factor, found.shift_factor, found.present.std, found.present.mean]
    estimates += [each for channel in found.channels for each in (channel.mean, channel.std, channel.relative_std)]
    return [number for each in estimates for number in (each.value, each.standard_error or 0.0)]


def test_latents_mean_and_std_that_are_configured_count_as_pipelines_apply_them(
    make_vae: MakeVae, images: Path
) -> None:
    mean, std, scale = [0.5, -1.0, 2.0, 0.1], [1.0, 2.0, 0.5, 4.0], 0.6
    path = make_vae(damage=spread_out, scaling_factor=scale, latents_mean=mean, latents_std=std)
    means, variances = all_latents(path, images)
    k = scale / np.array(std)[:, None]
    seen = (np.concatenate(means, axis=1) - np.array(mean)[:, None]) * k
    present = calibrate(path, images).present
    total = seen.var() + (k**2 * np.concatenate(variances, axis=1)).mean()
    assert present.std.value == pytest.approx(math.sqrt(total), rel=1e-5)
    assert present.mean.value == pytest.approx(seen.mean(), rel=1e-5)


def test_other_classes_and_encoders_without_a_posterior_are_measured(
    make_images: MakeImages, tmp_path: Path, taesd_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64), "b.png": (48, 32)})
    found = calibrate(taesd_path, images)
    assert found.class_name == "AutoencoderTiny" and found.scaling_factor_of_modes is None
    assert found.present.scaling_factor == 1.0 and found.scaling_factor.value > 0
    with pytest.raises(ConfigError, match="AutoencoderTiny"):
        write_calibration(taesd_path, found)


def test_real_photographs(assets: Path) -> None:
    found = calibrate(None, assets / "images/val", options=CalibrateOptions(size=64, crop="center", max_images=6))
    assert found.num_images == 6 and found.num_found > 6 and found.num_positions == 6 * 64
    assert 0.5 < found.present.std.value < 2.0
    assert 0 < (found.scaling_factor.relative_error or 0) < 0.2
    assert found.num_images_needed is not None and found.num_images_needed > 6


# ------------------------------------------------------------------------------------------------------------ judgement


@pytest.mark.parametrize(
    ("std", "error", "verdict", "words"),
    [
        (1.002, 0.01, "equal", "no difference"),
        (1.03, 0.01, "small", "too small to matter"),
        (0.97, 0.01, "small", "too small to matter"),
        (1.2, 0.01, "matters", "from scratch"),
        (0.8, 0.01, "matters", "from scratch"),
        (1.2, 0.15, "unclear", "take more images"),
        (1.2, None, "unclear", "take more images"),
    ],
)
def test_the_judgement_follows_size_and_certainty(
    make_vae: MakeVae, images: Path, std: float, error: float | None, verdict: str, words: str
) -> None:
    found = calibrate(make_vae(), images)
    found = replace(found, present=replace(found.present, std=Estimate(value=std, standard_error=error)))
    assert found.verdict == verdict and words in " ".join(found.judgement)
    keeps = "where a diffusion model has been trained with the present values, keep them" in " ".join(found.judgement)
    assert keeps == (verdict in ("matters", "unclear"))


@pytest.mark.parametrize(("std", "error"), [(1.0, 0.01), (1.00004, 0.01), (0.99996, 1e-6), (1.0, None)])
def test_a_std_that_is_1_to_the_digits_shown_is_not_told_apart_from_1(
    make_vae: MakeVae, images: Path, std: float, error: float | None
) -> None:
    found = calibrate(make_vae(), images)
    found = replace(found, present=replace(found.present, std=Estimate(value=std, standard_error=error)))
    said = " ".join(found.judgement)
    assert "have a standard deviation of 1, as it should be: keep the present value" in said
    assert "instead of 1" not in said and "difference" not in said


def test_how_many_images_would_do_is_said_where_these_are_too_few(make_vae: MakeVae, images: Path) -> None:
    found = calibrate(make_vae(), images)
    found = replace(found, num_images=100, scaling_factor=Estimate(value=0.2, standard_error=0.006))  # 3 %
    assert found.num_images_needed == 900 and "about 900 like them" in " ".join(found.judgement)
    found = replace(found, scaling_factor=Estimate(value=0.2, standard_error=0.001))
    assert found.num_images_needed == 25 and "like them" not in " ".join(found.judgement)


# ------------------------------------------------------------------------------------------------------------- failures


def test_bad_images_are_recorded_and_left_out(make_vae: MakeVae, images: Path) -> None:
    path = make_vae()
    plain = calibrate(path, images)
    (images / "03a.png").write_bytes(b"no image")
    calls: list[tuple[int, int]] = []
    found = calibrate(path, images, on_progress=lambda finished, total: calls.append((finished, total)))
    assert (found.exit_code, plain.exit_code) == (3, 0)
    assert [failure.key for failure in found.failures] == ["03a.png"]
    assert "not an image" in found.failures[0].reason and str(images) not in found.failures[0].reason
    assert _numbers(found) == _numbers(plain) and found.images_digest == plain.images_digest
    assert calls[-1] == (6, 6)
    json.dumps(found.to_json(), allow_nan=False)


def test_no_usable_image_is_an_error_with_the_reason(make_vae: MakeVae, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"none of 1 images could be used: bad\.png: not an image"):
        calibrate(make_vae(), tmp_path / "bad.png")


class Fragile(AutoencoderKL):
    """Fails for batches, and gives infinity for one size."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        if len(x) > 1:
            raise RuntimeError("out of memory")
        if x.shape[2:] == (64, 64):
            x = x * math.inf
        return super().encode(x, return_dict)


def test_a_batch_that_fails_is_tried_image_by_image_and_latents_that_are_not_finite_are_left_out(
    make_vae: MakeVae, images: Path
) -> None:
    vae = load_autoencoder(make_vae())
    vae.__class__ = Fragile
    found = calibrate(vae, images, options=CalibrateOptions(batch_size=2))
    assert [failure.key for failure in found.failures] == ["01.png", "03.png"]
    assert all("not finite" in failure.reason for failure in found.failures)
    assert found.num_images == 3 and "image by image" in found.warnings[0]


def test_latents_that_never_vary_are_an_error(make_vae: MakeVae, images: Path) -> None:
    def constant(vae: AutoencoderKL) -> None:
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias[4:] = -30.0

    with pytest.raises(CheckpointError, match="the same everywhere"):
        calibrate(make_vae(damage=constant), images)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"crop": "center"},
        {"crop": "left", "size": 8},
        {"dtype": "int8"},
        {"device": "tpu"},
        {"max_images": 0},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], make_vae: MakeVae, images: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        calibrate(make_vae(), images, options=CalibrateOptions(**wrong))


# -------------------------------------------------------------------------------------------------------------- writing


def config_of(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "config.json").read_text())
    assert isinstance(data, dict)
    return data


def test_what_is_written_gives_latents_of_variance_1_in_pipelines_that_read_it(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out, shift_factor=0.3)
    digest = autoencoder_digest(load_autoencoder(path))
    written = write_calibration(path, calibrate(path, images), per_channel=True)
    assert written.changed and written.before["latents_std"] is None
    assert (written.before["shift_factor"], written.after["shift_factor"]) == (0.3, None)
    config = diffusers.AutoencoderKL.from_pretrained(path).config
    means, variances = all_latents(path, images)
    z, var = np.concatenate(means, axis=1), np.concatenate(variances, axis=1)

    def std_of_latents(shift: Any, scale: Any) -> Array:
        seen = (z - shift) * scale
        return np.sqrt(seen.var(axis=1) + (scale**2 * var).mean(axis=1))

    mean, std = (np.array(config[name])[:, None] for name in ("latents_mean", "latents_std"))
    sdxl = (z - mean) * config.scaling_factor / std
    assert sdxl.mean(axis=1) == pytest.approx(np.zeros(4), abs=1e-4)
    assert std_of_latents(mean, config.scaling_factor / std) == pytest.approx(np.ones(4), rel=1e-4)
    stable_diffusion = z * config.scaling_factor
    assert stable_diffusion.var() + config.scaling_factor**2 * var.mean() == pytest.approx(1.0, rel=1e-4)
    assert autoencoder_digest(load_autoencoder(path)) != digest
    after = calibrate(path, images)
    assert after.verdict == "equal" and after.present.std.value == pytest.approx(1.0, rel=1e-4)


def test_by_default_the_scaling_factor_alone_is_set(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(scaling_factor=0.18215, shift_factor=0.1)
    before = config_of(path)
    found = calibrate(path, images, options=CalibrateOptions(size=32))
    written = write_calibration(path, found)
    after = config_of(path)
    notes = after.pop(NOTES_FIELD)
    assert after == before | {"scaling_factor": float(f"{found.scaling_factor.value:.6g}")}
    assert (written.before, written.after) == ({"scaling_factor": 0.18215}, found.fields())
    assert notes["previous"] == [
        {"scaling_factor": 0.18215, "shift_factor": 0.1, "latents_mean": None, "latents_std": None}
    ]
    note = notes["calibration"]
    assert note.keys() == {"num_images", "images_digest", "protocol", "standard_errors", "sdvae"}
    assert (note["num_images"], note["images_digest"]) == (5, folder_digest(images))
    assert note["protocol"]["size"] == 32
    assert note["standard_errors"] == {"scaling_factor": float(f"{found.scaling_factor.standard_error:.3g}")}


def test_written_again_nothing_changes_and_what_was_there_is_never_lost(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out)
    first = calibrate(path, images)
    assert write_calibration(path, first).changed
    stored = (path / "config.json").read_bytes()
    again = write_calibration(path, calibrate(path, images, options=CalibrateOptions(batch_size=3, workers=2)))
    assert not again.changed and (path / "config.json").read_bytes() == stored
    assert write_calibration(path, calibrate(path, images, options=CalibrateOptions(size=24))).changed
    assert write_calibration(path, first).changed
    previous = config_of(path)[NOTES_FIELD]["previous"]
    assert [each["scaling_factor"] for each in previous[:2]] == [0.18215, first.fields()["scaling_factor"]]
    assert [each.get("calibration", {}).get("protocol", {}).get("size") for each in previous] == [None, None, 24]
    assert (path / "config.json").read_bytes() != stored and config_of(path)["scaling_factor"] == first.fields()[
        "scaling_factor"
    ]


def test_a_calibration_that_finds_what_is_there_leaves_its_record_and_no_previous(
    make_vae: MakeVae, images: Path
) -> None:
    found = calibrate(make_vae(), images)
    path = make_vae("same", scaling_factor=found.fields()["scaling_factor"])
    assert write_calibration(path, found).changed
    assert config_of(path)[NOTES_FIELD].keys() == {"calibration"}


def test_a_scale_beside_latents_std_is_not_written_alone(make_vae: MakeVae, images: Path) -> None:
    path = make_vae(damage=spread_out, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    found = calibrate(path, images)
    with pytest.raises(ConfigError, match="per-channel"):
        write_calibration(path, found)
    assert write_calibration(path, found, per_channel=True).changed


def test_a_calibration_of_another_vae_is_refused(make_vae: MakeVae, images: Path) -> None:
    def nudge(vae: AutoencoderKL) -> None:
        vae.decoder.conv_out.bias[0] += 1e-4

    found = calibrate(make_vae(), images)
    others = [make_vae("nudged", damage=nudge), make_vae("eight", latent_channels=8)]
    for other in others:
        before = (other / "config.json").read_bytes()
        with pytest.raises(ConfigError, match="other weights, or another configuration"):
            write_calibration(other, found)
        assert (other / "config.json").read_bytes() == before
    assert write_calibration(make_vae("moved"), found).changed  # the same VAE by another name


@pytest.mark.parametrize(
    "scale",
    [
        {"scaling_factor": 0.7, "shift_factor": 0.3},
        {"scaling_factor": 1, "latents_mean": [0, 1, 2, 3], "latents_std": [1.0, 2.0, 0.5, 4.0]},
    ],
)
def test_a_calibration_is_of_its_vae_under_any_scale(make_vae: MakeVae, images: Path, scale: dict[str, Any]) -> None:
    path = make_vae(damage=spread_out, **scale)
    found = calibrate(path, images)
    assert write_calibration(path, found, per_channel=True).changed
    assert not write_calibration(path, found, per_channel=True).changed
    update_config(path, {"scaling_factor": 0.5}, {})
    assert write_calibration(path, found, per_channel=True).changed


def test_a_vae_whose_scale_is_null_takes_a_calibration(make_vae: MakeVae, images: Path) -> None:
    path = make_vae()
    update_config(path, {"scaling_factor": None}, {})
    found = calibrate(path, images)
    assert found.present.scaling_factor == 1.0 and write_calibration(path, found).before == {"scaling_factor": None}


def test_what_must_not_be_written_is_refused(make_vae: MakeVae, images: Path) -> None:
    path = make_vae()
    before = (path / "config.json").read_bytes()
    for bundled in (None, "sdvae-mini", bundled_path()):
        with pytest.raises(ConfigError, match="sdvae convert sdvae-mini DIR"):
            check_writable(bundled)
    with pytest.raises(ConfigError, match="one image"):
        write_calibration(path, calibrate(path, images / "00.png"))

    def dead(vae: AutoencoderKL) -> None:
        vae.quant_conv.weight[1] = 0
        vae.quant_conv.weight[5], vae.quant_conv.bias[5] = 0, -100.0

    dead_path = make_vae("dead", damage=dead)
    with pytest.raises(ConfigError, match="channel 1 is the same"):
        write_calibration(dead_path, calibrate(dead_path, images), per_channel=True)
    assert (path / "config.json").read_bytes() == before
