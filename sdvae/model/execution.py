"""How a network is run: its plain `forward`, or in strips, because that is faster or because it fits into memory.

`Execution` says what the user chose; `run` does it. The plain `forward` is what training uses, and whatever strips
cannot honor: gradients, hooks, compilation, tracing, autocast, layers that something replaced. `strips/` computes the
strips.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.layers import Decoder, Encoder, GroupNorm
from sdvae.model.strips.maps import NotInStrips
from sdvae.model.strips.passes import StripSizes, streamed
from sdvae.model.strips.plan import PassPlan, plan_pass
from sdvae.model.tiling import blended_tiles

__all__ = ["Execution", "Tiling", "available_bytes", "run"]

Tiling = Literal["auto", "exact", "blended", "off"]

_compiled: WeakKeyDictionary[nn.Module, set[torch.Size]] = WeakKeyDictionary()  # shapes that networks are compiled for

logger = logging.getLogger("sdvae")

# Layers that strips compute themselves. Every other module must say in `in_strips` how it is computed.
_LAYERS = {GroupNorm, nn.GroupNorm, nn.Conv2d, nn.Linear, nn.ModuleList}
_REPLACED = ("forward", "_conv_forward")  # the second is what makes images that can be laid side by side
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")

FREE_SHARE = 0.8  # of the memory that is free: the rest is for others, and for what an estimate misses

# Of an image, in layers computed in tiles: from here on strips are faster than `forward`. Measured on two cores
# with AVX-512, widths 16-32-96-128 to 128-256-512-512, 64 to 1024 px: 0.6 to 1.0 times as fast with 5 to 15e9, 1.0 to
# 1.5 times with 20 to 80e9, more above.
FAST_MULTIPLICATIONS = 20 * 10**9


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How `encode` and `decode` run. Beside blended tiles nothing here changes what comes out, except by rounding."""

    tile_sample_min_size: int  # px, of blended tiles
    tile_latent_min_size: int  # the same in latent positions
    tile_overlap_factor: float = 0.25  # share of a tile that two tiles have in common
    slicing: bool = False  # run the images of a batch one by one
    tiling: Tiling = "off"
    max_memory_bytes: int | None = None  # for exact and auto, with what is in use already; None: what is free
    fast: bool = False  # run in strips if that is faster
    fast_from: int = FAST_MULTIPLICATIONS
    sizes: StripSizes = field(default_factory=StripSizes)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor, tile: int, out_tile: int) -> Tensor:
        """`function(x)`, image by image or in blended tiles if that was chosen.

        tile, out_tile: sizes of a tile in positions of x and of the result.
        """
        if self.slicing and x.shape[0] > 1:
            return torch.cat([self.apply(function, image, tile, out_tile) for image in x.split(1)])
        if self.tiling != "blended" or max(x.shape[-2:]) <= tile:
            return function(x)
        stride = int(tile * (1 - self.tile_overlap_factor))
        blend = int(out_tile * self.tile_overlap_factor)
        return blended_tiles(function, x, tile, stride, out_stride=out_tile - blend, blend=blend)


def run(network: Encoder | Decoder, x: Tensor, execution: Execution) -> Tensor:
    """`network(x)`, to rounding, in one pass or exactly in strips.

    x: (B, C, H, W).
    Raises: ConfigError if the memory limit is too low for this size, or if exact is asked for and cannot be.
    """
    exact, auto = execution.tiling == "exact", execution.tiling == "auto"
    if not (exact or auto or execution.fast):
        return _forward(network, x)
    if reason := _why_not_in_strips(network, x):
        return _only_forward(network, x, exact, reason)
    try:
        plan = plan_pass(network, x, sizes=execution.sizes)
    except NotInStrips as error:
        name = next(name for name, module in network.named_modules() if module is error.conv)
        return _only_forward(
            network, x, exact, f"with the convolution {name}, which is no longer the usual one: {error}"
        )
    if exact or (execution.fast and _is_faster(plan, x, execution)):
        return _in_strips(network, x, plan, execution)
    if not auto:
        return _forward(network, x)
    budget = _budget(x.device, execution.max_memory_bytes)
    # torch keeps the input, the normalized input and the output of the widest convolution, and a copy in another layout
    whole_bytes = 2 * x.shape[0] * plan.most_bytes
    if whole_bytes > budget and (x.device.type == "cpu" or execution.max_memory_bytes is not None):
        return _in_strips(network, x, plan, execution)
    try:
        return _forward(network, x)
    except torch.OutOfMemoryError:
        height, width = _image_size(network, x)
        logger.warning("out of memory at %d x %d px: went on in exact tiles", width, height)
    # Only here, where the exception is gone: its frames hold the tensors of the failed pass.
    _empty_cache(x.device)
    return _in_strips(network, x, plan, execution)


def _only_forward(network: Encoder | Decoder, x: Tensor, exact: bool, reason: str) -> Tensor:
    if exact:
        raise ConfigError(f"exact tiling is not possible {reason}")
    return _forward(network, x)


