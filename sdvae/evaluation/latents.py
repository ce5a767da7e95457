"""Statistics of z over a set of images, and the scaling factor that follows from them.

Streaming: memory does not grow with the set.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LatentStatistics"]


class LatentStatistics:
    """Running mean and variance of z, per latent channel, over all images and positions."""

    def __init__(self, latent_channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(latent_channels, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(latent_channels, dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        """Take in a batch. z: (B, C, h, w), not scaled."""
        values = z.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # (C, B * h * w)
        self.count += values.shape[1]
        self.sum += values.sum(dim=1)
        self.sum_of_squares += values.square().sum(dim=1)

    @property
    def mean(self) -> Tensor:
        """Mean per channel. Returns: (C,), float64, units of z."""
        return self.sum / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel. Returns: (C,), float64, units of z."""
        return (self.sum_of_squares / self.count - self.mean.square()).clamp(min=0).sqrt()

    @property
    def scaling_factor(self) -> float:
        """1 / standard deviation of all elements of z about their common mean.

        Source: Rombach et al. 2022, section 4.3.2 and appendix G: latents of unit variance.
        """
        mean = self.sum.sum() / (self.count * len(self.sum))
        variance = self.sum_of_squares.sum() / (self.count * len(self.sum)) - mean.square()
        return float(variance.rsqrt())
