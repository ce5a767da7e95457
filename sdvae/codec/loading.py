"""The VAE of a run: where it comes from, on which device and in which dtype it runs, and the record of its identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sdvae.checkpoints.store import BUNDLED_NAME, autoencoder_digest, load_network
from sdvae.codec.options import RunOptions
from sdvae.errors import CheckpointError, ConfigError
from sdvae.latents.header import VaeRecord
from sdvae.model.device import batch_pixels, choose_device, preferred_memory_format
from sdvae.model.network import Autoencoder
from sdvae.model.optimize import optimize

__all__ = ["LoadedVae", "VaeRef", "open_vae"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedVae:
    """A VAE that is ready to run."""

    model: Autoencoder
    record: VaeRecord
    device: torch.device
    dtype: torch.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        return preferred_memory_format(self.device)

    @property
    def batch_pixels(self) -> int:
        """Pixels of a batch that suits the device."""
        return batch_pixels(self.device)


VaeRef = str | Path | Autoencoder | LoadedVae | None


def open_vae(vae: VaeRef, options: RunOptions) -> LoadedVae:
    """Load a VAE for a run.

    vae: a reference for `load_autoencoder`, None for the bundled one, or a loaded model, which is used as it stands: on
    its own device, in its own dtype and with its own tiling, whatever the options say. A `LoadedVae` comes back.
    Raises: ConfigError for a device that is not there; CheckpointError for a VAE that cannot be loaded.
    """
    if isinstance(vae, LoadedVae):
        return vae
    if isinstance(vae, Autoencoder):
        weight = next(vae.parameters())
        device, dtype = weight.device, weight.dtype
        model, digest, name = vae, autoencoder_digest(vae), str(vae.config.get("_name_or_path") or type(vae).__name__)
    else:
        device, dtype = choose_device(options.device), getattr(torch, options.dtype)
        model = load_network(vae)
        digest, name = autoencoder_digest(model), BUNDLED_NAME if vae is None else str(vae)
        torch.nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own `to` warns of a list that is empty
    if (model.config.in_channels, model.config.out_channels) != (3, 3):
        raise ConfigError(f"{name}: this VAE has {model.config.in_channels} input channels; images have 3")
    if model is not vae:  # a model that was handed in is not changed
        optimize(model)
        _set_tiling(model, options)
    blended = model.use_tiling and model.tiling_mode == "blended"
    record = VaeRecord(
        name=name,
        digest=digest,
        dtype=str(dtype).removeprefix("torch."),
        spatial_compression_ratio=model.spatial_compression_ratio,
        scaling_factor=float(model.config.scaling_factor),
        shift_factor=None if model.config.shift_factor is None else float(model.config.shift_factor),
        latents_mean=_per_channel(model, "latents_mean", name),
        latents_std=_per_channel(model, "latents_std", name),
        tile_size_px=model.tile_sample_min_size if blended else None,
        tile_overlap=model.tile_overlap_factor if blended else None,
    )
    return LoadedVae(model=model, record=record, device=device, dtype=dtype)


def _set_tiling(model: Autoencoder, options: RunOptions) -> None:
    """Let a model take large images as the options say. Raises: ConfigError for tiles that cannot be."""
    if options.tiling == "off":
        model.disable_tiling()
    else:
        model.enable_tiling(
            options.tiling,
            max_memory_bytes=options.max_memory_bytes,
            tile_size_px=options.tile_size,
            overlap=options.tile_overlap,
        )


def _per_channel(model: Autoencoder, field: str, name: str) -> tuple[float, ...] | None:
    """A field of the configuration with a number for each latent channel. Raises: CheckpointError."""
    values = model.config.get(field)
    if values is None:
        return None
    if len(values) != model.config.latent_channels:
        raise CheckpointError(
            f"{name}: {field} has {len(values)} values; expected {model.config.latent_channels}, one per latent channel"
        )
    return tuple(float(value) for value in values)
