"""z <-> latents: the one place with the formula. `latents` are what a diffusion model is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.model.posterior import DiagonalGaussian

__all__ = ["LatentScale"]


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """`latents = (z - mean) * gain`: one mean and gain for all channels, or one for each.

    With latents_mean and latents_std, latents are (z - latents_mean) * scaling_factor / latents_std, and shift_factor
    does not count; without either of the two, they are (z - shift_factor) * scaling_factor.
    Source: diffusers' pipelines, those of Stable Diffusion XL for the first, of Stable Diffusion 3 for the second.
    """

    scaling_factor: float = 1.0
    shift_factor: float | None = None  # None: 0
    latents_mean: tuple[float, ...] | None = None  # one per channel
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentScale:
        """The scale that a configuration states. One without scaling_factor has 1: its z are latents already."""
        shift = config.get("shift_factor")
        return cls(
            scaling_factor=float(config.get("scaling_factor") or 1.0),
            shift_factor=None if shift is None else float(shift),
            latents_mean=_floats(config.get("latents_mean")),
            latents_std=_floats(config.get("latents_std")),
        )

    @property
    def is_per_channel(self) -> bool:
        return self.latents_mean is not None and self.latents_std is not None

    def affine(self) -> tuple[Tensor, Tensor]:
        """Mean and gain, each (C, 1, 1) if per channel, else (1, 1, 1), float64: they broadcast over (B, C, h, w)."""
        if self.latents_mean is not None and self.latents_std is not None:
            mean, std = (torch.tensor(each, dtype=torch.float64) for each in (self.latents_mean, self.latents_std))
            return mean.view(-1, 1, 1), self.scaling_factor / std.view(-1, 1, 1)
        both = torch.tensor([self.shift_factor or 0.0, self.scaling_factor], dtype=torch.float64).view(2, 1, 1, 1)
        return both[0], both[1]

    def to_latents(self, z: Tensor) -> Tensor:
        """z (..., C, h, w) -> what a diffusion model sees. Inverse: to_z."""
        mean, gain = (each.to(z.device, z.dtype) for each in self.affine())
        return (z - mean) * gain

    def to_z(self, latents: Tensor) -> Tensor:
        """What a diffusion model makes, (..., C, h, w) -> z. Inverse: to_latents."""
        mean, gain = (each.to(latents.device, latents.dtype) for each in self.affine())
        return latents / gain + mean

    def to_latents_posterior(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        """The distribution of the latents of a z that is distributed as `posterior`."""
        gain = self.affine()[1].to(posterior.mean.device, posterior.mean.dtype)
        logvar = posterior.logvar + 2 * gain.abs().log()
        return DiagonalGaussian(torch.cat([self.to_latents(posterior.mean), logvar], dim=1))


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
