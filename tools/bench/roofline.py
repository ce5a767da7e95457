"""What the direct algorithm has to do, and how fast this machine could do it at best.

Counted are convolutions, linear layers and attention of diffusers' class, layer by layer: multiply-adds, and the bytes
of inputs, weights and outputs, each moved once. Norms, activations, additions and upsampling count nothing, as if they
cost nothing beside the layer that they stand at. `direct_s` gives each layer the longer of its two times, at the speed
of this machine's matrix product and of its copy. An implementation that needs less time than that does not compute
convolutions directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from common import DTYPES, build_vae, make_input, run_vae, timed

TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Layer:
    macs: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The best that was seen on this machine."""

    flops_per_s: float  # of a product of two square matrices, two for each multiply-add
    bytes_per_s: float  # of a copy, read and written

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class _Recorder(TorchFunctionMode):
    """Keeps a `Layer` of every convolution, linear layer and attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            weight = args[1]
            self._keep(out.numel() * weight[0].numel(), args[0], weight, out)
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            scores = query[..., 0].numel() * key.shape[-2]
            self._keep(scores * (query.shape[-1] + value.shape[-1]), query, key, value, out)
        return out

    def _keep(self, macs: int, *tensors: Tensor) -> None:
        self.layers.append(
            Layer(macs=macs, num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        )


@cache
def layers_of(config: str, operation: str, size: int, batch: int, dtype: str) -> tuple[Layer, ...]:
    """Nothing is computed: the tensors have shapes only."""
    from diffusers import AutoencoderKL as StockAutoencoderKL

    vae = build_vae(StockAutoencoderKL, config, device="meta", dtype=DTYPES[dtype])
    x = make_input(operation, size, batch, dtype=DTYPES[dtype], device="meta")
    with torch.no_grad(), _Recorder() as recorder:
        run_vae(vae, operation, x)
    return tuple(recorder.layers)


def direct_s(layers: Sequence[Layer], peaks: Peaks) -> float:
    return sum(max(2 * each.macs / peaks.flops_per_s, each.num_bytes / peaks.bytes_per_s) for each in layers)


def work(layers: Sequence[Layer], peaks: Peaks) -> dict[str, float]:
    return {
        "macs": sum(each.macs for each in layers),
        "bytes": sum(each.num_bytes for each in layers),
        "direct_s": direct_s(layers, peaks),
    }


def measure_peaks(device: str, dtype: str) -> Peaks:
    """Best of several, after one that warms up. A second or two."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)  # 256 MiB: more than caches hold
    target = torch.empty_like(source)
    product_s = min(timed(lambda: torch.mm(a, b), device)[0] for _ in range(TRIES + 1))
    copy_s = min(timed(lambda: target.copy_(source), device)[0] for _ in range(TRIES + 1))
    return Peaks(flops_per_s=2 * side**3 / product_s, bytes_per_s=2 * source.numel() / copy_s)
