"""Images in datasets are found and read one by one, in any process, and show when they changed."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdvae.data.images import EncodedImage, read_image_bytes
from sdvae.data.sources.dataset_rows import HUB_PREFIX, DatasetRow, find_rows, is_table
from sdvae.data.sources.datasets import DatasetImages
from sdvae.data.sources.files import ImageFile
from sdvae.errors import ConfigError, ImageError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", folder)


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


COLOURS = ("red", "green", "blue")


def table(cells: list[Any], column: str = "image") -> Any:
    return datasets.Dataset.from_dict({column: cells}, features=datasets.Features({column: datasets.Image()}))


def write(path: Path, *colours: str, column: str = "image") -> Path:
    table([{"bytes": png(colour), "path": None} for colour in colours], column).to_parquet(path)
    return path


def saved(path: Path) -> Path:
    datasets.DatasetDict(test=table([{"bytes": png(colour), "path": None} for colour in COLOURS])).save_to_disk(path)
    return path


def folder_of_parquet(path: Path) -> Path:
    path.mkdir()
    write(path / "0.parquet", *COLOURS[:2])
    write(path / "1.parquet", *COLOURS[2:])
    return path


@pytest.mark.parametrize(
    ("form", "split"),
    [
        (lambda folder: write(folder / "one.parquet", *COLOURS), "train"),
        (lambda folder: folder_of_parquet(folder / "parquet"), "train"),
        (lambda folder: saved(folder / "saved"), "test"),
        (lambda folder: next(saved(folder / "saved").rglob("*.arrow")), "train"),
    ],
    ids=["parquet file", "parquet folder", "saved", "arrow file"],
)
def test_every_form_gives_its_images_by_number(tmp_path: Path, form: Any, split: str) -> None:
    path = form(tmp_path)
    assert is_table(path) == path.is_file()
    images = find_rows(path, split=split)
    assert [image.key for image in images] == [f"{split}/00000000{i}" for i in range(3)]
    assert [image.content() for image in images] == [png(colour) for colour in COLOURS]
    (tmp_path / "green.png").write_bytes(png("green"))
    assert images[1].digest() == ImageFile("", tmp_path / "green.png").digest()
    assert str(images[1].path) == f"{path}[1]"
    size_bytes, mtime_ns = stamp_of(images[1])
    assert size_bytes == len(png("green")) and mtime_ns > 0
    assert images[1].has_stamp(size_bytes, mtime_ns) and not images[1].has_stamp(size_bytes, mtime_ns - 1)


def stamp_of(image: ImageFile) -> tuple[int, int]:
    read = image.read()
    return read.size_bytes, read.mtime_ns


def test_a_row_is_fetched_once_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    get = DatasetImages.__getitem__

    def counting(images: DatasetImages, index: int, /) -> EncodedImage:
        fetched.append(index)
        return get(images, index)

    monkeypatch.setattr(DatasetImages, "__getitem__", counting)
    image = find_rows(write(tmp_path / "one.parquet", *COLOURS))[1]
    assert image.read().data == png("green") and fetched == [1]


def test_a_changed_file_is_opened_anew_and_has_another_stamp(tmp_path: Path) -> None:
    path = write(tmp_path / "one.parquet", *COLOURS)
    before = find_rows(path)[2]
    stamp = stamp_of(before)
    write(path, "red", "green", "white")
    after = find_rows(path)[2]
    assert after.content() == png("white")
    assert not after.has_stamp(*stamp)


def test_images_beside_the_dataset_have_no_stamp_that_says_unchanged(tmp_path: Path) -> None:
    """The dataset's own files stay as they are where such an image changes."""
    (tmp_path / "red.png").write_bytes(png("red"))
    cells = [{"bytes": None, "path": str(tmp_path / "red.png")}, {"bytes": png("green"), "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "one.parquet")
    images = find_rows(tmp_path / "one.parquet")
    assert images[0].content() == tmp_path / "red.png"
    assert not any(image.has_stamp(*stamp_of(image)) for image in images)


def test_rows_without_an_image_and_damaged_ones_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    table([None, {"bytes": b"no picture", "path": "a.png"}, {"bytes": png("red"), "path": None}]).to_parquet(path)
    none, damaged, good = find_rows(path)
    with pytest.raises(ImageError, match=r"one.parquet\[0\]: holds no image"):
        none.content()
    content = damaged.content()
    assert isinstance(content, bytes)
    with pytest.raises(ImageError, match=r"^one\[1\]: "):
        read_image_bytes(content, "one[1]")
    assert good.content() == png("red")


def test_another_process_in_another_folder_reads_the_same_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one.parquet", *COLOURS)
    monkeypatch.chdir(tmp_path)
    member = find_rows("one.parquet")[1].member
    assert isinstance(member, DatasetRow) and member.absolute().dataset.path == str(tmp_path / "one.parquet")
    (tmp_path / "row").write_bytes(pickle.dumps(member.absolute()))
    script = (
        f"import pickle, sys; sys.stdout.buffer.write(pickle.load(open({str(tmp_path / 'row')!r}, 'rb')).content(''))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd="/", env=environment, check=True)
    assert result.stdout == png("green")


def test_columns_subsets_and_the_hub_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "one.parquet", "red", column="picture")
    with pytest.raises(ConfigError, match="no column 'image'; columns of images: picture"):
        find_rows(path)
    assert find_rows(path, image_column="picture")[0].content() == png("red")
    assert find_rows(folder_of_parquet(tmp_path / "x"), subset="default")[0].key == "default/train/000000000"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert is_table(f"{HUB_PREFIX}nobody/nothing")
    with pytest.raises(ConfigError, match="dataset 'nobody/nothing' is no file"):
        find_rows(f"{HUB_PREFIX}nobody/nothing")
