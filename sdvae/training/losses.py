"""Losses as plain functions of tensors.

One normalisation for all terms of the generator: per image element. What the papers sum over an image is divided here
by its 3 * H * W elements, so a weight means the same at every image size, and ratios of weights carry over unchanged.
The losses on a discriminator's logits are means over patches, as in the papers; where the two meet, `adaptive_weight`
says how their unit changes.

Left out: the perceptual distance (sdvae.features.lpips) and how the terms are put together (sdvae.training.step).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdvae.model.posterior import DiagonalGaussian

__all__ = [
    "D_LOSSES",
    "G_LOSSES",
    "REC_LOSSES",
    "LeCam",
    "adaptive_weight",
    "charbonnier_loss",
    "huber_loss",
    "kl_loss",
    "kl_weight_at",
    "l1_loss",
    "l2_loss",
    "nll_loss",
    "r1_penalty",
    "ramp_at",
]

Average = Callable[[Tensor], Tensor]  # a tensor of this device -> its mean over all devices


def l1_loss(recon: Tensor, x: Tensor, delta: float = 0.0) -> Tensor:
    """Mean absolute error; delta has no meaning here.

    recon, x: (B, 3, H, W). Returns: (), mean over all elements, in units of x.
    """
    return F.l1_loss(recon.float(), x.float())


def l2_loss(recon: Tensor, x: Tensor, delta: float = 0.0) -> Tensor:
    """Mean squared error, without a factor of a half; delta has no meaning here.

    recon, x: (B, 3, H, W). Returns: (), mean over all elements, in squared units of x.
    """
    return F.mse_loss(recon.float(), x.float())


def huber_loss(recon: Tensor, x: Tensor, delta: float) -> Tensor:
    """d^2 / (2 delta) where |d| < delta, else |d| - delta / 2: a parabola that turns into L1, with L1's gradients.

    This is Huber's function divided by delta, so that errors above delta weigh as in `l1_loss`.
    recon, x: (B, 3, H, W). Returns: (), mean over all elements, in units of x.
    Source: Huber 1964; the scale is that of Girshick 2015, "Fast R-CNN", equation 3.
    """
    return F.smooth_l1_loss(recon.float(), x.float(), beta=delta)


def charbonnier_loss(recon: Tensor, x: Tensor, delta: float) -> Tensor:
    """sqrt(d^2 + delta^2) - delta: L1 with a rounded tip, and 0 where recon = x.

    recon, x: (B, 3, H, W). Returns: (), mean over all elements, in units of x.
    Source: Charbonnier et al. 1994; the constant is taken off so that a perfect reconstruction costs nothing.
    """
    return torch.sqrt((recon.float() - x.float()).square() + delta**2).mean() - delta


REC_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l1": l1_loss,
    "l2": l2_loss,
    "huber": huber_loss,
    "charbonnier": charbonnier_loss,
}


def kl_loss(moments: Tensor, x: Tensor, form: str = "sum", free_bits: float = 0.0) -> Tensor:
    """KL divergence of the posterior to the standard normal.

    moments: (B, 2 * C, h, w); x: (B, 3, H, W), for its size. free_bits: nats; an element of the latent that costs less
    counts as this much and has no gradient. It is applied to each element of each image, not to means over a batch, so
    that the batch can be cut up among devices.
    Returns: (), mean over the batch; form sum: nats of an image's whole latent per element of the image; form mean:
    nats per element of the latent.
    Source: Kingma & Welling 2014, appendix B; free bits: Kingma et al. 2016 (IAF), with groups of one element.
    """
    posterior = DiagonalGaussian(moments.float())
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar)  # (B, C, h, w)
    if free_bits:
        kl = kl.clamp(min=free_bits)
    if form == "mean":
        return kl.mean()
    return kl.sum(dim=(1, 2, 3)).mean() / x[0].numel()


def ramp_at(step: int, start: int, ramp_steps: int) -> float:
    """Multiplier at optimizer update `step`: 0 until `start`, from there a line to 1 at start + ramp_steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / ramp_steps) if ramp_steps else 1.0


def kl_weight_at(step: int, weight: float, warmup_steps: int) -> float:
    """Weight of the KL at optimizer update `step` (the first is 0): a line from 0 to `weight` at warmup_steps."""
    return weight * ramp_at(step, 0, warmup_steps)


