"""Images -> latents on disk and back: what is read, computed and written for each, and the two public functions.

`plan.py` decides what is to be done; `engine.py` has the loop, the threads and the counting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.opened import OpenedVae, VaeRef, open_vae
from sdvae.codec.cache_writer import CacheWriter
from sdvae.codec.decoded_image import save_marked
from sdvae.codec.engine import Member, OnProgress, Tally, carry_out, prepare_folder
from sdvae.codec.listing import CacheListing, ListedFile
from sdvae.codec.merging import merge_finished_parts
from sdvae.codec.options import SHARDED_FORMATS, DecodeOptions, EncodeOptions
from sdvae.codec.plan import Item, LatentSource, Plan, find_latents, mark_for, plan_decode, plan_encode, why_no_bucket
from sdvae.codec.reports import DecodeReport, EncodeReport
from sdvae.data.images import (
    DEFAULT_MAX_PIXELS,
    JPEG_MARGIN,
    PREPROCESSING_VERSION,
    image_to_x,
    read_image,
    read_image_bytes,
    x_to_image,
)
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import find_inputs
from sdvae.data.transforms import pad_to_multiple, resize_and_crop, unpad
from sdvae.errors import ConfigError, ImageError, LatentFileError
from sdvae.latents.header import LatentHeader, Padding, Preprocessing, Size, SourceRecord, VaeRecord
from sdvae.latents.kohya import CHANNELS, RATIO, SCALING_FACTORS, mirrored_key
from sdvae.latents.parquet import check_installed
from sdvae.latents.safetensors import LatentFile
from sdvae.model.posterior import DiagonalGaussian, image_generator
from sdvae.model.scale import LatentScale

__all__ = ["DecodeRun", "EncodeRun", "ImageEncoder", "PreparedImage", "decode_folder", "encode_folder", "read_pixels"]


class ImageEncoder:
    """Does jobs of a plan with a VAE: image file -> latent in a file of the cache.

    Raises: ConfigError where the format cannot hold what this VAE and these options give.
    """

    def __init__(self, out: Path, options: EncodeOptions, vae: OpenedVae, record: VaeRecord | None = None) -> None:
        _check_format(options, vae)
        self.out = out
        self.options = options
        self.vae = vae
        self.record = record or VaeRecord.of(vae)
        self.preprocessing = Preprocessing(
            version=PREPROCESSING_VERSION,
            background=options.background,
            size=options.size,
            crop=options.crop,
            jpeg_margin=None if options.size is None else JPEG_MARGIN,
        )

    def encode(self, plan: Plan, writer: CacheWriter, on_progress: OnProgress | None = None) -> Tally:
        """Do the jobs of a plan. Raises: SdvaeError where the disk is full."""

        def write(member: Member, moments: Tensor) -> None:
            writer.add(member.item.output, member.header, self._tensors(member.header, moments.float().cpu()))

        return carry_out(
            plan,
            self.out,
            self.options,
            self.vae.batch_pixels,
            read=self._read,
            compute=self._encode,
            write=write,
            on_progress=on_progress,
            finish=writer.finish if self.options.format in SHARDED_FORMATS else None,
        )

    def _read(self, item: Item) -> Member:
        file = ImageFile(item.key, item.source, item.member)
        size_bytes, mtime_ns = file.stamp()  # before the bytes: a change while they are read shows in the next run
        digest = file.digest()
        image = read_pixels(file.content(), self.options, str(item.source))
        pixels = image.pixels
        x, padding = pad_to_multiple(image_to_x(pixels), self.vae.spatial_compression_ratio)
        if self.options.format == "kohya-npz" and (reason := why_no_bucket(pixels.shape[1], pixels.shape[0])):
            raise ImageError(f"{item.source}: {reason}")  # it changed since the plan, which refuses such images
        header = LatentHeader(
            space="moments" if self.options.store == "moments" else "z",
            store=self.options.store,  # type: ignore[arg-type]
            latent_dtype=self.options.latent_dtype,  # type: ignore[arg-type]
            seed=self.options.seed if self.options.draws else None,
            source=SourceRecord(
                key=item.key,
                digest=digest,
                size_bytes=size_bytes,
                mtime_ns=mtime_ns,
                width=image.source_size.width,
                height=image.source_size.height,
            ),
            image=Size(width=pixels.shape[1], height=pixels.shape[0]),
            padding=Padding(**asdict(padding)),
            preprocessing=self.preprocessing,
            vae=self.record,
            notes=image.notes,
            sdvae_version=__version__,
        )
        return Member(item, x, header)

    def _encode(self, batch: Sequence[Member]) -> Sequence[Tensor]:
        """Moments of each image, (2 * C, h, w), on the device; with `flip` those of the mirrored image follow."""
        x = _to_device([member.tensor for member in batch], self.vae)  # (B, 3, H, W)
        moments = self.vae.model.encode(x).latent_dist.parameters
        if self.options.flip:
            mirrored = self.vae.model.encode(x.flip(-1)).latent_dist.parameters
            moments = torch.cat((moments, mirrored), dim=1)  # (B, 4 * C, h, w)
        return list(moments)

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


class EncodeRun:
    """Images -> latent files: everything that is needed, looked up and planned; `run` does it.

    Raises: ConfigError for images, options or an output folder that cannot be; CheckpointError for the VAE.
    """

    def __init__(
        self,
        images: str | Path | Sequence[ImageFile],
        out: str | Path,
        vae: VaeRef = None,
        options: EncodeOptions | None = None,
    ) -> None:
        self.options = options or EncodeOptions()
        self.out = Path(out)
        if isinstance(images, (str, Path)):
            dataset = {name: getattr(self.options, name) for name in ("split", "subset", "image_column")}
            images = find_inputs(images, **dataset)
        self._on_ray = self.options.engine == "ray"
        if self._on_ray:
            _check_ray(vae)
        self._ref = vae
        self.vae = open_vae(vae, **self.options.opening | ({"device": "cpu"} if self._on_ray else {}))
        self.encoder = ImageEncoder(self.out, self.options, self.vae)
        self.plan = plan_encode(images, self.out, self.options, self.encoder.preprocessing, self.encoder.record)

    def run(self, on_progress: OnProgress | None = None) -> EncodeReport:
        """Encode what the plan says. Raises: SdvaeError where the disk is full."""
        prepare_folder(self.plan, self.out)
        listing = CacheListing(self.out, self.options.format, self.options.part)
        listing.begin(self.plan)
        written: dict[str, ListedFile] = {}
        try:
            tally, device = self._carry_out(written, on_progress)
        except BaseException:
            with contextlib.suppress(OSError):  # the next run completes the list
                listing.close(written, complete=False, num_failed=0)
            raise
        if self.options.format == "kohya-npz":
            tally.warnings += _scale_warnings(self.vae.scale, self.options.trainer_suffix)
        fields = tally.to_fields(self.plan, self.out, self.vae) | {"device": device}
        manifest = listing.close(written, complete=True, num_failed=fields["failed"])
        if self.options.part is not None:
            merged, warnings = merge_finished_parts(self.out)
            manifest, fields["warnings"] = merged or manifest, (*fields["warnings"], *warnings)
        return EncodeReport(**fields, format=self.options.format, manifest=str(manifest))

    def _carry_out(self, written: dict[str, ListedFile], on_progress: OnProgress | None) -> tuple[Tally, str]:
        """Do the jobs of the plan. Returns: what happened, and on which device.

        written: takes the files that were written, also where this raises.
        """
        if self._on_ray:
            from sdvae.codec.ray import encode_on_ray

            return encode_on_ray(
                self.plan, self.out, self.options, self._ref, self.encoder.record, written, on_progress
            )
        writer = CacheWriter(self.out, self.options.format, self.plan.jobs, written)
        return self.encoder.encode(self.plan, writer, on_progress), str(self.vae.device)


class DecodeRun:
    """Latent files -> images: everything that is needed, looked up and planned; `run` does it.

    Raises: ConfigError for latents, options or an output folder that cannot be; CheckpointError for the VAE;
        LatentFileError where all latents are of another VAE.
    """

    def __init__(
        self,
        latents: str | Path | Sequence[LatentSource],
        out: str | Path,
        vae: VaeRef = None,
        options: DecodeOptions | None = None,
    ) -> None:
        self.options = options or DecodeOptions()
        self.out = Path(out)
        files = find_latents(latents) if isinstance(latents, (str, Path)) else latents
        self.vae = open_vae(vae, **self.options.opening)
        self.record = VaeRecord.of(self.vae)
        self.plan = plan_decode(files, self.out, self.options, self.record)

    def run(self, on_progress: OnProgress | None = None) -> DecodeReport:
        """Decode what the plan says. Raises: SdvaeError where the disk is full."""
        prepare_folder(self.plan, self.out)
        tally = carry_out(
            self.plan,
            self.out,
            self.options,
            self.vae.batch_pixels,
            read=self._read,
            compute=self._decode,
            write=self._write,
            on_progress=on_progress,
        )
        return DecodeReport(**tally.to_fields(self.plan, self.out, self.vae))

    def _read(self, item: Item) -> Member:
        file = LatentFile.read(item.source)
        z, channels, ratio = file.z(), self.vae.latent_channels, self.vae.spatial_compression_ratio
        if (z.shape[0], file.header.vae.spatial_compression_ratio) != (channels, ratio):
            raise LatentFileError(
                f"{item.source}: {z.shape[0]} channels at {file.header.vae.spatial_compression_ratio} px per position; "
                f"this VAE decodes {channels} at {ratio}"
            )
        return Member(item, z, file.header)

    def _decode(self, batch: Sequence[Member]) -> Sequence[Tensor]:
        """Recon of each latent, (3, H, W) with the padding, on the device."""
        z = _to_device([member.tensor for member in batch], self.vae)  # (B, C, h, w)
        return list(self.vae.model.decode(z).sample)

    def _write(self, member: Member, recon: Tensor) -> None:
        item, header = member.item, member.header
        pixels = x_to_image(unpad(recon.cpu(), header.image.height, header.image.width))
        save_marked(pixels, item.output, mark_for(item.key, header, self.options, self.record))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image as it goes into the VAE, before padding."""

    pixels: NDArray[Any]  # (H, W, 3) uint8 or uint16, sRGB
    source_size: Size  # upright, before resizing and cropping
    notes: tuple[str, ...]


