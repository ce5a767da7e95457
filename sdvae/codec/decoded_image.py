"""A decoded image on disk, marked with the latent and the VAE that it comes from.

The mark is a JSON object in the EXIF user comment, which PNG, WebP and JPEG all carry. With it a second run tells its
own up-to-date images from stale ones, and from pictures that belong to the user.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sdvae._version import __version__
from sdvae.errors import ImageError
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader, VaeRecord

__all__ = ["ImageMark", "mark_for", "read_mark", "save_marked"]

_ASCII = b"ASCII\0\0\0"  # the character code that EXIF puts before a user comment

# As `sdvae.data.images.save_image` writes them, whose reasons hold here too; it cannot add a mark.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 1},
    ".webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 50},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
_MAX_SIDE_PX = {".webp": 16383, ".jpg": 65500}


@dataclass(frozen=True, kw_only=True)
class ImageMark:
    """Where a picture that sdvae wrote comes from. Equal marks: equal pictures."""

    key: str  # of the latent file, or the name of the picture's kind
    latent_digest: str
    vae_digest: str
    dtype: str = "float32"  # of the computation
    quality: int | None = None


def mark_for(key: str, header: LatentHeader, vae: VaeRecord, quality: int | None) -> ImageMark:
    """The mark of the image that this latent decodes to."""
    return ImageMark(
        key=key,
        latent_digest=header.latent_digest,
        vae_digest=vae.digest,
        dtype=vae.computation,
        quality=quality,
    )


def save_marked(pixels: NDArray[np.uint8], path: Path, mark: ImageMark) -> None:
    """Write a picture with its mark, whole or not at all; replaces what is there.

    pixels: (H, W, 3), sRGB. path: ends in .png, .webp or .jpg.
    Raises: ImageError where the format cannot hold the size; OSError.
    """
    options = dict(_SAVE_OPTIONS[path.suffix])
    limit = _MAX_SIDE_PX.get(path.suffix)
    if limit is not None and max(pixels.shape) > limit:
        raise ImageError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} px, but {options['format']} ends at {limit}")
    if mark.quality is not None:
        options = {"format": options["format"], "quality": mark.quality, "subsampling": 0}  # WebP takes no subsampling
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"sdvae {__version__}"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + json.dumps({"sdvae": asdict(mark)}).encode()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, exif=exif, **options)
    write_atomic(buffer.getvalue(), path)


def read_mark(path: Path) -> ImageMark | None:
    """The mark of a picture that `save_marked` wrote; None for any other file."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # large pictures, odd EXIF
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        return ImageMark(**json.loads(comment.removeprefix(_ASCII))["sdvae"])
    except Exception:  # whatever is wrong with it: it is not a picture that sdvae wrote
        return None
