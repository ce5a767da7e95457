"""Our faster class in the place of diffusers', in memory: the same weights, the same numbers within rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import ConfigError
from sdvae.model.device import compile_settings, preferred_memory_format
from sdvae.model.network import Autoencoder

if TYPE_CHECKING:
    from sdvae.model.autoencoder import AutoencoderKL

__all__ = ["optimize"]

T = TypeVar("T")

_SWITCHES = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


def optimize(model: T, *, compile: bool = False) -> T | Autoencoder:
    """Make a pipeline, or an autoencoder on its own, faster.

    On a CPU, in float32 and without gradients, encoding and decoding then run in strips of rows with fewer
    multiplications (docs/speed.md); everywhere, weights are laid out for their device. Numbers are equal to rounding.

    model: any diffusers pipeline whose `vae` is diffusers' AutoencoderKL, which is replaced within it; such a VAE; or
        an AutoencoderKL of sdvae. Device, dtype, mode, slicing and tiling are kept; the weights are shared. The first
        pass makes transformed weights (in a fraction of a second), which take up to five times the memory of the
        network's own; `enable_tiling("exact", max_memory_bytes=...)` goes without.
    compile: run encoder and decoder through torch.compile instead, for GPUs: normalisation and activation in one
        kernel, half precision in channels_last, and CUDA graphs. It compiles for every shape anew, of which torch keeps
        eight; each takes tens of seconds to minutes, and is told in the log.
    Returns: the pipeline that was given, or for a VAE the one to use in its place.
    Raises: ConfigError for a VAE of another class, one that is compiled, fused or offloaded, and where there is none.
    """
    if not hasattr(model, "register_modules"):
        return _optimized(model, "the model", compile)
    if not isinstance(vae := getattr(model, "vae", None), nn.Module):
        raise ConfigError(f"{type(model).__name__} has no vae; expected a pipeline with one, or the VAE itself")
    optimized = _optimized(vae, f"the vae of {type(model).__name__}", compile)
    if optimized is not vae:
        model.register_modules(vae=optimized)
    return model


def _optimized(vae: Any, name: str, compile: bool) -> Autoencoder:
    ours = vae if isinstance(vae, Autoencoder) else _shared(vae, name)
    weights = next(ours.parameters())
    ours.execution = replace(ours.execution, fast=True)
    memory_format = preferred_memory_format(weights.device)
    if compile:  # strips leave compiled networks alone
        mode, memory_format = compile_settings(weights.device, weights.dtype)
        ours.encoder.compile(dynamic=False, mode=mode)
        ours.decoder.compile(dynamic=False, mode=mode)
    return ours.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def _shared(stock: Any, name: str) -> AutoencoderKL:
    """Our class around the tensors of diffusers' one."""
    ensure_torchvision_importable()
    from diffusers import AutoencoderKL as StockAutoencoderKL

    from sdvae.model.autoencoder import AutoencoderKL

    if type(stock) is not StockAutoencoderKL:
        raise ConfigError(
            f"{name} is {type(stock).__module__}.{type(stock).__name__}; only diffusers' AutoencoderKL can be "
            f"replaced, before it is compiled or wrapped"
        )
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in stock.modules()):
        raise ConfigError(f"{name} is offloaded: its weights come and go by hooks; optimize first, then offload")
    fields = {field: value for field, value in stock.config.items() if not field.startswith("_")}
    with torch.device("meta"):
        ours: AutoencoderKL = AutoencoderKL(**fields)
    state = stock.state_dict()
    if unknown := sorted(set(state) ^ set(ours.state_dict())):
        raise ConfigError(
            f"{name} has other weights than an AutoencoderKL, {len(unknown)}, the first `{unknown[0]}`; undo what "
            f"changed it (unfuse_qkv_projections, unload adapters) and optimize first"
        )
    ours.load_state_dict(state, assign=True)
    trained = {parameter_name: parameter.requires_grad for parameter_name, parameter in stock.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        parameter.requires_grad_(trained[parameter_name])
    for switch in _SWITCHES:
        setattr(ours, switch, getattr(stock, switch))
    if stock.is_gradient_checkpointing:
        ours.enable_gradient_checkpointing()
    ours.train(stock.training)
    return ours
