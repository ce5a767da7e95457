"""Small autoencoders of any shape, with the same weights in every run."""

from __future__ import annotations

from typing import Any

import torch

from sdvae._torchvision import ensure_torchvision_importable

ensure_torchvision_importable()

from sdvae.model.autoencoder import AutoencoderKL  # noqa: E402


def vae_fields(*widths: int, **others: Any) -> dict[str, Any]:
    """Config fields of an autoencoder with these widths, in groups of 4 channels."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "norm_num_groups": 4,
        **others,
    }


def build_vae(*widths: int, seed: int = 0, kind: Any = AutoencoderKL, **others: Any) -> Any:
    """An autoencoder of ours, or of another class with the same fields, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**vae_fields(*widths, **others)).eval()
