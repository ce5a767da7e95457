"""inspect as a user calls it: VAEs of every layout, caches, and what cannot be used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from vaes import build_vae

from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.run import convert
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.cli.main import cli
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import encode_folder

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def described(path: object) -> dict[str, Any]:
    result = sdvae("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with the usual 32 groups, so that files without config.json can be read."""
    vae = build_vae(32, 64, norm_num_groups=32, layers_per_block=2, scaling_factor=0.31, shift_factor=0.1)
    return save_autoencoder(vae, tmp_path_factory.mktemp("vae") / "mine")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_a_folder_is_described_with_digests_scale_and_programs(folder: Path) -> None:
    data = described(folder)
    vae = load_autoencoder(folder)
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    assert (data["kind"], data["loads"], data["class_name"]) == ("diffusers VAE folder", True, "AutoencoderKL")
    assert data["digest"] == autoencoder_digest(vae)
    assert data["dtypes"] == {"F32": len(vae.state_dict())}
    assert (data["num_tensors"], data["num_parameters"]) == (len(vae.state_dict()), num_parameters)
    assert data["scale"] == {
        "scaling_factor": 0.31,
        "shift_factor": 0.1,
        "latents_mean": None,
        "latents_std": None,
        "from": "config.json",
    }
    files = {file["name"]: file for file in data["files"]}
    assert files.keys() == {"config.json", WEIGHTS}
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["size_bytes"] == len(content)
    assert data["size_bytes"] == files[WEIGHTS]["size_bytes"]
    verdicts = {verdict["loader"]: verdict for verdict in data["loaders"]}
    assert verdicts["diffusers from_pretrained"]["takes"] and not verdicts["ComfyUI"]["takes"]
    assert verdicts["ComfyUI"].keys() == {"loader", "takes", "reasons", "scale_from", "fix"}


def test_the_text_names_what_a_reader_needs_and_never_wraps_a_command(folder: Path) -> None:
    text = sdvae("inspect", folder).stdout
    lines = text.splitlines()
    assert f"digest: {described(folder)['digest']}" in lines
    assert "scale: scaling_factor 0.31, shift_factor 0.1 (config.json)" in lines
    assert any(line.split()[:4] == ["diffusers", "from_pretrained", "yes", "Scale"] for line in lines)
    assert any("ComfyUI" in line and "  no  " in line for line in lines)
    [command] = [line.strip() for line in lines if "sdvae convert" in line and "--to ldm" in line]
    assert command == f"$ sdvae convert {folder} mine-ldm.safetensors --to ldm --fold-scale 0.31"
    assert all(len(line) <= 120 for line in lines if "sdvae convert" not in line and "sha256" not in line)


@pytest.mark.parametrize("columns", ["60", "120"])
def test_programs_of_the_same_verdict_are_one_row_in_straight_columns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    bare = tmp_path / "a file.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in load_file(folder / WEIGHTS).items()}, bare)
    for path in (folder, bare):
        verdicts = described(path)["loaders"]
        expected: dict[tuple[Any, ...], list[str]] = {}
        for verdict in verdicts:
            scale = verdict["scale_from"] if verdict["takes"] else None
            key = (verdict["takes"], *verdict["reasons"], scale, verdict["fix"])
            expected.setdefault(key, []).append(verdict["loader"])
        assert len(expected) < len(verdicts)
        lines = sdvae("inspect", path).stdout.split("programs that take it as it is:\n")[1].splitlines()
        column = max(len(verdict["loader"]) for verdict in verdicts) + 4
        found: list[str] = []
        for line in lines:
            if answer := line[column : column + 4].strip():
                assert answer in ("yes", "no")
                found.append("")
            found[-1] += " " + line[:column].strip()
            assert line[column + 3 : column + 4] in ("", " ") and line[column + 4 : column + 5] not in ("", " ")
        assert [names.strip().split(", ") for names in found] == list(expected.values())


