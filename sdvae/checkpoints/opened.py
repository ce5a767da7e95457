"""An autoencoder that is ready to run: opened from a reference, on its device, with the record of its identity.

`open_vae` opens an AutoencoderKL, which the codec needs; `open_any_vae` one of any class of diffusers, and tries it.
Sizes, dtypes, devices and what the classes call their outputs end here; the rest sees x, z and recon.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.formats import CLASS_NAME
from sdvae.checkpoints.store import BUNDLED_NAME, load_any_autoencoder, load_network
from sdvae.data.transforms import pad_to_multiple, unpad
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.device import batch_pixels, choose_device, preferred_memory_format
from sdvae.model.network import Autoencoder
from sdvae.model.optimize import optimize
from sdvae.model.posterior import DiagonalGaussian, Encoding
from sdvae.model.scale import LatentScale

__all__ = ["OpenedVae", "VaeRef", "open_any_vae", "open_vae"]

_PROBE_PX = 128  # the largest downsampling that is published (DC-AE f128) makes one latent position of it
_DRAWS_WHILE_DECODING = frozenset({"ConsistencyDecoderVAE"})


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedVae:
    """An autoencoder of any class, ready to run."""

    name: str  # how the user called it: a path, a hub id, the name of the bundled one
    model: Any  # Autoencoder, or a model of diffusers
    class_name: str  # as config.json names it
    digest: str  # of the weights before they were cast to `dtype`
    device: torch.device
    dtype: torch.dtype
    spatial_compression_ratio: int
    latent_channels: int
    scale: (
        LatentScale  # an AutoencoderTiny is trained on scaled latents: its z are latents already, and its factor is 1
    )
    num_parameters: int

    @property
    def memory_format(self) -> torch.memory_format:
        return preferred_memory_format(self.device)

    @property
    def batch_pixels(self) -> int:
        """Pixels of a batch that suits the device."""
        return batch_pixels(self.device)

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

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def in_dtype(self, dtype: torch.dtype) -> OpenedVae:
        """The same autoencoder computing in another dtype: a copy of the weights."""
        model = _prepared(copy.deepcopy(self.model), self.device, dtype)
        return replace(self, model=model, dtype=dtype)

    @contextmanager
    def tiled(self, mode: Literal["off", "blended"]) -> Iterator[None]:
        """Within the context the model runs in its own blended tiles, or in none; afterwards as before.

        Raises: ConfigError for a class that has no tiles.
        """
        model = cast(Any, self.model)
        if isinstance(model, Autoencoder):
            execution = model.execution
            model.execution = replace(execution, tiling=mode)
            try:
                yield
            finally:
                model.execution = execution
            return
        before = getattr(model, "use_tiling", None)
        if mode == "blended" and (before is None or not self._can_tile()):
            raise ConfigError(f"{self.name}: {self.class_name} with {self.latent_channels} channels has no tiled mode")
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

    def _arranged(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory_format)


VaeRef = str | Path | Autoencoder | OpenedVae | None


def open_vae(
    ref: VaeRef, *, device: str = "auto", dtype: str = "float32", tiling: Mapping[str, Any] | None = None
) -> OpenedVae:
    """Open an AutoencoderKL for images.

    ref: a reference for `load_autoencoder`, None for the bundled one, or a loaded model, which is used as it stands: on
        its own device, in its own dtype and with its own tiling. An `OpenedVae` comes back.
    tiling: arguments of `enable_tiling`; None: off.
    Raises: ConfigError for a device that is missing, tiles that cannot be, and a VAE of other than 3 channels;
        CheckpointError for a VAE that cannot be loaded.
    """
    if isinstance(ref, OpenedVae):
        return ref
    if isinstance(ref, Autoencoder):
        model, place, kind = ref, ref.device, ref.dtype
        digest, name = autoencoder_digest(model), _name_of(model)
    else:
        place, kind = choose_device(device), getattr(torch, dtype)
        model = load_network(ref)
        digest, name = autoencoder_digest(model), BUNDLED_NAME if ref is None else str(ref)
        model.to(device=place, dtype=kind)
        optimize(model)
        if tiling is not None:
            model.enable_tiling(**tiling)
    config = model.config
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        raise ConfigError(f"{name}: this VAE has {config['in_channels']} input channels; images have 3")
    for field in ("latents_mean", "latents_std"):
        if (values := config.get(field)) is not None and len(values) != config["latent_channels"]:
            raise CheckpointError(
                f"{name}: {field} has {len(values)} values; expected {config['latent_channels']}, one per latent "
                "channel"
            )
    return _opened(name, model, digest, place, kind, model.spatial_compression_ratio, config["latent_channels"])


def open_any_vae(ref: str | Path | nn.Module | None, device: torch.device, dtype: torch.dtype) -> OpenedVae:
    """Open an autoencoder of any class, and try it on a small image.

    ref: a folder, file or hub id; None for the bundled one; or a loaded model, which is not changed: it is copied
        unless it is in eval mode and has this device and dtype.
    Raises: CheckpointError for what cannot be loaded, and for a model that does not map images to a latent plane and
        back; MissingWeightsError where there is nothing to load.
    """
    if isinstance(ref, nn.Module):
        model: Any = ref
        name, digest = _name_of(model), autoencoder_digest(model)
        weight = next(model.parameters())
        if model.training or (weight.device, weight.dtype) != (device, dtype):
            model = _prepared(copy.deepcopy(model), device, dtype)
    else:
        model, name = load_any_autoencoder(ref), BUNDLED_NAME if ref is None else str(ref)
        digest = autoencoder_digest(model)
        model = _prepared(model, device, dtype)
    return _opened(name, model, digest, device, dtype, *_probe(model, name, device, dtype))


def _opened(
    name: str, model: Any, digest: str, device: torch.device, dtype: torch.dtype, ratio: int, channels: int
) -> OpenedVae:
    return OpenedVae(
        name=name,
        model=model,
        class_name=_class_name(model),
        digest=digest,
        device=device,
        dtype=dtype,
        spatial_compression_ratio=ratio,
        latent_channels=channels,
        scale=LatentScale.of(model.config),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _name_of(model: Any) -> str:
    return str(model.config.get("_name_or_path") or _class_name(model))


def _class_name(model: nn.Module) -> str:
    return CLASS_NAME if isinstance(model, Autoencoder) else type(model).__name__


def _prepared(model: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own `to` warns of a list that is empty
    if isinstance(model, Autoencoder):
        optimize(model)
    model.to(memory_format=preferred_memory_format(device))
    return model.eval()  # type: ignore[no-any-return]


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
