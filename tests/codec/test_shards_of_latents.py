"""Shards (webdataset, parquet): other clients load them, and a run again touches only what it must."""

from __future__ import annotations

import errno
import io
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from forked import Forked, fork_sdvae

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import EncodeRun, encode_folder
from sdvae.errors import ConfigError, LatentFileError, SdvaeError
from sdvae.latents.formats import SHARDED_FORMATS
from sdvae.latents.manifest import read_manifest
from sdvae.latents.registry import FORMATS
from sdvae.latents.safetensors import LatentFile
from sdvae.latents.webdataset import escape_key

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

SIZES = {
    "a.jpg": (40, 24),
    "a.png": (24, 24),
    "b.c.png": (24, 40),
    "sub.x/photo one.png": (24, 24),
    "sub.x/é.png": (33, 17),
    "__MACOSX__/z.png": (24, 24),
}
SUFFIX = {"webdataset": ".tar", "parquet": ".parquet"}
sharded = pytest.mark.parametrize("format", SHARDED_FORMATS)


def shards(out: Path) -> dict[str, int]:
    """Shards with their times."""
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "manifest.jsonl"}


def keys(out: Path, format: str) -> list[list[str]]:
    return [
        [header.source.key for header in FORMATS[format].read_headers(path)] for path in FORMATS[format].find_files(out)
    ]


def numbered(count: int) -> dict[str, tuple[int, int]]:
    return {f"{i}.png": (16, 16) for i in range(count)}


# ------------------------------------------------------------------------------------------------------ other clients


@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards to the garbage collector
@pytest.mark.parametrize("latent_dtype", ["float16", "float32"])
@pytest.mark.parametrize("store", ["moments", "mode", "sample"])
def test_webdataset_loads_the_very_tensors_of_the_default_format(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, store: str, latent_dtype: str
) -> None:
    import webdataset

    images = make_images(tmp_path / "images", SIZES)
    options: dict[str, Any] = {"store": store, "latent_dtype": latent_dtype, "batch_size": 1}
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(**options))
    encode_folder(
        images, tmp_path / "shards", vae=opened_vae, options=EncodeOptions(format="webdataset", shard_size=4, **options)
    )
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(urls) == 2 and len(samples) == len(SIZES)
    assert [unquote(sample["__key__"]) for sample in samples] == sorted(SIZES)
    for sample in samples:
        plain = LatentFile.read(tmp_path / "plain" / f"{sample['json']['source']['key']}.safetensors")
        assert {name for name in sample if name.endswith(".npy")} == {f"{name}.npy" for name in plain.tensors}
        for name, tensor in plain.tensors.items():
            assert sample[f"{name}.npy"].dtype == latent_dtype
            assert np.array_equal(sample[f"{name}.npy"], tensor.numpy())
        assert sample["json"] == plain.header.to_json()


