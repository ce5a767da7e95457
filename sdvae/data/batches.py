"""Many files through a network: read ahead, computed in batches of one shape, written behind, and counted.

A file that fails is recorded, and the rest goes on. Memory does not grow with the number of files: each queue is
limited in files and, because a photograph may have a hundred times the pixels of a thumbnail, in pixels. The
computation itself stays in the calling thread. Torch is imported when it begins: the command line takes the number of
threads from here.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from sdvae.data.sources.files import FileReason
from sdvae.errors import SdvaeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Member",
    "Named",
    "OnProgress",
    "Tally",
    "WriteBehind",
    "compute_batches",
    "default_workers",
    "group_by_shape",
    "read_ahead",
]


class Named(Protocol):
    """A file to work on."""

    @property
    def key(self) -> str: ...  # its name among the others

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True, eq=False)
class Member:
    """A file that was read, for a batch with others of its shape."""

    job: Named
    tensor: Tensor

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the image, which the tensor is unless a subclass says otherwise."""
        height, width = self.tensor.shape[-2:]
        return width, height


OnProgress = Callable[[int, int], None]  # files finished or failed so far, files to do
Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
NamedJob = TypeVar("NamedJob", bound=Named)
AnyMember = TypeVar("AnyMember", bound=Member)
Result = TypeVar("Result")

# A queued pixel costs up to 12 bytes (three channels of float32), so each of the two queues stays under about 0.8 GB.
QUEUE_PIXELS = 64_000_000
AUTO_BATCH_LIMIT = 64
# Mixed folders have a few common shapes; a shape beyond these sends the fullest batch off.
WAITING_SHAPES = 16


def default_workers() -> int:
    """One thread per CPU core; more than 8 wait on the disk or on each other."""
    return min(8, os.cpu_count() or 1)


@dataclass
class Tally:
    """What happened so far."""

    on_progress: OnProgress | None
    total: int
    done: int = 0
    failures: list[FileReason] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    singly: bool = False  # since memory ran out: the next large batch would only fail again

    def fail(self, job: Named, error: Exception) -> None:
        self.failures.append(FileReason.of(job.key, job.path, error))
        self.tell()

    def tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.done + len(self.failures), self.total)


def compute_batches(
    jobs: Iterable[NamedJob],
    read: Callable[[NamedJob], AnyMember],
    compute: Callable[[Sequence[AnyMember]], Result],
    tally: Tally,
    *,
    workers: int,
    batch_size: int | None,
    batch_pixels: int,
    if_out_of_memory: str,
) -> Generator[tuple[Sequence[AnyMember], Result], None, None]:
    """Read files in threads, and compute batches of them, in inference mode. Close the generator to stop early.

    A batch that fails is tried again image by image, so that only the bad ones are lost: they go into the tally.
    batch_size, batch_pixels: as in `group_by_shape`. if_out_of_memory: advice for an image too large even alone.
    """
    import torch

    compute = torch.inference_mode()(compute)
    loaded = read_ahead(jobs, read, lambda each: math.prod(each.size_px), workers)
    with closing(loaded):
        members = _readable(loaded, tally)
        for batch in group_by_shape(
            members,
            shape=lambda each: each.tensor.shape,
            pixels=lambda each: math.prod(each.size_px),
            batch_size=batch_size,
            batch_pixels=batch_pixels,
        ):
            if len(batch) > 1 and not tally.singly:
                try:
                    result = compute(batch)
                except RuntimeError as error:  # torch.OutOfMemoryError is one
                    if _is_out_of_memory(error):
                        tally.singly = True
                        tally.warnings.append(f"out of memory with a batch of {len(batch)}: went on image by image")
                except SdvaeError:  # a size that does not fit into the memory that is allowed
                    pass
                else:
                    yield batch, result
                    continue
                # Only here, where the exception is gone: its frames hold the tensors of the failed batch.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            for member in batch:
                try:
                    result = compute([member])
                except RuntimeError as error:
                    size = f"{member.size_px[0]} x {member.size_px[1]} px"
                    reason = f"the VAE failed at {size}: {error}"
                    if _is_out_of_memory(error):
                        reason = f"out of memory at {size}: {if_out_of_memory}"
                    tally.fail(member.job, SdvaeError(reason))
                except SdvaeError as error:
                    tally.fail(member.job, error)
                else:
                    yield [member], result


def _readable(loaded: Iterable[tuple[NamedJob, AnyMember | Exception]], tally: Tally) -> Iterator[AnyMember]:
    for job, result in loaded:
        if isinstance(result, Exception):
            tally.fail(job, result)
        else:
            yield result


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and MPS, CPU on Linux, on Windows
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


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
