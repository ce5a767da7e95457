"""Building an autoencoder from the `model` section, and the weights it starts from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.layers import Attention, ResnetBlock2D

__all__ = ["INITS", "build_autoencoder", "residual_init"]


def build_autoencoder(
    model: Mapping[str, Any], init: Callable[[AutoencoderKL], None] | None = None, seed: int = 0
) -> AutoencoderKL:
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
        vae = AutoencoderKL(**fields)
        if init is not None:
            init(vae)
    return vae


@torch.no_grad()
def residual_init(vae: AutoencoderKL) -> None:
    """Start as a shallow network: every residual branch adds nothing, and what remains keeps the variance.

    The last layer of each branch is zero; the other convolutions are normal with variance 1 / fan_in (2 / fan_in before a
    second convolution). Convolutions on the residual stream get biases of unit variance, so that the GroupNorms divide by a nearly
    constant number at first and brightness and contrast survive them. The posterior starts narrow (std exp(-2)).
    Source: zero branches from Goyal et al. 2017, section 5.1; variances from He et al. 2015.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d):
            gain = 2.0 if name.endswith("conv1") else 1.0
            nn.init.normal_(layer.weight, std=(gain / layer.weight[0].numel()) ** 0.5)
            on_stream = name.endswith(("conv_in", "conv_shortcut", "samplers.0.conv"))
            nn.init.normal_(layer.bias) if on_stream else nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    for layer in vae.modules():
        last = layer.conv2 if isinstance(layer, ResnetBlock2D) else layer.to_out[0] if isinstance(layer, Attention) else None
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    log_std = -2.0
    posterior_conv = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    posterior_conv.bias[vae.config.latent_channels :] = 2.0 * log_std


INITS: dict[str, Callable[[AutoencoderKL], None] | None] = {"default": None, "residual": residual_init}
