"""Images in Hugging Face datasets, as `find.find_images` gives those in folders: any of them at any time.

A row is found by the name of its dataset and its number, so that another process can read it too; each process opens a
dataset once. Training reads datasets in its own order instead (training/data.py). The library is imported when a
dataset is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from sdvae.data.sources.datasets import DatasetImages, open_dataset
from sdvae.data.sources.files import FileBytes, ImageFile, read_regular

__all__ = ["HUB_PREFIX", "TABLE_SUFFIXES", "DatasetName", "DatasetRow", "find_rows", "is_table"]

HUB_PREFIX = "hf://datasets/"
TABLE_SUFFIXES = (".parquet", ".arrow")
_DIGITS = 9


@dataclass(frozen=True)
class DatasetName:
    """Which images of which dataset; the fields are those of `hf_datasets.open_dataset`."""

    path: str
    split: str = "train"
    subset: str | None = None
    image_column: str = "image"

    def open(self) -> DatasetImages:
        images = open_dataset(self.path, split=self.split, subset=self.subset, image_column=self.image_column)
        assert isinstance(images, DatasetImages)
        return images


@dataclass(frozen=True)
class DatasetRow:
    """Where an image lies in a dataset (`files.Member`)."""

    dataset: DatasetName
    index: int

    def has_stamp(self, size_bytes: int, mtime_ns: int) -> bool:
        return _opened(self.dataset).modified_ns == mtime_ns  # the size alone would take as long as reading the image

    def read(self, name: str) -> FileBytes:
        content = self.content(name)
        data = read_regular(content) if isinstance(content, Path) else content
        return FileBytes(data=data, size_bytes=len(data), mtime_ns=_opened(self.dataset).modified_ns or 0)

    def content(self, name: str) -> Path | bytes:
        return _opened(self.dataset)[self.index].content

    def absolute(self) -> DatasetRow:
        path = Path(self.dataset.path).expanduser()
        return replace(self, dataset=replace(self.dataset, path=str(path.absolute()))) if path.exists() else self


_open: dict[DatasetName, DatasetImages] = {}
_opening = Lock()


def _opened(name: DatasetName) -> DatasetImages:
    with _opening:
        if name not in _open:
            _open[name] = name.open()
        return _open[name]


def is_table(spec: str | Path) -> bool:
    """Whether `spec` is a dataset on the hub, or a parquet or arrow file."""
    path = Path(spec).expanduser()
    return str(spec).startswith(HUB_PREFIX) or (path.suffix in TABLE_SUFFIXES and path.is_file())


def find_rows(
    spec: str | Path, *, split: str = "train", subset: str | None = None, image_column: str = "image"
) -> list[ImageFile]:
    """The images of a dataset: "hf://datasets/owner/name", or a path as `open_dataset` takes it.

    Their keys are the split and the number of the row, train/000000012, after the subset where one is given: names in a
    dataset need be neither there nor unique. Returns: in the order of the dataset.
    Raises: ConfigError where it cannot be had, or holds nothing.
    """
    name = DatasetName(str(spec).removeprefix(HUB_PREFIX), split, subset, image_column)
    images = name.open()
    with _opening:
        _open[name] = images  # anew: the files may be others than those of the last time
    folder = split if subset is None else f"{subset}/{split}"
    rows = range(len(images))
    return [ImageFile(f"{folder}/{i:0{_DIGITS}}", Path(f"{name.path}[{i}]"), DatasetRow(name, i)) for i in rows]
