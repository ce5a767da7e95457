"""`sdvae check` and `sdvae fix-fp16` as a user calls them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result

from sdvae.checkpoints import tensor_files
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.store import load_autoencoder
from sdvae.cli.main import cli
from sdvae.data.images import image_to_x, read_image
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.precision import fix as fixing

SMALL = ("--size", "32", "--limit", "2", "--probe-size", "32")
MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def json_of(result: Result) -> dict[str, Any]:
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def overflow(vae: AutoencoderKL) -> None:
    """Conv1 of a block and the decoder's whole stream far beyond float16, the function unchanged."""
    for name, tensor in vae.state_dict().items():
        stream = name.startswith("decoder.") and (
            ("conv_in." in name or ".conv2." in name or ".to_out.0." in name)
            or (name.endswith(".bias") and (".conv_shortcut." in name or "samplers.0.conv." in name))
        )
        if stream:
            tensor.mul_(2.0**18)
        if name.startswith("encoder.mid_block.resnets.0.conv1."):
            tensor.mul_(2.0**18)


@pytest.fixture
def overflowing(make_vae: Callable[..., Path]) -> Path:
    return make_vae("overflowing", overflow, force_upcast=False)


def test_check_says_that_a_vae_is_safe_and_lists_the_largest_layers(vae_path: Path) -> None:
    result = sdvae("check", vae_path, *SMALL)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{vae_path}: AutoencoderKL, ") and lines[0].endswith(" 2 images, on cpu")
    assert [line.split(":")[0] for line in lines[1:4]] == ["fp32", "bf16", "fp16"]
    assert lines[3].startswith("fp16: safe, ") and "force_upcast is true, though fp16 is safe" in lines[4]
    start = lines.index(next(line for line in lines if line.startswith("largest magnitudes")))
    peaks = [float(line.split()[2]) for line in lines[start + 1 : start + 11]]
    assert peaks == sorted(peaks, reverse=True) and len(lines[start + 1].split()) == 5
    assert any("diffusers from_pretrained" in line and line.startswith("  yes") for line in lines)
    assert any("ComfyUI" in line and line.startswith("  no ") for line in lines)


def test_check_foretells_the_overflow_and_writes_json_and_a_chart(overflowing: Path, tmp_path: Path) -> None:
    result = sdvae("check", overflowing, *SMALL, "--out", tmp_path / "audit", "--json")
    data = json_of(result)
    assert result.exit_code == 0 and data["command"] == "check" and data["exit_code"] == 0
    half = data["verdicts"][2]
    assert half["dtype"] == "float16" and half["level"] == "overflows"
    assert half["layer"] == "encoder.mid_block.resnets.0.conv1" and "can repair this" in half["sentence"]
    assert "fp16 overflows" in data["upcast"]
    assert data["probes"][1]["first_not_finite"][0] == half["layer"] and len(data["probes"][1]["first_not_finite"]) == 2
    assert data["loaders"] and json.loads((tmp_path / "audit/audit.json").read_text()) == data
    assert (tmp_path / "audit/audit.svg").read_text().startswith("<svg ")

    again = sdvae("check", overflowing, *SMALL, "--out", tmp_path / "audit")
    assert again.exit_code == 2 and "audit.json is there already" in again.stderr
    replaced = sdvae("check", overflowing, *SMALL, "--out", tmp_path / "audit", "--overwrite")
    assert replaced.exit_code == 0 and "audit.svg" in replaced.stdout and "overflows by " in replaced.stdout
    assert "FAILED" not in replaced.stderr  # that is for gates


@pytest.mark.parametrize("gates", [("fp16",), ("bf16", "fp16")])
def test_a_gate_fails_with_its_reason(overflowing: Path, gates: tuple[str, ...]) -> None:
    arguments = [part for gate in gates for part in ("--fail-if-unsafe", gate)]
    result = sdvae("check", overflowing, *SMALL, *arguments)
    assert result.exit_code == 1
    assert "FAILED: fp16: overflows at encoder.mid_block.resnets.0.conv1" in result.stderr


def test_a_gate_that_holds_passes(vae_path: Path) -> None:
    assert sdvae("check", vae_path, *SMALL, "--fail-if-unsafe", "fp16").exit_code == 0