def read_pixels(
    content: Path | bytes, options: EncodeOptions, name: str = "", *, jpeg_margin: int | None = JPEG_MARGIN
) -> PreparedImage:
    """Read an image and do what the options ask for: background, limit, resizing and cropping.

    name: of an image that comes as bytes, for messages. jpeg_margin: as `Preprocessing` has it. Raises: ImageError.
    """
    settings: dict[str, Any] = {
        "background": options.background,
        "max_pixels": options.max_pixels or DEFAULT_MAX_PIXELS,
        "min_side_px": None if options.size is None or jpeg_margin is None else options.size * jpeg_margin,
    }
    read = read_image(content, **settings) if isinstance(content, Path) else read_image_bytes(content, name, **settings)
    pixels, place = read.pixels, read.place
    height, width = pixels.shape[:2] if place is None else (place.height, place.width)
    if options.size is not None:
        pixels = resize_and_crop(pixels, options.size, options.crop, place)  # type: ignore[arg-type]
    return PreparedImage(pixels=pixels, source_size=Size(width=width, height=height), notes=read.notes)


def encode_folder(
    images: str | Path | Sequence[ImageFile],
    out: str | Path,
    *,
    vae: VaeRef = None,
    format: str = EncodeOptions.format,
    shard_size: int | None = EncodeOptions.shard_size,
    kohya_suffix: str | None = EncodeOptions.kohya_suffix,
    flip: bool = EncodeOptions.flip,
    store: str = EncodeOptions.store,
    latent_dtype: str = EncodeOptions.latent_dtype,
    seed: int = EncodeOptions.seed,
    size: int | None = EncodeOptions.size,
    crop: str = EncodeOptions.crop,
    background: str = EncodeOptions.background,
    max_pixels: int | None = EncodeOptions.max_pixels,
    device: str = EncodeOptions.device,
    dtype: str = EncodeOptions.dtype,
    batch_size: int | None = EncodeOptions.batch_size,
    workers: int | None = EncodeOptions.workers,
    tiling: str = EncodeOptions.tiling,
    max_memory: int | str | None = EncodeOptions.max_memory,
    tile_size: int | None = EncodeOptions.tile_size,
    tile_overlap: float | None = EncodeOptions.tile_overlap,
    overwrite: bool = EncodeOptions.overwrite,
    shard: str | None = EncodeOptions.shard,
    engine: str = EncodeOptions.engine,
    ray_workers: int | None = EncodeOptions.ray_workers,
    split: str | None = EncodeOptions.split,
    subset: str | None = EncodeOptions.subset,
    image_column: str | None = EncodeOptions.image_column,
    on_progress: OnProgress | None = None,
) -> EncodeReport:
    """Encode images to one latent file each, or to shards; what is up to date already is skipped.

    images: a folder (its tree is mirrored), a file, a glob or a .txt list; tar files of images or a folder or glob of
        these; a dataset: parquet or arrow files, a folder of these, "hf://datasets/owner/name"; or what `find_images`
        returned.
    vae: a folder, a file or a hub id; None for the bundled one; a loaded model runs where and as it is.
    The options are those of `EncodeOptions`. Files that fail are recorded in the report, and the rest goes on.
    Raises: ConfigError and CheckpointError before anything is written; SdvaeError where the disk is full.
    """
    options = EncodeOptions(
        format=format,
        shard_size=shard_size,
        kohya_suffix=kohya_suffix,
        flip=flip,
        store=store,
        latent_dtype=latent_dtype,
        seed=seed,
        size=size,
        crop=crop,
        background=background,
        max_pixels=max_pixels,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        tiling=tiling,
        max_memory=max_memory,
        tile_size=tile_size,
        tile_overlap=tile_overlap,
        overwrite=overwrite,
        shard=shard,
        engine=engine,
        ray_workers=ray_workers,
        split=split,
        subset=subset,
        image_column=image_column,
    )
    return EncodeRun(images, out, vae, options).run(on_progress)


