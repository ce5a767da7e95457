"""Which images are measured, in which blocks, and as which pixels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import choose_images, find_images
from sdvae.errors import ImageError
from sdvae.evaluation.images import BLOCK_IMAGES, blocks_of, prepare, slice_of, stand_digest
from sdvae.evaluation.protocol import PRESETS, Protocol

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]


@pytest.mark.parametrize("count", [1, BLOCK_IMAGES - 1, BLOCK_IMAGES, BLOCK_IMAGES + 1, 100])
def test_blocks_hold_every_image_once(count: int) -> None:
    blocks = blocks_of(count)
    assert [index for block in blocks for index in block] == list(range(count))
    assert all(index // BLOCK_IMAGES == number for number, block in enumerate(blocks) for index in block)


def test_fewer_images_keep_the_share_of_each_folder() -> None:
    files = [ImageFile(f"{folder}/{i:03}.png", Path()) for folder in ("a", "b", "c") for i in range(40)]
    chosen = choose_images(files, 30)
    assert Counter(slice_of(file.key) for file in chosen) == {"a": 10, "b": 10, "c": 10}
    assert len({file.key for file in chosen}) == 30
    assert choose_images(files, 500) == files


def test_the_slice_is_the_first_folder() -> None:
    assert [slice_of(key) for key in ("faces/old/a.png", "faces/b.png", "c.png")] == ["faces", "faces", ""]


def test_pixels_come_at_the_protocols_size(tmp_path: Path, make_images: MakeImages) -> None:
    (file,) = find_images(make_images(tmp_path, {"a.png": (90, 60)}))
    assert prepare(0, file, PRESETS["native"]).pixels.shape == (60, 90, 3)
    assert prepare(0, file, Protocol(preset="x", size_px=32, crop="center")).pixels.shape == (32, 32, 3)
    assert prepare(0, file, Protocol(preset="x", size_px=30)).pixels.shape == (30, 45, 3)


def test_16_bit_gray_and_transparency_become_8_bit_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8110, np.uint16)).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    clear, gray = find_images(tmp_path)
    assert np.array_equal(np.unique(prepare(0, gray, PRESETS["native"]).pixels), [0x81])  # rounded
    assert np.array_equal(np.unique(prepare(0, clear, Protocol(preset="x", background="#102030")).pixels), [16, 32, 48])


def test_a_damaged_file_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"a\.png"):
        prepare(0, find_images(tmp_path)[0], PRESETS["native"])
    with pytest.raises(ImageError, match="no such file"):
        prepare(0, ImageFile("gone.png", tmp_path / "gone.png"), PRESETS["native"])


def test_a_changed_file_changes_the_digest_of_the_stand(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, {"a.png": (9, 9), "b.png": (9, 9)})
    before = stand_digest(find_images(tmp_path))
    assert stand_digest(find_images(tmp_path)) == before
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b"x")
    longer = stand_digest(find_images(tmp_path))
    assert longer != before
    os.utime(tmp_path / "b.png", (1, 1))
    touched = stand_digest(find_images(tmp_path))
    assert touched != longer, "a file of the same size may have other content"
    (tmp_path / "b.png").write_bytes(b"")
    os.utime(tmp_path / "b.png", (1, 1))
    assert stand_digest(find_images(tmp_path)) != touched, "nor does the time of change tell all"
    (empty,) = (file for file in find_images(tmp_path) if file.key == "b.png")
    assert stand_digest([empty]) != stand_digest([replace(empty, key="c.png")])
    (tmp_path / "b.png").unlink()
    assert stand_digest([empty]) == stand_digest([empty]), "a file that is gone has a stand too"
