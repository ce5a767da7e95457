"""Measuring an autoencoder on held-out images during training, with rows for a picture of what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdvae.codec.contact_sheet import SheetRow, sheet_row
from sdvae.data.images import image_to_x, read_image, x_to_image
from sdvae.data.transforms import pad_to_multiple, unpad
from sdvae.evaluation.metrics import psnr
from sdvae.model.autoencoder import AutoencoderKL

__all__ = ["ValidationResult", "Validator"]

SHEET_ROWS = 8


@dataclass(frozen=True)
class ValidationResult:
    psnr: float  # dB, mean over images, 8-bit rounded, z = mode
    kl: float  # nats per image, mean over images
    rows: tuple[SheetRow, ...]  # of the first images, for `contact_sheet`


class Validator:
    """Reconstructs the same images every time, one by one at their own size."""

    def __init__(self, paths: Sequence[Path], crop_px: int | None) -> None:
        self.paths = list(paths)
        self.crop_px = crop_px

    @torch.inference_mode()
    def run(self, vae: AutoencoderKL) -> ValidationResult:
        """Uses z = mode, so it draws no random number; the training mode of `vae` is put back."""
        was_training = vae.training
        vae.eval()
        psnrs: list[float] = []
        kls: list[float] = []
        rows: list[SheetRow] = []
        for path in self.paths:
            image = _centre(_to_8_bit(read_image(path).pixels), self.crop_px)
            x, _ = pad_to_multiple(image_to_x(image)[None].to(vae.device), vae.spatial_compression_ratio)
            posterior = vae.encode(x).latent_dist
            recon = x_to_image(unpad(vae.decode(posterior.mode()).sample, *image.shape[:2])[0])
            psnrs.append(psnr(image, recon))
            kls.append(float(posterior.kl()))
            if len(rows) < SHEET_ROWS:
                rows.append(sheet_row(image, recon, path.name, f"{psnrs[-1]:.2f} dB"))
        vae.train(was_training)
        return ValidationResult(float(np.mean(psnrs)), float(np.mean(kls)), tuple(rows))


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else x_to_image(image_to_x(pixels))


def _centre(image: np.ndarray, size: int | None) -> np.ndarray:
    """The centre crop of at most size x size, nothing resized."""
    if size is None:
        return image
    top, left = (max(0, (side - size) // 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]