@pytest.mark.parametrize("latent_dtype", ["float16", "float32"])
@pytest.mark.parametrize("store", ["moments", "mode", "sample"])
def test_datasets_and_pyarrow_load_the_very_tensors_of_the_default_format(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, store: str, latent_dtype: str
) -> None:
    import datasets
    import pyarrow.parquet as pq

    images = make_images(tmp_path / "images", SIZES)
    options: dict[str, Any] = {"store": store, "latent_dtype": latent_dtype, "batch_size": 1}
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(**options))
    encode_folder(
        images, tmp_path / "shards", vae=opened_vae, options=EncodeOptions(format="parquet", shard_size=4, **options)
    )
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/shards/*.parquet", split="train", cache_dir=str(tmp_path / "hf")
    )
    assert loaded["key"][:] == sorted(SIZES)
    assert loaded.features["scaling_factor"].dtype == "float64"
    table = pq.read_table(sorted((tmp_path / "shards").glob("*.parquet")))
    for row, arrow in zip(loaded.with_format("torch"), table.to_pylist(), strict=True):
        plain = LatentFile.read(tmp_path / "plain" / f"{row['key']}.safetensors")
        assert tuple(row["shape"]) == plain.z().shape
        assert (row["image_width"], row["image_height"]) == SIZES[row["key"]]
        for name, tensor in plain.tensors.items():
            assert loaded.features[name].feature.dtype == latent_dtype
            assert torch.equal(row[name].reshape(*row["shape"]).to(tensor.dtype), tensor)
            assert arrow[name] == tensor.reshape(-1).tolist()
        assert float(row["scaling_factor"]) == pytest.approx(0.18215) and float(row["shift_factor"]) == pytest.approx(
            0.1
        )


@pytest.mark.parametrize("latent_dtype", ["float16", "float32"])
def test_datasets_loads_the_webdataset_shards_too(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, latent_dtype: str
) -> None:
    import datasets

    images, out = make_images(tmp_path / "images", SIZES), tmp_path / "shards"
    options: dict[str, Any] = {"latent_dtype": latent_dtype, "batch_size": 1}
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(**options))
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format="webdataset", shard_size=4, **options))
    loaded = datasets.load_dataset(
        "webdataset", data_files=f"{out}/*.tar", split="train", cache_dir=str(tmp_path / "hf")
    )
    assert [unquote(key) for key in loaded["__key__"]] == sorted(SIZES)
    for row in loaded.with_format("numpy"):
        plain = LatentFile.read(tmp_path / "plain" / f"{unquote(row['__key__'])}.safetensors")
        assert row["json"]["source"]["width"] == plain.header.source.width
        for name, tensor in plain.tensors.items():
            assert np.array_equal(row[f"{name}.npy"], tensor.numpy())


def test_pandas_loads_the_parquet_shards(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae) -> None:
    import pandas  # type: ignore[import-untyped]

    images, out = make_images(tmp_path / "images", SIZES), tmp_path / "shards"
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(batch_size=1))
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(batch_size=1, format="parquet", shard_size=4))
    frame = pandas.read_parquet(out / "part-000000.parquet").set_index("key")
    assert list(frame.index) == sorted(SIZES)[:4]
    for key, row in frame.iterrows():
        plain = LatentFile.read(tmp_path / "plain" / f"{key}.safetensors")
        for name, tensor in plain.tensors.items():
            assert row[name].dtype == np.float16
            assert np.array_equal(row[name].reshape(row["shape"]), tensor.numpy())
        assert (row["source_width"], row["source_height"]) == SIZES[str(key)]


@sharded
def test_the_shards_read_back_as_the_default_format_does(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images = make_images(tmp_path / "images", SIZES)
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(batch_size=1))
    encode_folder(
        images, tmp_path / "shards", vae=opened_vae, options=EncodeOptions(batch_size=1, format=format, shard_size=4)
    )
    found = 0
    for path in FORMATS[format].find_files(tmp_path / "shards"):
        for header, tensors in FORMATS[format].read_items(path):
            plain = LatentFile.read(tmp_path / "plain" / f"{header.source.key}.safetensors")
            assert header == plain.header
            assert all(torch.equal(tensors[name], plain.tensors[name]) for name in ("mean", "logvar"))
            found += 1
    assert found == len(SIZES)


def test_keys_of_samples_are_plain_unique_and_reversible() -> None:
    names = ["a.jpg", "a.png", "a%2Ejpg", "x.y/__b__.png", "__m__/a.png", "é.png", os.fsdecode(b"caf\xe9.png"), "a b"]
    escaped = [escape_key(name) for name in names]
    assert len(set(escaped)) == len(names)
    assert all(key.isascii() and "." not in key and not key.startswith("__") for key in escaped)
    assert [unquote(key, errors="surrogateescape") for key in escaped] == names


@sharded
def test_a_name_that_is_no_utf8_goes_through(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    name = os.fsdecode(b"caf\xe9.png")
    try:
        os.rename(images / "a.png", images / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert encode_folder(images, tmp_path / "out", vae=opened_vae, options=EncodeOptions(format=format)).done == 1
    assert keys(tmp_path / "out", format) == [[name]]
    assert encode_folder(images, tmp_path / "out", vae=opened_vae, options=EncodeOptions(format=format)).skipped == 1


# ------------------------------------------------------------------------------------------------------- which shard


@sharded
def test_shards_are_filled_in_order_and_equal_to_the_byte(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images = make_images(tmp_path / "images", {f"{i}.png": (16, 24 if i % 2 else 16) for i in range(7)})
    digests = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        report = encode_folder(
            images,
            out,
            vae=opened_vae,
            options=EncodeOptions(format=format, shard_size=3, batch_size=1, workers=workers, store="sample"),
        )
        assert report.done == 7
        assert keys(out, format) == [["0.png", "1.png", "2.png"], ["3.png", "4.png", "5.png"], ["6.png"]]
        digests.append([sha256(path.read_bytes()).hexdigest() for path in FORMATS[format].find_files(out)])
    assert digests[0] == digests[1]


@sharded
def test_a_second_run_does_nothing_and_a_changed_source_rewrites_its_shard_alone(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(7)), tmp_path / "out"
    options: dict[str, Any] = {"format": format, "shard_size": 3, "latent_dtype": "float32"}
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    times, manifest = shards(out), (out / "manifest.jsonl").stat().st_mtime_ns
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    assert (report.done, report.skipped, shards(out)) == (0, 7, times)
    assert (out / "manifest.jsonl").stat().st_mtime_ns == manifest

    before = {
        header.source.key: tensors for header, tensors in FORMATS[format].read_items(FORMATS[format].find_files(out)[1])
    }
    make_images(images, {"4.png": (48, 16)})
    plan = EncodeRun(images, out, opened_vae, EncodeOptions(format=format, shard_size=3, latent_dtype="float32")).plan
    (job,) = plan.jobs
    assert (job.key, job.output, job.reason) == (
        "4.png",
        FORMATS[format].find_files(out)[1],
        "stale: the source changed",
    )
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    assert (report.done, report.skipped) == (1, 6)
    assert {name for name, written in shards(out).items() if times[name] != written} == {job.output.name}
    after = {header.source.key: tensors for header, tensors in FORMATS[format].read_items(job.output)}
    assert list(after) == ["3.png", "4.png", "5.png"]
    assert after["4.png"]["mean"].shape == (4, 2, 6)
    assert all(torch.equal(before[key]["mean"], after[key]["mean"]) for key in ("3.png", "5.png"))


@sharded
def test_images_that_are_added_fill_the_last_shard_and_rename_nothing(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(5)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=3))
    times = shards(out)
    make_images(images, {"00.png": (16, 16), "01.png": (16, 16), "99.png": (16, 16)})
    (images / "1.png").unlink()  # its latent stays, as in the default format
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=3))
    assert (report.done, report.skipped) == (3, 4)
    assert keys(out, format) == [["0.png", "1.png", "2.png"], ["00.png", "3.png", "4.png"], ["01.png", "99.png"]]
    assert shards(out)[min(times)] == times[min(times)]  # the first was full
    other = make_images(tmp_path / "other", {"x.png": (16, 16)})
    assert encode_folder(other, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=3)).done == 1
    assert keys(out, format)[2] == ["01.png", "99.png", "x.png"]


@sharded
@pytest.mark.parametrize(
    "changes", [{"store": "mode"}, {"latent_dtype": "float32"}, {"size": 8}, {"dtype": "bfloat16"}]
)
def test_other_options_redo_all_shards_but_mix_with_none(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, format: str, changes: dict[str, Any]
) -> None:
    vae = vae_path if "dtype" in changes else opened_vae  # that computes in its own
    images, out = make_images(tmp_path / "images", numbered(4)), tmp_path / "out"
    encode_folder(images, out, vae=vae, options=EncodeOptions(format=format, shard_size=3))
    with pytest.raises(ConfigError, match="images that are not given now, such as '0.png', and with other settings"):
        encode_folder(images / "1.png", out, vae=vae, options=EncodeOptions(format=format, shard_size=3, **changes))
    report = encode_folder(images, out, vae=vae, options=EncodeOptions(format=format, shard_size=3, **changes))
    assert (report.done, [len(shard) for shard in keys(out, format)]) == (4, [3, 1])
    assert len(read_manifest(out).settings) == 1


@sharded
def test_a_folder_takes_one_format(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str) -> None:
    images, out = make_images(tmp_path / "images", numbered(1)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    with pytest.raises(ConfigError, match=f"holds latents of the format {format}"):
        encode_folder(images, out, vae=opened_vae)
    (out / "manifest.jsonl").unlink()
    with pytest.raises(ConfigError, match=f"holds latents of the format {format}"):
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format)).skipped == 1


@sharded
def test_shards_of_others_and_doubled_keys_are_refused(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(1)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    (shard,) = FORMATS[format].find_files(out)
    copy = shard.with_name(shard.name.replace("000000", "000005"))
    copy.write_bytes(shard.read_bytes())
    with pytest.raises(ConfigError, match="'0.png' is in .*000000.* and in .*000005"):
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    copy.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="000005.*move it away"):
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))


# ------------------------------------------------------------------------------------------------- failures, interrupts


@sharded
def test_a_bad_image_is_left_out_of_its_shard_and_tried_again(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(5)), tmp_path / "out"
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[:60])
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"format": format, "shard_size": 3}
    report = encode_folder(
        images, out, vae=opened_vae, on_progress=lambda *n: seen.append(n), options=EncodeOptions(**options)
    )
    assert (report.done, report.exit_code, [f.key for f in report.failures]) == (4, 3, ["1.png"])
    assert sorted(seen) == seen and seen[-1] == (5, 5)
    assert keys(out, format) == [["0.png", "2.png"], ["3.png", "4.png"]]
    times = shards(out)
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    assert (report.done, report.skipped, report.failed, shards(out)) == (0, 4, 1, times)  # no shard written for nothing
    (images / "1.png").write_bytes(whole)
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options)).done == 1
    assert keys(out, format)[0] == ["0.png", "1.png", "2.png"]

    (images / "1.png").write_bytes(whole[:60])  # what is stale and fails leaves the shard too
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options)).failed == 1
    assert keys(out, format)[0] == ["0.png", "2.png"]
    for name in ("3.png", "4.png"):
        (images / name).write_bytes(whole[:60])
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options)).failed == 3
    assert keys(out, format) == [["0.png", "2.png"]] and read_manifest(out).num_files == 1


@sharded
def test_a_full_disk_stops_the_run_and_counts_only_whole_shards(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(8)), tmp_path / "out"
    fsync, calls = os.fsync, iter(range(100))

    def fsync_on_a_small_disk(descriptor: int) -> None:
        if next(calls) >= 3:  # a manifest and two shards
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_on_a_small_disk)
        with pytest.raises(SdvaeError, match=r"4 of 8 files were written and are whole"):
            encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=2))
    assert len(shards(out)) == 2
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=2))
    assert (report.done, report.skipped) == (4, 4)


@sharded
def test_a_shard_that_cannot_be_written_fails_its_images(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(4)), tmp_path / "out"
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if "000000" in str(target):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=2))
    assert (report.done, [failure.key for failure in report.failures]) == (2, ["0.png", "1.png"])
    assert "cannot be written: Permission denied" in report.failures[0].reason
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=2)).done == 2


@contextmanager
def encoding(images: Path, out: Path, vae_path: Path, format: str) -> Iterator[Forked]:
    """A process in the middle of encoding: some shards are written, most are not."""
    words = ("encode", images, out, "--vae", vae_path, "--batch-size", 1, "--format", format, "--shard-size", 4)
    process = fork_sdvae(*words, folder=out.parent, seconds_per_file=0.2)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob(f"*{SUFFIX[format]}"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        yield process
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("format", "signal_number"),
    [("webdataset", signal.SIGKILL), ("parquet", signal.SIGKILL), ("webdataset", signal.SIGINT)],
)
def test_a_killed_run_leaves_only_whole_shards_and_the_next_one_finishes(
    tmp_path: Path,
    make_images: MakeImages,
    vae_path: Path,
    opened_vae: OpenedVae,
    format: str,
    signal_number: int,
) -> None:
    images = make_images(tmp_path / "images", {f"{i:02}.png": (16, 16) for i in range(32)})
    out = tmp_path / "out"
    with encoding(images, out, vae_path, format) as process:
        process.send_signal(signal_number)
        process.wait(timeout=20)
        assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    begun = keys(out, format)
    assert 2 <= len(begun) < 8 and all(len(shard) == 4 for shard in begun)
    for path in FORMATS[format].find_files(out):
        assert len(list(FORMATS[format].read_items(path))) == 4
    listed = read_manifest(out).num_items  # all that it lists is there; after a kill not all that is there is listed
    assert listed == (4 * len(begun) if signal_number == signal.SIGINT else 0)
    times = shards(out)
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format, shard_size=4))
    assert (report.done, report.skipped) == (32 - 4 * len(begun), 4 * len(begun))
    written = shards(out)
    assert len(written) == 8 and all(written[name] == times[name] for name in times if name in written)
    assert sorted(key for shard in keys(out, format) for key in shard) == [f"{i:02}.png" for i in range(32)]
    assert read_manifest(out).num_items == 32


# --------------------------------------------------------------------------------------------------------------- damage


def rewrite_tar(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    members = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members.append(change(member.name, file.read()))
    with tarfile.open(path, "w") as tar:
        for name, data in filter(None, members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def nan_array(data: bytes) -> bytes:
    array = np.load(io.BytesIO(data))
    array[0, 0, 0] = np.nan
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, data: None if "0%2Epng.mean" in name else (name, data), "expected mean and logvar"),
        (lambda name, data: None if "0%2Epng.json" in name else (name, data), "without its header"),
        (lambda name, data: (name.replace("1%2E", "2%2E"), data), "is the header of '1.png'"),
        (lambda name, data: (name, data[:100] if "1%2Epng.mean" in name else data), "is no array"),
        (lambda name, data: (name, nan_array(data) if "1%2Epng.mean" in name else data), "not finite"),
        (lambda name, data: (name, b"{}" if "1%2Epng.json" in name else data), "no JSON with a format_version"),
        (lambda name, data: (name, data.replace(b"float16", b"float32")), "is torch.float16"),
        (lambda name, data: (name, data.replace(b'"width": 16', b'"width": 99')), "does not cover"),
    ],
)
def test_damage_in_a_tar_is_named(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, change: Callable[..., Any], reason: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(2)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format="webdataset"))
    rewrite_tar(out / "shard-000000.tar", change)
    with pytest.raises(LatentFileError, match=f"shard-000000.tar: .*{reason}"):
        list(FORMATS["webdataset"].read_items(out / "shard-000000.tar"))


@pytest.mark.parametrize(("name", "value"), [("scaling_factor", 0.5), ("key", "other.png"), ("shift_factor", None)])
def test_a_column_that_contradicts_its_header_is_named(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, name: str, value: Any
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, out = make_images(tmp_path / "images", numbered(2)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format="parquet"))
    (path,) = FORMATS["parquet"].find_files(out)
    table = pq.ParquetFile(path).read()
    place = table.schema.get_field_index(name)
    column = pa.array([table[name][0].as_py(), value], table.schema.field(name).type)
    pq.write_table(table.set_column(place, table.schema.field(name), column), path)
    with pytest.raises(LatentFileError, match=f"row of '1.png': the column {name} has {value!r}; its header says"):
        list(FORMATS["parquet"].read_items(path))
    pq.write_table(table.drop_columns([name]), path)
    with pytest.raises(LatentFileError, match=f"the column {name} is missing"):
        list(FORMATS["parquet"].read_items(path))


@sharded
def test_a_shard_that_was_cut_anywhere_is_not_taken_for_a_shorter_one(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(2)), tmp_path / "out"
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(format=format))
    (path,) = FORMATS[format].find_files(out)
    data = path.read_bytes()
    for length in range(0, len(data), 512):
        path.write_bytes(data[:length])
        with pytest.raises(LatentFileError, match="cannot be read as a shard of latents"):
            list(FORMATS[format].read_items(path))
        with pytest.raises(LatentFileError):
            FORMATS[format].read_headers(path)
