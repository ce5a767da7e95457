"""Feature maps that are computed some rows at a time: the parts that exact execution in strips is made of.

A `Rows` is a feature map of one image, (H, W, C), of which rows are asked for. `Stored` has them in memory; a `Layer`
computes them from the rows of another `Rows`, as many more as its convolution looks at, so the result has no seams. The
network, and how much of it is stored, is decided in `passes.py`.

Letters of the shape comments: n rows of a strip, H, W and C height, width and channels of the layer.
"""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.model.strips.winograd import CONVOLUTION, STEP, UPSAMPLING, Scratch, TileTransform, tile_convolution

__all__ = [
    "Image",
    "Kernel",
    "Layer",
    "Memory",
    "Moments",
    "Norm",
    "Rows",
    "Stored",
    "build_kernel",
    "forget_scratch",
    "local_scratch",
]

# Chunks above the size from which glibc's malloc gives memory straight back to the system when it is freed.
CHUNK_BYTES = 40 * 2**20


def _computing(dtype: torch.dtype) -> torch.dtype:
    """What normalisations of features in this dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, sums in one order: torch's operators add up a partial sum for each thread."""
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if count > 1:
            torch.set_num_threads(count)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and biased variance of each group of channels over some rows; each (groups,), float64."""

    count: int  # values of a group
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """x: (n, W, C), contiguous."""
        with _one_thread(x.device):
            return cls._of(x, groups)

    @classmethod
    def _of(cls, x: Tensor, groups: int) -> Moments:
        rows, width, channels = x.shape
        count = rows * width * channels // groups
        if x.device.type != "cpu" or x.dtype != torch.float32:
            values = x.to(_computing(x.dtype)).view(-1, groups, channels // groups)
            var, mean = torch.var_mean(values, dim=(0, 2), correction=0)
            return cls(count, mean.double(), var.double())
        folded = width
        while folded % 2 == 0 and rows * (width // folded) < 128:
            folded //= 2
        # Sums of some hundred terms, merged in float64. This operator gives both at the speed of memory; torch.var_mean
        # takes twenty times as long in this layout.
        lines = x.view(1, -1, 1, folded * channels).permute(0, 3, 1, 2)  # (1, folded * C, H', 1)
        means, variances = (
            part.double().view(folded, groups, -1) for part in torch.batch_norm_update_stats(lines, None, None, 0.0)
        )
        mean = means.mean((0, 2))
        return cls(count, mean, (variances + (means - mean[:, None]).square()).mean((0, 2)))

    @classmethod
    def merged(cls, parts: Sequence[Moments]) -> Moments:
        """The moments of all parts together, by the law of total variance."""
        count = sum(part.count for part in parts)
        weights = torch.tensor([part.count / count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
        means, variances = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "var"))
        mean = weights @ means
        return cls(count, mean, weights @ (variances + (means - mean).square()))


@dataclass(frozen=True, eq=False)
class Norm:
    """A GroupNorm whose statistics are known, and the activation after it."""

    scale: Tensor  # (C,), float32, or float64 for features in that
    shift: Tensor
    activation: Callable[[Tensor], Tensor]  # may work in place

    @classmethod
    def of(cls, layer: nn.GroupNorm, moments: Moments, activation: Callable[[Tensor], Tensor]) -> Norm:
        scale = (moments.var + layer.eps).rsqrt()[:, None] * layer.weight.double().view(layer.num_groups, -1)
        shift = layer.bias.double().view(layer.num_groups, -1) - moments.mean[:, None] * scale
        dtype = _computing(layer.weight.dtype)
        return cls(scale.flatten().to(dtype), shift.flatten().to(dtype), activation)

    def write(self, x: Tensor, out: Tensor) -> None:
        """Normalise and activate some rows. x, out: (n, W, C)."""
        if x.dtype == self.scale.dtype:
            torch.addcmul(self.shift, x, self.scale, out=out)
            result = self.activation(out)
        else:
            result = self.activation(torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale).to(x.dtype))
        if result is not out:
            out.copy_(result)


class Rows(ABC):
    """A feature map of one image, (height, width, channels), of which rows can be had."""

    height: int
    width: int
    channels: int
    moments: Moments  # of all rows; set once they are known

    @property
    def num_values(self) -> int:
        return self.height * self.width * self.channels

    @property
    @abstractmethod
    def stored_values(self) -> int:
        """Of the maps in memory that its rows are read or computed from."""

    @abstractmethod
    def pieces(self, start: int, stop: int) -> list[Tensor]:
        """The rows from start to stop, in one or more tensors (n, W, C)."""

    def release(self, before: int) -> None:  # noqa: B027  what stores nothing has nothing to release
        """No row before this one will be asked for again."""


class Image(Rows):
    """An image or latent that is there already. x: (C, H, W)."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self.channels, self.height, self.width = x.shape

    @property
    def stored_values(self) -> int:
        return 0  # it is not ours

    def pieces(self, start: int, stop: int) -> list[Tensor]:
        return [self._x[:, start:stop].permute(1, 2, 0)]


