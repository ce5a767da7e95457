"""From settings to data: every source, what is held out, and what is refused before a run."""

from __future__ import annotations

import io
import logging
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.images import EncodedImage
from sdvae.errors import ConfigError, ImageError, TrainingError
from sdvae.training.config import DataConfig
from sdvae.training.data import UnreadableGuard, open_data

SIZES = [(40, 30), (50, 40), (24, 60), (80, 70), (64, 64), (33, 90)]  # width, height


def encoded(index: int) -> bytes:
    """A picture whose mean tells its index."""
    file = io.BytesIO()
    Image.new("RGB", SIZES[index], (40 * index,) * 3).save(file, "PNG")
    return file.getvalue()


def index_of(pixels: np.ndarray) -> int:
    return round(float(pixels.mean()) / 40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same six pictures from each source: name -> settings."""
    root = tmp_path_factory.mktemp("source")
    (root / "files").mkdir()
    for index in range(6):
        (root / "files" / f"{index}.png").write_bytes(encoded(index))
    found: dict[str, dict[str, Any]] = {"images": {"path": str(root / "files")}}
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "files", arcname="files")
    found["webdataset"] = {"source": "webdataset", "path": str(root / "a.tar"), "num_val_images": 0}
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(index), "path": None} for index in range(6)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(root / "saved")
    found["datasets"] = {"source": "datasets", "path": str(root / "saved")}
    found["streaming"] = {**found["datasets"], "streaming": True, "num_val_images": 0}
    return found


def settings(source: dict[str, Any], **changes: Any) -> DataConfig:
    return DataConfig(**{"crop_px": 16, "num_val_images": 2, **source, **changes})


@pytest.mark.parametrize("name", ["images", "datasets", "webdataset", "streaming"])
@pytest.mark.parametrize("crop", ["native", "resized", "random_resized"])
def test_every_source_gives_crops_of_its_images(source: dict[str, dict[str, Any]], name: str, crop: str) -> None:
    config = settings(source[name], crop=crop, min_px=30, shuffle_buffer=3)
    data, val_images = open_data(config, seed=0)
    held_out = {index_of(image.read().pixels) for image in val_images}
    assert held_out == ({0, 3} if config.num_val_images else set())
    assert data.num_images == (None if config.is_stream else 4)
    batches = list(islice(data.batches(batch_size=5), 8))
    assert all(batch.x.shape == (5, 3, 16, 16) and batch.x.dtype == torch.float32 for batch in batches)
    seen = {index_of((crop.numpy() + 1) * 127.5) for batch in batches for crop in batch.x}
    assert seen == {0, 1, 2, 3, 4, 5} - {2} - held_out
    assert sum(batch.num_small for batch in batches) > 0


def test_validation_images_have_names_and_are_evenly_held_out(source: dict[str, dict[str, Any]]) -> None:
    for name, keys in (("images", ["0.png", "2.png", "4.png"]), ("datasets", ["[0]", "[2]", "[4]"])):
        _, val_images = open_data(settings(source[name], num_val_images=3), seed=0)
        assert all(isinstance(image, EncodedImage) for image in val_images)
        assert [image.key[-len(key) :] for image, key in zip(val_images, keys, strict=True)] == keys
    for name in source:
        config = settings(source[name], val_path=source["images"]["path"], num_val_images=4)
        data, val_images = open_data(config, seed=0)
        assert [image.key for image in val_images] == [f"{index}.png" for index in range(4)]
        assert data.num_images in (None, 6)


def test_the_seed_changes_what_is_drawn(source: dict[str, dict[str, Any]]) -> None:
    for name in source:
        first = [next(open_data(settings(source[name]), seed)[0].batches(batch_size=6)).x for seed in (0, 0, 1)]
        assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("name", ["images", "datasets", "webdataset", "streaming"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crop_px": 80},
            "'data.crop_px' is 80, but the 6 images .* short sides are 24 to 70 px. Set data.crop_px to 70",
        ),
        ({"crop_px": 48, "min_px": 200, "val_path": "x"}, "'data.min_px' is 200.* largest of them 70 px"),
    ],
)
def test_images_that_are_all_too_small_are_refused(
    source: dict[str, dict[str, Any]], name: str, changes: dict[str, Any], message: str
) -> None:
    if "val_path" in changes:
        changes = {**changes, "val_path": source["images"]["path"]}
    config = settings({**source[name], "num_val_images": 0}, **changes)
    with pytest.raises(ConfigError, match=message):
        next(open_data(config, seed=0)[0].batches(batch_size=1))


def test_single_small_images_and_resized_ones_may_be_enlarged(source: dict[str, dict[str, Any]]) -> None:
    for changes in ({"crop_px": 70}, {"crop_px": 100, "crop": "resized"}, {"crop_px": 100, "crop": "random_resized"}):
        config = settings(source["images"], num_val_images=0, **changes)
        batch = next(open_data(config, seed=0)[0].batches(batch_size=6))
        assert batch.x.shape[-1] == config.crop_px and batch.num_read == 6


def test_too_many_held_out_is_an_error(source: dict[str, dict[str, Any]]) -> None:
    for name in ("images", "datasets"):
        with pytest.raises(ConfigError, match="'data.num_val_images' is 6, but .* has 6 images"):
            open_data(settings(source[name], num_val_images=6), seed=0)


def test_a_folder_of_damaged_images_is_refused_at_once(tmp_path: Path) -> None:
    for index in range(100):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of the 64 images looked at can be read: .*0.jpg: not an image"):
        open_data(DataConfig(path=str(tmp_path), num_val_images=1), seed=0)
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(ImageError, match="none of the 1 images looked at can be read: .*a.tar: the shard"):
        open_data(DataConfig(path=str(tmp_path / "a.tar"), source="webdataset", num_val_images=0), seed=0)
    with pytest.raises(ConfigError, match="no such file"):
        open_data(DataConfig(path=str(tmp_path / "none")), seed=0)


def test_the_guard_warns_once_per_image_and_ends_a_run_with_too_many(caplog: pytest.LogCaptureFixture) -> None:
    guard = UnreadableGuard(0.05)
    with caplog.at_level(logging.WARNING):
        guard.add(100, ["a: cut", "b: cut"])
        guard.add(100, ["a: cut"])
    assert [record.message for record in caplog.records] == ["left out: a: cut", "left out: b: cut"]
    guard.add(10, ["c: cut"] * 6)  # 9 of 210: below ten, whatever the part
    with pytest.raises(TrainingError) as caught:
        guard.add(10, ["d: cut"] * 3)
    assert str(caught.value).startswith("12 of 220 samples read are damaged (5.5%, data.max_unreadable_ratio is 5.0%)")
    assert "a: cut; b: cut; c: cut." in str(caught.value)
    assert caught.value.exit_code == 1

    guard = UnreadableGuard(0.05)
    guard.add(1000, ["x"] * 50)  # the ratio itself is allowed
    with pytest.raises(TrainingError, match="51 of 1000"):
        guard.add(0, ["x"])
    with pytest.raises(TrainingError, match="2 of 2"):
        UnreadableGuard(1.0).add(2, ["x", "y"])
    UnreadableGuard(0.0).add(4, [])
