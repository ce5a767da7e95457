"""What an evaluation measures: an autoencoder of any class, behind one way to encode and decode.

Sizes, dtypes, devices and what the classes call their outputs end here; the rest of an evaluation sees x, z and recon.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sdvae.checkpoints.any_autoencoder import load_any_autoencoder
from sdvae.checkpoints.formats import CLASS_NAME
from sdvae.checkpoints.store import BUNDLED_NAME, autoencoder_digest
from sdvae.data.transforms import pad_to_multiple, unpad
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.device import preferred_memory_format
from sdvae.model.network import Autoencoder
from sdvae.model.optimize import optimize
from sdvae.model.posterior import DiagonalGaussian, Encoding

__all__ = ["Subject", "open_subject", "round_to_8_bits"]

_PROBE_PX = 128  # the largest downsampling that is published (DC-AE f128) makes one latent position of it
_DRAWS_WHILE_DECODING = frozenset({"ConsistencyDecoderVAE"})


def round_to_8_bits(recon: Tensor) -> Tensor:
    """What a picture file would hold. recon: [-1, 1] and beyond; not a number becomes black.

    Returns: float32 in [0, 1], multiples of 1/255.
    """
    levels = ((recon.float().nan_to_num(nan=-1.0) + 1) * 127.5).clamp_(0, 255).round_()
    return levels.div_(255)


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """An autoencoder under test, of any class.

    `latents` are what a diffusion model sees of z: (z - shift_factor) * scaling_factor, or, where the configuration has
    a mean and a standard deviation per channel, (z - latents_mean) * scaling_factor / latents_std, as diffusers'
    pipelines of Stable Diffusion XL do it. An AutoencoderTiny is trained on scaled latents: its z are latents already,
    and its scaling_factor is 1.
    """

    ref: str  # as given
    model: nn.Module
    class_name: str
    digest: str  # of the weights before they were cast to `dtype`
    device: torch.device
    dtype: torch.dtype
    spatial_compression_ratio: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None  # None: not configured, so 0
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    num_parameters: int

    @torch.inference_mode()
    def encode(self, x: Tensor) -> Encoding:
        """z of images of any size: what lacks to a multiple of the compression ratio is padded by repeating edges.

        x: (B, 3, H, W), float32, [-1, 1], on any device. Returns: z (B, C, h, w) with h = H / ratio rounded up.
        """
        padded, _ = pad_to_multiple(x.to(self.device, self.dtype), self.spatial_compression_ratio)
        return _encode(self.model, self._arranged(padded))

    @torch.inference_mode()
    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """Images for z, without what `encode` padded.

        z: (B, C, h, w). Returns: (B, 3, height, width), float32, about [-1, 1], not clamped.
        """
        return unpad(_decode(self.model, self._arranged(z.to(self.device, self.dtype))), height, width).float()

    def to_latents(self, z: Tensor) -> Tensor:
        """z -> what a diffusion model sees. Inverse: to_z."""
        shift, scale = self._shift_and_scale(z)
        return (z - shift) * scale

    def to_z(self, latents: Tensor) -> Tensor:
        """What a diffusion model makes -> z. Inverse: to_latents."""
        shift, scale = self._shift_and_scale(latents)
        return latents / scale + shift

    def latents_posterior(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        """The distribution of the latents of a z that is distributed as `posterior`."""
        _, scale = self._shift_and_scale(posterior.mean)
        logvar = posterior.logvar + 2 * scale.abs().log()
        return DiagonalGaussian(torch.cat([self.to_latents(posterior.mean), logvar.expand_as(posterior.logvar)], dim=1))

    def in_dtype(self, dtype: torch.dtype) -> Subject:
        """The same autoencoder computing in another dtype: a copy of the weights."""
        model = _prepared(copy.deepcopy(self.model), self.device, dtype)
        return replace(self, model=model, dtype=dtype)

    @contextmanager
    def tiled(self, mode: Literal["off", "blended"]) -> Iterator[None]:
        """Within the context the model runs in its own blended tiles, or in none; afterwards as before.

        Raises: ConfigError for a class that has no tiles.
        """
        model = cast(Any, self.model)
        before = getattr(model, "use_tiling", None)
        if mode == "blended" and (before is None or not self._can_tile()):
            raise ConfigError(f"{self.ref}: {self.class_name} with {self.latent_channels} channels has no tiled mode")
        if before is None:
            yield
            return
        model.use_tiling = mode == "blended"
        try:
            yield
        finally:
            model.use_tiling = before

    def _can_tile(self) -> bool:
        # diffusers 0.42: the first writes its tiles into a tensor of 4 channels, whatever it was built with; the
        # second takes a batch of images for one of videos
        if self.class_name == "AutoencoderTiny":
            return self.latent_channels == 4
        return self.class_name != "AutoencoderKLHunyuanImage"

    def describe(self) -> dict[str, Any]:
        """Which network it is, and its latent space: the fields of a result that are known before measuring."""
        return {
            "class_name": self.class_name,
            "digest": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_parameters": self.num_parameters,
            "spatial_compression_ratio": self.spatial_compression_ratio,
            "latent_channels": self.latent_channels,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }

    def _arranged(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=preferred_memory_format(self.device))

    def _shift_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors that broadcast over (B, C, h, w)."""
        if self.latents_mean is not None and self.latents_std is not None:
            shift = like.new_tensor(self.latents_mean).view(1, -1, 1, 1)
            return shift, self.scaling_factor / like.new_tensor(self.latents_std).view(1, -1, 1, 1)
        return like.new_tensor(self.shift_factor or 0.0), like.new_tensor(self.scaling_factor)


