"""What a pass in strips takes, told before it starts: memory, and the multiplications that tiles can save.

Nothing is retold of the network: the same `in_strips` methods that describe the pass to `passes.py` are run here on
shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdvae.model.strips.maps import Image, Layer, Resampling, Rows, Stored, transform_for
from sdvae.model.strips.passes import Network, Strips, StripSizes, strip_values
from sdvae.model.strips.winograd import STEP, TileTransform

__all__ = ["PassPlan", "plan_pass"]


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """What a pass over one image takes, as far as layers and shapes tell."""

    least_bytes: int  # intermediate results, if all that can be computed twice is
    most_bytes: int  # intermediate results, and weights kept for the next pass, if memory is not limited
    tiled_multiplications: int  # of the convolutions that can be computed in tiles, if computed directly


class _Plan(Strips):
    """A pass with shapes alone: its memory, the weights that it keeps, the multiplications of its layers."""

    def __init__(self, like: Tensor, max_bytes: int | None, sizes: StripSizes) -> None:
        super().__init__(like, max_bytes, sizes)
        self.bytes = 0
        self.kept_values = 0
        self.tiled_multiplications = 0

    def store(self, layer: Layer, last_use: bool = False) -> Stored:
        self._note(layer, self._held_values(layer, last_use))
        if last_use:
            layer.release(layer.height)
        return self._new_store(layer, strip_rows=layer.height)

    def measure(self, layer: Layer) -> Layer:
        self._note(layer, self._live_values())
        return layer

    def whole(self, x: Rows, norm: nn.GroupNorm, function: Callable[[Tensor], Tensor], num_maps: int) -> Stored:
        self._note_bytes(self._live_values() + (num_maps - 1) * x.num_values, 0)
        return self._noted(Stored(x.height, x.width, x.channels, self._memory, x.height, self._sizes.chunk_bytes))

    def image(self, layer: Layer) -> Tensor:
        self._note(layer, self._live_values())
        return torch.empty(layer.channels, layer.height, layer.width, device="meta")

    def _norm(self, source: Rows, norm: nn.GroupNorm, activation: Callable[[Tensor], Tensor] | None) -> None:
        return None

    def _weights(self, conv: nn.Conv2d, transform: TileTransform) -> Tensor:
        weights = torch.empty(transform.shape_for(conv.weight), device="meta")
        self.kept_values += weights.numel()
        return weights

    def _layer(self, source: Rows, conv: nn.Conv2d, resampling: Resampling, *others: object) -> Layer:
        layer = super()._layer(source, conv, resampling, *others)  # type: ignore[arg-type]
        if transform_for(conv, resampling) is not None:
            self.tiled_multiplications += conv.weight.numel() * layer.height * layer.width
        return layer

    def _note(self, layer: Layer, held_values: int) -> None:
        strip = strip_values(layer, 2 * STEP)
        if self._max_bytes is None:
            strip = max(strip, self._sizes.strip_bytes // self._like.element_size())
        self._note_bytes(held_values, strip)

    def _note_bytes(self, held_values: int, strip_values: int) -> None:
        self.bytes = max(self.bytes, self._like.element_size() * held_values + self._work_bytes(strip_values))


def plan_pass(network: Network, x: Tensor, *, sizes: StripSizes = StripSizes()) -> PassPlan:  # noqa: B008
    """What `streamed(network, x)` takes, without computing anything.

    x: (B, C, H, W), of which shape, dtype and device count; values do not, so it may be on the meta device.
    Raises: NotInStrips for a layer that strips cannot compute.
    """
    least, most = _Plan(x, 0, sizes), _Plan(x, None, sizes)
    for plan in (least, most):
        plan.image(network.in_strips(Image(x[0]), plan))
    return PassPlan(
        least_bytes=least.bytes,
        most_bytes=most.bytes + x.element_size() * most.kept_values,
        tiled_multiplications=most.tiled_multiplications,
    )