def test_a_dry_run_of_check_names_images_and_files_and_writes_nothing(vae_path: Path, tmp_path: Path) -> None:
    arguments = ("check", vae_path, *SMALL, "--out", tmp_path / "audit", "--dry-run")
    text, data = sdvae(*arguments), json_of(sdvae(*arguments, "--json"))
    assert len(data["images"]) == 2 and data["outputs"] == [
        str(tmp_path / "audit/audit.json"),
        str(tmp_path / "audit/audit.svg"),
    ]
    assert "Nothing was written." in text.stdout and not (tmp_path / "audit").exists()


def test_images_that_cannot_be_read_are_named_left_out_and_end_with_3(
    vae_path: Path, tmp_path: Path, make_images: MakeImages
) -> None:
    images = make_images(tmp_path / "images", {"good.png": (40, 40)})
    (images / "bad.png").write_bytes(b"no image")
    for arguments in (("check", vae_path, images), ("fix-fp16", vae_path, tmp_path / "fixed", images)):
        result = sdvae(*arguments, *SMALL, "--json")
        data = json_of(result)
        assert (result.exit_code, data["exit_code"]) == (3, 3)
        assert [failure["key"] for failure in data["failures"]] == ["bad.png"]
        assert arguments[0] == "fix-fp16" or data["num_images"] == 1
        assert "bad.png" in sdvae(*arguments, *SMALL).stdout
    alone = sdvae("check", vae_path, images / "bad.png", *SMALL)
    assert alone.exit_code == 1 and "none of the 1 images can be read" in alone.stderr


def test_fix_fp16_writes_a_vae_that_stock_diffusers_runs_in_float16(overflowing: Path, tmp_path: Path) -> None:
    result = sdvae("fix-fp16", overflowing, tmp_path / "fixed", *SMALL)
    assert result.exit_code == 0, result.output
    assert "decoder: scaled by 2^-" in result.stdout and "encoder.mid_block.resnets.0: scaled by 2^-" in result.stdout
    assert "NaN" in result.stdout
    assert result.stdout.endswith(f"Written to {tmp_path}/fixed; force_upcast is false now.\n")

    epsilon = json_of(sdvae("fix-fp16", overflowing, tmp_path / "x", *SMALL, "--json", "--dry-run"))["epsilon"]
    assert 0 < epsilon["effect"] < 1 and epsilon["norm"].startswith("decoder.")
    assert f"; through epsilon by at most {epsilon['effect']:.2g} in {epsilon['norm']}\n" in result.stdout

    photo = Path(__file__).parents[2] / "sdvae/assets/photos/cat.jpg"
    x = image_to_x(read_image(photo).pixels[100:164, 100:164])[None]
    before = load_autoencoder(overflowing)
    after = diffusers.AutoencoderKL.from_pretrained(tmp_path / "fixed", torch_dtype=torch.float16)
    assert after.config.force_upcast is False
    with torch.inference_mode():
        z = before.encode(x).latent_dist.mean
        half_z = after.encode(x.half()).latent_dist.mean.float()
        exact = before.decode(z).sample
        recon = after.decode(z.half()).sample.float()
    for found, wanted in ((half_z, z), (recon, exact)):
        assert float((found - wanted).abs().max() / (wanted.max() - wanted.min())) < 1e-2
    notes = json.loads((tmp_path / "fixed/config.json").read_text())["_sdvae"]
    assert notes["rewrites"][0].startswith("fix-fp16: decoder 2^-")
    assert notes["source_digest"] == autoencoder_digest(load_autoencoder(overflowing))
    assert notes["source"] == "overflowing"
    assert sdvae("check", tmp_path / "fixed", *SMALL, "--fail-if-unsafe", "fp16").exit_code == 0


def test_fix_fp16_says_how_much_the_function_changes_in_each_part_and_through_epsilon(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"encoder_change": 2e-5, "decoder_change": 3e-6, "epsilon_norm": "decoder.n", "epsilon_effect": 2e-4}
    # powers of two change this VAE by nothing at all
    monkeypatch.setattr(
        fixing, "fix_fp16", lambda *args, real=fixing.fix_fp16, **kw: replace(real(*args, **kw), **changes)
    )
    lines = sdvae("fix-fp16", overflowing, tmp_path / "fixed", *SMALL, "--dry-run").stdout.splitlines()
    assert lines[-3] == (
        "Function in fp32: encoder changed by 2e-05, decoder by 3e-06 of its output's range; "
        "through epsilon by at most 0.0002 in decoder.n"
    )


