"""Parts of a run: no image twice, none left out, and one folder that looks as if one run had made it."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from forked import Forked, fork_sdvae

from sdvae.checkpoints.opened import OpenedVae
from sdvae.cli.main import cli
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.run import EncodeRun, decode_folder, encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents import listing
from sdvae.latents.formats import CACHE_FORMATS, SHARDED_FORMATS
from sdvae.latents.listing import merge_parts
from sdvae.latents.manifest import (
    MANIFEST_NAME,
    Manifest,
    find_part_manifests,
    manifest_name,
    read_manifest,
    read_state,
)
from sdvae.latents.parts import Part
from sdvae.latents.registry import FORMATS, CacheFormat, part_of_shard

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
ROOT = Path(__file__).parents[2]

each_format = pytest.mark.parametrize("format", CACHE_FORMATS)
sharded = pytest.mark.parametrize("format", SHARDED_FORMATS)


def numbered(count: int, size: tuple[int, int] = (16, 16)) -> dict[str, tuple[int, int]]:
    return {f"{'sub/' if i % 3 else ''}{i:02}.png": size for i in range(count)}


def options_for(format: str, shard_size: int = 2) -> dict[str, Any]:
    """One by one: batches round differently, and parts batch differently."""
    return {"format": format, "shard_size": shard_size if format in SHARDED_FORMATS else None, "batch_size": 1}


def in_parts(images: Path, out: Path, count: int, vae: Path, **options: Any) -> list[Any]:
    return [
        encode_folder(images, out, vae, EncodeOptions(shard=f"{i}/{count}", **options)) for i in range(1, count + 1)
    ]


def latents(out: Path, format: str) -> dict[str, bytes]:
    """Each key with header and tensors, as bytes; a key may be in the folder once."""
    items = [item for path in FORMATS[format].find_files(out) for item in FORMATS[format].read_items(path)]
    times = Counter(header.source.key for header, _ in items)
    assert [key for key, count in times.items() if count > 1] == []
    return {header.source.key: FORMATS["webdataset"].encode([(header, tensors)]) for header, tensors in items}


def without_places(manifest: Manifest) -> Any:
    """What a manifest says of each latent, whatever shard it is in."""
    if manifest.format in SHARDED_FORMATS:
        return manifest.settings, sorted(
            (item.key, replace(item, source_mtime_ns=0)) for file in manifest.files.values() for item in file.items
        )
    # the safetensors library writes the entries of a header in any order
    digest = {"digest": ""} if manifest.format == "safetensors" else {}
    return manifest.settings, [replace(file, mtime_ns=0, **digest) for file in manifest.files.values()]


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------------------ division


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_every_key_belongs_to_exactly_one_part(count: int) -> None:
    keys = [f"folder/{i}.jpg" for i in range(100)] + ["\udcff.png", "é.png"]
    owners = [[part.index for part in Part(1, count).all() if part.has(key)] for key in keys]
    assert all(len(owner) == 1 for owner in owners)


def test_parts_are_of_about_one_size_and_stay_as_they_are_between_versions() -> None:
    part, keys = Part(2, 8), [f"{i}.jpg" for i in range(8000)]
    sizes = Counter(next(p.index for p in part.all() if p.has(key)) for key in keys)
    assert len(sizes) == 8 and all(850 < size < 1150 for size in sizes.values())  # 1000 +- 5 standard deviations
    # written down: another function would let a part that resumes leave its images to others
    assert [key for key in keys[:20] if part.has(key)] == ["1.jpg", "9.jpg", "16.jpg", "18.jpg"]


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "1", "a/b", "1/2/3", "-1/2", " 1/2", ""])
def test_a_part_that_cannot_be_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="expected i/n with i from 1 to n, such as 1/8"):
        EncodeOptions(shard=text)


@pytest.mark.parametrize("part", [Part(1, 1), Part(2, 8), Part(2, 16), Part(100, 1000)])
def test_names_of_parts_are_in_order_and_read_back(part: Part, tmp_path: Path) -> None:
    assert Part.from_name(part.name) == part == Part.parse(str(part))
    assert [p.name for p in part.all()] == sorted(p.name for p in part.all())
    assert Part.from_name("2-of-16") is None and Part.from_name("3-of-2") is None
    for format in SHARDED_FORMATS:
        assert part_of_shard(tmp_path / FORMATS[format].shard_name(7, part)) == part


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_the_plans_of_the_parts_are_disjoint_and_together_the_plan_of_the_whole(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, count: int
) -> None:
    images = make_images(tmp_path / "images", {**numbered(5), "a.png": (16, 16), "A.png": (16, 16), "A.jpg": (16, 16)})
    whole = EncodeRun(images, tmp_path / "out", opened_vae).plan
    parts = [
        EncodeRun(images, tmp_path / "out", opened_vae, EncodeOptions(shard=str(part))).plan
        for part in Part(1, count).all()
    ]
    together = [item for plan in parts for item in plan.items]
    assert sorted(together, key=lambda item: item.key) == list(
        whole.items
    )  # also which of a.png and A.png has its name
    assert len({item.output for item in together}) == 8


# ----------------------------------------------------------------------------------------------------------- one folder


@each_format
@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_give_what_one_run_gives(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str, count: int
) -> None:
    images = make_images(tmp_path / "images", numbered(5))
    options = {**options_for(format)}
    encode_folder(images, tmp_path / "whole", vae=opened_vae, options=EncodeOptions(**options))
    reports = in_parts(images, tmp_path / "out", count, vae=opened_vae, **options)
    assert sum(report.done for report in reports) == 5 and {report.exit_code for report in reports} == {0}
    assert latents(tmp_path / "out", format) == latents(tmp_path / "whole", format)
    assert without_places(read_manifest(tmp_path / "out")) == without_places(read_manifest(tmp_path / "whole"))
    assert [Path(report.manifest).name for report in reports] == [
        *(manifest_name(Part(i, count)) for i in range(1, count)),
        MANIFEST_NAME,  # the last part merges
    ]
    assert verify_cache(tmp_path / "out", images=images, vae=opened_vae).problems == ()
    again = in_parts(images, tmp_path / "out", count, vae=opened_vae, **options)
    assert [(report.done, Path(report.manifest).name) for report in again] == [(0, MANIFEST_NAME)] * count


@pytest.mark.parametrize("format", ["webdataset"])  # one for real; the others differ in what one process writes
def test_parts_that_run_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(40)), tmp_path / "out"
    processes = [start(images, out, vae_path, f"{i}/2", format) for i in (1, 2)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    encode_folder(images, tmp_path / "whole", vae=opened_vae, options=EncodeOptions(**options_for(format)))
    assert latents(out, format) == latents(tmp_path / "whole", format)
    assert without_places(read_manifest(out)) == without_places(read_manifest(tmp_path / "whole"))
    assert verify_cache(out).problems == ()


def start(images: Path, out: Path, vae_path: Path, shard: str, format: str, seconds_per_file: float = 0.0) -> Forked:
    words = ["encode", images, out, "--vae", vae_path, "--shard", shard, "--format", format, "--batch-size", 1]
    more = ["--shard-size", 2] if format in SHARDED_FORMATS else []
    return fork_sdvae(*words, *more, folder=out.parent, seconds_per_file=seconds_per_file)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_a_part_that_is_killed_goes_on_alone_and_the_last_one_merges(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(40, (64, 64))), tmp_path / "out"
    options = {**options_for(format)}
    other = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2", **options))
    times = {path: path.stat().st_mtime_ns for path in FORMATS[format].find_files(out)}
    process = start(images, out, vae_path, "1/2", format, 0.2)
    try:
        deadline = time.monotonic() + 60
        while len(FORMATS[format].find_files(out)) < len(times) + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
    state = read_state(out / manifest_name(Part(1, 2)))
    assert state is not None and not state[1].complete
    assert read_manifest(out / manifest_name(Part(1, 2))).num_files == 0  # no line about what it did not finish
    assert not (out / MANIFEST_NAME).exists() and merge_parts(out).missing == ("1/2",)
    begun = len(latents(out, format)) - other.done
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options))
    assert (report.done, report.skipped) == (40 - other.done - begun, begun) and begun >= 3
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())
    assert len(latents(out, format)) == 40 == read_manifest(out).num_items
    assert verify_cache(out).problems == ()


def test_images_that_are_added_move_no_other_image_to_another_part(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images, out = make_images(tmp_path / "images", numbered(9)), tmp_path / "out"
    options = {**options_for("webdataset")}
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options))
    make_images(images, {"!.png": (16, 16), "000.png": (16, 16), "zz.png": (16, 16)})  # while part 2 has not begun
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2", **options))
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options))
    assert len(latents(out, "webdataset")) == 12 == read_manifest(out).num_items and report.exit_code == 0


# ------------------------------------------------------------------------------------------------- changes, other runs


@each_format
def test_a_part_that_encodes_again_takes_the_manifest_away_until_it_has_ended(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for(format)}
    in_parts(images, out, 2, vae=opened_vae, **options)
    key = next(key for key in numbered(6) if Part(1, 2).has(key))
    make_images(images, {key: (24, 16)})
    seen: list[tuple[bool, list[str]]] = []

    def look(*_: int) -> None:
        listed = read_manifest(out / manifest_name(Part(1, 2)))
        seen.append(
            ((out / MANIFEST_NAME).exists(), [item.key for file in listed.files.values() for item in file.items])
        )
        assert merge_parts(out).missing == ("1/2",)

    report = encode_folder(images, out, vae=opened_vae, on_progress=look, options=EncodeOptions(shard="1/2", **options))
    assert report.done == 1 and seen and all(not there and key not in keys for there, keys in seen)
    assert report.manifest == str(out / MANIFEST_NAME) and read_manifest(out).num_items == 6
    assert verify_cache(out, images=images, vae=opened_vae).problems == ()  # of kohya-npz: nothing left by the old name
    assert {path.name for path in out.glob("manifest*")} == {
        MANIFEST_NAME, manifest_name(Part(1, 2)), manifest_name(Part(2, 2))
    }  # fmt: skip


def test_a_merge_that_comes_in_the_way_of_a_part_leaves_no_manifest(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    in_parts(images, out, 2, vae=opened_vae)
    begun = listing.CacheListing(out, "safetensors", Part(1, 2))
    plan = EncodeRun(images, out, opened_vae, EncodeOptions(shard="1/2", overwrite=True)).plan
    write = Manifest.write

    def begin_meanwhile(manifest: Manifest, where: Path) -> Path:
        if manifest.state.count == 1:
            begun.begin([job.output for job in plan.jobs], [job.output for job in plan.jobs])
        return write(manifest, where)

    monkeypatch.setattr(Manifest, "write", begin_meanwhile)
    report = merge_parts(out)
    assert (report.missing, report.manifest, report.exit_code) == (("1/2",), None, 3)
    assert not (out / MANIFEST_NAME).exists()


def test_merging_reads_only_files_that_no_part_lists(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    in_parts(images, out, 2, vae=opened_vae)
    (out / MANIFEST_NAME).unlink()
    monkeypatch.setattr(CacheFormat, "read_items", lambda *_: pytest.fail("a file is read"))
    assert merge_parts(out).num_items == 6


@each_format
@pytest.mark.parametrize("others", [False, True])
def test_parts_and_their_merge_read_no_file_again_that_an_earlier_run_listed(
    tmp_path: Path,
    make_images: MakeImages,
    opened_vae: OpenedVae,
    format: str,
    others: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second part finds no manifest.jsonl any more, and no part lists the shards of a run of the whole."""
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for(format)}
    if others:
        in_parts(images, out, 3, vae=opened_vae, **options)
    else:
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    make_images(images, {f"new{i}.png": (16, 16) for i in range(6)})
    monkeypatch.setattr(CacheFormat, "read_items", lambda *_: pytest.fail("a file is read"))
    reports = in_parts(images, out, 2, vae=opened_vae, **options)
    assert all(report.done for report in reports) and sum(report.done for report in reports) == 6
    assert read_manifest(out).num_items == 12
    assert {path.name for path in out.glob("manifest*")} == {
        MANIFEST_NAME, manifest_name(Part(1, 2)), manifest_name(Part(2, 2))
    }  # fmt: skip


