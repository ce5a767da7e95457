"""encode, decode, reconstruct and inspect as a user calls them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.cli.main import cli
from sdvae.data.images import read_image
from sdvae.model.autoencoder import AutoencoderKL

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

REPORT_KEYS = {
    "command", "out", "vae", "vae_digest", "device", "dtype", "total", "done", "skipped", "failed", "seconds",
    "megapixels", "images_per_s", "megapixels_per_s", "failures", "notes", "warnings", "exit_code",
}  # fmt: skip


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def json_of(result: Result) -> dict[str, Any]:
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", {"a.jpg": (40, 24), "sub/b.png": (21, 33)})


def test_encode_and_decode_report_what_they_did(images: Path, tmp_path: Path, vae_path: Path) -> None:
    encoded = sdvae("encode", images, tmp_path / "latents", "--vae", vae_path)
    assert encoded.exit_code == 0, encoded.output
    assert encoded.stdout.startswith(f"encode: 2 done, 0 up to date, 0 failed -> {tmp_path}/latents\n")
    assert "images/s" in encoded.stdout and encoded.stderr == ""
    decoded = sdvae("decode", tmp_path / "latents", tmp_path / "out", "--vae", vae_path, "--format", "webp")
    assert decoded.stdout.startswith("decode: 2 done, 0 up to date, 0 failed")
    assert (tmp_path / "out/sub/b.webp").is_file()
    again = sdvae("decode", tmp_path / "latents", tmp_path / "out", "--vae", vae_path, "--format", "webp")
    assert again.stdout == f"decode: 0 done, 2 up to date, 0 failed -> {tmp_path}/out\n"


def test_json_is_one_object_with_the_documented_keys(images: Path, tmp_path: Path, vae_path: Path) -> None:
    (images / "bad.png").write_bytes(b"no image")
    encoded = sdvae("encode", images, tmp_path / "latents", "--vae", vae_path, "--json")
    report = json_of(encoded)
    assert report.keys() == REPORT_KEYS | {"format", "manifest"}
    assert (report["format"], report["manifest"]) == ("safetensors", str(tmp_path / "latents/manifest.jsonl"))
    assert (encoded.exit_code, report["exit_code"], report["done"], report["failed"]) == (3, 3, 2, 1)
    assert report["failures"][0].keys() == {"key", "source", "reason"}
    assert report["failures"][0]["source"] == str(images / "bad.png")
    decoded = json_of(sdvae("decode", tmp_path / "latents", tmp_path / "out", "--vae", vae_path, "--json"))
    assert decoded.keys() == REPORT_KEYS and decoded["command"] == "decode" and decoded["done"] == 2


def test_failures_are_listed_with_their_reasons_and_the_exit_code_is_3(
    images: Path, tmp_path: Path, vae_path: Path
) -> None:
    for number in range(25):
        (images / f"bad{number:02}.png").write_bytes(b"no image")
    result = sdvae("encode", images, tmp_path / "latents", "--vae", vae_path)
    assert result.exit_code == 3
    assert f"  {images}/bad00.png: not an image of a known format" in result.stdout
    assert "bad19.png" in result.stdout and "bad20.png" not in result.stdout
    assert result.stdout.endswith("  and 5 more (--json lists all)\n")


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_a_dry_run_prints_the_plan_that_the_run_then_follows_and_writes_nothing(
    images: Path, tmp_path: Path, vae_path: Path, command: str
) -> None:
    source = images
    if command == "decode":
        source = tmp_path / "latents"
        sdvae("encode", images, source, "--vae", vae_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = (command, source, tmp_path / "out", "--vae", vae_path)
    text, data = sdvae(*arguments, "--dry-run"), json_of(sdvae(*arguments, "--dry-run", "--json"))
    assert (text.exit_code, sorted(tmp_path.rglob("*"))) == (0, before)
    assert (data["command"], data["dry_run"], data["counts"]) == (
        command,
        True,
        {"total": 2, "run": 2, "skip": 0, "fail": 0},
    )
    lines = text.stdout.splitlines()
    for item, line in zip(data["items"], lines, strict=False):
        assert line == f"run   {item['source']} -> {item['output']}  (new)"
    assert "Would" in lines[2] and "Nothing was written." in lines[2]
    sdvae(*arguments)
    assert all(Path(item["output"]).is_file() for item in data["items"])
    assert json_of(sdvae(*arguments, "--dry-run", "--json"))["counts"]["skip"] == 2


def test_a_dry_run_for_kohya_refuses_what_the_run_refuses(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"good.png": (64, 64), "odd.png": (101, 67)})
    arguments = ("encode", images, tmp_path / "out", "--vae", vae_path, "--format", "kohya-npz")
    planned, done = (json_of(sdvae(*arguments, *more, "--json")) for more in (["--dry-run"], []))
    assert planned["counts"] == {"total": 2, "run": 1, "skip": 0, "fail": 1}
    (refused,) = (item for item in planned["items"] if item["action"] == "fail")
    assert "101 x 67 px" in refused["reason"] and "--crop center" in refused["reason"]
    assert [(failure["key"], failure["reason"]) for failure in done["failures"]] == [("odd.png", refused["reason"])]
    assert [sdvae(*arguments, *more).exit_code for more in (["--dry-run"], [])] == [3, 3]


@pytest.mark.parametrize(
    ("given", "format"),
    [
        (["--shard-size", "1000"], "safetensors"),
        (["--shard-size", "10"], "kohya-npz"),
        (["--kohya-suffix", "sd"], "safetensors"),
        (["--kohya-suffix", "sdxl"], "parquet"),
        (["--flip"], "webdataset"),
    ],
)
def test_an_option_of_another_format_is_refused(
    images: Path, tmp_path: Path, vae_path: Path, given: list[str], format: str
) -> None:
    result = sdvae("encode", images, tmp_path / "latents", "--vae", vae_path, "--format", format, *given)
    name = given[0].removeprefix("--").replace("-", "_")
    assert result.exit_code == 2 and f"{name} is given, but the format {format} has no place for it" in result.stderr
    assert not (tmp_path / "latents").exists()


def test_without_a_vae_the_bundled_one_is_announced(images: Path, tmp_path: Path) -> None:
    result = sdvae("encode", images, tmp_path / "latents")
    assert result.stderr == "No --vae given: using the bundled sdvae-mini.\n"
    assert result.exit_code == 0


def test_a_missing_folder_and_a_wrong_vae_end_with_their_exit_codes(
    images: Path, tmp_path: Path, vae_path: Path
) -> None:
    missing = sdvae("encode", tmp_path / "nowhere", tmp_path / "latents", "--vae", vae_path)
    assert missing.exit_code == 2 and "no such file or folder" in missing.stderr
    wrong = sdvae("encode", images, tmp_path / "latents", "--vae", tmp_path / "no-vae")
    assert wrong.exit_code == 2 and "no-vae" in wrong.stderr
    assert not (tmp_path / "latents").exists()


def test_latents_of_another_vae_are_refused_with_both_ways_out(
    images: Path, tmp_path: Path, vae_path: Path, other_vae_path: Path
) -> None:
    sdvae("encode", images, tmp_path / "latents", "--vae", vae_path)
    arguments = ("decode", tmp_path / "latents", tmp_path / "out", "--vae", other_vae_path)
    refused = sdvae(*arguments)
    assert refused.exit_code == 1
    assert str(vae_path) in refused.stderr and "--vae" in refused.stderr and "--allow-other-vae" in refused.stderr
    assert sdvae(*arguments, "--allow-other-vae").exit_code == 0


# --------------------------------------------------------------------------------------------------------- reconstruct


def test_reconstruct_leaves_latents_images_a_sheet_and_a_table_of_psnr(
    images: Path, tmp_path: Path, vae_path: Path
) -> None:
    out = tmp_path / "demo"
    result = sdvae("reconstruct", images, out, "--vae", vae_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["image", "pixels", "PSNR", "(dB)"]
    assert [line.split()[0] for line in lines[1:4]] == ["a.jpg", "sub/b.png", "mean"]
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == [
        "contact_sheet.png",
        "latents/a.jpg.safetensors",
        "latents/manifest.jsonl",
        "latents/sub/b.png.safetensors",
        "reconstructions/a.png",
        "reconstructions/sub/b.png",
    ]
    report = json_of(sdvae("reconstruct", images, out, "--vae", vae_path, "--json"))
    for image in report["images"]:
        original, recon = (read_image(image[name]).pixels.astype(float) for name in ("source", "reconstruction"))
        assert original.shape == recon.shape == (image["height"], image["width"], 3)
        assert image["psnr_db"] == pytest.approx(10 * math.log10(255**2 / np.mean((original - recon) ** 2)))
        assert f"{image['psnr_db']:.2f}" in result.stdout
    assert report["mean_psnr_db"] == pytest.approx(np.mean([image["psnr_db"] for image in report["images"]]))
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 40 and sheet.height > 24 + 33


def test_reconstruct_measures_against_the_resized_image(images: Path, tmp_path: Path, vae_path: Path) -> None:
    arguments = ("--vae", vae_path, "--size", 16, "--crop", "center", "--json")
    report = json_of(sdvae("reconstruct", images, tmp_path / "demo", *arguments))
    assert {(image["width"], image["height"]) for image in report["images"]} == {(16, 16)}


def test_reconstruct_inside_the_image_folder_leaves_its_own_pictures_out(
    images: Path, vae_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    for _ in range(2):
        report = json_of(sdvae("reconstruct", ".", "--vae", vae_path, "--json"))
        assert [image["key"] for image in report["images"]] == ["a.jpg", "sub/b.png"]
    assert (images / "sdvae-demo/contact_sheet.png").is_file()


def test_reconstruct_records_bad_images_and_a_folder_of_them_gives_no_sheet(
    images: Path, tmp_path: Path, vae_path: Path
) -> None:
    (images / "bad.png").write_bytes(b"no image")
    result = sdvae("reconstruct", images, tmp_path / "demo", "--vae", vae_path)
    assert result.exit_code == 3 and "bad.png: not an image" in result.stdout and "mean" in result.stdout
    alone = json_of(sdvae("reconstruct", images / "bad.png", tmp_path / "none", "--vae", vae_path, "--json"))
    assert (alone["exit_code"], alone["images"], alone["mean_psnr_db"], alone["contact_sheet"]) == (3, [], None, None)


def test_reconstruct_does_not_replace_a_picture_that_is_not_its_own(
    images: Path, tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    out = make_images(tmp_path / "demo", {"contact_sheet.png": (3, 3)})
    refused = sdvae("reconstruct", images, out, "--vae", vae_path)
    assert refused.exit_code == 2 and "contact_sheet.png" in refused.stderr
    assert os.listdir(out) == ["contact_sheet.png"]
    assert sdvae("reconstruct", images, out, "--vae", vae_path, "--overwrite").exit_code == 0


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_a_vae_from_a_latent_file_and_a_run(
    images: Path, tmp_path: Path, vae_path: Path, vae: AutoencoderKL
) -> None:
    data = json_of(sdvae("inspect", vae_path, "--json"))
    assert (data["digest"], data["loads"], list(data["dtypes"])) == (autoencoder_digest(vae), True, ["F32"])
    assert data["num_parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert data["config"]["block_out_channels"] == [8, 16, 16, 16]
    assert f"digest: {data['digest']}" in sdvae("inspect", vae_path).stdout

    sdvae("encode", images, tmp_path / "latents", "--vae", vae_path)
    latent = json_of(sdvae("inspect", tmp_path / "latents/a.jpg.safetensors", "--json"))
    assert (latent["kind"], latent["tensors"]["mean"]["shape"]) == ("latent file", [4, 3, 5])
    assert latent["vae"]["digest"] == data["digest"]

    run = tmp_path / "run"
    (run / "checkpoints/step-00000010").mkdir(parents=True)
    (run / "config.yaml").write_text("run_dir: run\n")
    (run / "environment.json").write_text('{"sdvae": "0.1.0"}')
    (run / "metrics.jsonl").write_text('{"step": 5, "val/psnr": 20.5}\n{"step": 10, "train/rec_loss": 0.1}\n{"step": 1')
    described = json_of(sdvae("inspect", run, "--json"))
    assert (described["kind"], described["checkpoints"]) == ("training run", ["step-00000010"])
    assert described["last_metrics"] == {"step": 10, "val/psnr": 20.5, "train/rec_loss": 0.1}


def test_inspect_describes_what_cannot_be_loaded(tmp_path: Path, vae_path: Path, assets: Path) -> None:
    taesd = json_of(sdvae("inspect", assets / "weights/taesd_decoder.safetensors", "--json"))
    assert taesd["loads"] is False and "TAESD" in taesd["kind"] and taesd["reason"]
    missing = sdvae("inspect", tmp_path / "nothing")
    assert missing.exit_code == 2 and "does not exist" in missing.stderr
    empty = sdvae("inspect", tmp_path)
    assert empty.exit_code == 1 and "no VAE in this folder" in empty.stderr
