"""How a network is run: its plain `forward`, or in strips, because that is faster or because it fits into memory.

`passes.py` does the strips; here is when. The plain `forward` is what training uses, and whatever strips cannot
honour: gradients, hooks, compilation, tracing, autocast, layers that something replaced.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.layers import (
    Attention,
    Decoder,
    DownEncoderBlock2D,
    Downsample2D,
    Encoder,
    GroupNorm,
    ResnetBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
    Upsample2D,
)
from sdvae.model.strips.maps import WINOGRAD_CHANNELS
from sdvae.model.strips.passes import least_bytes, most_bytes, streamed

__all__ = ["TILING_MODES", "available_bytes", "execute", "why_not_in_strips"]

TILING_MODES = ("auto", "exact", "blended", "off")

_compiled: WeakKeyDictionary[nn.Module, set[torch.Size]] = WeakKeyDictionary()  # shapes that networks are compiled for

logger = logging.getLogger("sdvae")

# What strips know how to compute. A subclass, or another type in one of these places, does something that they do not.
_KNOWN = {
    Attention,
    Decoder,
    DownEncoderBlock2D,
    Downsample2D,
    Encoder,
    GroupNorm,
    ResnetBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
    Upsample2D,
    nn.Conv2d,
    nn.Linear,
    nn.ModuleList,
}
_REPLACED = ("forward", "_conv_forward")  # the second is what makes images that can be laid side by side
_CONV = ("zeros", (1, 1), 1)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")

FREE_SHARE = 0.8  # of the memory that is free: the rest is for others, and for what an estimate misses

# Of an image, in layers computed in tiles: from here on strips are faster than `forward`. Measured on two cores
# with AVX-512, widths 16-32-96-128 to 128-256-512-512, 64 to 1024 px: 0.6 to 1.0 times as fast with 5 to 15e9, 1.0 to
# 1.5 times with 20 to 80e9, more above.
FAST_MULTIPLICATIONS = 20 * 10**9


def execute(
    network: Encoder | Decoder, x: Tensor, *, fast: bool, mode: str = "off", max_bytes: int | None = None
) -> Tensor:
    """`network(x)`, to rounding.

    x: (B, C, H, W). fast: in strips where that is faster.
    mode: off; exact: in strips, in as much memory as there is; auto: in strips where the whole pass does not fit.
    max_bytes: of memory, with what is in use now: of the process on a CPU, of its tensors on other devices. None: what
        is free.
    Raises: ConfigError where max_bytes is too little for this size, or exact is asked for and cannot be.
    """
    if mode == "off" and not fast:
        return _forward(network, x)
    if reason := why_not_in_strips(network, x):
        if mode == "exact":
            raise ConfigError(f"exact tiling is not possible {reason}")
        return _forward(network, x)
    height, width = _image_size(network, x)
    if mode == "exact" or (fast and _is_faster(network, x, height, width)):
        return _in_strips(network, x, max_bytes)
    if mode == "off":
        return _forward(network, x)
    budget = _budget(x.device, max_bytes)
    if _whole_bytes(network, x) > budget and (x.device.type == "cpu" or max_bytes is not None):
        return _in_strips(network, x, max_bytes)
    try:
        return _forward(network, x)
    except torch.OutOfMemoryError:
        logger.warning("out of memory at %d x %d px: went on in exact tiles", width, height)
    # Only here, where the exception is gone: its frames hold the tensors of the failed pass.
    _empty_cache(x.device)
    return _in_strips(network, x, max_bytes)


def why_not_in_strips(network: nn.Module, x: Tensor) -> str:
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
        if type(module) not in _KNOWN or not vars(module).keys().isdisjoint(_REPLACED):
            return f"with {type(module).__name__} in the place of a layer, at {name or 'the top'}"
        if isinstance(module, nn.Conv2d) and (module.padding_mode, module.dilation, module.groups) != _CONV:
            return f"with the convolution {name}, which is no longer the usual one: {module.extra_repr()}"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            return f"while hooks watch the layer {name or 'at the top'}"
    weights = next(network.parameters())
    if (weights.device, weights.dtype) != (x.device, x.dtype):
        return f"for {x.dtype} on {x.device} with weights in {weights.dtype} on {weights.device}"
    return ""


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


def _in_strips(network: Encoder | Decoder, x: Tensor, max_bytes: int | None) -> Tensor:
    height, width = _image_size(network, x)
    itemsize = x.element_size()
    budget = _budget(x.device, max_bytes)
    least = least_bytes(network, height, width, itemsize)
    if most_bytes(network, height, width, itemsize) <= budget:
        return streamed(network, x)
    if budget < least:
        raise _too_little(network, (height, width), least, budget, max_bytes)
    while True:
        try:
            return streamed(network, x, budget)
        except torch.OutOfMemoryError:
            if budget // 2 < least:
                raise
        budget //= 2
        logger.warning("out of memory at %d x %d px: went on in smaller tiles", width, height)
        _empty_cache(x.device)


def _too_little(
    network: Encoder | Decoder, size: tuple[int, int], least: int, budget: int, max_bytes: int | None
) -> ConfigError:
    what = "decoding" if isinstance(network, Decoder) else "encoding"
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
        f"{what} {size[1]} x {size[0]} px exactly takes {least / 1e9:.1f} GB of memory for intermediate results, but "
        f"{have}: {advice}, or take blended tiles, which are approximate (--tiling blended)"
    )


def _image_size(network: Encoder | Decoder, x: Tensor) -> tuple[int, int]:
    """Height and width of the image that goes in or comes out, px."""
    ratio = 2 ** (len(network.up_blocks) - 1) if isinstance(network, Decoder) else 1
    return ratio * x.shape[2], ratio * x.shape[3]


def _is_faster(network: Encoder | Decoder, x: Tensor, height: int, width: int) -> bool:
    """Whether strips are faster than `forward`: on a CPU, where layers in tiles save more than strips cost."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and _tiled_multiplications(network, height, width) >= FAST_MULTIPLICATIONS


def _tiled_multiplications(network: Encoder | Decoder, height: int, width: int) -> int:
    """Of the 3x3 convolutions that strips compute in tiles, if computed directly. height, width: of the image, px."""
    levels = list(network.up_blocks)[::-1] if isinstance(network, Decoder) else list(network.down_blocks)
    total = 0
    for level, block in enumerate(levels):
        resnets = list(block.resnets) + (list(network.mid_block.resnets) if block is levels[-1] else [])
        per_pixel = 0
        for resnet in resnets:
            per_pixel += _if_tiled(resnet.conv1) + _if_tiled(resnet.conv2)
        for upsample in getattr(block, "upsamplers", ()):
            per_pixel += 4 * _if_tiled(upsample.conv)
        total += per_pixel * (height >> level) * (width >> level)
    return total


def _if_tiled(conv: nn.Conv2d) -> int:
    """Multiplications of an output pixel, 0 for a layer that is not computed in tiles."""
    tiled = min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
    return int(conv.weight.numel()) if tiled else 0


def _whole_bytes(network: Encoder | Decoder, x: Tensor) -> int:
    """About what `forward` takes at most for its intermediate results."""
    # torch keeps the input, the normalised input and the output of the widest convolution, and a copy in another layout
    height, width = _image_size(network, x)
    return 2 * x.shape[0] * most_bytes(network, height, width, x.element_size())


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