def nll_loss(rec: Tensor, logvar: Tensor) -> Tensor:
    """Reconstruction error as a negative log-likelihood with log-variance `logvar` of the output.

    rec: (), per image element, the perceptual term included; logvar: (). Returns: (), per image element.
    Source: latent-diffusion's kl-f8, where logvar is one number for all elements.
    """
    return rec / torch.exp(logvar) + logvar


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half of max(0, 1 - real) + max(0, 1 + fake).

    logits: (B, 1, h, w) or any shape. Returns: (), mean over patches. Source: Lim & Ye 2017; the half is VQGAN's.
    """
    return 0.5 * (F.relu(1.0 - logits_real.float()).mean() + F.relu(1.0 + logits_fake.float()).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half of the cross-entropies, softplus(-real) + softplus(fake).

    logits: (B, 1, h, w) or any shape. Returns: (), nats, mean over patches. Source: Goodfellow et al. 2014.
    """
    return 0.5 * (F.softplus(-logits_real.float()).mean() + F.softplus(logits_fake.float()).mean())


def least_squares_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half of (real - 1)^2 + fake^2.

    logits: (B, 1, h, w) or any shape. Returns: (), mean over patches. Source: Mao et al. 2017, equation 9.
    """
    return 0.5 * ((logits_real.float() - 1.0).square().mean() + logits_fake.float().square().mean())


def mean_g_loss(logits_fake: Tensor) -> Tensor:
    """The generator raises the logits of its images: -fake.

    Of the hinge loss, and of vanilla too, where latent-diffusion and VQGAN take it in place of softplus(-fake), whose
    gradient fades as the logits grow.
    logits: (B, 1, h, w) or any shape. Returns: (), mean over patches.
    """
    return -logits_fake.float().mean()


def least_squares_g_loss(logits_fake: Tensor) -> Tensor:
    """Half of (fake - 1)^2.

    logits: (B, 1, h, w) or any shape. Returns: (), mean over patches. Source: Mao et al. 2017, equation 9.
    """
    return 0.5 * (logits_fake.float() - 1.0).square().mean()


D_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d_loss,
    "vanilla": vanilla_d_loss,
    "least_squares": least_squares_d_loss,
}
G_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": mean_g_loss,
    "vanilla": mean_g_loss,
    "least_squares": least_squares_g_loss,
}


def adaptive_weight(nll_grad: Tensor, g_grad: Tensor, *, max_weight: float, average: Average | None = None) -> Tensor:
    """Weight of the generator's adversarial loss that makes its gradient at the last layer as long as that of nll.

    |nll_grad| / (|g_grad| + 1e-4), at most max_weight. nll_grad, g_grad: gradients at the weight of the last layer.

    Unit: nll here is a mean over the N = 3 * H * W elements of an image, in the papers a sum, and g_loss is a mean over
    patches in both. So this weight is 1/N of theirs, just as all other terms are, and the clamp at 1e4 of the papers is
    max_weight = 1e4 / N. Their 1e-4 stands beside |g_grad|, which is the same in both, and stays.

    average: takes the mean of a tensor over devices. The gradients are averaged before their norms are taken, so that
    every device has the weight of the joined batch.
    Returns: (), without graph. Source: Esser et al. 2021, "Taming Transformers", equation 7.
    """
    grads = torch.stack([nll_grad.detach().float(), g_grad.detach().float()])
    if average is not None:
        grads = average(grads)
    return (grads[0].norm() / (grads[1].norm() + 1e-4)).clamp(max=max_weight)


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """Squared length of the gradient of an image's summed logits at the image; no factor of a half.

    logits_real: (B, 1, h, w), computed from real: (B, 3, H, W), which requires a gradient. With batch statistics, the
    logits of all images depend on an image, and all of them count.
    Returns: () with graph to the discriminator, sum over the elements and mean over images.
    Source: Mescheder et al. 2018, equation 9.
    """
    (grad,) = torch.autograd.grad(logits_real.float().sum(), real, create_graph=True)
    return grad.float().square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """Holds logits near the averages that the other side had, so that a discriminator does not run away on little data.

    The averages are buffers: they belong into checkpoints. Both begin at 0, where a new discriminator's logits lie.
    Source: Tseng et al. 2021, "Regularizing GANs under Limited Data"; as in their code, a side that lies
    beyond the other's average already costs nothing.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.99) -> None:  # their value
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """max(0, real - average fake)^2 + max(0, average real - fake)^2.

        logits: (B, 1, h, w) or any shape. Returns: (), mean over patches.
        """
        above = F.relu(logits_real.float() - self.fake).square().mean()
        below = F.relu(self.real - logits_fake.float()).square().mean()
        return above + below

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor, average: Average | None = None) -> None:
        """Move both averages to the mean logits of this step; average: takes the mean of a tensor over devices."""
        means = torch.stack([logits_real.float().mean(), logits_fake.float().mean()])
        if average is not None:
            means = average(means)
        self.real.lerp_(means[0], 1.0 - self.decay)
        self.fake.lerp_(means[1], 1.0 - self.decay)
