"""verify as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sdvae.cli.main import cli
from sdvae.codec.run import encode_folder

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

KEYS = {
    "command", "cache", "format", "has_manifest", "num_files", "num_items", "size_bytes", "vae", "vae_digest", "store",
    "latent_dtype", "problems", "num_problems", "reencoded", "warnings", "seconds", "exit_code",
}  # fmt: skip


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", {"a.png": (24, 16), "sub/b.png": (16, 16)})


@pytest.fixture
def cache(tmp_path: Path, images: Path, vae_path: Path) -> Path:
    encode_folder(images, tmp_path / "cache", vae=vae_path)
    return tmp_path / "cache"


def test_a_whole_cache_ends_with_0_and_says_what_was_compared(cache: Path, images: Path, vae_path: Path) -> None:
    plain = sdvae("verify", cache)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.startswith(f"{cache}: safetensors, 2 files, 2 latents, 0.00")
    assert plain.stdout.endswith("No problems found.\n") and "encoded again" not in plain.stdout
    compared = sdvae("verify", cache, "--images", images, "--device", "cpu")
    assert "encoded again: 2 of 2 alike, at most 0.00" in compared.stdout and str(vae_path) in compared.stdout


def test_a_sample_needs_the_images(cache: Path) -> None:
    result = sdvae("verify", cache, "--sample", "3")
    assert result.exit_code == 2 and "--images" in result.stderr


def test_problems_are_listed_with_file_and_key_and_the_exit_code_is_3(cache: Path, other_vae_path: Path) -> None:
    (cache / "a.png.safetensors").rename(cache / "z.safetensors")
    result = sdvae("verify", cache, "--vae", other_vae_path, "--device", "cpu")
    assert result.exit_code == 3, result.output
    assert "3 problems:\n" in result.stdout
    assert "  a.png.safetensors: in the manifest, but not in the folder\n" in result.stdout
    assert "  z.safetensors: not in the manifest" in result.stdout and "  made by the VAE" in result.stdout


def test_json_is_one_object_with_the_documented_keys(cache: Path, images: Path) -> None:
    (cache / "sub/b.png.safetensors").unlink()
    result = sdvae("verify", cache, "--images", images, "--device", "cpu", "--json")
    data = json.loads(result.stdout)
    assert data.keys() == KEYS
    assert (result.exit_code, data["exit_code"], data["num_problems"], data["num_items"]) == (3, 3, 1, 1)
    assert data["problems"][0].keys() == {"file", "key", "reason"}
    assert data["reencoded"][0].keys() == {"file", "key", "difference", "tolerance", "ok"}


def test_no_cache_at_all_is_wrong_usage(images: Path, tmp_path: Path) -> None:
    result = sdvae("verify", images)
    assert result.exit_code == 2 and "no latent cache" in result.stderr
    assert sdvae("verify", tmp_path / "nothing").exit_code == 2
