"""Regularisers that act on z between encoder and decoder: scale and rotation equivariance, and noise.

Everything here is z, never scaled. How often they act is decided by whoever draws them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Transform", "draw_transform", "latent_noise"]


@dataclass(frozen=True)
class Transform:
    """Scaling and turning that can be done to z and, alike, to the image.

    Both are resized by the same filter, bilinear with antialiasing, which never leaves the range of its input.
    Source: Kouzelis et al. 2025, "EQ-VAE"; their code does not antialias.
    """

    scale: float  # above 0, up to 1: factor of the sides, rounded to whole latent positions
    quarter_turns: int  # counter-clockwise, 0 to 3

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Sides of a latent of these sides after scaling, before turning; at least 1."""
        return max(1, round(self.scale * height)), max(1, round(self.scale * width))

    def to_z(self, z: Tensor) -> Tensor:
        """z: (B, C, h, w). Returns: (B, C, h', w')."""
        return self._turn(_resize(z, self.latent_size(*z.shape[-2:])))

    def to_image(self, x: Tensor, spatial_compression_ratio: int) -> Tensor:
        """The target of decoding `to_z` of this image's z, and of the size that the decoder gives.

        x: (B, 3, H, W), [-1, 1]. Returns: (B, 3, H', W'), [-1, 1], sides multiples of spatial_compression_ratio.
        """
        ratio = spatial_compression_ratio
        height, width = self.latent_size(x.shape[-2] // ratio, x.shape[-1] // ratio)
        return self._turn(_resize(x, (height * ratio, width * ratio)))

    def _turn(self, x: Tensor) -> Tensor:
        return torch.rot90(x, self.quarter_turns, dims=(-2, -1)) if self.quarter_turns else x


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    # in float32: torch antialiases half precision on some devices only
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)


def draw_transform(
    probability: float, min_scale: float, rotate: bool, generator: torch.Generator | None = None
) -> Transform | None:
    """One transform for a whole batch, or None, which leaves z alone, with 1 - probability.

    The scale is uniform in [min_scale, 1), the quarter turn uniform in 0 to 3 (0 unless rotate). Each call takes three
    numbers from the generator (None: torch's of the CPU), whatever comes of it.
    """
    chance, size, turn = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if chance >= probability:
        return None
    return Transform(scale=min_scale + (1.0 - min_scale) * size, quarter_turns=int(4 * turn) if rotate else 0)


def latent_noise(z: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """z plus Gaussian noise whose level each image draws from 0 to `std`, in standard deviations of z.

    z: (B, C, h, w). The standard deviation is that of the channel over this device's batch, and has no gradient: the
    encoder cannot escape the noise by what it does to z's scale.
    Returns: (B, C, h, w), in the dtype of z.
    """
    device = z.device if generator is None else generator.device
    level = std * torch.rand((len(z), 1, 1, 1), generator=generator, device=device).to(z.device)
    noise = torch.randn(z.shape, generator=generator, device=device).to(z.device)
    spread = z.detach().float().std(dim=(0, 2, 3), keepdim=True, correction=0)  # (1, C, 1, 1)
    return z + (level * spread * noise).to(z.dtype)