def _why_not_in_strips(network: nn.Module, x: Tensor) -> str:
    """Why only `forward` can run this network now, as the end of a sentence; empty where strips can."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "while the network is compiled or traced"
    if network._compiled_call_impl is not None:
        return "with a network that is compiled"
    if type(x) not in (Tensor, nn.Parameter):
        return f"with a {type(x).__name__} as input"
    if torch.is_autocast_enabled(x.device.type):
        return "under autocast; give the network the dtype that you want instead"
    needs_grad = x.requires_grad or any(parameter.requires_grad for parameter in network.parameters())
    if torch.is_grad_enabled() and needs_grad:
        return "with gradients; use torch.no_grad() or torch.inference_mode()"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "while hooks watch all layers"
    for name, module in network.named_modules():
        if not _has_strips(type(module)) or not vars(module).keys().isdisjoint(_REPLACED):
            return f"with {type(module).__name__} in the place of a layer, at {name or 'the top'}"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            return f"while hooks watch the layer {name or 'at the top'}"
    weights = next(network.parameters())
    if (weights.device, weights.dtype) != (x.device, x.dtype):
        return f"for {x.dtype} on {x.device} with weights in {weights.dtype} on {weights.device}"
    return ""


def _has_strips(kind: type[nn.Module]) -> bool:
    """Whether strips compute what `forward` does: `in_strips` counts only in the class that defines `forward`."""
    return kind in _LAYERS or next("in_strips" in vars(base) for base in kind.__mro__ if "forward" in vars(base))


def _forward(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """`network(x)`. For one that is compiled, says what a new shape costs."""
    if network._compiled_call_impl is None or torch.compiler.is_compiling():
        return network(x)  # type: ignore[no-any-return]
    shapes, start = _compiled.setdefault(network, set()), time.perf_counter()
    result: Tensor = network(x).clone()  # the next replay of a CUDA graph writes to the same memory
    if x.shape not in shapes:
        shapes.add(x.shape)
        seconds, size = time.perf_counter() - start, " x ".join(map(str, x.shape))
        logger.warning("compiled the %s for %s in %.0f s", type(network).__name__.lower(), size, seconds)
    return result


def available_bytes(device: torch.device) -> int:
    """Memory that is free: of the machine, or of the container that limits it; on CUDA, of the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(psutil.virtual_memory().available)
    limit = _read_number(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None:  # what is used counts caches of files too, which give way
        used = _read_number(Path("/sys/fs/cgroup/memory.current")) or 0
        available = min(available, max(limit - used, limit - _process_bytes(), 0))
    return available


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None


def _process_bytes() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _budget(device: torch.device, max_bytes: int | None) -> int:
    """What intermediate results may take now."""
    if max_bytes is None:
        return int(FREE_SHARE * available_bytes(device))
    return max_bytes - (torch.cuda.memory_allocated(device) if device.type == "cuda" else _process_bytes())


def _in_strips(network: Encoder | Decoder, x: Tensor, plan: PassPlan, execution: Execution) -> Tensor:
    budget = _budget(x.device, execution.max_memory_bytes)
    if plan.most_bytes <= budget:
        return streamed(network, x, sizes=execution.sizes)
    if budget < plan.least_bytes:
        raise _too_little(network, x, plan.least_bytes, budget, execution.max_memory_bytes)
    while True:
        try:
            return streamed(network, x, budget, sizes=execution.sizes)
        except torch.OutOfMemoryError:
            if budget // 2 < plan.least_bytes:
                raise
        budget //= 2
        height, width = _image_size(network, x)
        logger.warning("out of memory at %d x %d px: went on in smaller tiles", width, height)
        _empty_cache(x.device)


def _too_little(network: Encoder | Decoder, x: Tensor, least: int, budget: int, max_bytes: int | None) -> ConfigError:
    what = "decoding" if isinstance(network, Decoder) else "encoding"
    height, width = _image_size(network, x)
    have = (
        f"{budget / 1e9:.1f} GB are free"
        if max_bytes is None
        else f"of {max_bytes / 1e9:.1f} GB, {budget / 1e9:.1f} are left"
    )
    need = least if max_bytes is None else least + max_bytes - budget
    advice = (
        "use a machine with more" if max_bytes is None else f"give a max_memory of {need / 1e9 + 0.05:.1f} GB or more"
    )
    return ConfigError(
        f"{what} {width} x {height} px exactly takes {least / 1e9:.1f} GB of memory for intermediate results, but "
        f"{have}: {advice}, or take blended tiles, which are approximate (--tiling blended)"
    )


def _image_size(network: Encoder | Decoder, x: Tensor) -> tuple[int, int]:
    """Height and width of the image that goes in or comes out, px."""
    ratio = 2 ** (len(network.up_blocks) - 1) if isinstance(network, Decoder) else 1
    return ratio * x.shape[2], ratio * x.shape[3]


def _is_faster(plan: PassPlan, x: Tensor, execution: Execution) -> bool:
    """Whether strips are faster than `forward`: on a CPU, where layers in tiles save more than strips cost."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and plan.tiled_multiplications >= execution.fast_from


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