class Memory:
    """Memory for chunks of rows. What was given back serves again: fresh memory costs a page fault every 4 KB."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._free: list[Tensor] = []

    def take(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        for index, chunk in enumerate(self._free):
            if len(chunk) == size:
                return self._free.pop(index).view(shape)
        self._free.clear()  # of another size: what comes now is of this one
        return self.like.new_empty(size).view(shape)

    def give_back(self, chunk: Tensor) -> None:
        self._free.append(chunk.view(-1))

    def forget(self) -> None:
        """Keep nothing that was given back."""
        self._free.clear()


class Stored(Rows):
    """Rows in memory, in chunks, so that those which are used up can be given back while others are written."""

    def __init__(self, height: int, width: int, channels: int, memory: Memory, strip: int) -> None:
        self.height, self.width, self.channels = height, width, channels
        self._memory = memory
        row_bytes = width * channels * memory.like.element_size()
        chunk_rows = strip * max(1, CHUNK_BYTES // (strip * row_bytes))
        self._chunk_rows = min(chunk_rows, -(-height // strip) * strip)
        self._chunks: list[Tensor | None] = [None] * -(-height // self._chunk_rows)

    @classmethod
    def of(cls, whole: Tensor, memory: Memory) -> Stored:
        """Rows that are there already. whole: (H, W, C), contiguous."""
        stored = cls(whole.shape[0], whole.shape[1], whole.shape[2], memory, strip=whole.shape[0])
        stored._chunk_rows, stored._chunks = whole.shape[0], [whole]
        return stored

    @property
    def stored_values(self) -> int:
        return self.num_values

    def place(self, start: int, stop: int) -> Tensor:
        """Where rows are to be written, (n, W, C); they must not cross the border of a chunk, as no strip does."""
        index, first = divmod(start, self._chunk_rows)
        if (chunk := self._chunks[index]) is None:
            chunk = self._memory.take(self._chunk_rows, self.width, self.channels)
            self._chunks[index] = chunk
        return chunk[first : first + stop - start]

    def pieces(self, start: int, stop: int) -> list[Tensor]:
        found = []
        while start < stop:
            index, first = divmod(start, self._chunk_rows)
            chunk = self._chunks[index]
            assert chunk is not None, "rows that were given back, or not written yet"
            found.append(chunk[first : first + stop - start])
            start += len(found[-1])
        return found

    def release(self, before: int) -> None:
        used_up = len(self._chunks) if before >= self.height else before // self._chunk_rows
        for index in range(used_up):
            if (chunk := self._chunks[index]) is not None:
                self._memory.give_back(chunk)
                self._chunks[index] = None

    def whole(self) -> Tensor:
        """All rows. Returns: (H, W, C)."""
        pieces = self.pieces(0, self.height)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Kernel(ABC):
    """What a layer computes from a window of its input that has all borders already."""

    channels: int  # of the output

    @abstractmethod
    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""

    @abstractmethod
    def window(self, start: int, stop: int) -> tuple[int, int]:
        """The first and the last input row, exclusive, that output rows depend on; outside the image they are zero."""

    @abstractmethod
    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        """Rows and columns of the padded window, and columns left of the image in it."""

    @abstractmethod
    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        """Compute the rows from `start` on. padded: (rows, columns, C), contiguous; out: (n, W_out, C_out)."""


class _Direct(Kernel):
    """torch's convolution."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int) -> None:
        self._weight, self._bias, self._stride = weight, bias, stride
        self.channels = len(weight)

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height // self._stride, width // self._stride

    def window(self, start: int, stop: int) -> tuple[int, int]:
        if self._stride == 2:  # the family pads at the bottom and the right only
            return 2 * start, 2 * stop + 1
        return start - 1, stop + 1

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return (rows, 2 * (width // 2) + 1, 0) if self._stride == 2 else (rows, width + 2, 1)

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        x = padded.permute(2, 0, 1)[None]  # (1, C, rows, columns), in channels_last
        out.copy_(F.conv2d(x, self._weight, self._bias, self._stride)[0].permute(1, 2, 0))


class _DirectUpsampling(Kernel):
    """Nearest neighbour to twice the size, then torch's convolution."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.channels = len(weight)

    def size(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return start // 2 - 1, -(-stop // 2) + 1

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return rows, width + 2, 1

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        large = F.interpolate(padded.permute(2, 0, 1)[None], scale_factor=2.0, mode="nearest")[:, :, 1:-1, 1:-1]
        y = F.conv2d(large, self._weight, self._bias)[0].permute(1, 2, 0)
        out.copy_(y[start % 2 : start % 2 + len(out)])


class _Winograd(Kernel):
    """A convolution of stride 1, or an upsampling with one, in tiles."""

    def __init__(self, weights: Tensor, bias: Tensor | None, transform: TileTransform) -> None:
        self._weights, self._bias, self._transform = weights, bias, transform
        self._phases = transform.phases
        self.channels = weights.shape[2]

    def size(self, height: int, width: int) -> tuple[int, int]:
        return self._phases * height, self._phases * width

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return start // self._phases - 1, -(-stop // self._phases) + 1

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return _whole_tiles(rows - 2) + 2, _whole_tiles(width) + 2, 1

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        first = start % self._phases
        rows, columns = (self._phases * (extent - 2) for extent in padded.shape[:2])
        if out.shape[:2] == (rows, columns):
            tile_convolution(padded, self._weights, self._bias, self._transform, scratch, out)
            return
        whole = scratch.take("whole", rows, columns, self.channels, like=padded)
        tile_convolution(padded, self._weights, self._bias, self._transform, scratch, whole)
        out.copy_(whole[first : first + len(out), : out.shape[1]])


def _whole_tiles(extent: int) -> int:
    return -(-extent // STEP) * STEP


# Of both sides of a convolution. Measured with 128 to 512 channels on a CPU with AVX-512.
WINOGRAD_CHANNELS = 64


def build_kernel(
    conv: nn.Conv2d, *, upsampling: bool, transformed: Callable[[nn.Conv2d, TileTransform], Tensor]
) -> Kernel:
    """The fastest way to compute a 3x3 convolution of stride 1 or 2, or an upsampling with one.

    transformed: gives the weights of a module for a transform.
    """
    wide = min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS and conv.stride == (1, 1)
    if wide and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32:
        transform = UPSAMPLING if upsampling else CONVOLUTION
        return _Winograd(transformed(conv, transform), conv.bias, transform)
    if upsampling:
        return _DirectUpsampling(conv.weight, conv.bias)
    return _Direct(conv.weight, conv.bias, conv.stride[0])


_local = threading.local()


def local_scratch() -> Scratch:
    """The intermediate results of this thread."""
    if not hasattr(_local, "scratch"):
        _local.scratch = Scratch()
    return _local.scratch  # type: ignore[no-any-return]


def forget_scratch() -> None:
    """Free them. To be called at the end of a pass: tensors made in inference mode cannot be written to outside it."""
    _local.__dict__.clear()


class Layer(Rows):
    """A convolution of normalised and activated rows, plus a shortcut: its rows are computed when they are asked for.

    shortcut: added as it is, or through the 1x1 convolution that is given with it.
    """

    def __init__(
        self,
        source: Rows,
        kernel: Kernel,
        norm: Norm | None = None,
        shortcut: tuple[Rows, nn.Conv2d | None] | None = None,
    ) -> None:
        self._source, self._kernel, self._norm, self._shortcut = source, kernel, norm, shortcut
        self.height, self.width = kernel.size(source.height, source.width)
        self.channels = kernel.channels
        self._last: dict[int, tuple[int, Tensor]] = {}  # by thread: the rows computed last, and their first index
        self._memory: dict[int, Tensor] = {}  # by thread: where it writes them

    def pieces(self, start: int, stop: int) -> list[Tensor]:
        # A block that is not stored asks twice for nearly the same rows: for its first convolution and its shortcut.
        thread = threading.get_ident()
        first, rows = self._last.get(thread, (0, None))
        if rows is None or start < first or stop > first + len(rows):
            first, rows = start, self._compute(start, stop)
            self._last[thread] = first, rows
        return [rows[start - first : stop - first]]

    @property
    def source(self) -> Rows:
        return self._source

    @property
    def stored_values(self) -> int:
        if self._shortcut is None or self._shortcut[0] is getattr(self._source, "source", None):
            return self._source.stored_values
        return self._source.stored_values + self._shortcut[0].stored_values

    def forget(self) -> None:
        """Free what was computed on the way, here and above, in all threads; none may be computing."""
        for layer in self._above():
            layer._last.clear()
            layer._memory.clear()

    def _above(self) -> Iterator[Layer]:
        """This layer, and those whose rows are computed for it."""
        yield self
        for source in (self._source, *(self._shortcut or ())[:1]):
            if isinstance(source, Layer):
                yield from source._above()

    def release(self, before: int) -> None:
        first, _ = self._kernel.window(before, before)
        if before >= self.height:
            first = self._source.height
        self._source.release(max(first, 0))
        if self._shortcut is not None and self._shortcut[0] is not getattr(self._source, "source", None):
            self._shortcut[0].release(before)  # else the convolutions look at rows above, and have released the others

    def compute(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows of the result. Returns: (n, W, C), `out`, or memory that this thread's next call writes to."""
        # Rows that were computed for another strip are equal to rounding only, and which these are depends on threads.
        for layer in self._above():
            layer._last.pop(threading.get_ident(), None)
        return self._compute(start, stop, out)

    def _compute(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        scratch = local_scratch()
        top, bottom = self._kernel.window(start, stop)
        inside = max(top, 0), min(bottom, self._source.height)
        pieces = self._source.pieces(*inside)  # before scratch memory is taken: they may be computed in it
        rows, columns, left = self._kernel.frame(bottom - top, self._source.width)
        padded = scratch.take("padded", rows, columns, self._source.channels, like=pieces[0])
        self._fill(padded, pieces, inside[0] - top, left)
        if out is None:
            out = self._take(stop - start, like=padded)
        self._kernel.apply(padded, start, out, scratch)
        if self._shortcut is not None:
            self._add_shortcut(*self._shortcut, start, stop, out)
        return out

    def _take(self, rows: int, like: Tensor) -> Tensor:
        thread, values = threading.get_ident(), rows * self.width * self.channels
        if thread not in self._memory or self._memory[thread].numel() < values:
            self._memory.pop(thread, None)
            self._memory[thread] = like.new_empty(values)
        return self._memory[thread][:values].view(rows, self.width, self.channels)

    def _fill(self, padded: Tensor, pieces: Sequence[Tensor], row: int, left: int) -> None:
        """Write the rows into the padded window, and zeros around them."""
        width = min(self._source.width, padded.shape[1] - left)
        padded[:row].zero_()
        padded[:, :left].zero_()
        padded[:, left + width :].zero_()
        for piece in pieces:
            place = padded[row : row + len(piece), left : left + width]
            if self._norm is None:
                place.copy_(piece[:, :width])
            else:
                self._norm.write(piece[:, :width], place)
            row += len(piece)
        padded[row:].zero_()

    def _add_shortcut(self, source: Rows, conv: nn.Conv2d | None, start: int, stop: int, out: Tensor) -> None:
        row = 0
        for piece in source.pieces(start, stop):
            place = out[row : row + len(piece)].view(-1, self.channels)
            values = piece.reshape(-1, source.channels)
            if conv is None:
                place.add_(values)
            else:
                place.addmm_(values, conv.weight.flatten(1).T)
                if conv.bias is not None:
                    place.add_(conv.bias)
            row += len(piece)
