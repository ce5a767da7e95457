"""The images of an evaluation: which ones, in which blocks, and how a file becomes the 8-bit pixels that are measured.

A block is the unit of work: processes share blocks, and an interrupted run goes on with the blocks that are missing.
Since blocks depend on the names alone, the number of processes and an interruption change no bit of a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdvae.data.images import image_to_x, read_image_bytes, x_to_image
from sdvae.data.sources.files import ImageFile, os_reason
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import ImageError
from sdvae.evaluation.protocol import Protocol
from sdvae.model.posterior import Encoding, image_generator

__all__ = [
    "BLOCK_IMAGES",
    "Prepared",
    "blocks_of",
    "evenly_spaced",
    "measured_z",
    "prepare",
    "slice_of",
    "stand_digest",
]

BLOCK_IMAGES = 16  # an interruption loses few; 16 photographs of 24 megapixels take 1.2 GB while they are measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """An image as it is measured."""

    index: int  # among the chosen images
    key: str
    pixels: NDArray[np.uint8]  # (H, W, 3), sRGB
    digest: str  # of the file's bytes

    @property
    def num_px(self) -> int:
        return int(self.pixels.shape[0] * self.pixels.shape[1])


def blocks_of(num_images: int) -> list[range]:
    """The indices of each block, in order."""
    return [range(start, min(start + BLOCK_IMAGES, num_images)) for start in range(0, num_images, BLOCK_IMAGES)]


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most so many places among `count`."""
    return [place * count // wanted for place in range(wanted)] if wanted < count else list(range(count))


def slice_of(key: str) -> str:
    """The first folder of a key, by which results are sliced; "" for a file that lies in none."""
    parts = PurePosixPath(key).parts
    return parts[0] if len(parts) > 1 else ""


def prepare(index: int, file: ImageFile, protocol: Protocol) -> Prepared:
    """Read a file, bring it to 8 bits and to the protocol's size. Raises: ImageError."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise ImageError(f"{file.path}: {os_reason(error)}") from error
    pixels = read_image_bytes(data, str(file.path), background=protocol.background).pixels
    if pixels.dtype != np.uint8:
        pixels = x_to_image(image_to_x(pixels))
    if protocol.size_px is not None:
        pixels = resize_and_crop(pixels, protocol.size_px, protocol.crop)
    digest = hashlib.sha256(data).hexdigest()
    return Prepared(index=index, key=file.key, pixels=np.ascontiguousarray(pixels), digest=digest)


def measured_z(encoding: Encoding, protocol: Protocol, keys: Sequence[str]) -> Tensor:
    """z (B, C, h, w) of the images of these keys: the mode, or the draw that each has under the protocol's seed."""
    if protocol.posterior == "mode":
        return encoding.z
    return encoding.draw([image_generator(protocol.seed, key) for key in keys])


def stand_digest(files: Sequence[ImageFile]) -> str:
    """Digest of names, sizes and times of change: tells an interrupted run whether the files are still the same."""
    whole = hashlib.sha256()
    for file in files:
        try:
            stat = file.path.stat()
            stand = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            stand = "gone"
        whole.update(f"{file.key}\0{stand}\n".encode(errors="surrogateescape"))
    return f"sha256:{whole.hexdigest()}"
