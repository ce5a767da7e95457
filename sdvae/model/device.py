"""Which device a network runs on, and what suits that device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdvae.errors import ConfigError

__all__ = ["batch_pixels", "choose_device", "compile_settings", "exact_float32", "preferred_memory_format"]


def choose_device(name: str) -> torch.device:
    """The device that a name stands for; auto is cuda where there is one, else mps, else cpu.

    Raises: ConfigError where the device is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        raise ConfigError(
            f"device '{name}' is not available to torch {torch.__version__}; "
            "use --device cpu, or auto to take what is there"
        )
    return torch.device(name)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the context, convolutions in float32 on NVIDIA GPUs keep all 24 bits; torch's default is TF32 with 11."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def preferred_memory_format(device: torch.device) -> torch.memory_format:
    """3x3 convolutions on CPUs are faster on channels_last; elsewhere it is left as it comes."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def compile_settings(device: torch.device, dtype: torch.dtype) -> tuple[str | None, torch.memory_format]:
    """The mode of torch.compile that suits a device, and the layout of the weights to compile.

    On CUDA: reduce-overhead, which replays CUDA graphs where a shape comes again; and channels_last for half precision,
    in which its convolutions run on tensor cores without being laid out anew. (Without torch.compile they are laid out
    back for every GroupNorm.)
    """
    if device.type != "cuda":
        return None, preferred_memory_format(device)
    half = dtype in (torch.float16, torch.bfloat16)
    return "reduce-overhead", torch.channels_last if half else torch.contiguous_format


def batch_pixels(device: torch.device) -> int:
    """Pixels of a batch that suits the device."""
    # CPU: a batch gains for images up to about 128 px; from 256 px on it is up to a fifth slower than one by one
    # (widths 32 to 128, one core), and needs more memory. Elsewhere 8 images of 512 px are to keep it busy.
    return 2**16 if device.type == "cpu" else 2**21
