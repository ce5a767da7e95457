"""Whether a kohya-npz file gives kohya's trainers what it should: its name, and each array that they read from it.

Without the image. That leaves the values of `latents_flipped` open, and with store=mode or sample those of `latents`
but for their precision: `reencoding` compares them with the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.latents.header import LatentHeader, Size
from sdvae.latents.kohya import CHANNELS, RATIO, SCALING_FACTORS, crop_ltrb, file_name
from sdvae.model.posterior import DiagonalGaussian, image_generator

__all__ = ["trainer_problems"]

Arrays = Mapping[str, NDArray[Any]]

_HALF_STEP = {"float32": (2.0**-24, 0.0), "float16": (2.0**-11, 2.0**-25)}  # of a value, and of those near 0
_ARITHMETIC = 1e-5  # of the terms of a draw; processors differ in the last bits of torch's normal deviates too


def trainer_problems(name: str, header: LatentHeader, arrays: Arrays) -> list[str]:
    """What is wrong with a file, for the trainers; empty where all is right.

    name: of the file, perhaps with its folder. arrays: all of it, as `kohya.read_all` gives them.
    """
    return [*_name(name, header), *_conditioning(header, arrays), *_shapes(header, arrays), *_values(header, arrays)]


def _name(name: str, header: LatentHeader) -> Iterator[str]:
    """The trainers know an image's latents by their name alone."""
    key = PurePosixPath(header.source.key).name
    stored = (header.source.width, header.source.height)
    sizes = (stored, stored[::-1])  # EXIF may turn the picture: the name has it as stored, the header upright
    names = {file_name(key, size, suffix) for size in sizes for suffix in SCALING_FACTORS} if key else set()
    if PurePosixPath(name).name not in names:
        yield f"not the name under which kohya's trainers look for an image of {stored[0]} x {stored[1]} px"


def _conditioning(header: LatentHeader, arrays: Arrays) -> Iterator[str]:
    original = Size(width=header.source.width, height=header.source.height)
    expected = {
        "original_size": [original.width, original.height],
        "crop_ltrb": list(crop_ltrb(header.image, original)),
    }
    for name, value in expected.items():
        found = arrays[name].tolist() if name in arrays else None
        if found != value:
            yield f"has no {name}" if found is None else f"{name} is {found}; by its header it is {value}"


def _shapes(header: LatentHeader, arrays: Arrays) -> Iterator[str]:
    image = header.image
    if image.width % RATIO or image.height % RATIO:
        yield f"encoded at {image.width} x {image.height} px, which no bucket has"
    expected = (CHANNELS, image.height // RATIO, image.width // RATIO)
    for name in ("latents", "latents_flipped"):
        if name in arrays and (arrays[name].shape != expected or arrays[name].dtype != np.float32):
            yield f"{name} has shape {arrays[name].shape} and type {arrays[name].dtype}; expected {expected} in float32"
        if (preferred := f"{name}_{expected[1]}x{expected[2]}") in arrays:
            yield f"has {preferred}, which sdvae does not write, and later trainers read in the place of {name}"


def _values(header: LatentHeader, arrays: Arrays) -> Iterator[str]:
    """`latents` is the draw that the writer makes of `mean` and `logvar`, or z in the precision of the header."""
    latents = arrays["latents"]
    if header.space == "z":
        if not np.array_equal(arrays["z"].astype(np.float32), latents):  # finite, so z has not overflowed
            yield f"latents is not of the precision {header.latent_dtype}, as z of this file is"
    elif header.seed is None:
        yield "its header has no seed of the draw that latents is"
    elif latents.shape == arrays["mean"].shape == arrays["logvar"].shape:
        draw, tolerance = _draw(header.seed, header, arrays)
        excess = (torch.from_numpy(latents) - draw).abs() - tolerance
        if not excess.max() <= 0:
            worst = int(excess.argmax())
            yield (
                f"latents is not the draw from mean and logvar by the seed {header.seed}: {latents.flat[worst]:.4g} "
                f"where that is {draw.flatten()[worst]:.4g}; {tolerance.flatten()[worst]:.2g} is rounding"
            )


def _draw(seed: int, header: LatentHeader, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The draw, and how far off rounding mean and logvar to the type in the file may put it; both (C, h, w)."""
    mean, logvar = (torch.from_numpy(arrays[name]).float() for name in ("mean", "logvar"))
    posterior = DiagonalGaussian(torch.cat((mean, logvar))[None])
    draw = posterior.sample(image_generator(seed, header.source.key))[0]
    relative, absolute = _HALF_STEP[header.latent_dtype]
    from_mean = relative * mean.abs() + absolute
    from_std = torch.expm1((relative * logvar.abs() + absolute) / 2) * (draw - mean).abs()
    arithmetic = _ARITHMETIC * (mean.abs() + posterior.std[0] + (draw - mean).abs())
    return draw, from_mean + from_std + arithmetic
