"""sdvae calibrate as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sdvae.calibration.measure import calibrate
from sdvae.cli.main import cli

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
MakeVae = Callable[..., Path]


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def json_of(result: Result) -> dict[str, Any]:
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", {"a.jpg": (40, 24), "sub/b.png": (21, 33), "c.png": (64, 40)})


def test_without_write_numbers_are_printed_and_nothing_changes(make_vae: MakeVae, images: Path) -> None:
    vae = make_vae()
    before = (vae / "config.json").read_bytes()
    result = sdvae("calibrate", vae, images)
    found = calibrate(vae, images)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"3 of 3 images in {images}, 70 latent positions, AutoencoderKL {vae}\n")
    row = next(line for line in result.stdout.splitlines() if line.startswith("scaling_factor "))
    assert row.split()[1:] == [
        f"{found.scaling_factor.value:.6g}",
        f"{found.scaling_factor.standard_error:.2g}",
        "0.18215",
    ]
    assert len([line for line in result.stdout.splitlines() if line[:1].isdigit()]) == 1 + 4  # title and channels
    assert "instead of 1" in result.stdout and "are fewer than 30" in result.stdout
    assert (vae / "config.json").read_bytes() == before


def test_json_is_one_object_with_the_documented_keys(make_vae: MakeVae, images: Path) -> None:
    (images / "bad.png").write_bytes(b"no image")
    result = sdvae("calibrate", make_vae(), images, "--json", "--size", 16, "--crop", "center")
    data = json_of(result)
    assert data.keys() == {
        "command", "vae", "vae_digest", "class_name", "source", "num_found", "num_images", "num_effective",
        "num_positions", "images_digest", "protocol", "device", "scaling_factor", "shift_factor",
        "scaling_factor_of_modes", "channels", "present", "difference", "difference_in_errors", "verdict",
        "num_images_needed", "judgement", "written", "warnings", "failures", "seconds", "exit_code",
    }  # fmt: skip
    assert data["scaling_factor"].keys() == {"value", "standard_error"}
    assert data["channels"][3].keys() == {"mean", "std", "relative_std", "varies"}
    assert data["present"].keys() == {
        "scaling_factor", "shift_factor", "latents_mean", "latents_std", "std", "mean",
    }  # fmt: skip
    assert (result.exit_code, data["exit_code"], data["written"], data["num_positions"]) == (3, 3, None, 3 * 4)
    assert [failure["key"] for failure in data["failures"]] == ["bad.png"]
    text = sdvae("calibrate", data["vae"], images)
    assert text.exit_code == 3 and f"  {images}/bad.png: not an image of a known format" in text.stdout


def test_write_sets_the_scale_once_and_says_what_that_means(make_vae: MakeVae, images: Path) -> None:
    vae = make_vae()
    first = sdvae("calibrate", vae, images, "--write", "--per-channel")
    assert first.exit_code == 0, first.output
    config = json.loads((vae / "config.json").read_text())
    assert f"scaling_factor: 0.18215 -> {config['scaling_factor']}\n" in first.stdout
    assert f"latents_std: None -> {config['latents_std']}\n" in first.stdout
    assert "digest changes" in first.stdout and "previous" in first.stdout
    stored = (vae / "config.json").read_bytes()
    again = sdvae("calibrate", vae, images, "--write", "--per-channel")
    assert f"Unchanged: {vae}/config.json" in again.stdout and "digest" not in again.stdout
    assert (vae / "config.json").read_bytes() == stored
    written = json_of(sdvae("calibrate", vae, images, "--write", "--per-channel", "--json"))["written"]
    assert written["changed"] is False and written["before"] == written["after"]
    assert written["after"]["latents_mean"] == config["latents_mean"]
    both = sdvae("calibrate", vae, images, "--write", "--shift", "--per-channel")
    assert both.exit_code == 2 and "two centres" in both.stderr
    assert (vae / "config.json").read_bytes() == stored


def test_a_dry_run_says_what_would_happen_and_does_nothing(make_vae: MakeVae, images: Path) -> None:
    vae = make_vae()
    before = (vae / "config.json").read_bytes()
    text = sdvae("calibrate", vae, images, "--write", "--dry-run", "--max-images", 2)
    data = json_of(sdvae("calibrate", vae, images, "--dry-run", "--json"))
    assert text.stdout == (
        f"Would encode 2 of 3 images in {images} with {vae}.\n"
        f"Would then set the scale in {vae}/config.json.\nNothing was written.\n"
    )
    assert (data["command"], data["dry_run"], data["num_images"], data["config_path"]) == ("calibrate", True, 3, None)
    assert (vae / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["sdvae-mini", "{images}", "--write"], 2, "part of the package"),
        (["{vae}", "{images}", "--shift"], 2, "--write"),
        (["{vae}", "{images}", "--crop", "center"], 2, "size"),
        (["{vae}", "{images}/nowhere"], 2, "no such file or folder"),
        (["{images}/no-vae", "{images}"], 2, "no-vae"),
        (["{images}/no-vae", "{images}", "--dry-run"], 2, "no-vae"),
        (["someone/vae", "{images}", "--write"], 2, "sdvae convert someone/vae DIR"),
    ],
)
def test_what_cannot_be_done_ends_with_its_exit_code_and_says_why(
    make_vae: MakeVae, images: Path, arguments: list[str], exit_code: int, words: str
) -> None:
    vae = make_vae()
    result = sdvae("calibrate", *(argument.format(vae=vae, images=images) for argument in arguments))
    assert (result.exit_code, result.stdout) == (exit_code, "") and words in result.stderr
