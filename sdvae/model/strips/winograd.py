"""3x3 convolutions with fewer multiplications: Winograd's minimal filtering, in tiles of 4x4 outputs.

A tile of 6x6 inputs is transformed, multiplied with transformed weights position by position (which over many tiles and
all channels is a batch of matrix products), and transformed back: 36 multiplications instead of 144. An upsampling by
nearest neighbour with a 3x3 convolution after it is four 2x2 convolutions of the small image, one for each parity of
the output's row and column; from one such tile come 8x8 outputs with 100 multiplications instead of 576. The transforms
are matrix products too. All of it is torch's own operators on blocks that stay in the cache.

Float32 on a CPU; plain tensors, no modules. Images are (H, W, C) here, channels last.

Source: Lavin & Gray 2016, "Fast algorithms for convolutional neural networks"; Cook and Toom's construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CONVOLUTION",
    "STEP",
    "UPSAMPLING",
    "Scratch",
    "TileTransform",
    "block_tiles",
    "tile_convolution",
    "toom_cook",
]

STEP = 4  # outputs of one tile along a side, at the resolution of the input
WINDOW = STEP + 2  # inputs of one tile along a side

# Where the polynomials are evaluated, beside infinity. The usual 0, +-1, +-2 round 4 times as coarsely: with SiLU of
# Gaussian inputs and 256 channels the largest error is 2.2e-5 of the output's standard deviation there, 5.0e-6 here
# (direct: 0.7e-6). Found by trying pairs between 1/2 and 2; the best have a product of about 1.
POINTS_OF_THREE_TAPS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
POINTS_OF_TWO_TAPS = (0.0, 3 / 4, -3 / 4, 3 / 2)


def toom_cook(points: Sequence[float], num_outputs: int, num_taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices A, G, B of y = A ((G g) * (B d)), the correlation of d with g, exact but for rounding.

    points: num_outputs + num_taps - 2 different numbers; infinity is added. d: (num_outputs + num_taps - 1,); g:
    (num_taps,). Returns: A (num_outputs, n), G (n, num_taps), B (n, n), float64, with n = num_outputs + num_taps - 1.
    """
    size = num_outputs + num_taps - 1
    finite = torch.tensor(points, dtype=torch.float64)

    def evaluation(length: int) -> Tensor:
        """Values of a polynomial with that many coefficients at all points, the last of which is infinity."""
        at_infinity = torch.zeros(1, length, dtype=torch.float64)
        at_infinity[0, -1] = 1.0
        return torch.cat((torch.linalg.vander(finite, N=length), at_infinity))

    # Multiplying polynomials is V(size)^-1 ((V(num_outputs) a) * (V(num_taps) g)); its transpose in a is a correlation.
    return evaluation(num_outputs).T, evaluation(num_taps), torch.linalg.inv(evaluation(size)).T


@dataclass(frozen=True, eq=False)
class TileTransform:
    """The matrices of a kind of convolution, for one direction; both directions are transformed alike, in turn.

    n is the number of points, K = (phases * n) ** 2 the number of products of a tile, a channel and a channel.
    """

    inputs: Tensor  # (phases * n, 6), float32
    weights: Tensor  # (phases * n, 3), float64
    outputs: Tensor  # (4, n), float32
    phases: int  # outputs per input position, along a side

    def shape_for(self, weight: Tensor) -> tuple[int, int, int]:
        """Shape of `of_weight(weight)`."""
        return len(self.weights) ** 2, weight.shape[1], weight.shape[0]

    def of_weight(self, weight: Tensor) -> Tensor:
        """Transformed weights. weight: (C_out, C, 3, 3). Returns: (K, C, C_out), float32."""
        both = torch.kron(self.weights, self.weights).to(weight)  # the columns' index first, as in `_convolve_block`
        taps = weight.permute(3, 2, 1, 0)  # (3, 3, C, C_out)
        return (both @ taps.reshape(9, -1)).view(-1, *taps.shape[2:])


def _convolution() -> TileTransform:
    a, g, b = toom_cook(POINTS_OF_THREE_TAPS, STEP, 3)
    return TileTransform(b.float(), g, a.float(), phases=1)


def _upsampling() -> TileTransform:
    a, g, b = toom_cook(POINTS_OF_TWO_TAPS, STEP, 2)
    nothing = torch.zeros(len(b), 1, dtype=torch.float64)
    # an even row of the result sees the source rows i - 1 and i, an odd one i and i + 1
    windows = (torch.cat((b, nothing), dim=1), torch.cat((nothing, b), dim=1))
    taps = (torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double(), torch.tensor([[1.0, 1, 0], [0, 0, 1]]).double())
    return TileTransform(torch.cat(windows).float(), torch.cat([g @ summed for summed in taps]), a.float(), phases=2)