def open_subject(ref: str | Path | nn.Module | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """Load an autoencoder for an evaluation, and try it on a small image.

    ref: a folder, file or hub id; None for the bundled one; or a loaded model, which is not changed: it is copied
        unless it is in eval mode and has this device and dtype.
    Raises: CheckpointError for what cannot be loaded, and for a model that does not map images to a latent plane and
        back; MissingWeightsError where there is nothing to load.
    """
    if isinstance(ref, nn.Module):
        model: Any = ref
        name = str(model.config.get("_name_or_path") or type(model).__name__)
        digest = autoencoder_digest(model)
        weight = next(model.parameters())
        if model.training or (weight.device, weight.dtype) != (device, dtype):
            model = _prepared(copy.deepcopy(model), device, dtype)
    else:
        model, name = load_any_autoencoder(ref), BUNDLED_NAME if ref is None else str(ref)
        digest = autoencoder_digest(model)
        model = _prepared(model, device, dtype)
    config = model.config
    ratio, channels = _probe(model, name, device, dtype)
    return Subject(
        ref=name,
        model=model,
        class_name=CLASS_NAME if isinstance(model, Autoencoder) else type(model).__name__,
        digest=digest,
        device=device,
        dtype=dtype,
        spatial_compression_ratio=ratio,
        latent_channels=channels,
        scaling_factor=float(config.get("scaling_factor") or 1.0),
        shift_factor=None if config.get("shift_factor") is None else float(config["shift_factor"]),
        latents_mean=_floats(config.get("latents_mean")),
        latents_std=_floats(config.get("latents_std")),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _prepared(model: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own `to` warns of a list that is empty
    if isinstance(model, Autoencoder):
        optimize(model)
    model.to(memory_format=preferred_memory_format(device))
    return model.eval()  # type: ignore[no-any-return]


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _encode(model: Any, x: Tensor) -> Encoding:
    output = model.encode(x)
    if hasattr(output, "latent_dist"):
        posterior = DiagonalGaussian(output.latent_dist.parameters.float())
        return Encoding(z=posterior.mode(), posterior=posterior)
    z = output.latents if hasattr(output, "latents") else output.latent
    return Encoding(z=z.float(), posterior=None)


def _decode(model: Any, z: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    if type(model).__name__ in _DRAWS_WHILE_DECODING:  # the same noise for every image, whatever its batch
        options["generator"] = [torch.Generator().manual_seed(0) for _ in range(z.shape[0])]
    return model.decode(z, **options).sample  # type: ignore[no-any-return]


@torch.inference_mode()
def _probe(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Pixels per latent position and number of latent channels, seen on a small image.

    Measured rather than read, because the classes have no config fields in common that say it.
    """
    x = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, device=device, dtype=dtype)
    kind = type(model).__name__
    try:
        z = _encode(model, x).z
        recon = _decode(model, z.to(dtype))
    except Exception as error:  # classes that take something else fail each in their own way
        raise CheckpointError(
            f"{name}: {kind} does not take images: a pass over {tuple(x.shape)} fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    sides = tuple(z.shape[2:])
    if len(sides) != 2 or sides[0] != sides[1] or not sides[0] or _PROBE_PX % sides[0] or recon.shape != x.shape:
        raise CheckpointError(
            f"{name}: {kind} makes {tuple(z.shape)} of images {tuple(x.shape)}, and of that {tuple(recon.shape)}; "
            f"expected a plane of latents whose side divides {_PROBE_PX}, and images of the same size"
        )
    return _PROBE_PX // sides[0], z.shape[1]
