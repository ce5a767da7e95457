"""The manifest: every line is true, all latents of the folder are listed, and what was listed is not read again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import decode_folder, encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.formats import CACHE_FORMATS, SHARDED_FORMATS
from sdvae.latents.manifest import Manifest, read_manifest, read_state
from sdvae.latents.registry import FORMATS, CacheFormat

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

SIZES = {"a.png": (64, 64), "b.jpg": (72, 64), "sub/c.png": (64, 128)}
each_format = pytest.mark.parametrize("format", CACHE_FORMATS)


def two_to_a_shard(format: str) -> dict[str, Any]:
    return {"format": format, "shard_size": 2 if format in SHARDED_FORMATS else None}


def check(out: Path, format: str, num_items: int) -> Manifest:
    """Compare a manifest with the folder, file by file."""
    manifest = read_manifest(out)
    paths = FORMATS[format].find_files(out)
    assert [file.path for file in manifest.files.values()] == [path.relative_to(out).as_posix() for path in paths]
    for path, file in zip(paths, manifest.files.values(), strict=True):
        assert file.digest == f"sha256:{sha256(path.read_bytes()).hexdigest()}"
        assert (file.size_bytes, file.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
        for item, (header, tensors) in zip(file.items, FORMATS[format].read_items(path), strict=True):
            source = header.source
            assert (item.key, item.source_digest) == (source.key, source.digest)
            assert (item.source_width, item.source_height) == (source.width, source.height)
            assert {item.shape} == {tuple(tensor.shape) for tensor in tensors.values()}
    assert (manifest.format, manifest.num_items) == (format, num_items)
    return manifest


@each_format
def test_the_manifest_lists_every_latent_with_its_digest(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, format: str
) -> None:
    images = make_images(tmp_path / "images", SIZES)
    report = encode_folder(
        images, tmp_path / "out", vae=opened_vae, options=EncodeOptions(store="mode", **two_to_a_shard(format))
    )
    assert report.manifest == str(tmp_path / "out/manifest.jsonl")
    check(tmp_path / "out", format, 3)
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    header = lines[0]
    assert (header["schema"], header["format"]) == ("sdvae.latent-cache/2", format)
    assert (header["vae"]["digest"], header["vae"]["name"]) == (report.vae_digest, str(vae_path))
    assert (header["store"], header["latent_dtype"], header["preprocessing"]["crop"]) == ("mode", "float16", "none")
    assert (header["num_files"], header["num_items"]) == (len(lines) - 1, 3)
    assert sum((line["items"] for line in lines[1:]), [])[1] == {
        "key": "b.jpg",
        "source_digest": f"sha256:{sha256((images / 'b.jpg').read_bytes()).hexdigest()}",
        "source_width": 72,
        "source_height": 64,
        "shape": [4, 8, 9],
        "source_size_bytes": (images / "b.jpg").stat().st_size,
        "source_mtime_ns": (images / "b.jpg").stat().st_mtime_ns,
    }


@each_format
def test_runs_over_different_images_are_listed_together(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    one, out = make_images(tmp_path / "one", SIZES), tmp_path / "out"
    two = make_images(tmp_path / "two", {"x.png": (64, 64), "y.png": (64, 64)})
    encode_folder(one, out, vae=opened_vae, options=EncodeOptions(**two_to_a_shard(format)))
    encode_folder(two, out, vae=opened_vae, options=EncodeOptions(**two_to_a_shard(format)))
    check(out, format, 5)
    make_images(one, {"a.png": (128, 64)})
    encode_folder(one, out, vae=opened_vae, options=EncodeOptions(**two_to_a_shard(format)))
    manifest = check(out, format, 5)
    assert len({item.key for file in manifest.files.values() for item in file.items}) == 5
    for path in FORMATS[format].find_files(out)[:1]:
        path.unlink()
    encode_folder(two, out, vae=opened_vae, options=EncodeOptions(**two_to_a_shard(format)))
    check(out, format, read_manifest(out).num_items)


@each_format
def test_what_is_listed_and_unchanged_is_not_read_again(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = make_images(tmp_path / "images", SIZES), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    before, times = (out / "manifest.jsonl").read_bytes(), (out / "manifest.jsonl").stat().st_mtime_ns
    read: list[Path] = []

    read_items = CacheFormat.read_items

    def counting(self: CacheFormat, path: Path) -> Any:
        read.append(path)
        return read_items(self, path)

    monkeypatch.setattr(CacheFormat, "read_items", counting)
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    assert read == [] and (out / "manifest.jsonl").stat().st_mtime_ns == times
    touched = FORMATS[format].find_files(out)[0]
    os.utime(touched, (1, 1))
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    assert read == [touched]
    check(out, format, 3)
    read.clear()
    (out / "manifest.jsonl").unlink()  # as in a folder that an earlier version wrote
    os.utime(touched, ns=(1, json.loads(before.splitlines()[1])["mtime_ns"]))
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    assert sorted(read) == FORMATS[format].find_files(out)
    assert (out / "manifest.jsonl").read_bytes() == before


def test_latents_of_two_vaes_in_one_folder_have_their_settings_each(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, other_vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {"a.png": (16, 16), "b.png": (16, 16)}), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae)
    encode_folder(images / "b.png", out, vae=other_vae_path)
    manifest = check(out, "safetensors", 2)
    names = [manifest.settings[index].vae.name for file in manifest.files.values() for index in file.settings]
    assert names == [str(vae_path), str(other_vae_path)]
    assert manifest.common("vae") is None and manifest.common("store") == "moments"
    header = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
    assert header["vae"] is None and header["store"] == "moments"
    renamed = shutil.copytree(other_vae_path, tmp_path / "renamed")  # the same VAE under another name
    encode_folder(images, out, vae=renamed)
    manifest = check(out, "safetensors", 2)
    assert len(manifest.settings) == 1 and manifest.common("vae") is not None


def test_a_manifest_of_before_the_statistics_of_the_vae_is_read_and_brought_up_to_date(
    tmp_path: Path, make_images: MakeImages, make_vae: Callable[..., Path], vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {"a.png": (16, 16)}), tmp_path / "out"
    with_statistics = make_vae(latents_mean=(0.5, -0.25, 0.0, 1.0), latents_std=(2.0, 0.5, 1.0, 4.0))
    for vae, mean in ((vae_path, None), (with_statistics, (0.5, -0.25, 0.0, 1.0))):
        encode_folder(images, out, vae=vae)
        path = out / "manifest.jsonl"
        text = path.read_text()
        assert read_manifest(out).common("vae").latents_mean == mean
        header, *files = map(json.loads, text.splitlines())
        del header["part"]
        header |= {"schema": "sdvae.latent-cache/1", "settings": list(header["settings"].values())}
        for record in (header["vae"], header["settings"][0]["vae"]):
            del record["latents_mean"], record["latents_std"]
        for file in files:
            file["settings"] = [0]
            for item in file["items"]:
                del item["source_size_bytes"], item["source_mtime_ns"]
        path.write_text("".join(json.dumps(line) + "\n" for line in (header, *files)))
        assert read_manifest(out).common("vae").latents_mean is None
        encode_folder(images, out, vae=vae, options=EncodeOptions(overwrite=True))
        check(out, "safetensors", 1)
        assert read_manifest(out).common("vae").latents_mean == mean


def test_a_manifest_of_a_version_whose_settings_had_other_fields_is_read(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    """Its digests are over the fields of then; the settings still are those of the latents."""
    out = tmp_path / "out"
    encode_folder(make_images(tmp_path / "images", {"a.png": (16, 16)}), out, vae=opened_vae)
    expected = read_manifest(out)
    header, line = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    (settings,) = header["settings"].values()
    for change in (lambda: settings["vae"].pop("tile_overlap"), lambda: settings.update(of_later="a field")):
        change()
        nameless = settings | {"vae": {name: value for name, value in settings["vae"].items() if name != "name"}}
        digest = f"sha256:{sha256(json.dumps(nameless, sort_keys=True).encode()).hexdigest()}"
        written = [header | {"settings": {digest: settings}}, line | {"settings": [digest]}]
        (out / "manifest.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
        assert digest not in expected.settings
        assert (read_manifest(out).settings, read_manifest(out).files) == (expected.settings, expected.files)
        assert verify_cache(out).problems == ()


def test_until_a_run_is_done_what_it_replaces_is_not_listed(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(4)}), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae)
    make_images(images, {"0.png": (24, 16), "2.png": (24, 16)})
    listed: list[list[str]] = []

    def look(*_: int) -> None:
        listed.append(list(read_manifest(out).files))

    encode_folder(images, out, vae=opened_vae, on_progress=look)
    assert listed == [["1.png.safetensors", "3.png.safetensors"]] * 2
    check(out, "safetensors", 4)


def test_files_of_others_are_not_listed(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae
) -> None:
    images, out = make_images(tmp_path / "images", {"a.png": (16, 16)}), tmp_path / "out"
    shutil.copytree(vae_path, out / "vae")
    encode_folder(images, out, vae=opened_vae)
    (out / ".hidden.safetensors").write_bytes(b"")
    encode_folder(images, out, vae=opened_vae)
    assert list(read_manifest(out).files) == ["a.png.safetensors"]
    assert decode_folder(out / "a.png.safetensors", tmp_path / "decoded", vae=opened_vae).done == 1


def test_a_manifest_of_others_is_replaced_only_when_asked(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    (images / "manifest.jsonl").write_text('{"image": "a.png", "text": "a photograph"}\n')
    with pytest.raises(ConfigError, match="has no schema sdvae.latent-cache/2.*--overwrite"):
        encode_folder(images, images, vae=opened_vae)
    assert read_state(tmp_path / "manifest.jsonl") is None
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(overwrite=True))
    check(images, "safetensors", 1)


def test_a_folder_of_another_format_is_refused(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae) -> None:
    images, out = make_images(tmp_path / "images", {"a.png": (64, 64)}), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae)
    for forget in (False, True):
        if forget:
            (out / "manifest.jsonl").unlink()
        with pytest.raises(ConfigError, match="holds latents of the format safetensors; one folder takes one format"):
            encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format="webdataset", overwrite=True))
    assert encode_folder(images, out, vae=opened_vae).skipped == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[:-1], "lists 1 files with 1 items, but its header says 2 and 2"),
        (lambda lines: [], "no schema"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "damaged manifest"),
        (lambda lines: [lines[0].replace("cache/2", "cache/3"), *lines[1:]], "upgrade sdvae"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"key"', '"name"')], "items has no key"),
        (
            lambda lines: [*lines[:-1], lines[-1].replace('"settings": ["sha256', '"settings": ["sha999')],
            "no settings 'sha999",
        ),
        (lambda lines: ["é"], "cannot be read"),
    ],
)
def test_a_damaged_manifest_is_named(
    tmp_path: Path,
    make_images: MakeImages,
    opened_vae: OpenedVae,
    change: Callable[[list[str]], list[str]],
    reason: str,
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "b.png": (16, 16)})
    encode_folder(images, tmp_path / "out", vae=opened_vae)
    path = tmp_path / "out/manifest.jsonl"
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())), encoding="utf-8")
    with pytest.raises(LatentFileError, match=f"manifest.jsonl: .*{reason}"):
        read_manifest(path)


def test_an_edited_manifest_is_set_right_by_the_next_run(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images, out = make_images(tmp_path / "images", {"a.png": (16, 16), "b.png": (16, 16)}), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae)
    path = out / "manifest.jsonl"
    right = path.read_text()
    for wrong in (right.replace('"settings": ["sha256', '"settings": ["sha999'), right[:-100]):
        path.write_text(wrong)
        assert encode_folder(images, out, vae=opened_vae).skipped == 2
        assert path.read_text() == right


def test_a_manifest_that_is_read_is_the_one_that_was_written(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "é/b.png": (16, 16)})
    encode_folder(images, tmp_path / "out", vae=opened_vae)
    manifest = read_manifest(tmp_path / "out")
    (tmp_path / "copy").mkdir()
    manifest.write(tmp_path / "copy")
    assert read_manifest(tmp_path / "copy/manifest.jsonl") == manifest
    assert (tmp_path / "copy/manifest.jsonl").read_bytes() == (tmp_path / "out/manifest.jsonl").read_bytes()
