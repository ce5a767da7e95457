"""What to encode, and into which file. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.files import plan_latent_files
from sdvae.codec.planning.kohya import plan_kohya
from sdvae.codec.planning.plan import OTHER_VAE, Plan
from sdvae.codec.planning.shards import plan_shards
from sdvae.data.images import JPEG_MARGIN, PREPROCESSING_VERSION
from sdvae.data.sources.files import ImageFile
from sdvae.errors import ConfigError, ImageError, LatentFileError
from sdvae.latents.header import LatentHeader, Preprocessing, VaeRecord
from sdvae.latents.kohya import CHANNELS, RATIO
from sdvae.latents.manifest import MANIFEST_NAME, find_part_manifests, read_state
from sdvae.latents.parquet import check_installed
from sdvae.latents.registry import FORMATS

if TYPE_CHECKING:
    from sdvae.checkpoints.opened import OpenedVae

__all__ = ["check_format", "plan_encode", "preprocessing_of"]


def preprocessing_of(options: EncodeOptions) -> Preprocessing:
    """What happens to images before the VAE, as latent files record it."""
    return Preprocessing(
        version=PREPROCESSING_VERSION,
        background=options.background,
        size=options.size,
        crop=options.crop,
        jpeg_margin=None if options.size is None else JPEG_MARGIN,
    )


def check_format(options: EncodeOptions, vae: OpenedVae) -> None:
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


def check_output_folder(out: Path, format: str, overwrite: bool) -> None:
    """Raises: ConfigError if latents of this format cannot go into the folder: it holds another's, or is a file."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the output")
    try:
        manifests = [out / MANIFEST_NAME, *find_part_manifests(out).values()] if out.is_dir() else []
        found = next((state[0] for state in map(read_state, manifests) if state), None)
    except LatentFileError as error:
        if not overwrite:
            raise ConfigError(f"{error}: it would be replaced; move it away, or give --overwrite") from error
        found = None
    if found is None:
        found = next((name for name, each in FORMATS.items() if each.is_in(out)), None)
    if found is not None and found != format:
        raise ConfigError(
            f"{out} holds latents of the format {found}; one folder takes one format: choose another for {format}, or "
            f"delete its files and its {MANIFEST_NAME}"
        )


def plan_encode(images: Sequence[ImageFile], out: Path, options: EncodeOptions, vae: VaeRecord) -> Plan:
    """What to encode, and into which file; of a part of a run, its own images and no others.

    images: all, also for a part: two images may want one name, and which one has it must not depend on the part.
    Done is what has a latent that was made from the same bytes, by the same VAE, with the same options.
    Raises: ConfigError where `out` is no folder, holds latents of another format, or other shards of the same one.
    """
    check_output_folder(out, options.format, options.overwrite)
    preprocessing = preprocessing_of(options)

    def why_other(header: LatentHeader, key: str) -> str | None:
        return _why_settings_differ(header, key, options, preprocessing, vae)

    def why_stale(header: LatentHeader, image: ImageFile) -> str | None:
        return why_other(header, image.key) or _why_source_differs(header, image)

    if FORMATS[options.format].is_sharded:
        return plan_shards(images, out, options, why_other, why_stale)
    if options.format == "kohya-npz":
        return plan_kohya(images, out, options, why_stale)
    return plan_latent_files(images, out, options, why_stale)


def _why_settings_differ(
    header: LatentHeader, key: str, options: EncodeOptions, preprocessing: Preprocessing, vae: VaeRecord
) -> str | None:
    if header.vae.digest != vae.digest:
        return f"{OTHER_VAE}: '{header.vae.name}'"
    if header.vae.computation != vae.computation:
        return f"computed in {header.vae.computation}"
    if (header.vae.latents_mean, header.vae.latents_std) != (vae.latents_mean, vae.latents_std):
        return "written without the VAE's latents_mean and latents_std"  # equal digests: by an sdvae that left them out
    if header.preprocessing.differs_for(header.source, preprocessing):
        return "other preprocessing"
    if header.store != options.store or header.latent_dtype != options.latent_dtype:
        return f"stored as {header.store} in {header.latent_dtype}"
    if options.draws and (header.seed, header.source.key) != (options.seed, key):
        return "sampled with another seed"
    return None


def _why_source_differs(header: LatentHeader, image: ImageFile) -> str | None:
    try:
        if image.has_stamp(header.source.size_bytes, header.source.mtime_ns):
            return None
        return None if image.digest() == header.source.digest else "the source changed"
    except (OSError, ImageError):
        return "the source cannot be read"  # the run then says why
