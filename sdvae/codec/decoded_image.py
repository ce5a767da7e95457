"""A decoded image on disk, marked with the latent and the VAE that it comes from.

The mark is a JSON object in the EXIF user comment, which PNG, WebP and JPEG all carry. With it a second run tells its
own up-to-date images from stale ones, and from pictures that belong to the user.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sdvae._version import __version__
from sdvae.data.images import image_bytes
from sdvae.files import write_atomic

__all__ = ["ImageMark", "read_mark", "save_marked"]

_ASCII = b"ASCII\0\0\0"  # the character code that EXIF puts before a user comment


@dataclass(frozen=True, kw_only=True)
class ImageMark:
    """Where a picture that sdvae wrote comes from. Equal marks: equal pictures."""

    key: str  # of the latent file, or the name of the picture's kind
    latent_digest: str
    vae_digest: str
    dtype: str = "float32"  # of the computation
    quality: int | None = None


def save_marked(pixels: NDArray[np.uint8], path: Path, mark: ImageMark) -> None:
    """Write a picture with its mark, whole or not at all; replaces what is there.

    pixels: (H, W, 3), sRGB. path: ends in .png, .webp or .jpg.
    Raises: ImageError where the format cannot hold the size; OSError.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"sdvae {__version__}"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + json.dumps({"sdvae": asdict(mark)}).encode()
    write_atomic(image_bytes(pixels, path, mark.quality, exif), path)


def read_mark(path: Path) -> ImageMark | None:
    """The mark of a picture that `save_marked` wrote; None for any other file."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # large pictures, odd EXIF
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        return ImageMark(**json.loads(comment.removeprefix(_ASCII))["sdvae"])
    except Exception:  # whatever is wrong with it: it is not a picture that sdvae wrote
        return None
