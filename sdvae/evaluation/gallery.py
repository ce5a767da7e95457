"""The pictures of a report: which images, and the original and its reconstructions as text that a page can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.evaluation.images import Prepared, measured_z
from sdvae.evaluation.protocol import Protocol
from sdvae.metrics.table import IMAGE_METRICS

__all__ = ["MAX_PICTURE_PX", "choose_gallery", "gallery_entry"]

MAX_PICTURE_PX = 512  # of a larger image the centre is shown, pixel for pixel: scaled down, errors would disappear


def choose_gallery(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], num_images: int, num_wanted: int
) -> list[int]:
    """Places of the images to show: half of them evenly spaced, the others the worst by one metric or another.

    values: VAE -> metric -> one value per image. Returns: sorted.
    """
    if num_images <= num_wanted:
        return list(range(num_images))
    chosen = {index * num_images // (num_wanted // 2 or 1) for index in range(num_wanted // 2)}
    names = dict.fromkeys(name for metrics in values.values() for name in metrics)
    rankings = [_worst_first(each[name], name) for name in names for each in values.values() if name in each]
    for rank in range(num_images):
        for ranking in rankings:
            if len(chosen) >= num_wanted:
                return sorted(chosen)
            if rank < len(ranking):
                chosen.add(ranking[rank])
    return sorted(chosen)


def _worst_first(column: Sequence[float | None], name: str) -> list[int]:
    goodness = IMAGE_METRICS[name].goodness
    present = [place for place, value in enumerate(column) if value is not None and math.isfinite(value)]
    return sorted(present, key=lambda place: (float(goodness(column[place])), place))


def gallery_entry(prepared: Prepared, subjects: Mapping[str, OpenedVae], protocol: Protocol) -> dict[str, Any]:
    """An entry of `gallery`, see docs/evaluation-result.md, with the reconstructions that were measured."""
    height, width = prepared.pixels.shape[:2]
    left, top = (max(0, (side - MAX_PICTURE_PX) // 2) for side in (width, height))
    right, bottom = min(width, left + MAX_PICTURE_PX), min(height, top + MAX_PICTURE_PX)
    x = torch.from_numpy(prepared.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    reconstructions = {}
    for id_, subject in subjects.items():
        z = measured_z(subject.encode(x), protocol, [prepared.key])
        recon = subject.decode(z, height, width)
        reconstructions[id_] = _data_uri(_to_pixels(round_to_8_bits(recon)[0])[top:bottom, left:right])
    return {
        "key": prepared.key,
        "width": width,
        "height": height,
        "crop": [left, top, right - left, bottom - top],
        "original": _data_uri(prepared.pixels[top:bottom, left:right]),
        "reconstructions": reconstructions,
    }


def _to_pixels(image: Tensor) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (image.permute(1, 2, 0) * 255).round().to("cpu", torch.uint8).numpy()
    return levels


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """Lossless: a difference map of lossy pictures would show the losses."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", lossless=True, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
