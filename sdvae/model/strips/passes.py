"""Encoding and decoding in strips of rows: the whole pass, with less work and in as much memory as there is.

The numbers are those of the network's own `forward`, to rounding, at any size: statistics of a normalisation are merged
over strips by the law of total variance, strips overlap by what a convolution looks at, and attention sees the whole
latent. Strips also keep intermediate results in the cache and share the work between threads, so this is the fast path
on CPUs. How strips are computed is in `maps.py`; here is the order of the network, what is stored on the way, and what
is computed twice instead where memory is limited.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.model.layers import Attention, Decoder, Encoder, ResnetBlock2D, UNetMidBlock2D, silu
from sdvae.model.strips.maps import Image, Layer, Memory, Moments, Norm, Rows, Stored, build_kernel, forget_scratch
from sdvae.model.strips.winograd import STEP, TileTransform, block_tiles

__all__ = ["least_bytes", "most_bytes", "streamed"]

T = TypeVar("T")

_one_pass = threading.Lock()  # the number of threads of torch is one for the whole process

_transformed: WeakKeyDictionary[nn.Module, _Transformed] = WeakKeyDictionary()

STRIP_BYTES = 2 * 2**20  # of a strip of a layer's result, where that leaves more than the least number of rows
LEAST_ROWS = 16
NESTED_ROWS = 64  # of one that is computed from a layer that is not stored: where strips overlap is computed twice
STRIP_COPIES = 9  # of a strip, in different stages, that a thread holds
SCRATCH_BYTES = 100 * 2**20  # of a thread, for blocks of tiles
WEIGHT_BYTES = 150 * 2**20  # transformed weights of one layer


def streamed(network: Encoder | Decoder, x: Tensor, max_bytes: int | None = None) -> Tensor:
    """`network(x)` in strips, without gradients.

    x: (B, C, H, W); images are computed one by one, so a batch changes no bit of any of them.
    max_bytes: what intermediate results may take; None: all are stored that save work.
    Returns: as `network.forward`. Uses more than max_bytes where that is below `least_bytes`.
    """
    grad = torch.inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()
    with grad, _one_pass, _Strips(network, x, max_bytes) as strips:
        passes = strips.decode if isinstance(network, Decoder) else strips.encode
        results = [passes(image) for image in x]
        return torch.stack(results) if len(results) > 1 else results[0][None]


def least_bytes(network: Encoder | Decoder, height: int, width: int, itemsize: int = 4) -> int:
    """What intermediate results take at least. height, width: of the image, px."""
    levels = list(network.up_blocks)[::-1] if isinstance(network, Decoder) else list(network.down_blocks)
    widths = [block.resnets[-1].conv2.out_channels for block in levels]
    maps = [channels * (height >> level) * (width >> level) for level, channels in enumerate(widths)]
    return itemsize * max(*maps, 6 * maps[-1]) + _work_bytes(
        2 * STEP * width * max(widths[:2]), itemsize, _num_workers(network)
    )


def most_bytes(network: Encoder | Decoder, height: int, width: int, itemsize: int = 4) -> int:
    """What intermediate results take where memory is not limited. height, width: of the image, px."""
    levels = list(network.up_blocks)[::-1] if isinstance(network, Decoder) else list(network.down_blocks)
    largest = max(
        (block.resnets[0].conv1.in_channels + block.resnets[0].conv1.out_channels)
        * (height >> level)
        * (width >> level)
        for level, block in enumerate(levels)
    )
    kept = 5 * sum(parameter.numel() for parameter in network.parameters())  # transformed weights; 4.7 for the SD VAE
    least = least_bytes(network, height, width, itemsize)
    work = _work_bytes(STRIP_BYTES // itemsize, itemsize, _num_workers(network))
    return itemsize * (largest + kept) + max(least - itemsize * largest, work)


def _num_workers(network: Encoder | Decoder) -> int:
    """Strips that are computed at a time: one in each of torch's threads on a CPU, one after the other elsewhere."""
    return torch.get_num_threads() if next(network.parameters()).device.type == "cpu" else 1


def _work_bytes(strip_values: int, itemsize: int, workers: int) -> int:
    """What it takes to compute so many strips at a time, of so many values, and to hold the last ones."""
    return workers * (STRIP_COPIES * strip_values * itemsize + SCRATCH_BYTES) + WEIGHT_BYTES


class _Transformed:
    """Transformed weights, with what tells whether the module's own have changed since.

    torch counts changes in place, but not those through `.data`, as diffusers' EMAModel makes them, and new weights may
    lie where old ones did. So some of the values are compared as well; and of weights that were made in inference mode,
    whose changes torch does not count, the sum.
    """

    def __init__(self, weight: Tensor, transform: TileTransform) -> None:
        self.weights = transform.of_weight(weight)
        self._transform = transform
        self._place = _place(weight)
        self._values = _some_values(weight).clone()

    def is_of(self, weight: Tensor, transform: TileTransform) -> bool:
        same_place = transform is self._transform and _place(weight) == self._place
        return same_place and torch.equal(_some_values(weight), self._values)


