"""The .npz caches that kohya-ss/sd-scripts reads for SD and SDXL, with what sdvae adds to them. No torch.

Source of all facts here: kohya-ss/sd-scripts, library/strategy_base.py, strategy_sd.py and train_util.py (48d368fa, and
pull requests 2269 and 2276 after it). Its trainers look beside each image for <stem>_<width>x<height>_sd.npz, with the
size of the image as it is stored, and read by name: `latents`, z that is not scaled, `original_size` and `crop_ltrb`;
`latents_flipped` for flip_aug. Names that they do not know stay unread: `mean`, `logvar` and `sdvae`, the header.
Later versions prefer `latents_<h>x<w>` and take `latents` where its shape is the one that they expect.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from sdvae.errors import LatentFileError
from sdvae.latents.header import TENSOR_NAMES, LatentHeader, Size, parse_header

__all__ = [
    "CHANNELS",
    "RATIO",
    "SCALING_FACTORS",
    "crop_ltrb",
    "file_name",
    "has_flipped",
    "is_file_name",
    "mirrored_key",
    "read_all",
    "read_arrays",
    "read_header",
    "to_bytes",
    "without_size",
]

Arrays = Mapping[str, NDArray[Any]]

SCALING_FACTORS = {"sd": 0.18215, "sdxl": 0.13025}  # constants of the trainers: a VAE's own factor is not read
RATIO = 8  # px per latent position that the trainers take for granted
CHANNELS = 4

_HEADER = "sdvae"
_FLOATS = (np.float16, np.float32, np.float64)


def file_name(key: str, size: tuple[int, int], suffix: str) -> str:
    """The path of an image's latents, below the folder of the cache; the folders are those of the image.

    key: path of the image, with "/". size: width and height in px as stored, before EXIF turns the picture.
    suffix: one of `SCALING_FACTORS`.
    """
    return f"{PurePosixPath(key).with_suffix('')}_{size[0]:04d}x{size[1]:04d}_{suffix}.npz"


def is_file_name(name: str) -> bool:
    """Whether a file of this name may be of this format, of sdvae or of the trainers themselves: by its suffix."""
    return name.endswith(tuple(f"_{suffix}.npz" for suffix in SCALING_FACTORS))


def without_size(name: str) -> str:
    """A path that `file_name` made, without the size: equal for one image before and after its size changed."""
    return re.sub(r"_\d{4,}x\d{4,}(_[a-z]+\.npz)$", r"\1", name)


def crop_ltrb(encoded: Size, original: Size) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as BucketManager.get_crop_ltrb has them, which SDXL is conditioned on.

    Not what was cut off: the place of the whole image, fitted into the bucket, in the bucket's pixels.
    """
    ratio = original.width / original.height
    if encoded.width / encoded.height > ratio:
        width, height = encoded.height * ratio, float(encoded.height)
    else:
        width, height = float(encoded.width), encoded.width / ratio
    left, top = (encoded.width - width) // 2, (encoded.height - height) // 2
    return left, top, left + width, top + height


def to_bytes(header: LatentHeader, arrays: Arrays) -> bytes:
    """The file. arrays: `latents` (C, h, w) float32, perhaps `latents_flipped`, and `mean` and `logvar` or `z`.

    `z` is not written: it is `latents` in the precision that the header names.
    """
    original = Size(width=header.source.width, height=header.source.height)
    contents: dict[str, Any] = {name: array for name, array in arrays.items() if name != "z"}
    contents["original_size"] = np.array([original.width, original.height])
    contents["crop_ltrb"] = np.array(crop_ltrb(header.image, original))
    contents[_HEADER] = np.array(json.dumps(header.to_json()).encode("ascii"))  # bytes: a str takes four times the room
    buffer = io.BytesIO()
    np.savez(buffer, **contents)  # numpy before 2.2 takes allow_pickle for the name of an array
    return buffer.getvalue()


def read_header(path: Path) -> LatentHeader:
    """What a file says of itself. Raises: LatentFileError, also for a file that kohya's own tools wrote."""
    with _opened(path) as npz:
        return _header(npz, path)


def mirrored_key(key: str) -> str:
    """Names the random numbers of the draw for the mirrored image: its own, as those of another image."""
    return f"{key}\0mirrored"


def has_flipped(path: Path) -> bool:
    """Whether the mirrored image is in the file too. Raises: LatentFileError."""
    with _opened(path) as npz:
        return "latents_flipped" in npz.files


def read_arrays(path: Path) -> tuple[LatentHeader, dict[str, NDArray[Any]]]:
    """The header, and the arrays that `header.space` names. Raises: LatentFileError."""
    header, arrays = read_all(path)
    return header, {name: arrays[name] for name in TENSOR_NAMES[header.space]}


def read_all(path: Path) -> tuple[LatentHeader, dict[str, NDArray[Any]]]:
    """The header, and all arrays: those of `read_arrays`, those for the trainers, and what others added.

    Raises: LatentFileError, also for `latents` or `latents_flipped` with values that are not finite.
    """
    with _opened(path) as npz:
        header = _header(npz, path)
        arrays = {name: npz[name] for name in npz.files if name != _HEADER}
    for name in {"latents", "latents_flipped", *TENSOR_NAMES[header.space]} & arrays.keys():
        if arrays[name].dtype not in _FLOATS:
            raise LatentFileError(f"{path}: damaged latent file: {name} has the type {arrays[name].dtype}")
    for name in ("latents", "latents_flipped"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise LatentFileError(f"{path}: damaged latent file: {name} has values that are not finite")
    if header.space == "z" and "latents" in arrays:
        with np.errstate(over="ignore"):  # not finite then, which the reader says
            arrays["z"] = arrays["latents"].astype(header.latent_dtype)
    if missing := [name for name in ("latents", *TENSOR_NAMES[header.space]) if name not in arrays]:
        raise LatentFileError(f"{path}: damaged latent file: has no {', '.join(missing)}")
    return header, arrays


@contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    try:
        with path.open("rb") as file:  # np.load leaves a file open that it opened and could not read
            npz = np.load(file)  # without pickles
            if not isinstance(npz, NpzFile):
                raise ValueError("is no .npz file")
            yield npz
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise LatentFileError(f"{path}: cannot be read as a latent file: {reason}") from error


def _header(npz: NpzFile, path: Path) -> LatentHeader:
    if _HEADER not in npz.files:
        raise LatentFileError(f"{path}: an .npz file, but no latent file of sdvae (no '{_HEADER}')")
    return parse_header(npz[_HEADER].item(), path)