@pytest.mark.parametrize(
    ("name", "prefix", "kind"),
    [
        ("bare.safetensors", "", "VAE file with LDM keys"),
        ("prefixed.safetensors", "first_stage_model.", "VAE file with LDM keys"),
        ("whole.safetensors", "first_stage_model.", "whole checkpoint with LDM keys"),
        ("old.ckpt", "", "VAE file with LDM keys"),
    ],
)
def test_a_file_in_another_layout_says_what_was_assumed(
    tmp_path: Path, folder: Path, tensors: dict[str, torch.Tensor], name: str, prefix: str, kind: str
) -> None:
    named = {prefix + key: tensor.contiguous() for key, tensor in to_ldm(tensors).items()}
    if name.startswith("whole"):
        named["model.diffusion_model.out.2.weight"] = torch.zeros(4, dtype=torch.float16)
    path = tmp_path / name
    if path.suffix == ".ckpt":
        torch.save({"state_dict": named}, path)
    else:
        save_file(named, path, metadata={"format": "pt"})
    data = described(path)
    assert (data["kind"], data["loads"], data["config_path"]) == (kind, True, None)
    # the VAE's own weights alone are counted
    assert data["dtypes"] == {"F32": len(tensors)} and data["num_tensors"] == len(tensors)
    assert data["num_parameters"] == described(folder)["num_parameters"]
    assert data["scale"]["from"] == "assumed, see remarks" and data["scale"]["scaling_factor"] == 0.18215
    assert any("scaling_factor assumed" in remark for remark in data["remarks"])
    assert "remark: " in sdvae("inspect", path).stdout


def test_a_config_beside_the_file_counts(tmp_path: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: t.contiguous() for k, t in to_ldm(tensors).items()}, tmp_path / "vae.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    data = described(tmp_path / "vae.safetensors")
    assert data["digest"] == described(folder)["digest"]
    assert data["scale"]["from"] == "config.json"


