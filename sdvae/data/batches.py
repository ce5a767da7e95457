"""Reading ahead, batches of one shape, writing behind: bounded queues around a computation. No torch.

Memory does not grow with the number of files: each queue is limited in files and, because a photograph may have a
hundred times the pixels of a thumbnail, in pixels. The computation itself stays in the calling thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["WriteBehind", "default_workers", "group_by_shape", "read_ahead"]

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")

# A queued pixel costs up to 12 bytes (three channels of float32), so each of the two queues stays under about 0.8 GB.
QUEUE_PIXELS = 64_000_000
AUTO_BATCH_LIMIT = 64
# Mixed folders have a few common shapes; a shape beyond these sends the fullest batch off.
WAITING_SHAPES = 16


def default_workers() -> int:
    """One thread per CPU core; more than 8 wait on the disk or on each other."""
    return min(8, os.cpu_count() or 1)


def read_ahead(
    jobs: Iterable[Job], read: Callable[[Job], Loaded], pixels: Callable[[Loaded], int], workers: int
) -> Generator[tuple[Job, Loaded | Exception], None, None]:
    """Read in threads, ahead of the consumer; results come in the order of the jobs.

    An exception of `read` takes the place of its result. Close the generator to stop early: files that are being read
    are finished, the others are dropped.
    """
    pending: deque[tuple[Job, Future[Loaded]]] = deque()
    largest = 1
    with ThreadPoolExecutor(workers, thread_name_prefix="sdvae-read") as pool:
        try:
            for job in jobs:
                pending.append((job, pool.submit(read, job)))
                while len(pending) > max(1, min(2 * workers, QUEUE_PIXELS // largest)):
                    first, future = pending.popleft()
                    if future.exception() is None:
                        largest = max(largest, pixels(future.result()))
                    result = _result_or_error(future)
                    yield first, result
            while pending:
                first, future = pending.popleft()
                result = _result_or_error(future)
                yield first, result
        finally:
            for _, future in pending:
                future.cancel()


def group_by_shape(
    members: Iterable[Job],
    shape: Callable[[Job], Hashable],
    pixels: Callable[[Job], int],
    batch_size: int | None,
    batch_pixels: int,
) -> Iterator[list[Job]]:
    """Batches of members of one shape.

    batch_size: the most members of a batch; None: as many as make `batch_pixels`, at least 1 and at most 64.
    """
    waiting: dict[Hashable, list[Job]] = {}
    for member in members:
        batch = waiting.setdefault(shape(member), [])
        batch.append(member)
        limit = batch_size or max(1, min(AUTO_BATCH_LIMIT, batch_pixels // pixels(member)))
        if len(batch) >= limit:
            yield waiting.pop(shape(member))
        elif len(waiting) > WAITING_SHAPES:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


class WriteBehind(Generic[Job]):
    """Writes in threads while the caller computes; a context manager.

    Leaving it normally waits for all writes. Leaving it with an exception finishes the writes that have begun and
    drops the rest.
    """

    def __init__(self, workers: int, on_done: Callable[[Job, Exception | None], None]) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sdvae-write")
        self._pending: deque[tuple[Job, Future[None]]] = deque()
        self._pixels: deque[int] = deque()
        self._limit = 2 * workers
        self._on_done = on_done  # called in the caller's thread, in the order of submission

    def submit(self, job: Job, write: Callable[[], None], pixels: int) -> None:
        """Queue a write; waits while the queue is full."""
        while self._pending and (len(self._pending) >= self._limit or sum(self._pixels) + pixels > QUEUE_PIXELS):
            self._finish_first()
        self._pending.append((job, self._pool.submit(write)))
        self._pixels.append(pixels)

    def _finish_first(self) -> None:
        self._pixels.popleft()
        job, future = self._pending.popleft()
        result = _result_or_error(future)
        self._on_done(job, result)

    def __enter__(self) -> WriteBehind[Job]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._pending:
                self._finish_first()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _result_or_error(future: Future[Loaded]) -> Loaded | Exception:
    try:
        return future.result()
    except Exception as error:
        return error
