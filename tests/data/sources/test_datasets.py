"""Hugging Face datasets from local files: the same pixels, exact resume, clear errors."""

from __future__ import annotations

import io
import pickle
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.images import EncodedImage, read_image_bytes
from sdvae.data.loader import IndexedData, StreamedData
from sdvae.data.sources.datasets import DatasetImages, DatasetShards, open_dataset
from sdvae.data.transforms import RandomCrop
from sdvae.errors import ConfigError, ImageError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

CROP = RandomCrop(crop_px=16)
COUNT = 11


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(index: int) -> bytes:
    """A picture of noise, turned by its EXIF orientation."""
    pixels = np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).resize((40, 30)).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def table(cells: list[Any]) -> Any:
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"picture": cells, "label": list(range(len(cells)))}, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset in every form: parquet files, an arrow file, saved, saved with splits. Sample 7 is damaged."""
    folder = tmp_path_factory.mktemp("datasets")
    cells = [{"bytes": encoded(index), "path": None} for index in range(COUNT)]
    cells[7]["bytes"] = cells[7]["bytes"][:300]
    data = table(cells)
    (folder / "parquet").mkdir()
    for index, rows in enumerate([range(0, 4), range(4, 6), range(6, COUNT)]):
        data.select(rows).to_parquet(folder / "parquet" / f"{index}.parquet")
    data.to_parquet(folder / "one.parquet")
    data.save_to_disk(folder / "saved", num_shards=3)
    datasets.DatasetDict(train=data.select(range(2)), test=data).save_to_disk(folder / "splits")
    data.save_to_disk(folder / "flat")
    (folder / "flat" / "data-00000-of-00001.arrow").rename(folder / "one.arrow")
    return folder


FORMS = [("parquet", "train"), ("one.parquet", "train"), ("saved", "train"), ("splits", "test"), ("one.arrow", "train")]


def opened(path: Path | str, split: str = "train", **options: Any) -> Any:
    return open_dataset(str(path), split=split, **{"image_column": "picture", **options})


@pytest.mark.parametrize(("name", "split"), FORMS)
def test_every_form_gives_the_encoded_images(folder: Path, name: str, split: str) -> None:
    images = opened(folder / name, split)
    assert isinstance(images, DatasetImages) and len(images) == COUNT
    assert [images[index].content for index in (0, 5, 10)] == [encoded(index) for index in (0, 5, 10)]
    pixels = images[3].read().pixels
    assert np.array_equal(pixels, read_image_bytes(encoded(3), "").pixels) and pixels.shape == (40, 30, 3)
    with pytest.raises(ImageError, match=rf"{name}\[7\]: truncated"):
        images[7].read()

    shards = opened(folder / name, split, streaming=True)
    assert isinstance(shards, DatasetShards) and shards.num_shards == (3 if name in ("parquet", "saved") else 1)
    samples = [sample for shard in range(shards.num_shards) for sample in shards.read_shard(shard)]
    assert all(isinstance(sample, EncodedImage) for sample in samples)
    assert [sample.content for sample in samples if sample is not samples[7]] == [
        encoded(index) for index in range(COUNT) if index != 7
    ]


@pytest.mark.parametrize(
    ("name", "streaming", "num_workers"),
    [
        *((name, streaming, 0) for name in ("parquet", "saved") for streaming in (False, True)),
        ("parquet", True, 2),  # workers open files again, or have them from the process that forked them
        ("saved", False, 2),
    ],
)
def test_a_saved_position_continues_with_the_next_samples_bit_for_bit(
    folder: Path, name: str, streaming: bool, num_workers: int
) -> None:
    def data() -> Any:
        source = opened(folder / name, streaming=streaming)
        return StreamedData(source, CROP, 5, shuffle_buffer=3) if streaming else IndexedData(source, CROP, 5)

    run, options = data(), {"batch_size": 2, "num_workers": num_workers}
    whole, states = [], []
    for batch in islice(run.batches(**options), 16):
        whole.append(batch)
        states.append(pickle.dumps(run.state_dict()))
    assert len({crop.numpy().tobytes() for batch in whole for crop in batch.x}) > 28
    assert any(f"{name}" in reason and "truncated" in reason for batch in whole for reason in batch.unreadable)
    for stop in (0, 7):
        resumed = data()
        resumed.load_state_dict(pickle.loads(states[stop]))
        for batch, expected in zip(resumed.batches(**options), whole[stop + 1 :], strict=False):
            assert torch.equal(batch.x, expected.x) and batch.unreadable == expected.unreadable


def test_a_column_of_bytes_or_of_paths_is_a_column_of_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    paths = table([str(tmp_path / "a.jpg"), None])
    paths.save_to_disk(tmp_path / "paths")
    images = opened(tmp_path / "paths")
    assert images[0].read().pixels.shape == (40, 30, 3)
    with pytest.raises(ImageError, match=r"paths\[1\]: holds no image"):
        images[1]
    datasets.Dataset.from_dict({"picture": [encoded(1)]}).save_to_disk(tmp_path / "bytes")
    assert opened(tmp_path / "bytes")[0].content == encoded(1)
    url = f"file://{tmp_path}/a.jpg"
    raw = datasets.Features({"picture": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    cells = [{"bytes": None, "path": url}, {"bytes": None, "path": url + "x"}]
    datasets.Dataset.from_dict({"picture": cells}, features=raw).save_to_disk(tmp_path / "urls")
    images = opened(tmp_path / "urls")
    assert images[0].content == encoded(0)
    with pytest.raises(ImageError, match="a.jpgx.: cannot be fetched .FileNotFoundError"):
        images[1]


def test_a_damaged_shard_is_one_unreadable_sample(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "parquet").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = opened(tmp_path, streaming=True)
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-50])
    (sample,) = shards.read_shard(1)
    assert isinstance(sample, ImageError)
    assert str(sample).startswith(f"{tmp_path}, shard 1: cannot be read after 0 samples (")
    assert len(list(shards.read_shard(2))) == 5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parquet", {"image_column": "image"}, "no column 'image'; columns of images: picture. Set image_column"),
        ("parquet", {"image_column": "label"}, "column 'label' holds no images; columns of images: picture"),
        ("parquet", {"split": "dev"}, r"split=dev.*\['train'\]"),
        ("parquet", {"subset": "tiny"}, r"subset=tiny.*'default'"),
        ("splits", {"split": "dev"}, "splits: no split 'dev'; split can be test, train"),
        ("saved", {"split": "dev"}, "saved: no split 'dev'; split can be train"),
        ("saved/state.json", {}, "expected a .parquet or .arrow file, a folder or the name"),
        ("nowhere", {}, "nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_opened_says_what_could(
    folder: Path, name: str, options: dict[str, str], message: str, streaming: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(folder / name, streaming=streaming, **options)


def test_a_dataset_without_images_or_samples_is_an_error(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "number": [1]}).save_to_disk(tmp_path / "words")
    with pytest.raises(ConfigError, match="no column 'picture'; it has none of images, only text, number"):
        opened(tmp_path / "words")
    table([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match="corresponds to no data"):
        opened(tmp_path / "empty.parquet")
    with pa.OSFile(str(tmp_path / "empty.arrow"), "wb") as file:
        pa.ipc.new_stream(file, table([]).features.arrow_schema).close()
    with pytest.raises(ConfigError, match="split 'train' holds no sample"):
        opened(tmp_path / "empty.arrow")
    (sample,) = opened(tmp_path / "empty.parquet", streaming=True).read_shard(0)
    assert "holds no sample" in str(sample)


def test_a_hub_out_of_reach_tells_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        with pytest.raises(ConfigError, match="dataset 'nobody/nothing' is no file.*HF_HOME.*give local"):
            opened("nobody/nothing", streaming=streaming)


def test_without_the_library_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets.*pip install 'sdvae\[datasets\]'"):
        opened(folder / "saved")
