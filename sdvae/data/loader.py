"""Batches of training crops, exactly resumable: from sources that can be read anywhere, and from streams.

`IndexedData`: sample number p of a run is a function of (seed, p) alone: which image, which crop, whether flipped. A
run continues at the right sample by knowing one number, whatever the number of workers and devices.

`StreamedData`: samples come in the order of their shards, through a shuffle buffer. Each reader (a worker of a device)
has shards of its own and a position in them; that of all workers travels with their batches. The same number of
workers and devices continues at the right sample.

Damaged and too small images are left out, and others take their places: batches are always full.
Where images are stored is the business of images.py, sources/datasets.py and sources/shards.py.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from sdvae.data.images import EncodedImage, Pixels, image_to_x
from sdvae.data.transforms import RandomCrop
from sdvae.errors import ConfigError, ImageError, SdvaeError

__all__ = ["Batch", "IndexedData", "IndexedImages", "ShardedImages", "StreamedData", "TrainingData"]

MAX_UNREADABLE = 20  # damaged samples in a row, in search of one crop, that end the run
MAX_SMALL = 10_000  # the same for samples below min_px, of which only headers are read
CACHE_SHARE = 0.25  # of the machine's memory that decoded images may fill, all workers together


class IndexedImages(Protocol):
    """A source of images that can be read in any order. Reading may raise ImageError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedImage: ...


@runtime_checkable
class ShardedImages(Protocol):
    """A source of images that is read shard by shard, each from its start."""

    @property
    def num_shards(self) -> int: ...

    def read_shard(self, index: int) -> Iterator[EncodedImage | ImageError]:
        """Its samples in a fixed order; in place of what cannot be read, the error that says why. At least one."""


@dataclass(frozen=True)
class Batch:
    """Training crops, and what was met on the way to them."""

    x: Tensor  # (B, 3, crop_px, crop_px), float32, [-1, 1]
    num_read: int  # samples opened for it, left-out ones included
    num_small: int  # left out by min_px
    unreadable: tuple[str, ...]  # "name: reason" of damaged samples, whose places others took
    reader: ReaderPosition | None = None  # of a stream: where its worker's reader stands after it


class TrainingData(ABC):
    """Endless batches, from a position that can be saved."""

    num_images: int | None  # None for a stream

    @abstractmethod
    def batches(self, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        """Batches from the current position on, without end; the position moves on with each.

        rank, world_size: which device of how many; they share the samples without overlap.
        num_workers: processes that read; 0: this one.
        Raises: ImageError where no readable image, or none of min_px, is found; ConfigError (at once) where a stream's
        position belongs to other numbers of devices or workers.
        """

    @abstractmethod
    def first_crops(self, count: int) -> Iterator[Tensor]:
        """Crops x, (3, crop_px, crop_px), [-1, 1]: the same in every run of a seed; the position stays."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that `batches` yielded: plain numbers. Of a stream: of this device."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ConfigError where the state is of another kind of source."""


class _Search:
    """Counts what is left out while one crop is looked for, and gives up where too much is."""

    def __init__(self, min_px: int) -> None:
        self.min_px = min_px
        self.num_read = self.num_small = self.largest_px = 0
        self.unreadable: list[str] = []

    def add_small(self, short_side_px: int) -> None:
        self.num_small += 1
        self.largest_px = max(self.largest_px, short_side_px)
        if self.num_small >= MAX_SMALL:
            raise ConfigError(
                f"'data.min_px' is {self.min_px}, but {self.num_small:,} images in a row have a smaller short side, "
                f"the largest of them {self.largest_px} px; lower data.min_px"
            )

    def add_unreadable(self, error: ImageError) -> None:
        self.unreadable.append(str(error))
        if len(self.unreadable) >= MAX_UNREADABLE:
            raise ImageError(
                f"{MAX_UNREADABLE} images in a row cannot be read; the last of them: " + "; ".join(self.unreadable[-3:])
            )


def _short_side_px(image: EncodedImage) -> int:
    return min(image.size())


def _batch(crops: Sequence[Tensor], searches: Sequence[_Search], reader: ReaderPosition | None = None) -> Batch:
    return Batch(
        x=torch.stack(list(crops)),
        num_read=sum(search.num_read for search in searches),
        num_small=sum(search.num_small for search in searches),
        unreadable=tuple(reason for search in searches for reason in search.unreadable),
        reader=reader,
    )


def _loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # its own, or starting the loader would draw from the random state that a resumed run has just restored
        generator=torch.Generator(),
        **options,
    )
    for batch in loader:
        if isinstance(batch, SdvaeError):  # raised here: torch would wrap a worker's error in its traceback
            try:
                raise batch
            finally:
                del batch  # error -> traceback -> this frame -> error: a ring that would keep the workers alive
        yield batch