def test_notes_and_fields_of_a_header_are_shown(tmp_path: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from sdvae.checkpoints.notes import header_metadata

    fields = json.loads((folder / "config.json").read_text())
    notes = {"source": "somewhere", "license": "mit"}
    path = tmp_path / "vae.safetensors"
    save_file({k: t.contiguous() for k, t in to_ldm(tensors).items()}, path, metadata=header_metadata(fields, notes))
    data = described(path)
    assert (data["scale"]["scaling_factor"], data["scale"]["from"]) == (0.31, "the file's header")
    assert data["notes"] == notes and data["digest"] == described(folder)["digest"]
    text = sdvae("inspect", path).stdout
    assert "  license: mit\n" in text


@pytest.mark.parametrize("beside", [{"scaling_factor": 0.9}, {"_class_name": "AutoencoderTiny"}, None])
def test_a_header_of_ours_counts_and_is_named_whatever_lies_beside_it(
    tmp_path: Path, folder: Path, beside: dict[str, Any] | None
) -> None:
    path = tmp_path / "mine.safetensors"
    convert(folder, path, options=ConvertOptions(to="ldm"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text("{" if beside is None else json.dumps(config | beside))
    data = described(path)
    assert (data["loads"], data["class_name"], data["config_path"]) == (True, "AutoencoderKL", None)
    assert (data["scale"]["scaling_factor"], data["scale"]["from"]) == (0.31, "the file's header")
    assert data["digest"] == described(folder)["digest"]
    assert [file["name"] for file in data["files"]] == ["mine.safetensors"]
    assert "scale: scaling_factor 0.31, shift_factor 0.1 (the file's header)\n" in sdvae("inspect", path).stdout


@pytest.mark.parametrize(("name", "options"), [("mine.safetensors", {"to": "ldm"}), ("mine", {})])
def test_a_scale_that_was_assumed_is_not_shown_as_a_fact_after_a_conversion(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str, options: dict[str, Any]
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in to_ldm(tensors).items()}, bare)
    convert(bare, tmp_path / name, options=ConvertOptions(**options))
    data = described(tmp_path / name)
    assert (data["scale"]["scaling_factor"], data["scale"]["from"]) == (0.18215, "assumed, see remarks")
    assert any("was assumed" in remark for remark in data["remarks"])
    assert data["notes"]["assumed"] == ["scaling_factor"]
    convert(bare, tmp_path / name, options=ConvertOptions(scaling_factor=0.13025, overwrite=True, **options))
    data = described(tmp_path / name)
    assert data["scale"]["scaling_factor"] == 0.13025 and not data["scale"]["from"].startswith("assumed")
    assert data["remarks"] == [] and "assumed" not in data["notes"]


@pytest.mark.parametrize("family", ["SDXL", None])
def test_a_scale_that_other_tensors_show_is_not_called_assumed(
    tmp_path: Path, tensors: dict[str, torch.Tensor], family: str | None
) -> None:
    named = {f"first_stage_model.{key}": tensor.contiguous() for key, tensor in to_ldm(tensors).items()}
    others = ["model.diffusion_model.input_blocks.0.0.weight", *(["conditioner.embedders.0.a"] if family else [])]
    save_file(named | {name: torch.zeros(1) for name in others}, tmp_path / "whole.safetensors")
    scale = described(tmp_path / "whole.safetensors")["scale"]
    expected = (0.13025, "the file's other tensors") if family else (0.18215, "assumed, see remarks")
    assert (scale["scaling_factor"], scale["from"]) == expected


def test_weights_of_two_types_are_counted_by_type(tmp_path: Path, folder: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "mixed")
    mixed = {
        name: tensor.half() if name.startswith("encoder.") else tensor
        for name, tensor in load_file(copy / WEIGHTS).items()
    }
    save_file(mixed, copy / WEIGHTS, metadata={"format": "pt"})
    counts = {"F16": 0, "F32": 0}
    for name in mixed:
        counts["F16" if name.startswith("encoder.") else "F32"] += 1
    assert described(copy)["dtypes"] == counts


def test_an_autoencoder_of_another_class_is_described(taesd_path: Path) -> None:
    data = described(taesd_path)
    assert (data["class_name"], data["loads"], data["loaders"]) == ("AutoencoderTiny", True, [])
    assert data["digest"].startswith("sha256:")
    assert data["num_parameters"] == sum(t.numel() for t in load_file(taesd_path / WEIGHTS).values())
    assert "no AutoencoderKL" in sdvae("inspect", taesd_path).stdout


def test_damaged_weights_say_why_and_offer_no_conversion(tmp_path: Path, folder: Path) -> None:
    short = shutil.copytree(folder, tmp_path / "short")
    content = (short / WEIGHTS).read_bytes()
    (short / WEIGHTS).write_bytes(content[:-1])
    data = described(short)
    assert data["loads"] is False and "damaged" in data["reason"] and data["loaders"] == []

    lacking = shutil.copytree(folder, tmp_path / "lacking")
    config = json.loads((lacking / "config.json").read_text()) | {"latent_channels": 5}
    (lacking / "config.json").write_text(json.dumps(config))
    data = described(lacking)
    assert data["loads"] is False and "latent_channels is 5" in data["reason"]
    assert data["num_tensors"] > 0 and data["config"]["latent_channels"] == 5
    assert all(verdict["fix"] is None for verdict in data["loaders"])
    assert "loads: no: " in sdvae("inspect", lacking).stdout


def test_a_hub_id_is_found_in_the_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--org--name/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text("abc")
    assert described("org/name")["digest"] == described(folder)["digest"]
    missing = sdvae("inspect", "org/other")
    assert missing.exit_code == 1 and "hf download org/other" in missing.stderr


def test_a_latent_cache_shows_its_settings(tmp_path: Path, make_images: MakeImages, vae_path: Path) -> None:
    images = make_images(tmp_path / "images", {"a.png": (40, 24), "b.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", vae=vae_path, options=EncodeOptions(size=16))
    data = described(tmp_path / "latents")
    assert (data["kind"], data["format"], data["num_files"], data["num_items"]) == ("latent cache", "safetensors", 2, 2)
    assert data["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "latents").glob("*.safetensors"))
    assert (data["vae"]["digest"], data["preprocessing"]["size"]) == (described(vae_path)["digest"], 16)
    assert data["shapes"] == [[4, 2, 2], [4, 2, 4]]
    assert "num_items: 2" in sdvae("inspect", tmp_path / "latents").stdout