def decode_folder(
    latents: str | Path | Sequence[LatentSource],
    out: str | Path,
    *,
    vae: VaeRef = None,
    format: str = DecodeOptions.format,
    quality: int | None = DecodeOptions.quality,
    allow_other_vae: bool = DecodeOptions.allow_other_vae,
    device: str = DecodeOptions.device,
    dtype: str = DecodeOptions.dtype,
    batch_size: int | None = DecodeOptions.batch_size,
    workers: int | None = DecodeOptions.workers,
    tiling: str = DecodeOptions.tiling,
    max_memory: int | str | None = DecodeOptions.max_memory,
    tile_size: int | None = DecodeOptions.tile_size,
    tile_overlap: float | None = DecodeOptions.tile_overlap,
    overwrite: bool = DecodeOptions.overwrite,
    shard: str | None = DecodeOptions.shard,
    on_progress: OnProgress | None = None,
) -> DecodeReport:
    """Decode latent files to one image each, at the size that was encoded; what is up to date already is skipped.

    latents: a folder (its tree is mirrored), a file or a glob, or what `find_latents` returned. Files that keep the
        posterior decode from its mean.
    vae: as for `encode_folder`; latents of another VAE are refused unless `allow_other_vae`.
    The options are those of `DecodeOptions`. Files that fail are recorded in the report, and the rest goes on.
    Raises: ConfigError, CheckpointError and LatentFileError before anything is written; SdvaeError where the disk is
        full.
    """
    options = DecodeOptions(
        format=format,
        quality=quality,
        allow_other_vae=allow_other_vae,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        tiling=tiling,
        max_memory=max_memory,
        tile_size=tile_size,
        tile_overlap=tile_overlap,
        overwrite=overwrite,
        shard=shard,
    )
    return DecodeRun(latents, out, vae, options).run(on_progress)


