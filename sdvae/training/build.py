"""Building an autoencoder from the `model` section of a training config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL

__all__ = ["build_autoencoder"]


def build_autoencoder(model: Mapping[str, Any], seed: int) -> AutoencoderKL:
    """An autoencoder with seeded weights. The block types follow from `block_out_channels` and need not be given.

    Raises: ConfigError for a key that is no parameter of AutoencoderKL, or values that cannot be built.
    """
    known = [name for name in inspect.signature(AutoencoderKL.__init__).parameters if name != "self"]
    if unknown := [key for key in model if key not in known]:
        raise ConfigError(f"unknown key 'model.{unknown[0]}'; known keys: {', '.join(known)}")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}
    levels = len(fields.get("block_out_channels", (64,)))
    fields.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    fields.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: AutoencoderKL = AutoencoderKL(**fields)
    return vae
