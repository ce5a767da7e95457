"""Feature maps that are computed some rows at a time: the parts that exact execution in strips is made of.

A `Rows` is a feature map of one image, (H, W, C), of which rows are asked for. `Stored` has them in memory; a `Layer`
computes them from the rows of another `Rows`, as many more as its convolution looks at, so the result has no seams. How
much of a network is stored is decided in `passes.py`; which layers it has is written beside each `forward`, in
`sdvae/model/layers.py`.

Letters of the shape comments: n rows of a strip, H, W and C height, width and channels of the layer.
"""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
    "NotInStrips",
    "Resampling",
    "Rows",
    "Stored",
    "build_kernel",
    "forget_scratch",
    "transform_for",
]


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
    """Mean and biased variance of each channel over some rows; each (C,), float64."""

    count: int  # values of a channel
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """x: (n, W, C), contiguous."""
        with _one_thread(x.device):
            return cls._of(x)

    @classmethod
    def _of(cls, x: Tensor) -> Moments:
        rows, width, channels = x.shape
        count = rows * width
        if x.device.type != "cpu" or x.dtype != torch.float32:
            var, mean = torch.var_mean(x.to(_computing(x.dtype)).view(-1, channels), dim=0, correction=0)
            return cls(count, mean.double(), var.double())
        folded = width
        while folded % 2 == 0 and rows * (width // folded) < 128:
            folded //= 2
        # Sums of some hundred terms, merged in float64. This operator gives both at the speed of memory; torch.var_mean
        # takes twenty times as long in this layout.
        lines = x.view(1, -1, 1, folded * channels).permute(0, 3, 1, 2)  # (1, folded * C, H', 1)
        means, variances = (
            part.double().view(folded, channels) for part in torch.batch_norm_update_stats(lines, None, None, 0.0)
        )
        mean = means.mean(0)
        return cls(count, mean, (variances + (means - mean).square()).mean(0))

    @classmethod
    def merged(cls, parts: Sequence[Moments]) -> Moments:
        """The moments of all parts together, by the law of total variance."""
        count = sum(part.count for part in parts)
        weights = torch.tensor([part.count / count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
        means, variances = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "var"))
        mean = weights @ means
        return cls(count, mean, weights @ (variances + (means - mean).square()))

    def of_groups(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of channels. Returns: each (num_groups,), float64."""
        means, variances = (values.view(num_groups, -1) for values in (self.mean, self.var))
        mean = means.mean(1)
        return mean, (variances + (means - mean[:, None]).square()).mean(1)


@dataclass(frozen=True, eq=False)
class Norm:
    """A GroupNorm whose statistics are known, and the activation after it."""

    scale: Tensor  # (C,), float32, or float64 for features in that
    shift: Tensor
    activation: Callable[[Tensor], Tensor]  # may work in place

    @classmethod
    def of(cls, layer: nn.GroupNorm, moments: Moments, activation: Callable[[Tensor], Tensor]) -> Norm:
        mean, var = moments.of_groups(layer.num_groups)
        scale = (var + layer.eps).rsqrt()[:, None] * layer.weight.double().view(layer.num_groups, -1)
        shift = layer.bias.double().view(layer.num_groups, -1) - mean[:, None] * scale
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

    @abstractmethod
    def pieces(self, start: int, stop: int) -> list[Tensor]:
        """The rows from start to stop, in one or more tensors (n, W, C)."""

    def first_rows(self, start: int) -> dict[Stored, int]:
        """The maps in memory that rows from start on are computed from, and the first row that is needed of each."""
        return {}

    def release(self, before: int) -> None:
        """No row before this one will be asked for again."""
        for stored, first in self.first_rows(before).items():
            stored.give_back(first)


class Image(Rows):
    """An image or latent that is there already. x: (C, H, W)."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self.channels, self.height, self.width = x.shape

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

    def __init__(self, height: int, width: int, channels: int, memory: Memory, strip: int, chunk_bytes: int) -> None:
        self.height, self.width, self.channels = height, width, channels
        self._memory = memory
        row_bytes = width * channels * memory.like.element_size()
        chunk_rows = strip * max(1, chunk_bytes // (strip * row_bytes))
        self.is_released = False
        self._chunk_rows = min(chunk_rows, -(-height // strip) * strip)
        self._chunks: list[Tensor | None] = [None] * -(-height // self._chunk_rows)

    @classmethod
    def of(cls, whole: Tensor, memory: Memory) -> Stored:
        """Rows that are there already. whole: (H, W, C), contiguous."""
        stored = cls(whole.shape[0], whole.shape[1], whole.shape[2], memory, strip=whole.shape[0], chunk_bytes=0)
        stored._chunk_rows, stored._chunks = whole.shape[0], [whole]
        return stored

    def first_rows(self, start: int) -> dict[Stored, int]:
        return {self: start}

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

    def give_back(self, before: int) -> None:
        """Free the rows before this one, as far as they fill chunks."""
        self.is_released = before >= self.height
        used_up = len(self._chunks) if self.is_released else before // self._chunk_rows
        for index in range(used_up):
            if (chunk := self._chunks[index]) is not None:
                self._memory.give_back(chunk)
                self._chunks[index] = None

    def whole(self) -> Tensor:
        """All rows. Returns: (H, W, C)."""
        pieces = self.pieces(0, self.height)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class NotInStrips(Exception):
    """The convolution `conv` is none that strips can compute."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.extra_repr())
        self.conv = conv


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
    """torch's convolution of stride 1, with as many rows and columns as before."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        self._padding = conv.kernel_size[0] // 2
        self.channels = conv.out_channels

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return start - self._padding, stop + self._padding

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return rows, width + 2 * self._padding, self._padding

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        conv, x = self._conv, padded.permute(2, 0, 1)[None]  # (1, C, rows, columns), in channels_last
        out.copy_(F.conv2d(x, conv.weight, conv.bias, groups=conv.groups)[0].permute(1, 2, 0))


class _DirectDownsampling(Kernel):
    """torch's 3x3 convolution of stride 2, padded at the bottom and the right only."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        self.channels = conv.out_channels

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return 2 * start, 2 * stop + 1

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return rows, 2 * (width // 2) + 1, 0

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        x = padded.permute(2, 0, 1)[None]  # (1, C, rows, columns), in channels_last
        out.copy_(F.conv2d(x, self._conv.weight, self._conv.bias, stride=2)[0].permute(1, 2, 0))


class _DirectUpsampling(Kernel):
    """Nearest neighbour to twice the size, then torch's 3x3 convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        self.channels = conv.out_channels

    def size(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return start // 2 - 1, -(-stop // 2) + 1

    def frame(self, rows: int, width: int) -> tuple[int, int, int]:
        return rows, width + 2, 1

    def apply(self, padded: Tensor, start: int, out: Tensor, scratch: Scratch) -> None:
        large = F.interpolate(padded.permute(2, 0, 1)[None], scale_factor=2.0, mode="nearest")[:, :, 1:-1, 1:-1]
        y = F.conv2d(large, self._conv.weight, self._conv.bias)[0].permute(1, 2, 0)
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

Resampling = Literal["none", "down", "up"]  # what a convolution does to height and width: keep, halve or double them


def transform_for(conv: nn.Conv2d, resampling: Resampling) -> TileTransform | None:
    """The transform with which a convolution has fewer multiplications; None if that would not pay."""
    if resampling == "down" or conv.groups != 1 or conv.kernel_size != (3, 3):
        return None
    wide = min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
    return (UPSAMPLING if resampling == "up" else CONVOLUTION) if wide else None


def build_kernel(
    conv: nn.Conv2d, resampling: Resampling, transformed: Callable[[nn.Conv2d, TileTransform], Tensor]
) -> Kernel:
    """The fastest way to compute a convolution.

    transformed: gives the weights of a module for a transform.
    Raises: NotInStrips for a convolution whose window none of the ways has.
    """
    side = conv.kernel_size[0]
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    fits = {
        "none": window == ((side, side), (1, 1), (side // 2,) * 2, (1, 1), "zeros") and side % 2 == 1,
        "down": window == ((3, 3), (2, 2), (0, 0), (1, 1), "zeros") and conv.groups == 1,
        "up": window == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros") and conv.groups == 1,
    }
    if not fits[resampling]:
        raise NotInStrips(conv)
    on_cpu = conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
    if on_cpu and (transform := transform_for(conv, resampling)) is not None:
        return _Winograd(transformed(conv, transform), conv.bias, transform)
    if resampling == "none":
        return _Direct(conv)
    return _DirectDownsampling(conv) if resampling == "down" else _DirectUpsampling(conv)


_local = threading.local()


def _local_scratch() -> Scratch:
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

    def first_rows(self, start: int) -> dict[Stored, int]:
        top = max(self._kernel.window(start, start)[0], 0) if start < self.height else self._source.height
        found = self._source.first_rows(top)
        if self._shortcut is not None:
            for stored, first in self._shortcut[0].first_rows(start).items():
                found[stored] = min(first, found.get(stored, first))
        return found

    def compute(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows of the result. Returns: (n, W, C), `out`, or memory that this thread's next call writes to."""
        # Rows that were computed for another strip are equal to rounding only, and which these are depends on threads.
        for layer in self._above():
            layer._last.pop(threading.get_ident(), None)
        return self._compute(start, stop, out)

    def _compute(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        scratch = _local_scratch()
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
