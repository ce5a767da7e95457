"""Tiling and memory of folder jobs: what the options mean, and what files record of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdvae.checkpoints.opened import open_vae
from sdvae.codec.options import DecodeOptions, EncodeOptions, RunOptions, parse_bytes
from sdvae.codec.run import decode_folder, encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError
from sdvae.latents.safetensors import LatentFile


@pytest.fixture
def photos(tmp_path: Path, make_images: Any) -> Path:
    return make_images(tmp_path / "photos", {"wide.png": (200, 72), "tall.png": (64, 136)})  # type: ignore[no-any-return]


@pytest.fixture
def small_tiles(make_vae: Callable[..., Path]) -> Path:
    return make_vae("small-tiles", sample_size=32)


def read(folder: Path) -> dict[str, LatentFile]:
    return {path.name: LatentFile.read(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    "size, expected",
    [
        ("4GB", 4 * 10**9),
        ("4 gb", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("64k", 64000),
        (123, 123),
        ("7t", 7 * 10**12),
    ],
)
def test_a_memory_size_is_read_as_people_write_it(size: int | str, expected: int) -> None:
    assert parse_bytes(size) == expected
    assert RunOptions(max_memory=size).max_memory_bytes == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "4 apples", "0", 0, "4GBB"])
def test_what_is_no_memory_size_is_named(size: int | str) -> None:
    with pytest.raises(ConfigError, match=f"max_memory is '{size}'; expected a size such as 4GB"):
        RunOptions(max_memory=size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tiling": "some"}, "tiling is 'some'; expected one of auto, exact, blended, off"),
        ({"tiling": "blended", "max_memory": "4GB"}, "max_memory is given, but tiling is 'blended'"),
        ({"tiling": "off", "max_memory": "4GB"}, "max_memory is given, but tiling is 'off'"),
        ({"tile_size": 64}, "tile_size and tile_overlap are of blended tiling, but tiling is 'auto'"),
        ({"tiling": "exact", "tile_overlap": 0.5}, "but tiling is 'exact'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    for kind in (EncodeOptions, DecodeOptions):
        with pytest.raises(ConfigError, match=message):
            kind(**options)


def test_a_tile_that_the_vae_cannot_have_is_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, vae_path: Path
) -> None:
    with pytest.raises(ConfigError, match="tile_size_px is 30; expected a multiple of 8"):
        encode_folder(photos, tmp_path / "out", vae=vae_path, options=EncodeOptions(tiling="blended", tile_size=30))
    assert not (tmp_path / "out").exists()


def test_a_loaded_vae_runs_fast_and_with_the_tiling_that_was_asked_for(vae_path: Path) -> None:
    model = open_vae(vae_path, **RunOptions(tiling="exact", max_memory="3GB").opening).model
    assert (model.execution.fast, model.use_tiling, model.execution.tiling) == (True, True, "exact")
    assert model.execution.max_memory_bytes == 3 * 10**9
    assert not open_vae(vae_path, **RunOptions(tiling="off").opening).model.use_tiling


def test_exact_tiling_gives_the_latents_and_images_of_one_pass(photos: Path, tmp_path: Path, vae_path: Path) -> None:
    for tiling in ("off", "exact"):
        encode_folder(
            photos, tmp_path / tiling, vae=vae_path, options=EncodeOptions(tiling=tiling, latent_dtype="float32")
        )
        decode_folder(
            tmp_path / "off", tmp_path / f"{tiling}-decoded", vae=vae_path, options=DecodeOptions(tiling=tiling)
        )
    whole, strips = read(tmp_path / "off"), read(tmp_path / "exact")
    assert set(whole) == set(strips) == {"wide.png.safetensors", "tall.png.safetensors"}
    for name, file in whole.items():
        assert strips[name].header.vae == file.header.vae
        for part, tensor in file.tensors.items():
            torch.testing.assert_close(strips[name].tensors[part], tensor, rtol=1e-5, atol=1e-5)
    report = encode_folder(
        photos, tmp_path / "off", vae=vae_path, options=EncodeOptions(tiling="exact", latent_dtype="float32")
    )
    assert (report.done, report.skipped) == (0, 2)  # they are the same, so nothing is stale


def test_blended_tiles_are_recorded_and_not_taken_for_the_result_of_one_pass(
    photos: Path, tmp_path: Path, small_tiles: Path
) -> None:
    out = tmp_path / "out"
    encode_folder(photos, out, vae=small_tiles, options=EncodeOptions(tiling="blended", tile_overlap=0.5))
    header = next(iter(read(out).values())).header
    assert (header.vae.tile_size_px, header.vae.tile_overlap) == (32, 0.5)
    assert header.vae.computation == "float32 in tiles of 32 px that overlap by 0.5"
    again = encode_folder(photos, out, vae=small_tiles, options=EncodeOptions(tiling="blended", tile_overlap=0.5))
    assert (again.done, again.skipped) == (0, 2)
    whole = encode_folder(photos, out, vae=small_tiles)
    assert (whole.done, whole.skipped) == (2, 0)
    assert next(iter(read(out).values())).header.vae.tile_size_px is None


def test_images_decoded_in_blended_tiles_are_decoded_again_in_one_pass(
    photos: Path, tmp_path: Path, small_tiles: Path
) -> None:
    encode_folder(photos, tmp_path / "latents", vae=small_tiles)
    for tiling, done in (("blended", 2), ("blended", 0), ("auto", 2), ("exact", 0)):
        report = decode_folder(
            tmp_path / "latents", tmp_path / "out", vae=small_tiles, options=DecodeOptions(tiling=tiling)
        )
        assert report.done == done, tiling


def test_a_cache_of_blended_tiles_is_verified_with_its_own_tiles(
    photos: Path, tmp_path: Path, small_tiles: Path
) -> None:
    encode_folder(photos, tmp_path / "out", vae=small_tiles, options=EncodeOptions(tiling="blended"))
    report = verify_cache(tmp_path / "out", vae=small_tiles, images=photos, sample=2)
    assert report.exit_code == 0, report


def test_too_little_memory_fails_each_image_with_what_it_takes(photos: Path, tmp_path: Path, vae_path: Path) -> None:
    report = encode_folder(
        photos, tmp_path / "out", vae=vae_path, options=EncodeOptions(tiling="exact", max_memory="1MB")
    )
    assert (report.done, report.failed) == (0, 2)
    assert "give a max_memory of" in report.failures[0].reason