@each_format
def test_a_run_of_the_whole_takes_over_what_parts_have_begun(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for(format)}
    first = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/3", **options))
    assert not (out / MANIFEST_NAME).exists() and first.done
    assert any("sdvae merge" in warning for warning in verify_cache(out).warnings)
    whole = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    assert (whole.done, whole.skipped) == (6 - first.done, first.done)
    assert len(latents(out, format)) == 6 == read_manifest(out).num_items
    assert find_part_manifests(out) == {} and verify_cache(out).problems == ()


@each_format
def test_another_number_of_parts_skips_what_is_done_and_merges_without_the_old_ones(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(8)), tmp_path / "out"
    options = {**options_for(format)}
    begun = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options)).done
    reports = in_parts(images, out, 3, vae=opened_vae, **options)
    assert sum(report.done for report in reports) == 8 - begun
    assert sorted(find_part_manifests(out)) == Part(1, 3).all()
    assert len(latents(out, format)) == 8 == read_manifest(out).num_items


@sharded
def test_a_part_does_not_change_shards_that_are_not_its_own(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for(format)}
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options))
    assert sum(report.skipped for report in in_parts(images, out, 2, vae=opened_vae, **options)) == 6
    make_images(images, {key: (24, 16) for key in numbered(6)})
    with pytest.raises(
        ConfigError, match="the source changed.*00000[0-2].*which part 1/2 may not change: encode without"
    ):
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options))
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(**options)).done == 6


