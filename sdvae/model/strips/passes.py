"""Encoding and decoding in strips of rows: the whole pass, with less work and in as much memory as there is.

The numbers are those of the network's own `forward`, to rounding, at any size: statistics of a normalization are merged
over strips by the law of total variance, strips overlap by what a convolution looks at, and attention sees the whole
latent. Strips also keep intermediate results in the cache and share the work between threads, so this is the fast path
on CPUs.

Each block of the network says in `in_strips`, beside its `forward`, which layers it has, in terms of `Strips`. Here
they are computed; `plan.py` goes through the same methods with shapes alone. Maps and kernels are in `maps.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from sdvae.model.strips.maps import (
    Image,
    Layer,
    Memory,
    Moments,
    Norm,
    NotInStrips,
    Resampling,
    Rows,
    Stored,
    build_kernel,
    forget_scratch,
)
from sdvae.model.strips.winograd import STEP, TileTransform, block_tiles

__all__ = ["Network", "StripSizes", "Strips", "streamed", "strip_values"]

T = TypeVar("T")

_one_pass = threading.Lock()  # the number of threads of torch is one for the whole process

_transformed: WeakKeyDictionary[nn.Module, _Transformed] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class StripSizes:
    """How large strips are, and what they take; the defaults were measured on CPUs with AVX2 and AVX-512."""

    strip_bytes: int = 2 * 2**20  # of a strip of a layer's result, if that is more than the least number of rows
    least_rows: int = 16
    nested_rows: int = 64  # of a strip computed from a layer that is not stored: where strips overlap is computed twice
    least_blocks: int = 1  # blocks of tiles that a strip of the input has at least
    chunk_bytes: int = 40 * 2**20  # of stored rows; glibc returns larger ones to the system as soon as they are freed
    strip_copies: int = 9  # of a strip, in different stages, that a thread holds
    scratch_bytes: int = 100 * 2**20  # of a thread, for blocks of tiles
    weight_bytes: int = 150 * 2**20  # transformed weights of one layer

    def work_bytes(self, strip_values: int, itemsize: int, workers: int) -> int:
        """Memory to compute so many strips at a time, of so many values, and to hold the last ones."""
        return workers * (self.strip_copies * strip_values * itemsize + self.scratch_bytes) + self.weight_bytes


class Network(Protocol):
    """An encoder or a decoder."""

    def in_strips(self, x: Rows, strips: Strips) -> Layer: ...


class Strips(ABC):
    """The language of `in_strips`: the layers of a pass over one image, and which of their results are in memory.

    `conv`, `downsample` and `upsample` describe a layer, whose rows are computed when they are asked for. A layer that
    others read twice, or that a normalization follows, is then handed to `store` or `keep`.
    """

    def __init__(self, like: Tensor, max_bytes: int | None, sizes: StripSizes) -> None:
        self._like = like
        self._max_bytes = max_bytes
        self._sizes = sizes
        self._memory = Memory(like)
        self._stored: WeakSet[Stored] = WeakSet()
        # strips computed at a time: one in each of torch's threads on a CPU, one after the other elsewhere
        self._num_threads = torch.get_num_threads() if like.device.type == "cpu" else 1

    # For blocks

    def conv(
        self,
        source: Rows,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        shortcut: tuple[Rows, nn.Conv2d | None] | None = None,
    ) -> Layer:
        """A convolution of stride 1 that keeps height and width: `conv(activation(norm(source)))`, plus the shortcut.

        norm: needs a source that was stored or kept. activation: after the norm; may work in place.
        shortcut: rows that are added, as they are or through a 1x1 convolution.
        """
        if shortcut is not None and shortcut[1] is not None and not _is_pointwise(shortcut[1]):
            raise NotInStrips(shortcut[1])
        return self._layer(source, conv, "none", norm, activation, shortcut)

    def downsample(self, source: Rows, conv: nn.Conv2d) -> Layer:
        """A 3x3 convolution of stride 2, of the source padded by a row at the bottom and a column at the right."""
        return self._layer(source, conv, "down")

    def upsample(self, source: Rows, conv: nn.Conv2d) -> Layer:
        """Nearest neighbor to twice the size, then a 3x3 convolution."""
        return self._layer(source, conv, "up")

    def keep(self, layer: Layer, last_use: bool = False) -> Rows:
        """Store a layer if it fits into memory; else only measure it, so that its rows are computed whenever they are
        asked for. last_use: nothing else reads what it is computed from, which can be given back on the way."""
        return self.store(layer, last_use) if self._has_room(layer, last_use) else self.measure(layer)

    @abstractmethod
    def store(self, layer: Layer, last_use: bool = False) -> Stored:
        """Compute all rows into memory. last_use: as for `keep`."""

    @abstractmethod
    def measure(self, layer: Layer) -> Layer:
        """Compute all rows for their moments alone, which a norm needs."""

    @abstractmethod
    def whole(self, x: Rows, norm: nn.GroupNorm, function: Callable[[Tensor], Tensor], num_maps: int) -> Stored:
        """x plus a function of all its normalized positions at once, such as attention.

        x: stored. function: (1, N, C) -> (1, N, C), with N = H * W.
        num_maps: tensors of that size in memory at once, at most, with x, the function's input and its result.
        """

    @abstractmethod
    def image(self, layer: Layer) -> Tensor:
        """All rows of the last layer. Returns: (C, H, W)."""

    # What the two kinds of pass share

    @abstractmethod
    def _norm(self, source: Rows, norm: nn.GroupNorm, activation: Callable[[Tensor], Tensor] | None) -> Norm | None: ...

    @abstractmethod
    def _weights(self, conv: nn.Conv2d, transform: TileTransform) -> Tensor: ...

    def _layer(
        self,
        source: Rows,
        conv: nn.Conv2d,
        resampling: Resampling,
        norm: nn.GroupNorm | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        shortcut: tuple[Rows, nn.Conv2d | None] | None = None,
    ) -> Layer:
        normed = None if norm is None else self._norm(source, norm, activation)
        return Layer(source, build_kernel(conv, resampling, self._weights), normed, shortcut)

    def _new_store(self, layer: Layer, strip_rows: int) -> Stored:
        sizes = (layer.height, layer.width, layer.channels)
        return self._noted(Stored(*sizes, self._memory, strip_rows, self._sizes.chunk_bytes))

    def _noted(self, stored: Stored) -> Stored:
        self._stored.add(stored)
        return stored

    def _held_values(self, layer: Layer, last_use: bool = False) -> int:
        """Of all maps in memory while a layer is computed and stored; last_use: what it is computed from is given back
        on the way."""
        held = self._live_values()
        if last_use:
            return max(held, held + layer.num_values - sum(stored.num_values for stored in layer.first_rows(0)))
        return held + layer.num_values

    def _live_values(self) -> int:
        """Of all maps in memory now."""
        return sum(stored.num_values for stored in self._stored if not stored.is_released)

    def _has_room(self, layer: Layer, last_use: bool) -> bool:
        """Whether it can be in memory, beside what it is computed from; last_use: which it takes the place of."""
        if self._max_bytes is None:
            return True
        held = self._like.element_size() * self._held_values(layer, last_use)
        return held + self._work_bytes(strip_values(layer, self._sizes.least_rows)) <= self._max_bytes

    def _work_bytes(self, strip_values: int) -> int:
        return self._sizes.work_bytes(strip_values, self._like.element_size(), self._num_threads)


def strip_values(layer: Layer, rows: int) -> int:
    """Of a strip of so many rows, of the result or of what it is computed from, whichever is wider."""
    return rows * layer.width * max(layer.source.channels, layer.channels)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    window = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return window == ((1, 1), (1, 1), (0, 0), 1)


class _Transformed:
    """Transformed weights, with what tells whether the module's own have changed since.

    torch counts changes in place, but not those through `.data`, as diffusers' EMAModel makes them, nor those of
    weights that were made in inference mode; and new weights may lie where old ones did. So the sum of all bit patterns
    is compared as well, which one pass over the weights costs. What it cannot see is values that were exchanged with
    one another through `.data`.
    """

    def __init__(self, weight: Tensor, transform: TileTransform) -> None:
        self.weights = transform.of_weight(weight)
        self._transform = transform
        self._state = _state(weight)

    def is_of(self, weight: Tensor, transform: TileTransform) -> bool:
        return transform is self._transform and _state(weight) == self._state


def _state(weight: Tensor) -> tuple[object, ...]:
    """Where the weight is, how often it was changed, and the sum of its bits."""
    version = None if weight.is_inference() else weight._version
    values = weight.detach()
    if not values.is_contiguous():
        values = values.permute(0, 2, 3, 1)  # of channels_last
    values = values.reshape(-1)
    # integers wrap around, and two at a time are faster
    pairs = values.numel() % 2 == 0 and values.storage_offset() % 2 == 0
    dtype = torch.int64 if pairs else torch.int32
    return weight.data_ptr(), weight.stride(), weight.is_inference(), version, int(values.view(dtype).sum(dtype=dtype))


class _Pass(Strips):
    """A pass over images of one size that is computed: what is stored, and the threads."""

    def __init__(self, like: Tensor, max_bytes: int | None, sizes: StripSizes) -> None:
        super().__init__(like, max_bytes, sizes)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Pass:
        if self._num_threads > 1:
            self._pool = ThreadPoolExecutor(self._num_threads, "sdvae-strips")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        forget_scratch()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._num_threads)

    def store(self, layer: Layer, last_use: bool = False) -> Stored:
        rows = self._strip_rows(layer, self._held_values(layer, last_use))
        stored = self._new_store(layer, rows)

        def job(start: int, stop: int) -> Callable[[], Moments]:
            place = stored.place(start, stop)
            return lambda: Moments.of(layer.compute(start, stop, place))

        stored.moments = Moments.merged(self._run(layer, rows, job, last_use))
        return stored

    def measure(self, layer: Layer) -> Layer:
        def job(start: int, stop: int) -> Callable[[], Moments]:
            return lambda: Moments.of(layer.compute(start, stop))

        rows = self._strip_rows(layer, self._live_values())
        layer.moments = Moments.merged(self._run(layer, rows, job, release=False))
        return layer

    def whole(self, x: Rows, norm: nn.GroupNorm, function: Callable[[Tensor], Tensor], num_maps: int) -> Stored:
        assert isinstance(x, Stored), "hand it to store first"
        whole = x.whole()  # (H, W, C)
        tokens = torch.empty_like(whole)
        self._norm(x, norm, None).write(whole, tokens)
        h = function(tokens.view(1, -1, x.channels))  # (1, N, C)
        result = self._noted(Stored.of(h.view_as(whole).add_(whole), self._memory))
        result.moments = Moments.of(result.whole())
        return result

    def image(self, layer: Layer) -> Tensor:
        image = self._like.new_empty(layer.channels, layer.height, layer.width)

        def job(start: int, stop: int) -> Callable[[], object]:
            return lambda: image[:, start:stop].copy_(layer.compute(start, stop).permute(2, 0, 1))

        self._run(layer, self._strip_rows(layer, self._live_values() + image.numel()), job, release=True)
        return image

    def _norm(self, source: Rows, norm: nn.GroupNorm, activation: Callable[[Tensor], Tensor] | None) -> Norm:
        return Norm.of(norm, source.moments, activation or (lambda h: h))

    def _weights(self, conv: nn.Conv2d, transform: TileTransform) -> Tensor:
        """Transformed weights: kept from pass to pass if memory is not limited, as long as the module is the same."""
        if self._max_bytes is not None:
            return transform.of_weight(conv.weight)
        kept = _transformed.get(conv)
        if kept is None or not kept.is_of(conv.weight, transform):
            kept = _transformed[conv] = _Transformed(conv.weight, transform)
        return kept.weights

    # How strips are computed

    def _strip_rows(self, layer: Layer, held_values: int) -> int:
        """Rows of a strip. held_values: of maps that are in memory meanwhile.

        Where memory is not limited it depends on shapes alone, so that two threads give the bits of one. With more
        threads than strips, MKL divides sums among those of a strip: equal to rounding.
        """
        itemsize = self._like.element_size()
        row_bytes = layer.width * max(layer.channels, layer.source.channels) * itemsize
        phases = layer.height // layer.source.height or 1
        tiles = self._sizes.least_blocks * block_tiles(layer.source.channels, phases)
        tile_rows = -(-tiles // -(-layer.source.width // STEP))
        rows = max(self._sizes.least_rows, self._sizes.strip_bytes // row_bytes, tile_rows * STEP * phases)
        if self._max_bytes is not None:
            if isinstance(layer.source, Layer):
                rows = max(rows, self._sizes.nested_rows)
            left = self._max_bytes - itemsize * held_values - self._work_bytes(0)
            fit = left // (self._sizes.strip_copies * self._num_threads * row_bytes)
            rows = max(min(rows, fit // (2 * STEP) * 2 * STEP), 2 * STEP)
        return -(-min(rows, -(-layer.height // 2)) // (2 * STEP)) * 2 * STEP

    def _run(self, layer: Layer, rows: int, job: Callable[[int, int], Callable[[], T]], release: bool) -> list[T]:
        """Do the jobs of all strips. Returns: their results, in order."""
        try:
            return self._run_strips(layer, rows, job, release)
        finally:
            layer.forget()
            if self._max_bytes is not None:
                self._memory.forget()
                if self._like.device.type == "cpu":
                    _return_freed_memory()

    def _run_strips(
        self, layer: Layer, rows: int, job: Callable[[int, int], Callable[[], T]], release: bool
    ) -> list[T]:
        strips = [(start, min(start + rows, layer.height)) for start in range(0, layer.height, rows)]
        workers = min(self._num_threads, len(strips))
        if self._pool is None or workers == 1:
            results = []
            for start, stop in strips:
                results.append(job(start, stop)())
                if release:
                    layer.release(stop)
            return results
        inner, inference = self._num_threads // workers, torch.is_inference_mode_enabled()
        waiting: deque[tuple[int, Future[T]]] = deque()
        results = []

        def finish() -> None:
            stop, future = waiting.popleft()
            results.append(future.result())
            if release:
                layer.release(stop)

        torch.set_num_threads(inner)  # also that of MKL, which is one for all threads
        try:
            for start, stop in strips:
                if len(waiting) >= workers + 1:
                    finish()
                waiting.append((stop, self._pool.submit(_in_thread, inner, inference, job(start, stop))))
            while waiting:
                finish()
        finally:
            for _, future in waiting:
                future.cancel()
            torch.set_num_threads(self._num_threads)
        return results


def _return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in a heap for each thread, and no other thread finds it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _in_thread(count: int, inference: bool, job: Callable[[], T]) -> T:
    """A job in the modes of the thread that waits for it; torch has them for each thread."""
    torch.set_num_threads(count)
    with torch.inference_mode(inference), torch.no_grad():
        return job()


def streamed(
    network: Network,
    x: Tensor,
    max_bytes: int | None = None,
    *,
    sizes: StripSizes = StripSizes(),  # noqa: B008
) -> Tensor:
    """`network(x)` in strips, without gradients.

    x: (B, C, H, W); images are computed one by one, so a batch changes no bit of any of them.
    max_bytes: limit for intermediate results; None: all that saves work is stored. Below the least that `plan_pass`
        names it cannot be kept.
    Returns: as `network.forward`.
    """
    grad = torch.inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()
    with grad, _one_pass, _Pass(x, max_bytes, sizes) as strips:
        results = [strips.image(network.in_strips(Image(image), strips)) for image in x]
        return torch.stack(results) if len(results) > 1 else results[0][None]
