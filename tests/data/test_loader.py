"""Batches of training crops: which samples come, in which order, and that a saved position continues with the next."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.images import EncodedImage
from sdvae.data.loader import Batch, IndexedData, StreamedData, TrainingData
from sdvae.data.transforms import RandomCrop
from sdvae.errors import ConfigError, ImageError

CROP = RandomCrop(crop_px=32)


def write_images(folder: Path, count: int) -> list[EncodedImage]:
    """Images of one colour each, so that a crop tells its image."""
    folder.mkdir()
    found = []
    for index in range(count):
        path = folder / f"{index:02d}.png"
        Image.fromarray(np.full((40, 48, 3), 4 * index, np.uint8)).save(path)
        found.append(EncodedImage(path.name, path))
    return found


def numbers_in(batches: Sequence[Batch]) -> list[int]:
    return [round(float(crop.mean() + 1) * 127.5 / 4) for batch in batches for crop in batch.x]


def take(data: TrainingData, count: int, **options: int) -> list[Batch]:
    return list(islice(data.batches(**{"batch_size": 2, **options}), count))


def joined(batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([batch.x for batch in batches])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[EncodedImage]:
    return write_images(tmp_path_factory.mktemp("images") / "good", 5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[EncodedImage]:
    """Twelve images; the fourth is cut short, the fifth no image, the sixth 20 x 20 px."""
    found = write_images(tmp_path_factory.mktemp("images") / "damaged", 12)
    paths = [image.content for image in found]
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    paths[4].write_bytes(b"no image")
    Image.fromarray(np.full((20, 20, 3), 20, np.uint8)).save(paths[5])
    return found


class InMemoryShards:
    """Images as shards of the given sizes; read_shard counts how often each was opened."""

    def __init__(self, images: Sequence[EncodedImage | ImageError], sizes: Sequence[int]) -> None:
        ends = np.cumsum(sizes)
        self.shards = [images[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.opened: Counter[int] = Counter()

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read_shard(self, index: int) -> Iterator[EncodedImage | ImageError]:
        self.opened[index] += 1
        yield from self.shards[index]


def stream(images: Sequence[EncodedImage], sizes: Sequence[int], seed: int = 0, **options: int) -> StreamedData:
    return StreamedData(InMemoryShards(images, sizes), CROP, seed, **{"shuffle_buffer": 4, **options})


# Every source: a position continues.


BUILDERS: dict[str, Callable[[list[EncodedImage]], TrainingData]] = {
    "indexed": lambda images: IndexedData(images, CROP, 0, min_px=30),
    "shards": lambda images: stream(images, [3, 2, 4, 3], min_px=30),
    "one shard": lambda images: stream(images, [12], min_px=30),
    "a buffer larger than an epoch": lambda images: stream(images, [3, 2, 4, 3], min_px=30, shuffle_buffer=50),
    "a buffer of one": lambda images: stream(images, [3, 2, 4, 3], min_px=30, shuffle_buffer=1),
}


@pytest.mark.parametrize(
    ("name", "num_workers"), [*((name, 0) for name in BUILDERS), ("indexed", 2), ("shards", 2), ("one shard", 2)]
)
def test_a_saved_position_continues_with_the_next_samples_bit_for_bit(
    damaged: list[EncodedImage], name: str, num_workers: int
) -> None:
    whole_run = BUILDERS[name](damaged).batches(batch_size=3, num_workers=num_workers)
    whole, states, run = [], [], BUILDERS[name](damaged)
    for batch in islice(run.batches(batch_size=3, num_workers=num_workers), 14):  # into the third epoch or beyond
        whole.append(batch)
        states.append(pickle.dumps(run.state_dict()))
    assert all(torch.equal(a.x, b.x) for a, b in zip(whole, whole_run, strict=False))
    assert sum(len(batch.unreadable) for batch in whole) > 3 and sum(batch.num_small for batch in whole) > 1
    stops = range(13) if num_workers == 0 else (0, 5, 10)
    for stop in stops:
        resumed = BUILDERS[name](damaged)
        resumed.load_state_dict(pickle.loads(states[stop]))
        following = take(resumed, 13 - stop, batch_size=3, num_workers=num_workers)
        assert torch.equal(joined(following), joined(whole[stop + 1 :]))
        for one, other in zip(following, whole[stop + 1 :], strict=True):
            assert (one.num_read, one.num_small, one.unreadable) == (other.num_read, other.num_small, other.unreadable)
        assert pickle.dumps(resumed.state_dict()) == states[-1]


@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_is_cut_anew_every_time(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    same = [EncodedImage("a", tmp_path / "a.png")] * 12
    crops = joined(take(BUILDERS[name](same), 20))
    assert len({crop.numpy().tobytes() for crop in crops}) > 36


@pytest.mark.parametrize("name", BUILDERS)
def test_the_first_crops_are_the_same_whatever_the_position(damaged: list[EncodedImage], name: str) -> None:
    data = BUILDERS[name](damaged)
    first = torch.stack(list(data.first_crops(5)))
    assert first.shape == (5, 3, 32, 32) and first.dtype == torch.float32 and first.abs().max() <= 1
    assert data.state_dict() == BUILDERS[name](damaged).state_dict()
    take(data, 3)
    state = data.state_dict()
    assert torch.equal(first, torch.stack(list(data.first_crops(5))))
    assert data.state_dict() == state


@pytest.mark.parametrize("name", BUILDERS)
def test_damaged_and_small_images_are_left_out_and_counted(damaged: list[EncodedImage], name: str) -> None:
    batches = take(BUILDERS[name](damaged), 20, batch_size=3)
    assert set(numbers_in(batches)) == set(range(12)) - {3, 4, 5}
    reasons = [reason for batch in batches for reason in batch.unreadable]
    assert {reason.partition(": ")[0].rpartition("/")[2] for reason in reasons} == {"03.png", "04.png"}
    assert all("truncated" in reason or "not an image" in reason for reason in reasons)
    assert sum(batch.num_read for batch in batches) == 60 + len(reasons) + sum(batch.num_small for batch in batches)


def test_the_state_of_another_kind_of_source_is_refused(images: list[EncodedImage]) -> None:
    indexed, streamed = IndexedData(images, CROP, 0), stream(images, [5])
    for one, other in ((indexed, streamed), (streamed, indexed)):
        with pytest.raises(ConfigError, match="another kind of data source.*data.source"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_and_reading_leaves_the_random_state_alone(images: list[EncodedImage], num_workers: int) -> None:
    state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    for data in (IndexedData(images, CROP, 0), stream(images, [2, 3])):
        take(data, 2, num_workers=num_workers)
        list(data.first_crops(2))
    assert torch.equal(state, torch.get_rng_state()) and pickle.dumps(np.random.get_state()) == numpy_state


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_without_a_readable_image_is_an_error_that_names_reasons(tmp_path: Path, num_workers: int) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path in paths:
        path.write_bytes(b"no image")
    broken = [EncodedImage(path.name, path) for path in paths]
    for data in (IndexedData(broken, CROP, 0), stream(broken, [2, 2])):
        with pytest.raises(ImageError, match=r"^20 images in a row cannot be read.*\d.png: not an image"):
            take(data, 1, num_workers=num_workers)


# Sources that can be read anywhere.


def test_every_image_serves_once_per_epoch_in_a_new_order(images: list[EncodedImage]) -> None:
    numbers = numbers_in(take(IndexedData(images, CROP, 3), 4, batch_size=5))
    epochs = [numbers[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_samples_do_not_depend_on_workers_devices_batch_size_or_cache(damaged: list[EncodedImage]) -> None:
    """Nor does a position: it may be continued with other numbers of them."""

    def data(cache_images: bool = False) -> IndexedData:
        crop = RandomCrop(crop_px=24, kind="random_resized")
        return IndexedData(damaged, crop, 0, min_px=30, cache_images=cache_images)

    plain = joined(take(data(), 12, batch_size=2))
    assert torch.equal(plain, joined(take(data(cache_images=True), 6, batch_size=4, num_workers=2)))
    cached = data(cache_images=True)
    assert torch.equal(plain, torch.cat([joined(take(cached, 4, batch_size=3)) for _ in range(2)]))
    state = cached.state_dict()
    assert state == {"num_samples": 24}
    later = joined(take(data(), 16, batch_size=2))[24:]
    ranks = []
    for rank in range(2):
        resumed = data()
        resumed.load_state_dict(state)
        ranks.append(joined(take(resumed, 2, batch_size=2, rank=rank, world_size=2)))
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), later)


def test_a_damaged_image_moves_no_other_sample(images: list[EncodedImage], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    broken = [*images[:2], EncodedImage("bad", tmp_path / "bad.png"), *images[3:]]
    good, bad = (take(IndexedData(source, CROP, 0), 20, batch_size=1) for source in (images, broken))
    for one, other in zip(good, bad, strict=True):
        if numbers_in([one]) == [2]:
            assert other.num_read > 1 and other.unreadable[0].endswith("bad.png: is empty (0 bytes)")
        else:
            assert torch.equal(one.x, other.x) and other.num_read == 1


def test_no_image_of_min_px_is_an_error_that_names_the_largest(images: list[EncodedImage]) -> None:
    with pytest.raises(ConfigError, match="'data.min_px' is 64, but all 5 images .* largest of them 40 px"):
        take(IndexedData(images, CROP, 0, min_px=64), 1)
    with pytest.raises(ConfigError, match="'data.min_px' is 64, but 10,000 images in a row .* largest of them 40 px"):
        take(stream(images, [2, 3], min_px=64), 1)


def test_the_cache_ends_at_its_bound(images: list[EncodedImage], monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    from sdvae.data import loader

    size_bytes = 40 * 48 * 3
    monkeypatch.setattr(loader, "CACHE_SHARE", 2.5 * size_bytes / psutil.virtual_memory().total)
    data = IndexedData(images, CROP, 0, cache_images=True)
    plain = IndexedData(images, CROP, 0)
    assert torch.equal(joined(take(data, 10)), joined(take(plain, 10)))
    assert len(data._crops.cache) == 2 and data._crops.cached_bytes == 2 * size_bytes


# Streams.


@pytest.mark.parametrize("sizes", [[3, 4, 5, 4, 2, 6], [24], [20, 4]])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (3, 0)])
def test_readers_share_an_epoch_without_overlap(
    tmp_path: Path, sizes: list[int], world_size: int, num_workers: int
) -> None:
    images = write_images(tmp_path / "many", 24)
    first_epoch: list[int] = []
    for rank in range(world_size):
        ended = set()
        data = stream(images, sizes)
        options = {"batch_size": 1, "rank": rank, "world_size": world_size, "num_workers": num_workers}
        for batch in islice(data.batches(**options), 60):
            if batch.reader.index not in ended:
                first_epoch += numbers_in([batch])
            if batch.reader.epoch > 0:
                ended.add(batch.reader.index)
        assert len(ended) == max(1, num_workers)
    assert sorted(first_epoch) == list(range(24))


def test_an_epoch_of_one_reader_gives_each_sample_once_in_a_new_order(tmp_path: Path) -> None:
    images = write_images(tmp_path / "many", 24)
    numbers = numbers_in(take(stream(images, [3, 4, 5, 4, 2, 6]), 4, batch_size=24))
    epochs = [tuple(numbers[start : start + 24]) for start in range(0, 96, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(epochs)) == 4
    other_seed = numbers_in(take(stream(images, [3, 4, 5, 4, 2, 6], seed=1), 1, batch_size=24))
    assert tuple(other_seed) != epochs[0]
    # the buffer mixes within and over shards, the shards come shuffled
    unmixed = numbers_in(take(stream(images, [3, 4, 5, 4, 2, 6], shuffle_buffer=1), 2, batch_size=24))
    assert unmixed[:24] != unmixed[24:]
    unmixed = unmixed[:24]
    assert sum(b == a + 1 for a, b in zip(unmixed, unmixed[1:], strict=False)) >= 18
    assert sum(b == a + 1 for a, b in zip(epochs[0], epochs[0][1:], strict=False)) < 10


def test_going_on_opens_only_the_shards_that_the_buffer_still_needs(tmp_path: Path) -> None:
    images = write_images(tmp_path / "many", 40)
    data = stream(images, [2] * 20, shuffle_buffer=2)
    take(data, 17)
    resumed = stream(images, [2] * 20, shuffle_buffer=2)
    resumed.load_state_dict(data.state_dict())
    take(resumed, 1)
    assert sum(resumed._stream.images.opened.values()) < 8


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"num_workers": 2}, "num_workers=1 (now 2)"),
        ({"world_size": 2}, "world_size=1 (now 2)"),
        ({"world_size": 2, "rank": 1}, "world_size=1 (now 2), rank=0 (now 1)"),
    ],
)
def test_a_stream_goes_on_only_as_it_was_begun(
    images: list[EncodedImage], options: dict[str, int], changed: str
) -> None:
    data, resumed = stream(images, [2, 3]), stream(images, [2, 3])
    take(data, 1)
    resumed.load_state_dict(data.state_dict())
    with pytest.raises(ConfigError) as caught:
        resumed.batches(batch_size=2, **options)
    assert changed in str(caught.value) and "start a new run" in str(caught.value)
    other = stream(images, [2, 3], shuffle_buffer=9)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ConfigError, match="shuffle_buffer=4"):
        other.batches(batch_size=2)


def test_shards_that_lost_samples_are_named_as_the_reason(images: list[EncodedImage]) -> None:
    data, resumed = stream(images, [5]), stream(images[:2], [2])
    take(data, 1, batch_size=1)
    resumed.load_state_dict(data.state_dict())
    with pytest.raises(ImageError, match="hold fewer samples than before"):
        take(resumed, 1)


def test_more_readers_than_samples_is_an_error(images: list[EncodedImage]) -> None:
    with pytest.raises(ConfigError, match="fewer samples than the 8 readers.*lower data.num_workers"):
        take(stream(images, [5]), 1, rank=7, world_size=8)
