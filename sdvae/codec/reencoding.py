"""A latent of a cache beside what its image gives now: prepared and computed as recorded, a draw with its seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae, VaeRef, open_vae
from sdvae.codec.image_encoder import load_image
from sdvae.data.images import image_to_x
from sdvae.data.sources.files import ImageFile
from sdvae.data.transforms import pad_to_multiple
from sdvae.errors import CheckpointError, ConfigError, LatentFileError, MissingWeightsError
from sdvae.latents.header import LatentHeader
from sdvae.latents.kohya import mirrored_key
from sdvae.latents.manifest import CacheSettings
from sdvae.model.posterior import DiagonalGaussian, image_generator

__all__ = ["COMPUTE_TOLERANCES", "Reencoding", "StoredLatent", "open_recorded_vae", "reencode", "short_digest"]

# How far two computations of one latent may lie apart, in standard deviations of z: other devices, library versions and
# batch sizes add in another order. Measured with sdvae-mini on six photographs, on a CPU: float16 lies up to 0.011 from
# float32, bfloat16 up to 0.12, so two computations in one of them up to twice that; another image lies 6.7 and more
# away. float32 includes the 11 bits of TF32, as many as those of float16, which torch takes for convolutions on NVIDIA.
COMPUTE_TOLERANCES = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.3}
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}  # of the largest value, by the type in the file


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """One latent beside what its image gives now."""

    file: str
    key: str
    difference: float  # the largest, in standard deviations of z; for logvar in nats or its own standard deviations
    tolerance: float  # of computing and of rounding to the type in the file

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for nan


@dataclass(frozen=True, eq=False)
class StoredLatent:
    """A latent as it was read.

    tensors: those that `header.space` names, and in a kohya-npz file `latents` and perhaps `latents_flipped`; each
        (C, h, w), on the CPU.
    """

    file: str  # path below the cache
    header: LatentHeader
    tensors: Mapping[str, Tensor]


def short_digest(digest: str) -> str:
    """As much of a digest as sentences show: `sha256:` and 12 digits."""
    return digest[:19]


def open_recorded_vae(settings: CacheSettings, vae: VaeRef, device: str) -> OpenedVae:
    """The VAE to compare a cache with, in the dtype of the cache: `vae`, or where that is None the one of its name.

    Raises: ConfigError or CheckpointError where it is not there, or the name stands for another one now.
    """
    record = settings.vae
    tiles = {"mode": "blended", "tile_size_px": record.tile_size_px, "overlap": record.tile_overlap}
    opening: dict[str, Any] = {
        "device": device,
        "dtype": record.dtype,
        "tiling": {"mode": "auto"} if record.tile_size_px is None else tiles,
    }
    if vae is not None:
        return open_vae(vae, **opening)
    try:
        loaded = open_vae(record.name, **opening)
    except (MissingWeightsError, ConfigError) as error:
        raise ConfigError(
            f"the VAE '{record.name}' ({short_digest(record.digest)}) that made the cache is not found from here: "
            "give it with --vae"
        ) from error
    if loaded.digest != record.digest:
        raise CheckpointError(
            f"'{record.name}' is no longer the VAE that made the cache ({short_digest(record.digest)}, now "
            f"{short_digest(loaded.digest)}): give the right one with --vae"
        )
    return loaded


def reencode(latent: StoredLatent, image: ImageFile, loaded: OpenedVae) -> tuple[Reencoding, str]:
    """Compare all tensors of a latent with those that its image gives now.

    Returns: the comparison of the tensor that lies furthest off, and the name of that one.
    Raises: ImageError; LatentFileError where they cannot be compared.
    """
    header = latent.header
    expected = _expected(header, *_encode(image, header, loaded, mirrored="latents_flipped" in latent.tensors))
    shape = expected["z"].shape
    if found := next((t.shape for t in latent.tensors.values() if t.shape != shape), None):
        raise LatentFileError(f"its image gives the shape {tuple(shape)}, the file has {tuple(found)}")
    if not all(tensor.isfinite().all() for tensor in expected.values()):
        raise LatentFileError(f"its image gives values that are not finite in {header.vae.dtype} on this device")
    z_std = (expected["mean"].var(correction=0) + expected["logvar"].exp().mean()).sqrt()
    compared = []
    for name, tensor in latent.tensors.items():
        reference = expected[name]
        # logvar may be the same everywhere, so its own spread alone is no measure
        unit = reference.std(correction=0).clamp(min=1.0) if name == "logvar" else z_std
        rounding = _ROUNDING[header.latent_dtype] * reference.abs().max()
        difference = ((tensor.float() - reference).abs().max() / unit).item()
        tolerance = COMPUTE_TOLERANCES[header.vae.dtype] + (rounding / unit).item()
        compared.append((difference, tolerance, name))
    difference, tolerance, worst = max(compared, key=lambda each: each[0] / each[1])
    return Reencoding(file=latent.file, key=header.source.key, difference=difference, tolerance=tolerance), worst


def _expected(
    header: LatentHeader, posterior: DiagonalGaussian, mirrored: DiagonalGaussian | None
) -> dict[str, Tensor]:
    """What the writer makes of the posteriors, in float32 and by the name in the file; each (C, h, w)."""

    def z(posterior: DiagonalGaussian, stream: str) -> Tensor:
        if header.store == "mode":
            return posterior.mode()[0]
        return posterior.sample(image_generator(header.seed or 0, stream))[0]

    key = header.source.key
    expected = {"mean": posterior.mean[0], "logvar": posterior.logvar[0], "z": z(posterior, key)}
    expected["latents"] = expected["z"]
    if mirrored is not None:
        expected["latents_flipped"] = z(mirrored, mirrored_key(key))
    return expected


def _encode(
    image: ImageFile, header: LatentHeader, loaded: OpenedVae, mirrored: bool
) -> tuple[DiagonalGaussian, DiagonalGaussian | None]:
    """The posteriors of an image, prepared as a latent's header says, and of its mirror image where that is asked for.

    Returns: moments (1, 2 * C, h, w), float32, on the CPU. Raises: ImageError.
    """
    was_accepted = max(1, header.source.width * header.source.height)
    pixels = load_image(image, header.preprocessing, was_accepted).pixels
    x, _ = pad_to_multiple(image_to_x(pixels), loaded.spatial_compression_ratio)
    batch = x[None].to(loaded.device, loaded.dtype).to(memory_format=loaded.memory_format)  # (1, 3, H, W)

    def posterior(x: Tensor) -> DiagonalGaussian:
        with torch.inference_mode():
            return DiagonalGaussian(loaded.model.encode(x).latent_dist.parameters.float().cpu())

    return posterior(batch), posterior(batch.flip(-1)) if mirrored else None
