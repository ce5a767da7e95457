"""Bounded queues: order, limits, errors in their place."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from sdvae.data.batches import QUEUE_PIXELS, WAITING_SHAPES, WriteBehind, group_by_shape, read_ahead


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


def test_writes_are_reported_in_order_and_the_queue_is_bounded() -> None:
    done: list[tuple[int, str]] = []
    waiting = 0
    release = threading.Event()

    def on_done(job: int, error: Exception | None) -> None:
        done.append((job, repr(error)))

    def write(job: int) -> None:
        release.wait(5)
        if job == 2:
            raise OSError("no")

    with WriteBehind[int](2, on_done) as writer:
        threading.Timer(0.2, release.set).start()
        begin = time.perf_counter()
        for job in range(6):
            writer.submit(job, lambda job=job: write(job), pixels=1)  # type: ignore[misc]
            waiting = job if time.perf_counter() - begin < 0.15 else waiting
    assert waiting == 3  # of six, four fit in the queue of two workers
    assert done == [(0, "None"), (1, "None"), (2, "OSError('no')"), (3, "None"), (4, "None"), (5, "None")]


def test_an_exception_drops_the_writes_that_have_not_begun() -> None:
    written: list[int] = []

    def write(job: int) -> None:
        time.sleep(0.05)
        written.append(job)

    with pytest.raises(KeyboardInterrupt), WriteBehind[int](1, lambda job, error: None) as writer:
        for job in range(2):
            writer.submit(job, lambda job=job: write(job), pixels=1)  # type: ignore[misc]
        raise KeyboardInterrupt
    assert len(written) <= 1
