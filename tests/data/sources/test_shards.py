"""Tar shards: found, read in order, damaged ones passed over, and exactly resumed."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.images import EncodedImage
from sdvae.data.loader import StreamedData
from sdvae.data.sources.shards import TarShards, find_shards
from sdvae.data.transforms import RandomCrop
from sdvae.errors import ConfigError, ImageError

pytest.importorskip("webdataset")

CROP = RandomCrop(crop_px=16)


def encoded(index: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(first: int, count: int) -> dict[str, bytes]:
    members = {}
    for index in range(first, first + count):
        members[f"dir/{index:03d}.json"] = b"{}"
        members[f"dir/{index:03d}.png"] = encoded(index)
        members[f"dir/{index:03d}.mask.png"] = encoded(99)
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, (first, count) in enumerate([(0, 4), (4, 2), (6, 5), (11, 3)]):
        write_tar(folder / f"part-{shard:03d}.tar", samples(first, count))
    (folder / "notes.md").write_text("no shard")
    return folder


def contents(shards: TarShards, index: int) -> list[bytes | str]:
    return [sample.content if isinstance(sample, EncodedImage) else str(sample) for sample in shards.read_shard(index)]


def test_folders_globs_braces_lists_and_urls_name_the_same_shards(folder: Path, tmp_path: Path) -> None:
    every = [str(folder / f"part-{shard:03d}.tar") for shard in range(4)]
    listing = folder / "list.txt"
    listing.write_text(f"# shards\npart-000.tar\n\npart-00{{1..2}}.tar\nfile:{every[3]}\n")
    assert find_shards(str(folder)) == every
    assert find_shards(str(folder / "part-*.tar")) == every
    assert find_shards(str(folder / "part-{000..003}.tar")) == every
    assert find_shards(f"{folder}/part-{{000..001}}.tar::{folder}/part-00[23].tar") == every
    assert find_shards(every[1]) == every[1:2]
    assert find_shards(str(listing)) == [*every[:3], f"file:{every[3]}"]
    assert find_shards("https://example.org/{0..2}.tar") == [f"https://example.org/{n}.tar" for n in range(3)]
    for url in (every[1], f"file:{every[1]}", f"pipe:cat {every[1]}"):
        assert contents(TarShards([url]), 0) == [encoded(4), encoded(5)]


def test_a_sample_is_its_first_image(tmp_path: Path) -> None:
    members = {"a.JPG": encoded(1), "a.txt": b"words", "b.txt": b"words", "b.cls": b"1", "c.x.png": encoded(2)}
    write_tar(tmp_path / "a.tar.gz", members)
    first, second, third = TarShards(find_shards(str(tmp_path))).read_shard(0)
    assert isinstance(first, EncodedImage) and isinstance(third, EncodedImage)
    assert (first.content, third.content) == (encoded(1), encoded(2))
    assert first.key == f"{tmp_path}/a.tar.gz: a.jpg"
    assert isinstance(second, ImageError) and "b: no image among its files (txt, cls)" in str(second)


def test_a_shard_cut_short_gives_what_it_has_and_one_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "part-000.tar").read_bytes()
    with tarfile.open(folder / "part-000.tar") as tar:
        places = [(member.offset, member.offset_data) for member in tar.getmembers()]
    # three members a sample: json, png, mask.png
    for member, kept in ((0, 0), (1, 0), (2, 1), (8, 3), (10, 3), (11, 4)):
        (tmp_path / "cut.tar").write_bytes(whole[: places[member][1] + 1])
        *good, error = contents(TarShards([str(tmp_path / "cut.tar")]), 0)
        assert good == [encoded(index) for index in range(kept)]
        assert f"cut.tar: the shard cannot be read after {kept} samples (ReadError" in str(error)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "ReadError"), (b"no tar" * 300, "ReadError"), (b"\0" * 10240, "holds no sample")]
)
def test_what_is_no_shard_is_one_error(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    (error,) = contents(TarShards([str(tmp_path / "a.tar")]), 0)
    assert str(error).startswith(f"{tmp_path}/a.tar: the shard") and reason in str(error)
    (error,) = contents(TarShards([f"pipe:cat {tmp_path}/none.tar 2> /dev/null"]), 0)
    assert "cannot be read after 0 samples" in str(error)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_saved_position_continues_with_the_next_samples_bit_for_bit(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "cut.tar").write_bytes((folder / "part-002.tar").read_bytes()[:6000])
    write_tar(tmp_path / "bad.tar", {"1.png": b"no image", **samples(20, 2)})
    urls = [str(folder / f"part-{shard:03d}.tar") for shard in range(4)] + find_shards(str(tmp_path))

    def data() -> StreamedData:
        return StreamedData(TarShards(urls), CROP, 7, shuffle_buffer=5)

    run, options = data(), {"batch_size": 3, "num_workers": num_workers}
    whole, states = [], []
    for batch in islice(run.batches(**options), 18):  # into the third epoch
        whole.append(batch)
        states.append(pickle.dumps(run.state_dict()))
    reasons = {reason for batch in whole for reason in batch.unreadable}
    assert len(reasons) == 2 and any("cut.tar: the shard" in reason for reason in reasons)
    assert len({crop.numpy().tobytes() for batch in whole for crop in batch.x}) > 48
    for stop in (0, 5, 11, 16):
        resumed = data()
        resumed.load_state_dict(pickle.loads(states[stop]))
        for batch, expected in zip(resumed.batches(**options), whole[stop + 1 :], strict=False):
            assert torch.equal(batch.x, expected.x) and batch.unreadable == expected.unreadable


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "empty: no tar shard found; expected .tar"),
        ("*.tar", "no tar shard found"),
        ("{0..2}.tar", "3 of 3 tar shards are not there, the first of them .*0.tar"),
        ("list.txt", "1 of 1 tar shards are not there, the first of them .*/x.tar"),
    ],
)
def test_shards_that_are_not_there_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("x.tar\n")
    with pytest.raises(ConfigError, match=message):
        find_shards(str(tmp_path / name))


def test_without_the_library_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ConfigError, match=r"webdataset.*pip install 'sdvae\[train\]'"):
        find_shards(str(folder))
