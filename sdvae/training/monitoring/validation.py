"""Measuring an autoencoder on held-out images during training, with rows for a picture of what it does.

Several processes share the images; what comes out is the same number, to the last bit, for any number of them. Which
images are held out, and writing anything down, are left to the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdvae.data.contact_sheet import DIFFERENCE_LABEL, SheetRow, difference, make_tile
from sdvae.data.images import ReadImage, image_to_x, x_to_image
from sdvae.data.transforms import pad_to_multiple, unpad
from sdvae.errors import ImageError
from sdvae.metrics.table import psnr
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import LOGVAR_MAX, LOGVAR_MIN, DiagonalGaussian

__all__ = ["MAX_PSNR", "SHEET_LABELS", "SHEET_ROWS", "ValidationItem", "ValidationResult", "Validator"]

SHEET_ROWS = 8
SHEET_LABELS = ("original", "reconstruction", "averaged weights", DIFFERENCE_LABEL)
# dB, for an image that comes back without any error, such as a white page: infinity would be the mean of all images,
# and no later step could be better. One level off in one value of 256 x 256 px is 101 dB.
MAX_PSNR = 100.0

Gather = Callable[[list[Any]], list[Any]]


class ValidationItem(Protocol):
    """An image that can be read again at every validation."""

    @property
    def key(self) -> str: ...

    def read(self) -> ReadImage: ...


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Means over images, with the averaged weights and z = mode; the reconstruction rounded to 8 bits."""

    psnr: float  # dB, higher is better
    kl: float  # nats per image
    lpips: float | None  # lower is better; None without a perceptual network
    posterior_std: float
    clamped_logvar: float  # part of the latent's elements whose logvar is outside its clamp
    num_images: int
    unreadable: tuple[str, ...]  # what could not be read this time, with the reason, and is in none of the means
    rows: tuple[SheetRow, ...]  # of the first images that could be read, for `contact_sheet`; columns SHEET_LABELS

    def metrics(self) -> dict[str, float]:
        """Values by the names that they are logged under."""
        values = {
            "val/psnr": self.psnr,
            "val/lpips": self.lpips,
            "val/kl": self.kl,
            "val/posterior_std": self.posterior_std,
            "val/clamped_logvar": self.clamped_logvar,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One image's share of a result, as it travels between processes."""

    index: int  # among the items
    error: str | None = None  # why it could not be read; then there is nothing else
    values: dict[str, float] | None = None
    row: SheetRow | None = None


class Validator:
    """Reconstructs the same images every time, one by one at their own size. Draws no random number."""

    def __init__(self, items: Sequence[ValidationItem], crop_px: int | None) -> None:
        """items: at least one. crop_px: side of the centre crop that is taken; None: whole images."""
        self.items = list(items)
        self.crop_px = crop_px

    def run(
        self,
        vae: AutoencoderKL,
        ema_context: Callable[[], AbstractContextManager[Any]],
        *,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> ValidationResult:
        """Measure the averaged weights, and show them beside the weights themselves.

        ema_context: a `with` block in which `vae` carries the averaged weights.
        rank, world_size: this process takes every world_size-th item; all processes must call.
        gather: one process's list -> the lists of all processes joined; None: there is one process.
        perceptual: recon, x, each (1, 3, H, W) in [-1, 1] -> (1,), lower is better.
        Returns: the same on every process, for any world_size. Modules are left in the mode they were in.
        Raises: ImageError where no item can be read; one that cannot is left out and named in the result.
        """
        mine = range(rank, len(self.items), world_size)
        with _evaluating(vae):
            with torch.inference_mode():
                own = {index: self._own(vae, index) for index in mine if index < SHEET_ROWS}
            with ema_context(), torch.inference_mode():
                records = [self._measure(vae, index, own.get(index), perceptual) for index in mine]
        if gather is not None:
            records = gather(records)
        return self._joined(sorted(records, key=lambda record: record.index))

    def _own(self, vae: AutoencoderKL, index: int) -> tuple[Image.Image, float] | None:
        """The reconstruction by the weights themselves, as a tile of the sheet, and its PSNR."""
        try:
            image = self._read(index)
        except ImageError:  # said when the averaged weights are measured
            return None
        recon = _reconstruct(vae, image)[0]
        return make_tile(recon), psnr(image, recon)

    def _measure(
        self,
        vae: AutoencoderKL,
        index: int,
        own: tuple[Image.Image, float] | None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> _Record:
        try:
            image = self._read(index)
        except ImageError as error:
            return _Record(index=index, error=str(error))
        recon, posterior = _reconstruct(vae, image)
        logvar = posterior.moments.chunk(2, dim=1)[1]  # not yet clamped
        values = {
            "psnr": min(psnr(image, recon), MAX_PSNR),
            "kl": float(posterior.kl()),
            "posterior_std": float(posterior.std.mean()),
            "clamped_logvar": float(((logvar < LOGVAR_MIN) | (logvar > LOGVAR_MAX)).float().mean()),
        }
        if perceptual is not None:
            values["lpips"] = float(perceptual(*(image_to_x(each)[None].to(vae.device) for each in (recon, image))))
        row = None
        if own is not None:
            row = SheetRow(
                labels=SHEET_LABELS,
                tiles=(make_tile(image), own[0], make_tile(recon), make_tile(difference(image, recon))),
                name=self.items[index].key,
                details=f"{own[1]:.2f} dB, averaged weights {values['psnr']:.2f} dB",
            )
        return _Record(index=index, values=values, row=row)

    def _read(self, index: int) -> np.ndarray:
        return _centre(_to_8_bit(self.items[index].read().pixels), self.crop_px)

    def _joined(self, records: Sequence[_Record]) -> ValidationResult:
        """records: of all items, in their order, so that sums round alike whoever measured what."""
        read = [record.values for record in records if record.values is not None]
        unreadable = tuple(record.error for record in records if record.error is not None)
        if not read:
            raise ImageError(f"none of the {len(records)} validation images can be read; the first: {unreadable[0]}")
        means = {name: math.fsum(values[name] for values in read) / len(read) for name in read[0]}
        return ValidationResult(
            psnr=means["psnr"],
            kl=means["kl"],
            lpips=means.get("lpips"),
            posterior_std=means["posterior_std"],
            clamped_logvar=means["clamped_logvar"],
            num_images=len(read),
            unreadable=unreadable,
            rows=tuple(record.row for record in records if record.row is not None),
        )


@contextmanager
def _evaluating(vae: AutoencoderKL) -> Iterator[None]:
    """Every module in eval mode; afterwards each in its own again, since frozen parts are in another than the rest."""
    modes = [(module, module.training) for module in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _reconstruct(vae: AutoencoderKL, image: np.ndarray) -> tuple[np.ndarray, DiagonalGaussian]:
    """image: (H, W, 3) uint8, any size. Returns: the same in z = mode and back, and the posterior."""
    x, _ = pad_to_multiple(image_to_x(image)[None].to(vae.device), vae.spatial_compression_ratio)
    posterior = vae.encode(x).latent_dist
    recon = unpad(vae.decode(posterior.mode()).sample, *image.shape[:2])  # (1, 3, H, W)
    return x_to_image(recon[0]), posterior


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else x_to_image(image_to_x(pixels))


def _centre(image: np.ndarray, size: int | None) -> np.ndarray:
    """The centre crop of at most size x size, nothing resized."""
    if size is None:
        return image
    top, left = (max(0, (side - size) // 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]
