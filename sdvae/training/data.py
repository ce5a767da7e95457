"""From the settings to training data and validation images, with the checks that come before a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

from torch.utils.data import Subset

from sdvae.data.images import EncodedImage
from sdvae.data.loader import IndexedData, IndexedImages, ShardedImages, StreamedData, TrainingData
from sdvae.data.sources.datasets import open_dataset
from sdvae.data.sources.find import find_images
from sdvae.data.sources.shards import TarShards, find_shards
from sdvae.data.transforms import RandomCrop
from sdvae.errors import ConfigError, ImageError, TrainingError
from sdvae.training.config import DataConfig

__all__ = ["UnreadableGuard", "open_data"]

logger = logging.getLogger(__name__)

NUM_PROBED = 64  # images whose headers are looked at before a run
MIN_UNREADABLE = 10  # fewer damaged samples than this do not end a run, whatever part of those read they are


def open_data(data: DataConfig, seed: int) -> tuple[TrainingData, Sequence[EncodedImage]]:
    """The training data, and the images for validation.

    Without `val_path`, every n-th image of the source is held out.
    Raises: ConfigError where nothing is found, all would be held out, or the images looked at are all smaller than the
    crop (data.crop native) or, where these are all there are, than data.min_px; ImageError where none can be read.
    """
    crop = RandomCrop(
        crop_px=data.crop_px,
        kind=data.crop,
        resize_px=data.resize_px,
        min_ratio=data.min_crop_ratio,
        flip=data.flip,
    )
    val_images = _files(data.val_path)[: data.num_val_images] if data.val_path is not None else []
    source = _source(data)
    if isinstance(source, ShardedImages):
        _check(data, islice(source.read_shard(0), NUM_PROBED), are_all=False)
        stream = StreamedData(source, crop, seed, min_px=data.min_px, shuffle_buffer=data.shuffle_buffer)
        return stream, val_images
    if data.val_path is None:
        source, val_images = _held_out(data, source)
    probed = _spread(len(source), min(NUM_PROBED, len(source)))
    _check(data, (_sample(source, index) for index in probed), are_all=len(probed) == len(source))
    return IndexedData(source, crop, seed, min_px=data.min_px, cache_images=data.cache_images), val_images


class UnreadableGuard:
    """Warns of each damaged sample once, and ends a run that has too many.

    max_ratio: damaged samples as a part of all that were read.
    """

    def __init__(self, max_ratio: float) -> None:
        self.max_ratio = max_ratio
        self.num_read = self.num_unreadable = 0
        self._reasons: dict[str, None] = {}  # different ones, in order

    def add(self, num_read: int, unreadable: Sequence[str]) -> None:
        """Count the samples of a batch; `unreadable` holds "name: reason" of the damaged ones.

        Raises: TrainingError where MIN_UNREADABLE or more were damaged and they are above max_ratio, or nothing but
        damaged samples was read.
        """
        self.num_read += num_read
        self.num_unreadable += len(unreadable)
        for reason in unreadable:
            if reason not in self._reasons:
                self._reasons[reason] = None
                logger.warning("left out: %s", reason)
        is_above = self.num_unreadable > self.max_ratio * self.num_read and self.num_unreadable >= MIN_UNREADABLE
        if is_above or self.num_unreadable == self.num_read > 0:
            raise TrainingError(
                f"{self.num_unreadable} of {self.num_read} samples read are damaged "
                f"({self.num_unreadable / self.num_read:.1%}, data.max_unreadable_ratio is {self.max_ratio:.1%}): "
                + "; ".join(islice(self._reasons, 3))
                + ". Repair or remove them, or raise data.max_unreadable_ratio."
            )


def _source(data: DataConfig) -> IndexedImages | ShardedImages:
    if data.source == "webdataset":
        return TarShards(find_shards(data.path))
    if data.source == "datasets":
        return open_dataset(
            data.path,
            split=data.split,
            subset=data.subset,
            image_column=data.image_column,
            streaming=data.streaming,
        )
    return _files(data.path)


def _files(spec: str) -> list[EncodedImage]:
    return [EncodedImage(image.key, image.path) for image in find_images(spec)]


def _held_out(data: DataConfig, source: IndexedImages) -> tuple[IndexedImages, list[EncodedImage]]:
    """What remains for training, and what is kept for validation."""
    total = len(source)
    if data.num_val_images >= total:
        raise ConfigError(
            f"'data.num_val_images' is {data.num_val_images}, but {data.path} has {total} images; "
            "lower it or set data.val_path"
        )
    if data.num_val_images == 0:
        return source, []
    held_out = _spread(total, data.num_val_images)
    kept = sorted(set(range(total)) - set(held_out))
    return Subset(source, kept), [source[index] for index in held_out]  # type: ignore[arg-type]


def _spread(total: int, count: int) -> list[int]:
    """`count` different ones of the numbers below `total`, evenly spread."""
    return [index * total // count for index in range(count)]


def _sample(source: IndexedImages, index: int) -> EncodedImage | ImageError:
    try:
        return source[index]
    except ImageError as error:
        return error


def _check(data: DataConfig, samples: Iterable[EncodedImage | ImageError], *, are_all: bool) -> None:
    """Look at the headers of some images, so that what can never work fails before the long work starts."""
    sides, errors = [], []
    for sample in samples:
        try:
            if isinstance(sample, ImageError):
                raise sample
            sides.append(min(sample.size()))
        except ImageError as error:
            errors.append(str(error))
    if not sides:
        raise ImageError(
            f"{data.path}: none of the {len(errors)} images looked at can be read: {'; '.join(errors[:3])}"
        )
    usable = [side for side in sides if side >= data.min_px]
    if not usable:
        if are_all:
            raise ConfigError(
                f"'data.min_px' is {data.min_px}, but the {len(sides)} images of {data.path} all have a smaller short "
                f"side, the largest of them {max(sides)} px; lower data.min_px"
            )
        return  # there may be larger ones; the loader finds out
    smallest, largest = min(usable), max(usable)
    if data.crop == "native" and largest < data.crop_px:
        raise ConfigError(
            f"'data.crop_px' is {data.crop_px}, but the {len(usable)} images of {data.path} that were looked at are "
            f"smaller: their short sides are {smallest} to {largest} px. Set data.crop_px to {largest} or less, or "
            "data.crop to resized, which enlarges them"
        )
