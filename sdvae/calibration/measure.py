"""Measures scaling_factor, shift_factor, latents_mean and latents_std of a VAE over a set of images.

Left out: anything that changes the weights; `checkpoints/rewrite/fold_scale.py` folds a scale into them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdvae.calibration.result import Calibration, Present
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.data.batches import Member, OnProgress, Tally, compute_batches, default_workers
from sdvae.data.images import DEFAULT_MAX_PIXELS, PREPROCESSING_VERSION, image_to_x, read_image_bytes
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import choose_images, find_images
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import CheckpointError, ConfigError, ImageError, SdvaeError
from sdvae.metrics.moments import LatentMoments
from sdvae.model.device import batch_pixels, choose_device, exact_float32
from sdvae.model.posterior import Encoding

__all__ = ["CalibrateOptions", "calibrate"]

Array = NDArray[np.float64]

_CHOICES = {
    "crop": ("none", "center"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How images become z, and where."""

    size: int | None = None  # length of the short side in px after resizing; None: as it is
    crop: str = "none"  # center: cut the resized image to size x size
    background: str = "white"  # colour under transparent pixels
    max_pixels: int | None = None  # larger images are refused; None: the limit of `read_image`
    max_images: int | None = None  # evenly spaced over the sorted names; None: all
    device: str = "auto"
    dtype: str = "float32"  # of the computation
    batch_size: int | None = None  # images of one size that go through the VAE together; None: what suits the device
    workers: int | None = None  # threads that read; None: one per core, at most 8

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "max_images", "batch_size", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        for name, known in _CHOICES.items():
            if (choice := getattr(self, name)) not in known:
                raise ConfigError(f"{name} is '{choice}'; expected one of {', '.join(known)}")
        if self.crop != "none" and self.size is None:
            raise ConfigError(f"crop is '{self.crop}', but no size is given; give both, for example size 512")

    @property
    def num_workers(self) -> int:
        return default_workers() if self.workers is None else self.workers

    def protocol(self) -> dict[str, Any]:
        """Every choice that changes a number beyond rounding, besides the images."""
        return {
            "size": self.size,
            "crop": self.crop,
            "background": self.background,
            "dtype": self.dtype,
            "preprocessing_version": PREPROCESSING_VERSION,
            "padding": "edges repeated to the VAE's multiple",
        }


def calibrate(
    vae: str | Path | nn.Module | None,
    images: str | Path | Sequence[ImageFile],
    options: CalibrateOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Measure the scale of a VAE's latents over images. Nothing is written: `write_calibration` does that.

    vae: a folder, a file or a hub id of any diffusers autoencoder of images; None for the bundled one; or a model.
    images: a folder, a file, a glob or a .txt list, or what `find_images` returned; of any sizes, padded as encoding
        does it. Images that fail are recorded, and the rest goes on.
    Raises: ConfigError for images or options that cannot be; CheckpointError for the VAE, also where its latents do
        not vary; ImageError where not one image could be used.
    """
    options = options or CalibrateOptions()
    found = find_images(images) if isinstance(images, (str, Path)) else list(images)
    files = choose_images(found, options.max_images)
    subject = open_any_vae(vae, choose_device(options.device), getattr(torch, options.dtype))
    started = time.perf_counter()
    tally = Tally(on_progress, len(files))
    moments, has_posterior, digest = _measure(subject, files, options, tally)
    if not moments.num_images:
        first = f": {tally.failures[0].key}: {tally.failures[0].reason}" if tally.failures else ""
        raise ImageError(f"{images}: none of {len(files)} images could be used{first}")
    if not moments.varies.any():
        raise CheckpointError(f"{subject.name}: its latents are the same everywhere, so no scale makes their std 1")
    shift, scale = (each.squeeze().numpy() for each in subject.scale.affine())  # (C,) or ()
    present = Present(**asdict(subject.scale), std=moments.std(scale, shift), mean=moments.common_mean(scale, shift))
    return Calibration(
        vae=subject.name,
        vae_digest=subject.digest,
        class_name=subject.class_name,
        source=str(images) if isinstance(images, (str, Path)) else f"{len(found)} files",
        num_found=len(found),
        num_images=moments.num_images,
        num_effective=moments.num_effective,
        num_positions=moments.num_positions,
        images_digest=digest,
        protocol=options.protocol(),
        device=str(subject.device),
        scaling_factor=moments.scaling_factor(),
        shift_factor=moments.common_mean(),
        scaling_factor_of_modes=moments.scaling_factor(of_modes=True) if has_posterior else None,
        channels=tuple(moments.channel(index) for index in range(moments.latent_channels)),
        present=present,
        warnings=tuple(tally.warnings),
        failures=tuple(sorted(tally.failures, key=lambda failure: failure.key)),
        seconds=time.perf_counter() - started,
    )


def _measure(
    subject: OpenedVae, files: Sequence[ImageFile], options: CalibrateOptions, tally: Tally
) -> tuple[LatentMoments, bool, str]:
    """Returns: the moments, whether there were posteriors, and the digest of the images that could be read."""
    moments = LatentMoments(subject.latent_channels)
    has_posterior = False
    digests: dict[str, str] = {}

    def read(file: ImageFile) -> Member:
        content = file.read()
        limit = options.max_pixels or DEFAULT_MAX_PIXELS
        pixels = read_image_bytes(content.data, str(file.path), background=options.background, max_pixels=limit).pixels
        if options.size is not None:
            pixels = resize_and_crop(pixels, options.size, options.crop)  # type: ignore[arg-type]
        member = Member(file, image_to_x(pixels))
        digests[file.key] = content.digest
        return member

    encodings = compute_batches(
        files,
        read,
        lambda batch: subject.encode(torch.stack([member.tensor for member in batch])),
        tally,
        workers=options.num_workers,
        batch_size=options.batch_size,
        batch_pixels=batch_pixels(subject.device),
        if_out_of_memory="use a smaller --size, or a device with more memory",
    )
    with closing(encodings), exact_float32():
        for members, encoding in encodings:
            finite = _finite(encoding)
            for member, is_finite in zip(members, finite.tolist(), strict=True):
                if not is_finite:
                    tally.fail(member.job, SdvaeError(f"its latents are not finite in {options.dtype}"))
            has_posterior = encoding.posterior is not None
            if finite.any():
                moments.update(*_mean_and_var(encoding, finite))
            tally.done += int(finite.sum())
            tally.tell()
    whole = hashlib.sha256()
    for key in (file.key for file in files if file.key in digests):
        whole.update(f"{key}\0{digests[key]}\n".encode(errors="surrogateescape"))
    return moments, has_posterior, f"sha256:{whole.hexdigest()}"


def _finite(encoding: Encoding) -> Tensor:
    """Whether all of an image's latents are finite. Returns: (B,), bool."""
    finite = encoding.z.isfinite().flatten(1).all(dim=1)
    if encoding.posterior is not None:
        finite &= encoding.posterior.logvar.isfinite().flatten(1).all(dim=1)
    return finite.cpu()


def _mean_and_var(encoding: Encoding, rows: Tensor) -> tuple[Array, Array | None]:
    mean = encoding.z.cpu().double()[rows].numpy()  # (B, C, h, w)
    if encoding.posterior is None:
        return mean, None
    return mean, encoding.posterior.logvar.cpu().double()[rows].exp().numpy()