# Sources that can be read anywhere.


class IndexedData(TrainingData):
    """Every image serves once per epoch, in an order shuffled anew for each.

    Position p is that of all devices together. An image that cannot serve is replaced by others, drawn as a function
    of (seed, p): so what is damaged moves no other sample.
    cache_images: keep decoded images, while they fill no more than CACHE_SHARE of memory; each worker has a cache of
    its own.
    """

    def __init__(
        self, images: IndexedImages, crop: RandomCrop, seed: int, *, min_px: int = 0, cache_images: bool = False
    ) -> None:
        self.num_images = len(images)
        self._crops = _IndexedCrops(images, crop, seed, min_px, cache_images)
        self._num_samples = 0  # used by all devices together

    def batches(self, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        self._crops.cache_bytes = CACHE_SHARE * psutil.virtual_memory().total / max(1, num_workers) / world_size
        positions = _Positions(self._num_samples + rank, world_size)
        # a batch comes whole from __getitems__
        options: dict[str, Any] = dict(sampler=positions, batch_size=batch_size, collate_fn=_same)
        for batch in _loader(self._crops, num_workers, **options):
            self._num_samples += batch_size * world_size
            yield batch

    def first_crops(self, count: int) -> Iterator[Tensor]:
        return (self._crops.crop_at(position)[0] for position in range(count))

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self._num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_keys(state, self.state_dict())
        self._num_samples = state["num_samples"]


class _IndexedCrops(Dataset[Any]):
    """Crops by position, any whole number from 0 on."""

    def __init__(self, images: IndexedImages, crop: RandomCrop, seed: int, min_px: int, cache_images: bool) -> None:
        self.images, self.crop, self.seed, self.min_px = images, crop, seed, min_px
        self.cache: dict[int, Pixels] | None = {} if cache_images else None
        self.cache_bytes = CACHE_SHARE * psutil.virtual_memory().total
        self.cached_bytes = 0
        self.small: dict[int, int] = {}  # index of an image below min_px -> its short side

    def __getitems__(self, positions: Sequence[int]) -> Batch | SdvaeError:
        try:
            crops, searches = zip(*(self.crop_at(position) for position in positions), strict=True)
        except SdvaeError as error:
            return error
        return _batch(crops, searches)

    def crop_at(self, position: int) -> tuple[Tensor, _Search]:
        search = _Search(self.min_px)
        epoch, place = divmod(position, len(self.images))
        index = int(_shuffled(len(self.images), self.seed, epoch)[place])
        replacements = np.random.default_rng((self.seed, 2, position))
        while True:
            search.num_read += 1
            try:
                pixels = self._pixels(index)
                if pixels is not None:
                    rng = np.random.default_rng((self.seed, 1, position))
                    return image_to_x(self.crop(pixels, rng)), search
                search.add_small(self.small[index])
            except ImageError as error:
                search.add_unreadable(error)
            index = int(replacements.integers(len(self.images)))

    def _pixels(self, index: int) -> Pixels | None:
        """None: smaller than min_px."""
        if index in self.small:
            return None
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = self.images[index]
        if self.min_px and (side := _short_side_px(image)) < self.min_px:
            self.small[index] = side
            if len(self.small) == len(self.images):
                raise ConfigError(
                    f"'data.min_px' is {self.min_px}, but all {len(self.images):,} images have a smaller short side, "
                    f"the largest of them {max(self.small.values())} px; lower data.min_px"
                )
            return None
        pixels = image.read(min_side_px=self.crop.min_side_px).pixels
        if self.cache is not None and self.cached_bytes + pixels.nbytes <= self.cache_bytes:
            self.cache[index] = pixels
            self.cached_bytes += pixels.nbytes
        return pixels


class _Positions(Sampler[int]):
    """first, first + step, ... without end."""

    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        position = self.first
        while True:
            yield position
            position += self.step


def _same(batch: Batch | SdvaeError) -> Batch | SdvaeError:
    return batch


@lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


# Streams.


@dataclass(frozen=True)
class ReaderPosition:
    """Where a reader of a stream stands.

    An epoch's samples are numbered in the order in which the reader meets them. `num_drawn` and `num_met` say by
    computation alone which numbers wait in the shuffle buffer; shards before the one that holds the oldest of them are
    not opened again.
    """

    index: int  # which of this device's readers
    epoch: int = 0
    num_drawn: int = 0  # samples of the epoch that have left the buffer
    num_met: int = 0  # samples of the epoch that have entered it
    shard_place: int = 0  # in the epoch's order of this reader's shards: the one that holds the oldest in the buffer
    shard_start: int = 0  # samples in the shards before that one


class StreamedData(TrainingData):
    """Shards in an order shuffled for each epoch by (seed, epoch), then a buffer from which samples are drawn.

    Readers, `num_workers` (at least 1) on each device, take disjoint shards; where there are fewer shards than readers,
    every reader reads all shards and takes every n-th sample. A reader's epoch gives each of its samples once.
    shuffle_buffer: samples that wait, undecoded, in each reader; it is filled first, so it also delays the start.
    """

    num_images = None

    def __init__(
        self, images: ShardedImages, crop: RandomCrop, seed: int, *, min_px: int = 0, shuffle_buffer: int = 1000
    ) -> None:
        self._stream = _Stream(images, crop, seed, min_px, shuffle_buffer)
        self._layout: dict[str, int] = {}  # what the positions hold for; empty before the first batch
        self._readers: list[ReaderPosition] = []
        self._next_reader = 0

    def batches(self, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        num_readers = max(1, num_workers)
        layout = {
            "world_size": world_size,
            "rank": rank,
            "num_workers": num_readers,
            "shuffle_buffer": self._stream.shuffle_buffer,
            "num_shards": self._stream.images.num_shards,
        }
        if not self._layout:
            self._layout, self._next_reader = layout, 0
            self._readers = [ReaderPosition(index) for index in range(num_readers)]
        self._require_layout(layout)
        return self._batches(batch_size, rank, world_size, num_workers)

    def _batches(self, batch_size: int, rank: int, world_size: int, num_workers: int) -> Iterator[Batch]:
        # torch asks its workers in turn from the first on, so the reader whose turn it is goes to the first
        turns = self._readers[self._next_reader :] + self._readers[: self._next_reader]
        dataset = _StreamedBatches(self._stream, turns, batch_size, rank, world_size)
        for batch in _loader(dataset, num_workers, batch_size=None):
            assert batch.reader is not None
            self._readers[batch.reader.index] = batch.reader
            self._next_reader = (batch.reader.index + 1) % len(self._readers)
            yield batch

    def _require_layout(self, layout: dict[str, int]) -> None:
        changed = {name: old for name, old in self._layout.items() if layout[name] != old}
        if changed:
            raise ConfigError(
                "a stream can only be resumed as it was begun, with "
                + ", ".join(f"{name}={old} (now {layout[name]})" for name, old in changed.items())
                + "; set it so, or start a new run"
            )

    def first_crops(self, count: int) -> Iterator[Tensor]:
        reader = _Reader(self._stream, ReaderPosition(0), number=0, num_readers=1)
        return (reader.next_crop()[0] for _ in range(count))

    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": dict(self._layout),
            "next_reader": self._next_reader,
            "readers": [asdict(reader) for reader in self._readers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_keys(state, self.state_dict())
        self._layout = dict(state["layout"])
        self._next_reader = state["next_reader"]
        self._readers = [ReaderPosition(**reader) for reader in state["readers"]]


@dataclass(frozen=True)
class _Stream:
    """What all readers share."""

    images: ShardedImages
    crop: RandomCrop
    seed: int
    min_px: int
    shuffle_buffer: int


class _StreamedBatches(IterableDataset[Any]):
    """Endless batches of one reader: in worker i that of turns[i]."""

    def __init__(
        self, stream: _Stream, turns: Sequence[ReaderPosition], batch_size: int, rank: int, world_size: int
    ) -> None:
        self.stream, self.turns, self.batch_size = stream, list(turns), batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch | SdvaeError]:
        worker = get_worker_info()
        position = self.turns[0 if worker is None else worker.id]
        number = self.rank * len(self.turns) + position.index
        reader = _Reader(self.stream, position, number=number, num_readers=self.world_size * len(self.turns))
        while True:
            try:
                crops, searches = zip(*(reader.next_crop() for _ in range(self.batch_size)), strict=True)
            except SdvaeError as error:
                yield error
                return
            yield _batch(crops, searches, reader.position)


@dataclass
class _Waiting:
    """A sample in the shuffle buffer."""

    number: int  # among the epoch's samples of this reader
    shard_place: int
    shard_start: int
    sample: EncodedImage | ImageError = field(repr=False)


class _Reader:
    """One of `num_readers` over all devices; holds a buffer of samples and its position."""

    def __init__(self, stream: _Stream, position: ReaderPosition, *, number: int, num_readers: int) -> None:
        self.stream, self.number = stream, number
        is_sharded = stream.images.num_shards >= num_readers
        # shards this one reads: number, number + step, ...; samples it takes: one in `stride`, from `offset` on
        self.shards = (number, num_readers) if is_sharded else (0, 1)
        self.offset, self.stride = (0, 1) if is_sharded else (number, num_readers)
        self._enter(position)

    @property
    def position(self) -> ReaderPosition:
        oldest = min(self.buffer, key=lambda waiting: waiting.number, default=None)
        if oldest is None:  # all samples of this epoch were drawn: nothing of it is needed
            return ReaderPosition(self.index, self.epoch + 1)
        place, start = oldest.shard_place, oldest.shard_start
        return ReaderPosition(self.index, self.epoch, self.num_drawn, self.num_met, place, start)

    def next_crop(self) -> tuple[Tensor, _Search]:
        search = _Search(self.stream.min_px)
        while True:
            sample = self._next_sample()
            search.num_read += 1
            try:
                if isinstance(sample, ImageError):
                    raise sample
                if self.stream.min_px and (side := _short_side_px(sample)) < self.stream.min_px:
                    search.add_small(side)
                    continue
                pixels = sample.read(min_side_px=self.stream.crop.min_side_px).pixels
            except ImageError as error:
                search.add_unreadable(error)
                continue
            rng = np.random.default_rng((self.stream.seed, 3, self.number, self.epoch, self.num_drawn))
            return image_to_x(self.stream.crop(pixels, rng)), search

    def _next_sample(self) -> EncodedImage | ImageError:
        """Draw one from the buffer, whose place the next of the stream takes."""
        if not self.buffer:
            self._enter(ReaderPosition(self.index, self.epoch + 1))
        slot = self.rng.randrange(len(self.buffer))
        drawn = self.buffer[slot]
        self.num_drawn += 1
        following = next(self.samples, None)
        if following is None:
            self.buffer[slot] = self.buffer[-1]
            self.buffer.pop()
        else:
            self.num_met += 1
            self.buffer[slot] = following
        return drawn.sample

    def _enter(self, position: ReaderPosition) -> None:
        """Go to a position: compute which samples wait in the buffer there, and read only those."""
        self.index, self.epoch, self.num_drawn = position.index, position.epoch, position.num_drawn
        self.rng = random.Random(f"{self.stream.seed} {self.number} {self.epoch}")
        self.samples = self._samples(position.shard_place, position.shard_start)
        if self.num_drawn == 0:
            self.buffer: list[_Waiting] = []
            for waiting in self.samples:
                self.buffer.append(waiting)
                if len(self.buffer) == self.stream.shuffle_buffer:
                    break
            if not self.buffer:  # every shard gives at least an error, so this one takes every n-th sample
                raise ConfigError(
                    f"the stream has fewer samples than the {self.stride} readers (devices times data.num_workers) "
                    "that share it; lower data.num_workers"
                )
            self.num_met = len(self.buffer)
            return
        self.num_met = position.num_met
        numbers = self._numbers_in_buffer(position)
        wanted = set(numbers)
        found = {}
        for waiting in self.samples:
            if waiting.number in wanted:
                found[waiting.number] = waiting
            if waiting.number == self.num_met - 1:
                break
        if len(found) < len(wanted):
            raise ImageError(
                f"the stream cannot be resumed: its shards hold fewer samples than before ({len(wanted) - len(found)} "
                "are missing); start a new run"
            )
        self.buffer = [found[number] for number in numbers]

    def _numbers_in_buffer(self, position: ReaderPosition) -> list[int]:
        """Draw as `_next_sample` did, with bare numbers."""
        capacity = self.stream.shuffle_buffer
        numbers = list(range(min(capacity, position.num_met)))
        for following in range(capacity, capacity + position.num_drawn):
            slot = self.rng.randrange(len(numbers))
            if following < position.num_met:
                numbers[slot] = following
            else:
                numbers[slot] = numbers[-1]
                numbers.pop()
        return numbers

    def _samples(self, shard_place: int, shard_start: int) -> Iterator[_Waiting]:
        """The epoch's samples of this reader, from a shard on."""
        order = random.Random(f"{self.stream.seed} {self.epoch}").sample(
            range(self.stream.images.num_shards), self.stream.images.num_shards
        )
        first, step = self.shards
        number = shard_start
        for place, shard in enumerate(order[first::step]):
            if place < shard_place:
                continue
            start = number
            for sample in self.stream.images.read_shard(shard):
                if number % self.stride == self.offset:
                    yield _Waiting(number // self.stride, place, start, sample)
                number += 1


def _require_keys(state: dict[str, Any], expected: dict[str, Any]) -> None:
    if state.keys() != expected.keys():
        raise ConfigError(
            "the checkpoint holds the position in another kind of data source: resume with the same data.source and "
            "data.streaming, or start a new run"
        )