def test_fix_fp16_reports_as_json_and_a_dry_run_writes_nothing(overflowing: Path, tmp_path: Path) -> None:
    result = sdvae("fix-fp16", overflowing, tmp_path / "fixed", *SMALL, "--json", "--dry-run")
    data = json_of(result)
    assert (data["command"], data["dry_run"], data["written"], data["needed"]) == ("fix-fp16", True, False, True)
    assert data["exponents"]["encoder"] == 0 and data["exponents"]["decoder"] < 0
    assert data["before"]["verdict"]["level"] == "overflows" and data["after"]["verdict"]["level"] == "safe"
    assert max(data["change"]["encoder"], data["change"]["decoder"]) < data["change"]["limit"] == 1e-4
    assert not (tmp_path / "fixed").exists()
    text = sdvae("fix-fp16", overflowing, tmp_path / "fixed", *SMALL, "--dry-run").stdout
    assert text.endswith(f"Would write {tmp_path}/fixed. Nothing was written.\n")


def test_fix_fp16_finds_nothing_to_fix_and_copies_only_when_told(vae_path: Path, tmp_path: Path) -> None:
    result = sdvae("fix-fp16", vae_path, tmp_path / "fixed", *SMALL)
    assert result.exit_code == 0 and result.stdout.startswith("Nothing to fix: every layer has 2 bits of headroom")
    assert not (tmp_path / "fixed").exists()
    forced = json_of(sdvae("fix-fp16", vae_path, tmp_path / "fixed", *SMALL, "--force", "--json"))
    assert forced["written"] and not forced["needed"]
    again = sdvae("fix-fp16", vae_path, tmp_path / "fixed", *SMALL, "--force")
    assert again.exit_code == 0 and again.stdout.endswith(f"{tmp_path}/fixed is up to date. Nothing was written.\n")
    other = sdvae("fix-fp16", vae_path, tmp_path / "other", *SMALL, "--force")
    assert other.stdout.splitlines()[-1].startswith(f"A copy was written to {tmp_path}/other")
    assert "Written" not in other.stdout
    copy, vae = load_autoencoder(tmp_path / "fixed"), load_autoencoder(vae_path)
    assert all(torch.equal(tensor, copy.state_dict()[name]) for name, tensor in vae.state_dict().items())


def test_fix_fp16_run_again_is_up_to_date_and_with_another_headroom_refused(overflowing: Path, tmp_path: Path) -> None:
    target = tmp_path / "fixed"
    assert json_of(sdvae("fix-fp16", overflowing, target, *SMALL, "--json"))["written"]
    written = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    again = sdvae("fix-fp16", overflowing, target, *SMALL)
    assert again.exit_code == 0 and again.stdout.endswith(f"{target} is up to date. Nothing was written.\n")
    other = sdvae("fix-fp16", overflowing, target, *SMALL, "--headroom", "4")
    assert other.exit_code == 2 and "exists" in other.stderr
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == written


def test_fix_fp16_never_writes_over_its_own_source(overflowing: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in overflowing.iterdir()}
    for target in (overflowing, overflowing.parent):
        result = sdvae("fix-fp16", overflowing, target, *SMALL, "--overwrite")
        assert result.exit_code == 2, result.output
    assert {path.name: path.read_bytes() for path in overflowing.iterdir()} == before


def test_fix_fp16_reads_back_what_it_wrote(overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tensor_files.safetensors.torch.save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = min(tensors)
        save({**tensors, name: tensors[name] + 0.5}, path, metadata=metadata)

    monkeypatch.setattr(tensor_files.safetensors.torch, "save_file", wrong)
    result = sdvae("fix-fp16", overflowing, tmp_path / "fixed", *SMALL)
    assert result.exit_code == 1 and "read back with other values" in result.stderr
    assert not (tmp_path / "fixed").exists()


def test_fix_fp16_replaces_nothing_without_being_told(overflowing: Path, tmp_path: Path) -> None:
    target = tmp_path / "fixed"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    refused = sdvae("fix-fp16", overflowing, target, *SMALL)
    assert refused.exit_code == 2 and sdvae("fix-fp16", overflowing, target, *SMALL, "--overwrite").exit_code == 2
    assert os.listdir(target) == ["notes.txt"]


def test_what_cannot_be_repaired_is_an_error_and_leaves_no_folder(
    make_vae: Callable[..., Path], tmp_path: Path
) -> None:
    broken = make_vae("broken", lambda vae: vae.decoder.conv_out.weight.mul_(2.0**20))
    result = sdvae("fix-fp16", broken, tmp_path / "fixed", *SMALL)
    assert result.exit_code == 1 and "decoder.conv_out reaches" in result.stderr
    assert not (tmp_path / "fixed").exists()
