"""Each kind of damage that a latent cache can have, planted and found; and caches in which nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdvae.checkpoints.opened import OpenedVae
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import encode_folder
from sdvae.codec.verify import VerifyReport, verify_cache
from sdvae.errors import CheckpointError, ConfigError, SdvaeError
from sdvae.latents.header import read_header
from sdvae.latents.manifest import MANIFEST_NAME, CacheSettings
from sdvae.latents.registry import FORMATS
from sdvae.latents.safetensors import LatentFile

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
SIZES = {"a.png": (24, 24), "b.png": (24, 24), "sub/c.png": (32, 24), "sub/d.png": (40, 16), "e.png": (24, 24)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, (name, size) in enumerate(SIZES.items()):
        levels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, images: Path, opened_vae: OpenedVae) -> dict[str, Path]:
    """A cache of each format; shards of two images."""
    out = tmp_path_factory.mktemp("caches")
    for format in FORMATS:
        options: dict[str, Any] = {"shard_size": 2} if FORMATS[format].is_sharded else {}
        encode_folder(images, out / format, vae=opened_vae, options=EncodeOptions(format=format, **options))
    return {format: out / format for format in FORMATS}


@pytest.fixture
def cache(tmp_path: Path, caches: dict[str, Path]) -> Path:
    return copy_of(caches["safetensors"], tmp_path)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "cache")


def reasons(report: VerifyReport) -> dict[str, str]:
    """File -> what is wrong with it, all in one."""
    found: dict[str, str] = {}
    for problem in report.problems:
        found[str(problem.file)] = f"{found.get(str(problem.file), '')} {problem.key}: {problem.reason}"
    return found


def edit_manifest(cache: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    lines = [json.loads(line) for line in (cache / MANIFEST_NAME).read_text().splitlines()]
    change(lines)
    (cache / MANIFEST_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def relist(cache: Path, name: str) -> None:
    """Make the manifest agree with the bytes of a file, so that only its content is wrong."""

    def change(lines: list[dict[str, Any]]) -> None:
        content = (cache / name).read_bytes()
        [line] = [line for line in lines[1:] if line["path"] == name]
        line |= {"digest": f"sha256:{sha256(content).hexdigest()}", "size_bytes": len(content)}

    edit_manifest(cache, change)


# ---------------------------------------------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_cache_has_no_problems_and_its_images_give_the_same_latents(
    caches: dict[str, Path], images: Path, opened_vae: OpenedVae, format: str
) -> None:
    report = verify_cache(caches[format], images=images, vae=opened_vae)
    assert report.problems == () and report.warnings == () and report.exit_code == 0
    assert (report.format, report.has_manifest, report.num_items) == (format, True, 5)
    assert report.num_files == (3 if format in ("webdataset", "parquet") else 5)
    assert sorted(each.key for each in report.reencoded) == sorted(SIZES)
    # only the rounding to float16 lies between them, half a unit of 2^-10 of the largest value
    assert 0 < max(each.difference for each in report.reencoded) < 0.01
    assert report.to_json()["exit_code"] == 0
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("store", ["moments", "mode", "sample"])
@pytest.mark.parametrize("latent_dtype", ["float16", "float32"])
def test_what_is_stored_is_reproduced_in_its_type_and_with_its_seed(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, store: str, latent_dtype: str
) -> None:
    options = {"store": store, "latent_dtype": latent_dtype, "seed": 5, "size": 16, "crop": "center"}
    encode_folder(images, tmp_path / "cache", vae=opened_vae, options=EncodeOptions(**options))  # type: ignore[arg-type]
    report = verify_cache(tmp_path / "cache", images=images, device="cpu")  # the VAE is found by its name
    assert report.problems == () and len(report.reencoded) == 5
    worst = max(each.difference for each in report.reencoded)
    assert worst < (1e-5 if latent_dtype == "float32" else 0.01)


def test_a_draw_with_another_seed_is_another_latent(tmp_path: Path, images: Path, opened_vae: OpenedVae) -> None:
    cache = tmp_path / "cache"
    encode_folder(images, cache, vae=opened_vae, options=EncodeOptions(store="sample", seed=5))
    path = cache / "a.png.safetensors"
    file = LatentFile.read(path)
    LatentFile(header=replace(file.header, seed=6), tensors=file.tensors).write(path)
    relist(cache, path.name)
    assert "what the manifest says of VAE" in reasons(verify_cache(cache))[path.name]
    settings = CacheSettings.of(read_header(path))
    edit_manifest(cache, lambda lines: lines[0]["settings"].update({settings.digest: asdict(settings)}))
    edit_manifest(
        cache,
        lambda lines: [line.update(settings=[settings.digest]) for line in lines[1:] if line["path"] == path.name],
    )
    found = reasons(verify_cache(cache, images=images, device="cpu"))
    assert found.keys() == {path.name}
    assert "other settings than the rest: seed" in found[path.name] and "gives another latent" in found[path.name]


def test_a_folder_without_manifest_is_checked_as_far_as_it_goes(
    cache: Path, images: Path, opened_vae: OpenedVae
) -> None:
    (cache / MANIFEST_NAME).unlink()
    report = verify_cache(cache, images=images, vae=opened_vae)
    assert (report.problems, report.has_manifest, report.num_items) == ((), False, 5)
    assert report.warnings == ("no manifest: digests not checked, and lost files not seen",)
    (cache / "a.png.safetensors").write_bytes((cache / "a.png.safetensors").read_bytes()[:-3])
    assert reasons(verify_cache(cache)).keys() == {"a.png.safetensors"}


def test_the_sample_is_chosen_by_its_seed_among_all(
    caches: dict[str, Path], images: Path, opened_vae: OpenedVae
) -> None:
    def chosen(seed: int) -> set[str]:
        report = verify_cache(caches["webdataset"], images=images, vae=opened_vae, sample=2, seed=seed)
        assert len(report.reencoded) == 2
        return {each.key for each in report.reencoded}

    assert chosen(1) == chosen(1)
    assert set.union(*map(chosen, range(12))) == set(SIZES)


def test_progress_ends_with_everything_done(caches: dict[str, Path], images: Path, opened_vae: OpenedVae) -> None:
    calls: list[tuple[int, int]] = []
    verify_cache(
        caches["safetensors"],
        images=images,
        vae=opened_vae,
        sample=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 7) for done in range(1, 8)]


# ------------------------------------------------------------------------------------------------------ planted damage


@pytest.mark.parametrize("format", FORMATS)
def test_one_flipped_bit_is_found(tmp_path: Path, caches: dict[str, Path], format: str) -> None:
    cache = copy_of(caches[format], tmp_path)
    path = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)[0]
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
    report = verify_cache(cache)
    assert report.exit_code == 3
    found = reasons(report)
    assert found.keys() == {path.relative_to(cache).as_posix()} and "its bytes changed" in next(iter(found.values()))


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_found_twice_by_its_size_and_by_reading(
    tmp_path: Path, caches: dict[str, Path], format: str
) -> None:
    cache = copy_of(caches[format], tmp_path)
    path = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    [first, second] = verify_cache(cache).problems
    assert first.file == second.file == path.relative_to(cache).as_posix()
    assert "bytes; the manifest says" in first.reason and str(path) not in second.reason


def test_lost_and_added_files_are_found(cache: Path) -> None:
    (cache / "sub/c.png.safetensors").unlink()
    shutil.copy(cache / "a.png.safetensors", cache / "zz.safetensors")
    save_file({"weight": torch.zeros(1)}, cache / "sub/other.safetensors")
    report = verify_cache(cache)
    found = reasons(report)
    assert found.keys() == {"sub/c.png.safetensors", "zz.safetensors", "sub/other.safetensors"}
    assert "not in the folder" in found["sub/c.png.safetensors"]
    assert "not in the manifest" in found["zz.safetensors"] and "a.png.safetensors too" in found["zz.safetensors"]
    assert "no latent file of sdvae" in found["sub/other.safetensors"]
    assert (report.num_files, report.num_items) == (6, 5)


def test_values_that_are_not_finite_are_found_though_the_manifest_agrees(cache: Path) -> None:
    path = cache / "a.png.safetensors"
    file = LatentFile.read(path)
    mean = file.tensors["mean"].clone()
    mean[0, 0, 0] = float("nan")
    save_file({"mean": mean, "logvar": file.tensors["logvar"]}, path, metadata=file.header.to_metadata())
    relist(cache, path.name)
    found = reasons(verify_cache(cache))
    assert found.keys() == {path.name} and "not finite" in found[path.name]


def test_two_files_that_changed_places_are_found(cache: Path) -> None:
    one, other = cache / "a.png.safetensors", cache / "b.png.safetensors"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    found = reasons(verify_cache(cache))
    assert found.keys() == {one.name, other.name}
    assert "the manifest has 'a.png' here" in found[one.name] and "its bytes changed" in found[one.name]
    relist(cache, one.name)  # and where someone made the manifest agree
    relist(cache, other.name)
    found = reasons(verify_cache(cache))
    assert found.keys() == {one.name, other.name} and "the manifest has 'a.png' here" in found[one.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[1].update(digest="sha256:" + "0" * 64), "its bytes changed"),
        (lambda lines: lines[1]["items"][0].update(shape=[4, 3, 4]), "shape (4, 3, 3), in the manifest (4, 3, 4)"),
        (lambda lines: lines[1]["items"][0].update(source_digest="sha256:0"), "source_digest"),
        (lambda lines: lines[1]["items"].append(lines[1]["items"][0]), "damaged manifest: lists 5 files with 6 items"),
        (lambda lines: next(iter(lines[0]["settings"].values())).update(seed=1), "are not those of this digest"),
        (lambda lines: lines[0].update(schema="sdvae.latent-cache/9"), "upgrade sdvae"),
        (lambda lines: lines[1].update(path="../a.png.safetensors"), "outside the cache"),
        (lambda lines: lines[1].update(settings=["7"]), "damaged manifest: there are no settings '7'"),
        (lambda lines: lines.append(lines[1]), "is listed twice"),
        (
            lambda lines: (lines[1]["items"].append(lines[1]["items"][0]), lines[0].update(num_items=6)),
            "holds 1 latents; the manifest says 2",
        ),
    ],
)  # fmt: skip
def test_an_edited_manifest_is_found(cache: Path, change: Callable[[Any], Any], reason: str) -> None:
    edit_manifest(cache, change)
    report = verify_cache(cache)
    assert report.exit_code == 3 and reason in " ".join(reasons(report).values())


def test_a_cache_of_two_vaes_or_preprocessings_is_found(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, other_vae_path: Path, make_images: MakeImages
) -> None:
    cache = tmp_path / "cache"
    more = make_images(tmp_path / "more", {"x.png": (16, 16)})
    encode_folder(images, cache, vae=opened_vae)
    encode_folder(more, cache, vae=other_vae_path, options=EncodeOptions(size=8))
    [problem] = verify_cache(cache).problems
    assert (problem.file, problem.key) == ("x.png.safetensors", "x.png")
    assert "made by another VAE than the rest" in problem.reason
    encode_folder(more, cache, vae=opened_vae, options=EncodeOptions(size=8))
    [problem] = verify_cache(cache).problems
    assert problem.reason == "made with other settings than the rest: preprocessing"


def test_another_vae_than_the_given_one_is_found_once(cache: Path, other_vae_path: Path, images: Path) -> None:
    [problem] = verify_cache(cache, vae=other_vae_path, images=images, device="cpu").problems
    assert problem.file is None and "made by the VAE" in problem.reason and str(other_vae_path) in problem.reason


def test_images_that_changed_or_went_away_are_found(
    tmp_path: Path, cache: Path, images: Path, opened_vae: OpenedVae
) -> None:
    changed = shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (24, 24), "red").save(changed / "a.png")
    (changed / "b.png").unlink()
    report = verify_cache(cache, images=changed, vae=opened_vae)
    found = reasons(report)
    assert found.keys() == {"a.png.safetensors", "b.png.safetensors"} and len(report.reencoded) == 3
    assert "stale: the image changed" in found["a.png.safetensors"]
    assert "its image is not in" in found["b.png.safetensors"]


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_values_that_are_not_those_of_the_image_are_found(
    tmp_path: Path, caches: dict[str, Path], images: Path, opened_vae: OpenedVae, format: str
) -> None:
    """Sound files with a whole manifest, but the latents of a.png are moved: only encoding again shows it."""
    cache = copy_of(caches[format], tmp_path)
    path = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)[0]
    items = [(header, dict(tensors)) for header, tensors in FORMATS[format].read_items(path)]
    mean = items[0][1]["mean"].clone()
    mean[0, 1, 1] += 0.2 * mean.float().std().item()
    items[0][1]["mean"] = mean
    arrays = [(header, {name: tensor.numpy() for name, tensor in tensors.items()}) for header, tensors in items]
    path.write_bytes(FORMATS[format].to_bytes(arrays))
    relist(cache, path.name)
    assert verify_cache(cache, vae=opened_vae).exit_code == 0
    report = verify_cache(cache, images=images, vae=opened_vae)
    [problem] = report.problems
    assert problem.key == "a.png" and "gives another latent" in problem.reason
    assert sum(not each.ok for each in report.reencoded) == 1


def test_the_same_key_in_two_shards_is_found(tmp_path: Path, caches: dict[str, Path]) -> None:
    cache = copy_of(caches["parquet"], tmp_path)
    shutil.copy(cache / "part-000000.parquet", cache / "part-000009.parquet")
    problems = verify_cache(cache).problems
    assert [problem.file for problem in problems] == ["part-000009.parquet"] * 3
    assert [problem.key for problem in problems[1:]] == ["a.png", "b.png"]
    assert all("part-000000.parquet too" in problem.reason for problem in problems[1:])


def test_a_prepared_image_of_another_version_is_not_compared(cache: Path, images: Path, opened_vae: OpenedVae) -> None:
    for path in sorted(cache.rglob("*.safetensors")):
        file = LatentFile.read(path)
        other = replace(file.header, preprocessing=replace(file.header.preprocessing, version=99))
        LatentFile(header=other, tensors=file.tensors).write(path)
    (cache / MANIFEST_NAME).unlink()
    report = verify_cache(cache, images=images, vae=opened_vae)
    assert (report.problems, report.reencoded) == ((), ())
    assert any("version 99" in warning for warning in report.warnings)


# -------------------------------------------------------------------------------------------------- what it refuses


def test_what_is_no_cache_is_an_error(tmp_path: Path, images: Path, vae_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", images / "a.png", images, vae_path):
        with pytest.raises(ConfigError, match="no latent cache"):
            verify_cache(path)


def test_a_vae_that_is_gone_or_became_another_is_an_error_before_anything_is_read(
    tmp_path: Path, images: Path, vae_path: Path, other_vae_path: Path
) -> None:
    mine = shutil.copytree(vae_path, tmp_path / "mine")
    encode_folder(images, tmp_path / "cache", vae=mine)
    save_autoencoder(load_autoencoder(other_vae_path), mine, overwrite=True)
    with pytest.raises(CheckpointError, match="no longer the VAE"):
        verify_cache(tmp_path / "cache", images=images, device="cpu")
    shutil.rmtree(mine)
    with pytest.raises(ConfigError, match="give it with --vae"):
        verify_cache(tmp_path / "cache", images=images, device="cpu")
    with pytest.raises(SdvaeError, match="no such file or folder"):
        verify_cache(tmp_path / "cache", images=images / "z.png", vae=vae_path)
    assert verify_cache(tmp_path / "cache").exit_code == 0
