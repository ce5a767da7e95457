"""An autoencoder really computed in a number format on small images, and how far the result is from float32's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import Pixels, image_to_x, round_to_8_bits
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.device import exact_float32
from sdvae.precision.activations import watch

__all__ = ["Probe", "probe"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Small images, really computed in a number format, against float32."""

    dtype: str
    size_px: int
    num_images: int
    error: str = ""  # why this device cannot compute in this format; then the rest says nothing
    not_finite: tuple[str, ...] = ()  # the first layer with infinity or NaN, of the encoder and of the decoder
    z_error: float | None = None  # root mean square of the difference of z, as a share of that of z
    max_difference: float | None = None  # of recon, [-1, 1], the whole way through z
    psnr_against_fp32: float | None = None  # dB, of 8-bit pixels, mean over images, at most 100

    @property
    def finite(self) -> bool:
        return not self.not_finite

    def to_json(self) -> dict[str, Any]:
        if self.error:
            return {"dtype": self.dtype, "error": self.error}
        return {
            "dtype": self.dtype,
            "size_px": self.size_px,
            "num_images": self.num_images,
            "finite": self.finite,
            "first_not_finite": list(self.not_finite),
            "z_error": self.z_error,
            "max_difference": self.max_difference,
            "psnr_against_fp32": self.psnr_against_fp32,
        }


@torch.inference_mode()
def probe(subject: OpenedVae, images: Sequence[Pixels], dtype: str) -> Probe:
    """Encode and decode in a number format, and the same in float32. Holds a second copy of the weights.

    The encoder's z goes into the decoder, unless it is not finite: then float32's does, so that both are tried.
    """
    size, compute = images[0].shape[0], IMAGE_METRICS["psnr"].build()
    cast = subject.in_dtype(getattr(torch, dtype))
    about: dict[str, Any] = {"dtype": dtype, "size_px": size, "num_images": len(images)}
    bad: dict[str, str] = {}  # encoder and decoder -> first layer
    squares, power, difference, psnr = 0.0, 0.0, 0.0, 0.0
    for pixels in images:
        x = image_to_x(pixels)[None].to(subject.device)
        with exact_float32():
            exact_z = subject.encode(x).z
            exact = subject.decode(exact_z, *x.shape[-2:])
        try:
            z = _tried(cast, bad, "encoder", lambda x=x: cast.encode(x).z)  # type: ignore[misc]
            source = z if z.isfinite().all() else exact_z
            recon = _tried(cast, bad, "decoder", lambda z=source, x=x: cast.decode(z, *x.shape[-2:]))  # type: ignore[misc]
        except RuntimeError as error:  # float32 has just done the same, so it is this format that has no kernel
            return Probe(**about, error=str(error).splitlines()[0])
        squares += float((z - exact_z).double().square().sum())
        power += float(exact_z.double().square().sum())
        difference = max(difference, float((recon - exact).abs().max()))
        psnr += float(compute(round_to_8_bits(recon), round_to_8_bits(exact)))
    return Probe(
        **about,
        not_finite=tuple(bad.values()),
        z_error=None if "encoder" in bad else math.sqrt(squares / power) if power else 0.0,
        max_difference=None if "decoder" in bad else difference,
        psnr_against_fp32=None if "decoder" in bad else psnr / len(images),
    )


def _tried(subject: OpenedVae, bad: dict[str, str], part: str, function: Callable[[], Tensor]) -> Tensor:
    """The function's result; the first layer whose output is not finite is noted under `part`."""

    def look(name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        if part not in bad and not out.isfinite().all():
            bad[part] = name

    with watch(subject.model, look):
        result = function()
    if part not in bad and not result.isfinite().all():
        bad[part] = f"{part}'s output"
    return result
