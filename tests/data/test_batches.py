"""Bounded queues: order, limits, errors in their place; batches that fail lose only what is bad."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from sdvae.data.batches import (
    QUEUE_PIXELS,
    WAITING_SHAPES,
    Member,
    Tally,
    compute_batches,
    group_by_shape,
    read_ahead,
    write_behind,
)
from sdvae.data.sources.files import FileReason, ImageFile
from sdvae.errors import ImageError, SdvaeError


def test_results_come_in_the_order_of_the_jobs_with_errors_in_their_place() -> None:
    def read(job: int) -> int:
        time.sleep(0.01 * (job % 3))
        if job == 4:
            raise ValueError("bad")
        return job * 10

    results = list(read_ahead(range(9), read, lambda result: 1, workers=3))
    assert [job for job, _ in results] == list(range(9))
    assert [result for job, result in results if job != 4] == [0, 10, 20, 30, 50, 60, 70, 80]
    assert isinstance(results[4][1], ValueError)


@pytest.mark.parametrize(("pixels", "most"), [(1, 5), (QUEUE_PIXELS, 2)])
def test_reading_stays_a_few_files_ahead_however_many_there_are_and_fewer_if_large(pixels: int, most: int) -> None:
    lock, started, consumed, largest = threading.Lock(), 0, 0, 0

    def read(job: int) -> int:
        nonlocal started
        with lock:
            started += 1
        return job

    for _ in read_ahead(range(200), read, lambda result: pixels, workers=2):
        consumed += 1
        time.sleep(0.001)
        if consumed > 10:
            largest = max(largest, started - consumed)
    assert consumed == 200
    assert largest <= most


def test_closing_the_reader_drops_what_has_not_begun() -> None:
    read_jobs: list[int] = []
    with closing(read_ahead(range(1000), lambda job: read_jobs.append(job), lambda result: 1, workers=2)) as results:
        next(results)
    assert len(read_jobs) < 10


def test_batches_have_one_shape_and_keep_every_member() -> None:
    members = [("a", 1), ("b", 2), ("a", 3), ("a", 4), ("b", 5), ("a", 6)]
    batches = list(group_by_shape(members, lambda m: m[0], lambda m: 1, batch_size=3, batch_pixels=1))
    assert batches == [[("a", 1), ("a", 3), ("a", 4)], [("b", 2), ("b", 5)], [("a", 6)]]


def test_automatic_batches_shrink_with_the_size_of_the_images() -> None:
    def largest(pixels: int) -> int:
        batches = group_by_shape(range(100), lambda m: 0, lambda m: pixels, batch_size=None, batch_pixels=2**21)
        return max(len(batch) for batch in batches)

    assert (largest(64 * 64), largest(512 * 512), largest(6000 * 4000)) == (64, 8, 1)


def test_a_folder_of_many_shapes_does_not_pile_up() -> None:
    produced = 0

    def members():  # type: ignore[no-untyped-def]
        nonlocal produced
        for shape in range(1000):
            produced += 1
            yield shape

    for consumed, _ in enumerate(group_by_shape(members(), lambda m: m, lambda m: 1, batch_size=8, batch_pixels=1)):
        assert produced - consumed <= WAITING_SHAPES + 1
    assert consumed == 999


def numbers(count: int) -> Generator[tuple[list[Member], list[int]], None, None]:
    """Batches of one, with their number as the result."""
    for number in range(count):
        yield [Member(ImageFile(str(number), Path(str(number))), torch.ones(1, 1, 1))], [number]


def test_writes_are_reported_in_order_and_the_queue_is_bounded() -> None:
    done: list[tuple[str, str]] = []
    begun = 0
    release = threading.Event()

    def computed() -> Generator[tuple[list[Member], list[int]], None, None]:
        nonlocal begun
        for batch in numbers(6):
            begun += not release.is_set()
            yield batch

    def write(member: Member, number: int) -> None:
        release.wait(5)
        if number == 2:
            raise OSError("no")

    threading.Timer(0.2, release.set).start()
    for member, error in write_behind(computed(), write, workers=2):
        done.append((member.job.key, repr(error)))
    assert begun == 5  # of six, four fit in the queue of two workers, and one waits for its place
    expected = ["None", "None", "OSError('no')", "None", "None", "None"]
    assert done == [(str(number), error) for number, error in enumerate(expected)]


def test_an_exception_drops_the_writes_that_have_not_begun() -> None:
    written: list[int] = []

    def computed() -> Generator[tuple[list[Member], list[int]], None, None]:
        yield from numbers(2)
        raise KeyboardInterrupt

    def write(member: Member, number: int) -> None:
        time.sleep(0.05)
        written.append(number)

    with pytest.raises(KeyboardInterrupt):
        list(write_behind(computed(), write, workers=1))
    assert len(written) <= 1


def test_closing_finishes_the_writes_that_have_begun() -> None:
    written: list[int] = []

    def write(member: Member, number: int) -> None:
        time.sleep(0.01)
        written.append(number)

    with closing(write_behind(numbers(9), write, workers=1)) as results:
        next(results)
    assert written == list(range(len(written))) and 1 <= len(written) < 4


class Network:
    """Sums images, and fails as told; remembers the sizes of its batches."""

    def __init__(self, error: Exception, most: int = 64, largest_px: int = 10**9) -> None:
        self.error, self.most, self.largest_px = error, most, largest_px
        self.batches: list[int] = []

    def __call__(self, batch: Sequence[Member]) -> list[float]:
        self.batches.append(len(batch))
        assert torch.is_inference_mode_enabled()
        if len(batch) > self.most or batch[0].size_px[0] > self.largest_px:
            raise self.error
        return [each.tensor.sum().item() for each in batch]


def compute(network: Network, sizes: Sequence[int]) -> tuple[Tally, dict[str, float], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    tally = Tally(lambda done, total: told.append((done, total)), total=len(sizes))

    def read(file: ImageFile) -> Member:
        size = int(file.path.stem.split("-")[1])
        if size == 0:
            raise ImageError(f"{file.path}: is empty")
        return Member(file, torch.ones(1, size, size))

    files = [ImageFile(f"{number}", Path(f"photos/{number}-{size}.png")) for number, size in enumerate(sizes)]
    found: dict[str, float] = {}
    batches = compute_batches(
        files, read, network, tally, workers=2, batch_size=3, batch_pixels=1, if_out_of_memory="buy more"
    )
    for members, results in batches:
        found |= {member.job.key: result for member, result in zip(members, results, strict=True)}
        tally.done += len(members)
        tally.tell()
    return tally, found, told


def test_files_that_cannot_be_read_are_counted_and_the_others_computed_in_batches() -> None:
    network = Network(RuntimeError("never"))
    tally, found, told = compute(network, [2, 0, 2, 4, 2, 2])
    assert found == {"0": 4, "2": 4, "3": 16, "4": 4, "5": 4} and sorted(network.batches) == [1, 1, 3]
    assert tally.failures == [FileReason(key="1", source="photos/1-0.png", reason="is empty")]
    assert (tally.done, tally.warnings, told[-1]) == (5, [], (6, 6))


def test_once_memory_ran_out_all_goes_image_by_image_and_what_does_not_fit_alone_comes_with_the_advice() -> None:
    network = Network(torch.OutOfMemoryError("CUDA out of memory"), most=1, largest_px=3)
    tally, found, _ = compute(network, [2, 2, 2, 2, 2, 2, 4])
    assert len(found) == 6 and network.batches == [3, *[1] * 7]
    assert tally.warnings == ["out of memory with a batch of 3: went on image by image"]
    assert [failure.reason for failure in tally.failures] == ["out of memory at 4 x 4 px: buy more"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("odd"), "the VAE failed at 4 x 4 px: odd"),
        (SdvaeError("does not fit into 1 MB"), "does not fit into 1 MB"),
    ],
)
def test_a_batch_that_fails_otherwise_is_tried_image_by_image_and_the_next_one_is_a_batch_again(
    error: Exception, reason: str
) -> None:
    network = Network(error, largest_px=3)
    tally, found, _ = compute(network, [4, 4, 4, 2, 2, 2])
    assert len(found) == 3 and network.batches == [3, 1, 1, 1, 3] and tally.warnings == []
    assert [failure.reason for failure in tally.failures] == [reason] * 3


def test_an_error_that_is_a_bug_ends_the_run() -> None:
    with pytest.raises(KeyError):
        compute(Network(KeyError("bug"), most=0), [2, 2, 2])
