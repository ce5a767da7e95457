"""Losses as plain functions of tensors.

One normalisation for all: per image element. `rec_loss` is the mean over the elements of x; `kl_loss` is the KL of an
image, summed over its latent, divided by its number of elements. So a weight means the same at every image size, and
the papers' `kl_weight` (sums over the image against sums over the latent) carries over unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sdvae.model.posterior import DiagonalGaussian

__all__ = ["REC_LOSSES", "kl_loss", "l1_loss", "l2_loss"]


def l1_loss(recon: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error. recon, x: (B, 3, H, W). Returns: (), mean over all elements, in units of x."""
    return (recon.float() - x.float()).abs().mean()


def l2_loss(recon: Tensor, x: Tensor) -> Tensor:
    """Mean squared error. recon, x: (B, 3, H, W). Returns: (), mean over all elements, in squared units of x."""
    return (recon.float() - x.float()).square().mean()


REC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1_loss, "l2": l2_loss}


def kl_loss(moments: Tensor, x: Tensor) -> Tensor:
    """KL divergence of the posterior to the standard normal, per image element.

    moments: (B, 2 * C, h, w); x: (B, 3, H, W), for its size. Returns: (), nats per element, mean over the batch.
    """
    return DiagonalGaussian(moments.float()).kl().mean() / x[0].numel()
