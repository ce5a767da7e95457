"""An image file -> its latent in a file of a cache: what is read, computed and written for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.engine import Member, Work, to_device
from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.encode import preprocessing_of
from sdvae.codec.planning.kohya import why_no_bucket
from sdvae.codec.planning.plan import Item
from sdvae.data.images import DEFAULT_MAX_PIXELS, image_to_x, read_image_bytes
from sdvae.data.sources.files import ImageFile
from sdvae.data.transforms import pad_to_multiple, resize_and_crop
from sdvae.errors import ImageError
from sdvae.files import write_atomic
from sdvae.latents.header import ArrayItem, LatentHeader, Padding, Preprocessing, Size, SourceRecord, VaeRecord
from sdvae.latents.kohya import mirrored_key
from sdvae.latents.manifest import Manifest
from sdvae.latents.registry import FORMATS
from sdvae.latents.safetensors import check_finite
from sdvae.model.posterior import DiagonalGaussian, image_generator

__all__ = ["ImageEncoder", "LoadedImage", "load_image"]


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


class ImageEncoder(Work):
    """Does jobs of a plan with a VAE: image file -> latent in a file of the cache, each file whole."""

    options: EncodeOptions
    if_out_of_memory = "use a smaller --size, a lower --max-memory, or a device with more memory"

    def __init__(
        self, out: Path, options: EncodeOptions, vae: OpenedVae, record: VaeRecord, jobs: Iterable[Item]
    ) -> None:
        """record: of the VAE."""
        self.out = out
        self.options = options
        self.vae = vae
        self.record = record
        self.written = Manifest(format=options.format)  # the files that were written
        self._format = FORMATS[options.format]
        self._preprocessing = preprocessing_of(options)
        self._shard: list[ArrayItem] = []  # of the shard that is being filled
        self._redone: dict[Path, set[str]] = {}  # keys that are encoded anew, by output
        for job in jobs:
            self._redone.setdefault(job.output, set()).add(job.key)

    def load(self, item: Item) -> LoadedImage:
        """The image of an item, as it goes into the VAE. Raises: ImageError."""
        return load_image(ImageFile(item.key, item.path, item.member), self._preprocessing, self.options.max_pixels)

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
            preprocessing=self._preprocessing,
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
        """Write a latent, or of a format of shards keep it for `finish`.

        Raises: LatentFileError for values that are not finite; OSError.
        """
        header, output = member.header, member.job.output
        tensors = self._tensors(header, computed.float().cpu())
        check_finite(header, tensors, output)
        item = (header, {name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
        if self.by_output:
            self._shard.append(item)
        else:
            self._write_file(output, [item])

    @property
    def by_output(self) -> bool:
        return self._format.is_sharded

    def finish(self, output: Path) -> None:
        """Write a shard: what `write` kept since the last one, and of the old shard what was up to date.

        Raises: LatentFileError where the old one cannot be read; OSError.
        """
        added, self._shard = self._shard, []
        old = list(self._format.read_items(output)) if output.exists() else []
        kept = [
            (header, {name: tensor.numpy() for name, tensor in tensors.items()})
            for header, tensors in old
            if header.source.key not in self._redone[output]
        ]
        if items := sorted([*added, *kept], key=lambda item: item[0].source.key):
            if added or len(kept) < len(old):
                self._write_file(output, items)
        else:
            output.unlink(missing_ok=True)  # all that it held is stale, and failed now

    def _write_file(self, output: Path, items: Sequence[ArrayItem]) -> None:
        data = self._format.to_bytes(items)
        write_atomic(data, output)
        shapes = [(header, next(iter(arrays.values())).shape) for header, arrays in items]
        self.written.add(self.out, output, data, shapes)

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