def _check_ray(vae: VaeRef) -> None:
    """Raises: ConfigError where Ray is not installed, or its workers could not load the VAE."""
    from sdvae.codec.ray import check_installed

    check_installed()
    if vae is not None and not isinstance(vae, (str, Path)):
        raise ConfigError("engine ray loads the VAE in every worker: give its folder, file or hub id, not a loaded one")


def _check_format(options: EncodeOptions, vae: OpenedVae) -> None:
    """Raises: ConfigError where the format cannot hold what this VAE and these options give."""
    if options.format == "parquet":
        check_installed()
    if options.format != "kohya-npz":
        return
    channels, ratio = vae.latent_channels, vae.spatial_compression_ratio
    if (channels, ratio) != (CHANNELS, RATIO):
        raise ConfigError(
            f"kohya's SD and SDXL trainers take latents of {CHANNELS} channels at {RATIO} px per position; "
            f"{vae.name} has {channels} at {ratio}: choose another --format"
        )
    if options.size is not None and options.crop != "none" and options.size % RATIO:
        raise ConfigError(f"size is {options.size}; kohya's buckets are multiples of {RATIO} px, most often of 64")


def _scale_warnings(scale: LatentScale, suffix: str) -> list[str]:
    """What to say where kohya's trainers would scale the latents of this VAE wrongly; empty where they do it right."""
    expected = SCALING_FACTORS[suffix]
    differing = [] if scale.scaling_factor == expected else [f"scaling_factor {scale.scaling_factor}"]
    if scale.is_per_channel:
        differing.append("latents_mean and latents_std")
    elif scale.shift_factor:
        differing.append(f"shift_factor {scale.shift_factor}")
    if not differing:
        return []
    return [
        f"kohya's {suffix} trainers multiply every latent by {expected} and do nothing else to it, but this VAE has "
        f"{' and '.join(differing)}: fold the scale first (sdvae convert VAE DST --fold-scale {expected}), and encode "
        "with the result"
    ]


def _to_device(tensors: Sequence[Tensor], vae: OpenedVae) -> Tensor:
    """A batch on the device of the VAE, in its dtype. Does not wait for the copy, so the next batch can be prepared."""
    batch = torch.stack(list(tensors)).to(memory_format=vae.memory_format)
    if vae.device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(vae.device, vae.dtype, non_blocking=True)