@sharded
def test_a_part_does_not_look_into_shards_that_another_may_be_writing(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for(format)}
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2", **options))
    FORMATS[format].find_files(out)[0].write_bytes(b"gone before it could be read")
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options)).exit_code == 0


def test_parts_of_different_settings_are_said_to_be(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    options = {**options_for("webdataset")}
    encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="1/2", **options))
    report = encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2", store="mode", **options))
    assert any("different settings" in warning for warning in report.warnings)
    assert verify_cache(out).problems != ()
    with pytest.raises(ConfigError, match="holds latents of the format webdataset"):
        encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2"))


@each_format
def test_a_damaged_image_is_reported_by_its_part_and_by_the_merge(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    key = next(key for key in numbered(6) if Part(2, 2).has(key))
    whole = (images / key).read_bytes()
    (images / key).write_bytes(whole[:60])
    options = {**options_for(format)}
    good, bad = in_parts(images, out, 2, vae=opened_vae, **options)
    assert (good.exit_code, bad.exit_code) == (0, 3) and [failure.key for failure in bad.failures] == [key]
    merged = merge_parts(out)
    assert (merged.failed, merged.num_items, merged.exit_code) == ({"2/2": 1}, 5, 3)
    (images / key).write_bytes(whole)
    assert encode_folder(images, out, vae=opened_vae, options=EncodeOptions(shard="2/2", **options)).done == 1
    assert (merge_parts(out).exit_code, read_manifest(out).num_items) == (0, 6)


def pack_tars(images: Path, out: Path) -> Path:
    names = list(numbered(6))
    out.mkdir()
    for number, part in enumerate((names[:4], names[4:])):
        with tarfile.open(out / f"{number}.tar", "w") as tar:
            for name in part:
                tar.add(images / name, name)
    return out


def pack_parquet(images: Path, out: Path) -> Path:
    names = list(numbered(6))
    out.mkdir()
    for number, part in enumerate((names[:4], names[4:])):
        cells = [{"bytes": (images / name).read_bytes(), "path": name} for name in part]
        table = pa.table({"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
        pq.write_table(table, out / f"{number}.parquet", row_group_size=2)
    return out


@each_format
@pytest.mark.parametrize(
    ("pack", "folders"), [(pack_tars, {"0.tar", "1.tar"}), (pack_parquet, {"train"})], ids=["tars", "dataset"]
)
def test_packed_images_are_divided_as_files_are(
    tmp_path: Path,
    make_images: MakeImages,
    opened_vae: OpenedVae,
    format: str,
    pack: Callable[[Path, Path], Path],
    folders: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    packed = pack(images, tmp_path / "packed")
    options = {**options_for(format)}
    reports = in_parts(packed, out, 3, vae=opened_vae, **options)
    assert sum(report.done for report in reports) == 6 == read_manifest(out).num_items
    encode_folder(images, tmp_path / "whole", vae=opened_vae, options=EncodeOptions(**options))

    def means(folder: Path) -> dict[str, list[float]]:
        items = [item for path in FORMATS[format].find_files(folder) for item in FORMATS[format].read_items(path)]
        return {h.source.digest: t["mean"].flatten().tolist() for h, t in items}

    assert means(out) == means(tmp_path / "whole")
    assert {key.split("/")[0] for key in latents(out, format)} == folders
    again = in_parts(packed, out, 3, vae=opened_vae, **options)
    assert sum(report.done for report in again) == 0
    checked = verify_cache(out, images=packed, device="cpu")
    assert (checked.problems, len(checked.reencoded)) == ((), 6)


@pytest.mark.parametrize("count", [2, 12])
def test_decoding_in_parts_gives_the_images_of_one_run(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, count: int
) -> None:
    images = make_images(tmp_path / "images", {**numbered(4), "a.png": (24, 16), "a.jpg": (16, 24)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "whole", vae=opened_vae)
    done = [
        decode_folder(
            tmp_path / "latents", tmp_path / "out", vae=opened_vae, options=DecodeOptions(shard=str(part))
        ).done
        for part in Part(1, count).all()
    ]
    assert sum(done) == 6

    def pictures(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}

    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole") and len(pictures(tmp_path / "out")) == 6


# --------------------------------------------------------------------------------------------------------- command line


def test_merge_says_which_parts_are_missing_and_then_merges(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", numbered(6)), tmp_path / "out"
    nothing = sdvae("merge", out)
    assert nothing.exit_code == 2 and "no manifest of a part; expected manifest.part-1-of-2.jsonl" in nothing.stderr
    assert sdvae("encode", images, out, "--vae", vae_path, "--shard", "2/3").exit_code == 0
    early = sdvae("merge", out)
    assert early.exit_code == 3 and "2 of 3 parts have not ended:\n  --shard 1/3\n  --shard 3/3\n" in early.stdout
    data = json.loads(sdvae("merge", out, "--json").stdout)
    assert (data["missing"], data["manifest"], data["exit_code"]) == (["1/3", "3/3"], None, 3)
    for shard in ("1/3", "3/3"):
        assert sdvae("encode", images, out, "--vae", vae_path, "--shard", shard).exit_code == 0
    (out / MANIFEST_NAME).unlink()
    merged = sdvae("merge", out)
    assert (merged.exit_code, merged.stdout) == (0, f"merge: 3 parts, 6 files, 6 latents -> {out}/manifest.jsonl\n")
    data = json.loads(sdvae("merge", out, "--json").stdout)
    assert set(data) == {
        "command", "out", "format", "num_parts", "missing", "failed", "num_files", "num_items", "manifest", "warnings",
        "exit_code",
    }  # fmt: skip
    assert sdvae("verify", out).exit_code == 0


def test_a_wrong_part_is_wrong_usage(tmp_path: Path, make_images: MakeImages) -> None:
    images = make_images(tmp_path / "images", numbered(1))
    result = sdvae("encode", images, tmp_path / "out", "--shard", "3/2")
    assert result.exit_code == 2 and "shard is '3/2'; expected i/n" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest_of_a_part_is_named(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae) -> None:
    images, out = make_images(tmp_path / "images", numbered(4)), tmp_path / "out"
    in_parts(images, out, 2, vae=opened_vae)
    path = out / manifest_name(Part(2, 2))
    path.write_text(path.read_text().replace('"part": {"index": 2', '"part": {"index": "2"'))
    with pytest.raises(LatentFileError, match="part-2-of-2.jsonl: damaged manifest: index is '2'"):
        merge_parts(out)
