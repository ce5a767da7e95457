"""One training step's mathematics, without devices, logging or files, so that it can be tested on tensors alone.

The generator's pass lives here; a discriminator's pass goes beside it and takes the `Reconstruction` of the former.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.config import LossConfig
from sdvae.training.losses import REC_LOSSES, kl_loss

__all__ = ["GeneratorModule", "Reconstruction", "generator_loss", "lr_at"]


@dataclass(frozen=True)
class Reconstruction:
    """Result of the generator's forward pass: recon (B, 3, H, W) and moments (B, 2 * C, h, w), with their graph."""

    recon: Tensor
    moments: Tensor


class GeneratorModule(nn.Module):
    """Encoding, drawing z and decoding as one `forward`.

    Gradients are averaged over devices only for what runs inside the `forward` of the wrapped module; calling `encode`
    and `decode` of an unwrapped VAE leaves every device with gradients of its own.
    """

    def __init__(self, vae: AutoencoderKL, sample_posterior: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.sample_posterior = sample_posterior

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W), [-1, 1]. Returns: recon (B, 3, H, W) and moments (B, 2 * C, h, w)."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample() if self.sample_posterior else posterior.mode()
        return self.vae.decode(z).sample, posterior.parameters


def generator_loss(output: Reconstruction, x: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of the generator, and its terms by the names they are logged under.

    x: (B, 3, H, W), [-1, 1]. Returns: () with graph, and detached () tensors; all per image element.
    """
    rec = REC_LOSSES[config.rec](output.recon, x)
    kl = kl_loss(output.moments, x)
    total = rec + config.kl_weight * kl
    return total, {"loss": total.detach(), "rec_loss": rec.detach(), "kl_loss": kl.detach()}


def lr_at(step: int, *, lr: float, steps: int, warmup_steps: int, final_lr_ratio: float) -> float:
    """Learning rate of optimizer update `step` (the first is 0): linear warm-up, half a cosine to lr * final_lr_ratio.

    Source of the cosine: Loshchilov & Hutter 2017, equation 5, one period.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