CONVOLUTION = _convolution()  # 3x3, stride 1
UPSAMPLING = _upsampling()  # nearest neighbour to twice the size, then 3x3


class Scratch:
    """Memory for intermediate results that is used again and again; one for each thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """A tensor with whatever was in it, in the dtype and on the device of `like`; until the name is taken again."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


def tile_convolution(
    padded: Tensor, weights: Tensor, bias: Tensor | None, transform: TileTransform, scratch: Scratch, out: Tensor
) -> None:
    """Convolve a strip of an image, all of whose borders are there already.

    padded: (4 * rows + 2, 4 * columns + 2, C), contiguous. weights: from `TileTransform.of_weight`. bias: (C_out,).
    out: (4 * rows * phases, 4 * columns * phases, C_out), written to; any strides with channels last.
    """
    rows, columns = ((extent - 2) // STEP for extent in padded.shape[:2])
    block_rows, block_columns = _block(rows, columns, block_tiles(padded.shape[2], transform.phases))
    for top in range(0, rows, block_rows):
        for left in range(0, columns, block_columns):
            block = (min(block_rows, rows - top), min(block_columns, columns - left))
            _convolve_block(padded, weights, bias, transform, scratch, out, (top, left), block)


def block_tiles(channels: int, phases: int) -> int:
    """Tiles that are best computed together."""
    # Measured with 128, 256 and 512 channels: enough that reading the weights (37 MB with 512 channels) does not count,
    # few enough that what is transformed stays in the cache.
    return min(max(channels // 2, 64), 256) // phases


def _block(rows: int, columns: int, tiles: int) -> tuple[int, int]:
    """Tiles of a block, down and across."""
    if columns >= tiles:
        return 1, -(-columns // round(columns / tiles))
    return min(rows, max(1, tiles // columns)), columns


def _convolve_block(
    padded: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    transform: TileTransform,
    scratch: Scratch,
    out: Tensor,
    corner: tuple[int, int],
    block: tuple[int, int],
) -> None:
    (top, left), (rows, columns) = corner, block
    phases, points = transform.phases, transform.outputs.shape[1]
    size = phases * points  # products along a side
    channels, out_channels, width = padded.shape[2], out.shape[2], STEP * columns + 2
    shared = (phases * STEP * phases, *transform.outputs.shape)

    # inputs, first along the columns of the image, in place of its rows, then along its rows
    down, across, _ = padded.stride()
    offset = padded.storage_offset() + STEP * (top * down + left * across)
    lines = padded.as_strided((rows, WINDOW, width * channels), (STEP * down, down, 1), offset)
    halfway = scratch.take("halfway", rows, size, width * channels, like=padded)
    torch.bmm(transform.inputs.expand(rows, -1, -1), lines, out=halfway)
    windows = halfway.as_strided(
        (WINDOW, size, rows, columns, channels),
        (channels, width * channels, size * width * channels, STEP * channels, 1),
    )
    gathered = scratch.take("gathered", *windows.shape, like=padded)
    gathered.copy_(windows)
    inputs = scratch.take("inputs", size**2, rows * columns, channels, like=padded)
    torch.mm(transform.inputs, gathered.view(WINDOW, -1), out=inputs.view(size, -1))

    products = scratch.take("products", size**2, rows * columns, out_channels, like=padded)
    torch.bmm(inputs, weights, out=products)

    # outputs, the other way round
    halfway = scratch.take("inputs", phases, STEP, size * rows * columns * out_channels, like=padded)
    torch.bmm(transform.outputs.expand(phases, -1, -1), products.view(phases, points, -1), out=halfway)
    results = scratch.take("gathered", phases * STEP * phases, STEP, rows * columns * out_channels, like=padded)
    torch.bmm(transform.outputs.expand(shared), halfway.view(len(results), points, -1), out=results)
    down, across, _ = out.stride()
    places = out.as_strided(
        (phases, STEP, phases, STEP, rows, columns, out_channels),
        (across, phases * across, down, phases * down, STEP * phases * down, STEP * phases * across, 1),
        out.storage_offset() + STEP * phases * (top * down + left * across),
    )
    if bias is None:
        places.copy_(results.view(places.shape))
    else:
        torch.add(results.view(places.shape), bias, out=places)
