"""Images of Hugging Face datasets: on the hub, in local parquet or arrow files, or saved folders.

The only file that knows the library `datasets`, which is imported when a dataset is opened. The library hands over
encoded images; they are decoded as files are, with orientation and colour profile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sdvae.data.images import EncodedImage
from sdvae.errors import ConfigError, ImageError

__all__ = ["DatasetImages", "DatasetShards", "open_dataset"]


class DatasetImages:
    """Random access (`loader.IndexedImages`) to an image column of a datasets.Dataset."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self._dataset, self._column, self._name = dataset, column, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> EncodedImage:
        return _encoded(self._dataset[index][self._column], f"{self._name}[{index}]")

    @cached_property
    def modified_ns(self) -> int | None:
        """When the dataset's files were last changed; None where they do not hold all of the images."""
        import pyarrow.compute as pc

        cells = self._dataset.data.column(self._column)
        is_elsewhere = pc.and_(pc.is_null(pc.struct_field(cells, "bytes")), pc.is_valid(pc.struct_field(cells, "path")))
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        if not files or pc.any(is_elsewhere).as_py():
            return None
        return max(file.stat().st_mtime_ns for file in files)


class DatasetShards:
    """The shards (`loader.ShardedImages`) of an image column of a datasets.IterableDataset."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self._dataset, self._column, self._name = dataset, column, name

    @property
    def num_shards(self) -> int:
        return int(self._dataset.num_shards)

    def read_shard(self, index: int) -> Iterator[EncodedImage | ImageError]:
        shard = self._dataset.shard(num_shards=self.num_shards, index=index)
        name, number = f"{self._name}, shard {index}", 0
        try:
            # not iter(shard), which splits anew over the workers of a DataLoader
            for row in shard.iter(batch_size=1):
                yield _encoded_or_error(row[self._column][0], f"{name}, sample {number}")
                number += 1
        except Exception as error:  # a network and a damaged file fail in many ways; the other shards go on
            yield ImageError(f"{name}: cannot be read after {number} samples ({_details(error)})")
            return
        if number == 0:
            yield ImageError(f"{name}: holds no sample")


def open_dataset(
    path: str, *, split: str, subset: str | None = None, image_column: str = "image", streaming: bool = False
) -> DatasetImages | DatasetShards:
    """Open a dataset by its name on the hub or from this machine.

    path: a .parquet or .arrow file; a folder written by save_to_disk; a folder that load_dataset understands (parquet
    or arrow files among others); or the name of a dataset on the hub, which is fetched into the library's cache.
    subset: the dataset's configuration, where it has several.
    streaming: read shard by shard, without fetching or converting the whole first.
    Raises: ConfigError where `datasets` is not installed, or the dataset, split, subset or column cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{path}: a dataset needs the package datasets, which is not installed: pip install 'sdvae[datasets]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    dataset = _opened(Path(path).expanduser(), path, split, subset, streaming)
    features = _features(dataset)
    _require_images(features, image_column, path)
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    if streaming:
        return DatasetShards(dataset, image_column, path)
    if len(dataset) == 0:
        raise ConfigError(f"{path}: split '{split}' holds no sample")
    return DatasetImages(dataset, image_column, path)


def _opened(local: Path, path: str, split: str, subset: str | None, streaming: bool) -> Any:
    import datasets

    if not local.exists() and (local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise ConfigError(f"{local}: no such file or folder (a dataset on the hub is called owner/name)")
    is_saved = (local / "state.json").is_file() or (local / "dataset_dict.json").is_file()
    try:
        if is_saved:
            return _saved(local, split, streaming)
        if local.is_file() and local.suffix == ".arrow" and not streaming:
            _require_split(split, ["train"], path)
            return datasets.Dataset.from_file(str(local))  # mapped into memory, where load_dataset would copy it
        if local.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(local.suffix)
            if kind is None:
                raise ConfigError(f"{local}: expected a .parquet or .arrow file, a folder or the name of a dataset")
            return datasets.load_dataset(kind, data_files=str(local), split=split, streaming=streaming)
        place = str(local) if local.exists() else path
        return datasets.load_dataset(place, subset, split=split, streaming=streaming)
    except ConfigError:
        raise
    except ConnectionError as error:  # also where HF_HUB_OFFLINE forbids to ask
        raise ConfigError(_unreachable(path, error)) from error
    except Exception as error:  # the library and its builders raise nearly anything, mostly with a clear message
        raise ConfigError(
            f"{path}: cannot be opened as a dataset with split={split}, subset={subset or 'null'} ({_details(error)})"
        ) from error


def _saved(folder: Path, split: str, streaming: bool) -> Any:
    """What save_to_disk has written."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        _require_split(split, sorted(saved), str(folder))
        saved = saved[split]
        folder = folder / split
    else:
        _require_split(split, sorted({"train", str(saved.split or "train")}), str(folder))
    if not streaming:
        return saved
    # one shard for each file
    return saved.to_iterable_dataset(num_shards=max(1, min(len(saved), len(list(folder.glob("*.arrow"))))))


def _require_split(split: str, known: list[str], path: str) -> None:
    if split not in known:
        raise ConfigError(f"{path}: no split '{split}'; split can be {', '.join(known)}")


def _features(dataset: Any) -> Mapping[str, Any]:
    if dataset.features is None:  # a stream whose files do not say: look at its first samples
        dataset = dataset._resolve_features()
    features: Mapping[str, Any] = dataset.features
    return features


def _require_images(features: Mapping[str, Any], column: str, path: str) -> None:
    images = [name for name, feature in features.items() if _holds_images(feature)]
    if column in images:
        return
    problem = f"column '{column}' holds no images" if column in features else f"no column '{column}'"
    known = (
        f"columns of images: {', '.join(images)}" if images else f"it has none of images, only {', '.join(features)}"
    )
    raise ConfigError(f"{path}: {problem}; {known}. Set image_column.")


def _holds_images(feature: Any) -> bool:
    """Images; or what the library can take for them: the bytes of files, alone or beside a path."""
    import datasets

    if isinstance(feature, Mapping):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _encoded(cell: Mapping[str, Any] | None, name: str) -> EncodedImage:
    """An image from what an undecoded cell holds: the bytes of a file or its path."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ImageError(f"{name}: holds no image")
    path = cell["path"]
    if path:
        name = f"{name} ({path})"
    if cell["bytes"] is not None:
        return EncodedImage(name, cell["bytes"])
    if "://" in path:
        return EncodedImage(name, _fetched(path, name))
    return EncodedImage(name, Path(path))


def _encoded_or_error(cell: Mapping[str, Any] | None, name: str) -> EncodedImage | ImageError:
    try:
        return _encoded(cell, name)
    except ImageError as error:
        return error


def _fetched(url: str, name: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            data: bytes = file.read()
            return data
    except Exception as error:  # as many kinds as there are file systems behind it
        raise ImageError(f"{name}: cannot be fetched ({_details(error)})") from error


def _unreachable(path: str, error: Exception) -> str:
    import datasets

    return (
        f"dataset '{path}' is no file or folder here, is not in the cache ({datasets.config.HF_DATASETS_CACHE}), and "
        f"the hub cannot be reached ({_details(error)}). Without a network, fill that cache on another machine "
        "and point HF_HOME to it, or give local parquet or arrow files or a folder of save_to_disk"
    )


def _details(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
