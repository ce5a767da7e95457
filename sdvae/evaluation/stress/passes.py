"""What stress tests share: images one by one through an autoencoder, and means of metrics.

Images go one by one, so sizes may differ and memory does not depend on their number. Metrics are called as everywhere:
(recon, image) -> one value each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import Pixels, image_to_x, round_to_8_bits
from sdvae.errors import ConfigError
from sdvae.metrics.table import Compute

__all__ = ["Images", "Means", "Metrics", "Note", "levels", "no_note", "reconstruct"]

Images = Sequence[tuple[str, Pixels]]  # key, (H, W, 3)
Metrics = Mapping[str, Compute]
Note = Callable[[str], None]  # takes a sentence for the reader of the result


def no_note(sentence: str) -> None: ...


class Means:
    """Mean of each metric over the images that it is defined for."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.sums = dict.fromkeys(metrics, 0.0)
        self.counts = dict.fromkeys(metrics, 0)

    def add(self, recon: Tensor, image: Tensor) -> None:
        """recon, image: (1, 3, H, W), [0, 1], multiples of 1/255."""
        for name, metric in self.metrics.items():
            try:
                value = float(metric(recon, image))
            except ConfigError:  # the image is too small for it
                continue
            if not np.isnan(value):
                self.sums[name] += value
                self.counts[name] += 1

    def values(self) -> dict[str, float | None]:
        return {name: self.sums[name] / count if count else None for name, count in self.counts.items()}


def levels(pixels: Pixels, subject: OpenedVae) -> Tensor:
    """(1, 3, H, W), [0, 1], multiples of 1/255, where the subject computes."""
    return round_to_8_bits(image_to_x(pixels)[None]).to(subject.device)


def reconstruct(subject: OpenedVae, x: Tensor) -> Tensor:
    """x (1, 3, H, W) -> recon of the same shape, through the mode, not clamped."""
    return subject.decode(subject.encode(x).z, *x.shape[-2:])
