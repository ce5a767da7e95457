"""The encoder's output as a distribution over z: a diagonal Gaussian per latent position.

Torch only. Scaling into `latents` is not done here: everything in this file is z, never scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

__all__ = ["LOGVAR_MAX", "LOGVAR_MIN", "DiagonalGaussian", "Encoding", "image_generator"]

# The clamp of latent-diffusion and diffusers; a file or a peer that reads our moments expects the same.
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class DiagonalGaussian:
    """Posterior q(z | x) with independent positions and channels.

    `moments` (also `parameters`, the name diffusers uses): (B, 2 * C, h, w), mean and logvar stacked.
    `mean`, `logvar` (natural log of the variance, clamped to [-30, 20]), `std`, `var`: (B, C, h, w).
    """

    def __init__(self, moments: Tensor) -> None:
        self.parameters = moments
        self.mean, logvar = moments.chunk(2, dim=1)  # each (B, C, h, w)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    @property
    def moments(self) -> Tensor:
        """Encoder output after quant_conv, logvar not yet clamped. Returns: (B, 2 * C, h, w)."""
        return self.parameters

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """One draw of z.

        generator: one for the batch, alone or in a list, or one per image; on the CPU they draw alike for any device.
        Returns: (B, C, h, w), in the dtype of the moments.
        """
        return self.mean + self.std * _randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        """The most probable z, which is the mean. Returns: (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL divergence to `other`, or to the standard normal, per image.

        Returns: (B,), nats, summed over latent channels and positions.
        Source: Kingma & Welling 2014, appendix B.
        """
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        distance = (self.mean - other.mean).square() / other.var
        return 0.5 * (distance + self.var / other.var - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, z: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-density of z, summed over `dims`.

        z: (B, C, h, w). Returns: (B,) with the default dims, nats.
        """
        return 0.5 * (math.log(2.0 * math.pi) + self.logvar + (z - self.mean).square() / self.var).sum(dim=tuple(dims))


def image_generator(seed: int, key: str) -> torch.Generator:
    """The random stream of one image: the same in any batch, order or number of workers, and on any device."""
    digest = sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _randn_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]  # as diffusers: a sequence of one serves the whole batch
    if isinstance(generator, Sequence):
        if len(generator) != x.shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {x.shape[0]}; expected one per image")
        return torch.cat([_randn_like(x[i : i + 1], g) for i, g in enumerate(generator)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoding:
    """What an encoder made of a batch of images."""

    z: Tensor  # (B, C, h, w), the mode, float32, never scaled
    posterior: DiagonalGaussian | None  # moments in float32; None for encoders that know no uncertainty

    def of(self, rows: Sequence[int]) -> Encoding:
        """Those of some images of the batch."""
        posterior = None if self.posterior is None else DiagonalGaussian(self.posterior.moments[list(rows)])
        return Encoding(z=self.z[list(rows)], posterior=posterior)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """One sample of z per image, from its own generator, so that the split into batches changes nothing.

        Returns: (B, C, h, w), float32; z itself where there is no posterior.
        """
        if len(generators) != self.z.shape[0]:
            raise ValueError(f"{len(generators)} generators for {self.z.shape[0]} images; expected one per image")
        return self.z if self.posterior is None else self.posterior.sample(generators)
