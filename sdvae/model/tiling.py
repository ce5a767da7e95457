"""Running a convolutional map in overlapping tiles that are blended linearly where they meet.

This is diffusers' scheme, kept for parity: every tile has its own GroupNorm statistics and its own attention, so the
result approximates the whole pass. Knows tensors and callables, not configuration or files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["blended_tiles"]


def blended_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, stride: int, out_stride: int, blend: int
) -> Tensor:
    """Apply `function` to overlapping tiles of x and blend the results.

    x: (B, C, H, W). tile, stride: size and distance of the tiles, in positions of x.
    out_stride: how much of each tile's result is kept, and blend: the width of the ramp, in positions of the result.
    Returns: (B, C_out, H_out, W_out).
    """
    above: list[Tensor] = []
    rows = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            part = function(x[:, :, top : top + tile, left : left + tile])
            if above:
                part = _blend(above[len(row)], part, blend, dim=2)
            if row:
                part = _blend(row[-1], part, blend, dim=3)
            row.append(part)
        rows.append(torch.cat([part[:, :, :out_stride, :out_stride] for part in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, its first `extent` lines faded in from the last lines of `before`; the weights of each line sum to 1."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device, dtype=torch.float32) / extent).to(after.dtype).view(shape)
    start = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = start * (1 - weight) + after.narrow(dim, 0, extent) * weight
    return torch.cat([faded, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