def _place(weight: Tensor) -> tuple[object, ...]:
    """Where the weight is, and what tells of most changes."""
    state = float(weight.sum(dtype=torch.float64)) if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.stride(), weight.is_inference(), state


def _some_values(weight: Tensor) -> Tensor:
    """Every 61st value, in the order of memory: of all channels and taps, as 61 is prime."""
    values = weight.detach()
    if not values.is_contiguous():
        values = values.permute(0, 2, 3, 1)  # of channels_last
    return values.reshape(-1)[::61]


class _Strips:
    """A pass over images of one size: the parts of the network, what is stored, and the threads."""

    def __init__(self, network: Encoder | Decoder, x: Tensor, max_bytes: int | None) -> None:
        self._network = network
        self._like = x
        self._memory = Memory(x)
        self._groups = network.conv_norm_out.num_groups
        self._max_bytes = max_bytes
        self._num_threads = _num_workers(network)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Strips:
        if self._num_threads > 1:
            self._pool = ThreadPoolExecutor(self._num_threads, "sdvae-strips")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        forget_scratch()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._num_threads)

    # The network

    def encode(self, x: Tensor) -> Tensor:
        """x: (C, H, W). Returns: (2 * latent_channels, h, w)."""
        network = self._network
        h = self.store(self.layer(Image(x), network.conv_in))
        for block in network.down_blocks:
            for resnet in block.resnets:
                h = self.resnet(h, resnet)
            for downsample in block.downsamplers:
                h = self.store(self.layer(h, downsample.conv), last_use=True)
        h = self.mid_block(h, network.mid_block)
        return self.image(self.layer(h, network.conv_out, self.norm(h, network.conv_norm_out, silu)))

    def decode(self, z: Tensor) -> Tensor:
        """z: (latent_channels, h, w), after post_quant_conv. Returns: (C, H, W)."""
        network = self._network
        h: Rows = self.mid_block(self.store(self.layer(Image(z), network.conv_in)), network.mid_block)
        for block in network.up_blocks:
            for resnet in block.resnets:
                h = self.resnet(h, resnet)
            for upsample in block.upsamplers:
                large = self.layer(h, upsample.conv, upsampling=True)
                h = self.store(large, last_use=True) if self.has_room(large, last_use=True) else self.measure(large)
        return self.image(self.layer(h, network.conv_out, self.norm(h, network.conv_norm_out, silu)))

    def mid_block(self, h: Stored, block: UNetMidBlock2D) -> Stored:
        h = self.resnet(h, block.resnets[0])
        for attention in block.attentions:
            h = self.attention(h, attention)
        return self.resnet(h, block.resnets[1])

    def resnet(self, x: Rows, block: ResnetBlock2D) -> Stored:
        inner = self.layer(x, block.conv1, self.norm(x, block.norm1, block.activation))
        h = self.store(inner) if self.has_room(inner) else self.measure(inner)
        norm = self.norm(h, block.norm2, block.activation)
        return self.store(self.layer(h, block.conv2, norm, shortcut=(x, block.conv_shortcut)), last_use=True)

    def attention(self, x: Stored, layer: Attention) -> Stored:
        whole = x.whole()  # (H, W, C)
        tokens = torch.empty_like(whole)
        self.norm(x, layer.group_norm, lambda h: h).write(whole, tokens)
        tokens = tokens.view(-1, x.channels)  # (N, C)
        q, k, v = (project(tokens)[None, None] for project in (layer.to_q, layer.to_k, layer.to_v))
        h = layer.to_out[0](F.scaled_dot_product_attention(q, k, v)[0, 0])  # (N, C)
        result = Stored.of(h.view_as(whole).add_(whole), self._memory)
        result.moments = Moments.of(result.whole(), self._groups)
        return result

    # Its layers

    def norm(self, h: Rows, layer: nn.GroupNorm, activation: Callable[[Tensor], Tensor]) -> Norm:
        return Norm.of(layer, h.moments, activation)

    def layer(
        self,
        source: Rows,
        conv: nn.Conv2d,
        norm: Norm | None = None,
        *,
        upsampling: bool = False,
        shortcut: tuple[Rows, nn.Conv2d | None] | None = None,
    ) -> Layer:
        kernel = build_kernel(conv, upsampling=upsampling, transformed=self._transformed)
        return Layer(source, kernel, norm, shortcut)

    def _transformed(self, conv: nn.Conv2d, transform: TileTransform) -> Tensor:
        """Transformed weights: kept from pass to pass where memory is not limited, and the module is not changed."""
        weight = conv.weight
        if self._max_bytes is not None:
            return transform.of_weight(weight)
        kept = _transformed.get(conv)
        if kept is None or not kept.is_of(weight, transform):
            kept = _transformed[conv] = _Transformed(weight, transform)
        return kept.weights

    # What is stored

    def has_room(self, node: Layer, last_use: bool = False) -> bool:
        """Whether it can be in memory, beside what it is computed from; last_use: which it takes the place of."""
        if self._max_bytes is None:
            return True
        strip = LEAST_ROWS * node.width * max(node.source.channels, node.channels)
        itemsize = self._like.element_size()
        held = itemsize * _held_values(node, last_use)
        return held + _work_bytes(strip, itemsize, self._num_threads) <= self._max_bytes

    def store(self, node: Layer, last_use: bool = False) -> Stored:
        """Compute all rows, and their moments. last_use: give back what it is computed from, strip by strip."""
        rows = self._strip_rows(node, _held_values(node, last_use))
        stored = Stored(node.height, node.width, node.channels, self._memory, rows)

        def job(start: int, stop: int) -> Callable[[], Moments]:
            place = stored.place(start, stop)
            return lambda: Moments.of(node.compute(start, stop, place), self._groups)

        stored.moments = Moments.merged(self._run(node, rows, job, last_use))
        return stored

    def measure(self, node: Layer) -> Layer:
        """Compute all rows for their moments alone."""

        def job(start: int, stop: int) -> Callable[[], Moments]:
            return lambda: Moments.of(node.compute(start, stop), self._groups)

        rows = self._strip_rows(node, node.stored_values)
        node.moments = Moments.merged(self._run(node, rows, job, release=False))
        return node

    def image(self, node: Layer) -> Tensor:
        """All rows of the last layer. Returns: (C, H, W)."""
        image = self._like.new_empty(node.channels, node.height, node.width)

        def job(start: int, stop: int) -> Callable[[], object]:
            return lambda: image[:, start:stop].copy_(node.compute(start, stop).permute(2, 0, 1))

        self._run(node, self._strip_rows(node, node.stored_values + image.numel()), job, release=True)
        return image

    # How strips are computed

    def _strip_rows(self, node: Layer, held_values: int) -> int:
        """Rows of a strip. held_values: of maps that are in memory meanwhile.

        Where memory is not limited it depends on shapes alone, so that two threads give the bits of one. With more
        threads than strips, MKL divides sums among those of a strip: equal to rounding.
        """
        itemsize = self._like.element_size()
        row_bytes = node.width * max(node.channels, node.source.channels) * itemsize
        phases = node.height // node.source.height or 1
        tile_rows = -(-block_tiles(node.source.channels, phases) // -(-node.source.width // STEP))
        rows = max(LEAST_ROWS, STRIP_BYTES // row_bytes, tile_rows * STEP * phases)
        if self._max_bytes is not None:
            if isinstance(node.source, Layer):
                rows = max(rows, NESTED_ROWS)
            left = self._max_bytes - itemsize * held_values - _work_bytes(0, itemsize, self._num_threads)
            fit = left // (STRIP_COPIES * self._num_threads * row_bytes)
            rows = max(min(rows, fit // (2 * STEP) * 2 * STEP), 2 * STEP)
        return -(-min(rows, -(-node.height // 2)) // (2 * STEP)) * 2 * STEP

    def _run(self, node: Layer, rows: int, job: Callable[[int, int], Callable[[], T]], release: bool) -> list[T]:
        """Do the jobs of all strips. Returns: their results, in order."""
        try:
            return self._run_strips(node, rows, job, release)
        finally:
            node.forget()
            if self._max_bytes is not None:
                self._memory.forget()
                if self._like.device.type == "cpu":
                    _return_freed_memory()

    def _run_strips(self, node: Layer, rows: int, job: Callable[[int, int], Callable[[], T]], release: bool) -> list[T]:
        strips = [(start, min(start + rows, node.height)) for start in range(0, node.height, rows)]
        workers = min(self._num_threads, len(strips))
        if self._pool is None or workers == 1:
            results = []
            for start, stop in strips:
                results.append(job(start, stop)())
                if release:
                    node.release(stop)
            return results
        inner, inference = self._num_threads // workers, torch.is_inference_mode_enabled()
        waiting: deque[tuple[int, Future[T]]] = deque()
        results = []

        def finish() -> None:
            stop, future = waiting.popleft()
            results.append(future.result())
            if release:
                node.release(stop)

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


def _held_values(node: Layer, last_use: bool) -> int:
    """Of the maps in memory while a layer is computed and stored; last_use: what it is computed from is given back on
    the way."""
    if last_use:
        return max(node.num_values, node.stored_values)
    return node.num_values + node.stored_values


def _return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in a heap for each thread, and no other thread finds it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _in_thread(count: int, inference: bool, job: Callable[[], T]) -> T:
    """A job in the modes of the thread that waits for it; torch has them for each thread."""
    torch.set_num_threads(count)
    with torch.inference_mode(inference), torch.no_grad():
        return job()
