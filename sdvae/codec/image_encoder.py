"""An image file -> its latent in a file of a cache: what is read, computed and written for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.cache_writer import CacheWriter
from sdvae.codec.engine import Member, Work
from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.encode import preprocessing_of
from sdvae.codec.planning.kohya import why_no_bucket
from sdvae.codec.planning.plan import Item
from sdvae.data.images import DEFAULT_MAX_PIXELS, image_to_x, read_image_bytes
from sdvae.data.sources.files import ImageFile
from sdvae.data.transforms import pad_to_multiple, resize_and_crop
from sdvae.errors import ImageError
from sdvae.latents.formats import SHARDED_FORMATS
from sdvae.latents.header import LatentHeader, Padding, Preprocessing, Size, SourceRecord, VaeRecord
from sdvae.latents.kohya import mirrored_key
from sdvae.model.posterior import DiagonalGaussian, image_generator

__all__ = ["ImageEncoder", "LoadedImage", "load_image", "to_device"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedImage:
    """An image as it goes into the VAE, before padding; its bytes were read once."""

    source: SourceRecord
    pixels: NDArray[Any]  # (H, W, 3) uint8 or uint16, sRGB
    notes: tuple[str, ...]


def load_image(file: ImageFile, preprocessing: Preprocessing, max_pixels: int | None = None) -> LoadedImage:
    """Read an image and do what the preprocessing says: background, resizing and cropping. Raises: ImageError."""
    content = file.read()
    read = read_image_bytes(
        content.data,
        str(file.path),
        background=preprocessing.background,
        max_pixels=max_pixels or DEFAULT_MAX_PIXELS,
        min_side_px=preprocessing.min_side_px,
    )
    pixels, place = read.pixels, read.place
    height, width = pixels.shape[:2] if place is None else (place.height, place.width)
    if preprocessing.size is not None:
        pixels = resize_and_crop(pixels, preprocessing.size, preprocessing.crop, place)  # type: ignore[arg-type]
    source = SourceRecord(
        key=file.key,
        digest=content.digest,
        size_bytes=content.size_bytes,
        mtime_ns=content.mtime_ns,
        width=width,
        height=height,
    )
    return LoadedImage(source=source, pixels=pixels, notes=read.notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEncoder(Work):
    """Does jobs of a plan with a VAE: image file -> latent in a file of the cache."""

    out: Path
    options: EncodeOptions
    vae: OpenedVae
    record: VaeRecord  # of the VAE
    writer: CacheWriter

    if_out_of_memory = "use a smaller --size, a lower --max-memory, or a device with more memory"

    def load(self, item: Item) -> LoadedImage:
        """The image of an item, as it goes into the VAE. Raises: ImageError."""
        file = ImageFile(item.key, item.path, item.member)
        return load_image(file, preprocessing_of(self.options), self.options.max_pixels)

    def read(self, item: Item) -> Member:
        image = self.load(item)
        height, width = image.pixels.shape[:2]
        if self.options.format == "kohya-npz" and (reason := why_no_bucket(width, height)):
            raise ImageError(f"{item.path}: {reason}")  # it changed since the plan, which refuses such images
        x, padding = pad_to_multiple(image_to_x(image.pixels), self.vae.spatial_compression_ratio)
        header = LatentHeader(
            space="moments" if self.options.store == "moments" else "z",
            store=self.options.store,  # type: ignore[arg-type]
            latent_dtype=self.options.latent_dtype,  # type: ignore[arg-type]
            seed=self.options.seed if self.options.draws else None,
            source=image.source,
            image=Size(width=width, height=height),
            padding=Padding(**asdict(padding)),
            preprocessing=preprocessing_of(self.options),
            vae=self.record,
            notes=image.notes,
            sdvae_version=__version__,
        )
        return Member(item, x, header)

    def compute(self, batch: Sequence[Member]) -> Sequence[Tensor]:
        """Moments of each image, (2 * C, h, w), on the device; with `flip` those of the mirrored image follow."""
        x = to_device([member.tensor for member in batch], self.vae)  # (B, 3, H, W)
        moments = self.vae.model.encode(x).latent_dist.parameters
        if self.options.flip:
            mirrored = self.vae.model.encode(x.flip(-1)).latent_dist.parameters
            moments = torch.cat((moments, mirrored), dim=1)  # (B, 4 * C, h, w)
        return list(moments)

    def write(self, member: Member, computed: Tensor) -> None:
        self.writer.add(member.job.output, member.header, self._tensors(member.header, computed.float().cpu()))

    @property
    def by_output(self) -> bool:
        return self.options.format in SHARDED_FORMATS

    def finish(self, output: Path) -> None:
        self.writer.finish(output)

    def _tensors(self, header: LatentHeader, moments: Tensor) -> dict[str, Tensor]:
        """What the file is to hold, each (C, h, w)."""
        posterior, *mirrored = (DiagonalGaussian(part[None]) for part in moments.chunk(2 if self.options.flip else 1))
        key, dtype = header.source.key, getattr(torch, header.latent_dtype)
        if header.store == "moments":
            tensors = {"mean": posterior.mean[0].to(dtype), "logvar": posterior.logvar[0].to(dtype)}
        else:
            tensors = {"z": self._z(posterior, key).to(dtype)}
        if self.options.format == "kohya-npz":
            tensors["latents"] = tensors["z"].float() if "z" in tensors else self._z(posterior, key)
            for other in mirrored:  # a draw of its own, as for another image
                tensors["latents_flipped"] = self._z(other, mirrored_key(key))
        return tensors

    def _z(self, posterior: DiagonalGaussian, key: str) -> Tensor:
        """The mean for store=mode, else a draw; (C, h, w)."""
        if not self.options.draws:
            return posterior.mode()[0]
        return posterior.sample(image_generator(self.options.seed, key))[0]


def to_device(tensors: Sequence[Tensor], vae: OpenedVae) -> Tensor:
    """A batch on the device of the VAE, in its dtype. Does not wait for the copy, so the next batch can be prepared."""
    batch = torch.stack(list(tensors)).to(memory_format=vae.memory_format)
    if vae.device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(vae.device, vae.dtype, non_blocking=True)
