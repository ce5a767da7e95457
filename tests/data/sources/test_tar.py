"""Images in tar files are found and read one by one, and what would be lost silently is an error."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import find_images, find_inputs
from sdvae.data.sources.tar import find_in_tars
from sdvae.errors import ConfigError, ImageError


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


FILES = {"a/cat.jpg": b"one", "a/cat.txt": b"a cat", "dog.PNG": b"four", "._dog.png": b"mac", "a/cat.json": b"{}"}


def contents(images: Sequence[ImageFile]) -> dict[str, bytes | Path]:
    return {image.key: image.content() for image in images}


def test_images_of_a_tar_are_found_by_name_with_their_bytes(tmp_path: Path) -> None:
    tar = pack(tmp_path / "0.tar", FILES)
    images = find_in_tars(tar)
    assert contents(images) == {"0.tar/a/cat.jpg": b"one", "0.tar/dog.PNG": b"four"}
    (tmp_path / "one").write_bytes(b"one")
    assert images[0].digest() == ImageFile("one", tmp_path / "one").digest()
    read = images[0].read()
    assert (read.data, read.size_bytes, read.mtime_ns) == (b"one", 3, tar.stat().st_mtime_ns)
    assert read.digest == images[0].digest() and images[0].has_stamp(read.size_bytes, read.mtime_ns)
    assert images[0].path == tar / "a/cat.jpg"  # for messages


def test_a_folder_and_a_glob_of_tars_keep_tars_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        pack(tmp_path / folder / "0.tar", {"cat.jpg": folder.encode()})
    expected = {"x/0.tar/cat.jpg": b"x", "y/0.tar/cat.jpg": b"y"}
    assert contents(find_inputs(tmp_path)) == expected
    assert contents(find_inputs(f"{tmp_path}/*/0.tar")) == expected
    assert contents(find_inputs(f"{tmp_path}/x/*.tar")) == {"0.tar/cat.jpg": b"x"}


def test_a_folder_with_images_is_one_of_images(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", FILES)
    (tmp_path / "b.png").write_bytes(b"")
    assert find_inputs(tmp_path) == find_images(tmp_path) == [ImageFile("b.png", tmp_path / "b.png")]


@pytest.mark.parametrize(
    ("files", "cut", "message"),
    [
        ({"cat.jpg": b"1" * 5000}, 600, "cut off: it has no end mark"),
        ({"cat.jpg": b"1", "dog.jpg": b"2"}, 1024, "cut off"),  # between two members: tarfile takes it for whole
        ({"../cat.jpg": b"1"}, None, "a name that leads out of it"),
        ({"/cat.jpg": b"1"}, None, "a name that leads out of it"),
        ({"cat.txt": b"1"}, None, "no image found in 1 tar files"),
    ],
)
def test_a_tar_that_cannot_be_taken_whole_is_refused(
    tmp_path: Path, files: dict[str, bytes], cut: int | None, message: str
) -> None:
    tar = pack(tmp_path / "0.tar", files)
    if cut is not None:
        tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=message):
        find_in_tars(tar)


def test_a_tar_that_changed_after_it_was_listed_fails_its_images(tmp_path: Path) -> None:
    tar = pack(tmp_path / "0.tar", {"cat.jpg": b"1" * 5000})
    (image,) = find_in_tars(tar)
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(ImageError, match="cat.jpg: the tar is shorter than it was"):
        image.content()
    tar.unlink()
    with pytest.raises(ImageError, match="cat.jpg: no such file"):
        image.digest()
