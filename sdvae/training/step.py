"""One training step's mathematics, without devices, logging or files, so that it can be tested on tensors alone.

A step is: `GeneratorModule` forward, `generator_loss` and its backward pass, then `discriminator_loss` on the same
reconstructions and its backward pass, then `apply_updates`. The generator's pass leaves no gradient in the
discriminator, the discriminator's none in the generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdvae.features.lpips import LPIPS
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import LOGVAR_MAX, LOGVAR_MIN
from sdvae.training.config import AdversarialConfig, LossConfig, TrainingConfig
from sdvae.training.discriminator import DiscriminatorModule
from sdvae.training.equivariance import Transform, latent_noise
from sdvae.training.losses import (
    D_LOSSES,
    G_LOSSES,
    REC_LOSSES,
    LeCam,
    adaptive_weight,
    kl_loss,
    kl_weight_at,
    nll_loss,
    r1_penalty,
    ramp_at,
)

__all__ = [
    "Adversary",
    "GeneratorModule",
    "Reconstruction",
    "apply_updates",
    "discriminator_loss",
    "generator_loss",
    "lr_at",
    "select_trained",
]

Terms = dict[str, Tensor]  # () each, detached, by the names they are logged under


def select_trained(vae: AutoencoderKL, trained: str, num_last_blocks: int = 1) -> None:
    """Let gradients reach the named part only: all, encoder, decoder or last_blocks (of the decoder)."""
    decoder = vae.decoder
    parts: dict[str, list[nn.Module | None]] = {
        "all": [vae],
        "encoder": [vae.encoder, vae.quant_conv],
        "decoder": [vae.post_quant_conv, decoder],
        "last_blocks": [*decoder.up_blocks[-num_last_blocks:], decoder.conv_norm_out, decoder.conv_out],
    }
    vae.requires_grad_(False)
    for part in parts[trained]:
        if part is not None:
            part.requires_grad_(True)


@dataclass(frozen=True)
class Reconstruction:
    """Result of the generator's forward pass, with its graph."""

    recon: Tensor  # (B, 3, H, W)
    moments: Tensor  # (B, 2 * C, h, w)
    logvar: Tensor  # (), of the output


class GeneratorModule(nn.Module):
    """Encoding, drawing z and decoding as one `forward`; frozen parts run in eval mode and keep no activations.

    Gradients are averaged over devices only for what runs inside the `forward` of the wrapped module; calling `encode`
    and `decode` of an unwrapped VAE leaves every device with gradients of its own.
    """

    def __init__(self, vae: AutoencoderKL, config: LossConfig | None = None) -> None:
        super().__init__()
        config = config or LossConfig()
        self.vae = vae
        self.sample_posterior = config.sample_posterior
        self.latent_noise_std = config.latent_noise.std
        logvar = torch.tensor(float(config.logvar.init))
        if config.logvar.learned:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar)
        self.train()

    @property
    def encoder_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vae.encoder.parameters())

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the discriminator is balanced: of the last convolution that is trained."""
        if self.vae.decoder.conv_out.weight.requires_grad:
            return self.vae.decoder.conv_out.weight
        quant_conv = self.vae.quant_conv
        return self.vae.encoder.conv_out.weight if quant_conv is None else quant_conv.weight

    def train(self, mode: bool = True) -> GeneratorModule:
        """Training mode for the parts that are trained; the others stay in eval."""
        super().train(mode)
        for part in (self.vae.encoder, self.vae.quant_conv, self.vae.post_quant_conv, self.vae.decoder):
            if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(self, x: Tensor, transform: Transform | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, 3, H, W), [-1, 1]; transform: what happens to z before decoding.

        Returns: recon (B, 3, H', W'), moments (B, 2 * C, h, w), logvar (). H' and W' differ from H and W under a
        transform.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            posterior = self.vae.encode(x).latent_dist
        z = posterior.sample() if self.sample_posterior else posterior.mode()
        if transform is not None:
            z = transform.to_z(z)
        if self.latent_noise_std:
            z = latent_noise(z, self.latent_noise_std)
        return self.vae.decode(z).sample, posterior.parameters, self.logvar


@dataclass
class Adversary:
    """What the losses need to know of the discriminator."""

    module: DiscriminatorModule  # not wrapped for several devices: the generator's pass needs no exchange
    last_layer: Tensor
    lecam: LeCam | None = None
    average: Callable[[Tensor], Tensor] | None = None  # over devices; None: there is one
    loss_scale: float = 1.0  # of fp16


def generator_loss(
    output: Reconstruction,
    x: Tensor,
    config: LossConfig,
    step: int,
    perceptual: LPIPS | None = None,
    adversary: Adversary | None = None,
) -> tuple[Tensor, Terms]:
    """Total loss of the generator before optimizer update number `step` (the first is 0), and its terms.

    x: (B, 3, H, W), [-1, 1], of the size of the reconstruction: the target.
    perceptual: None where its weight is 0. adversary: None where its weight is 0; not touched before disc_start.
    Returns: () with graph, per image element.
    """
    gan = config.adversarial
    kl = kl_loss(output.moments, x, config.kl.form, config.kl.free_bits)
    weighted_kl = kl_weight_at(step, config.kl.weight, config.kl.warmup_steps) * kl
    if adversary is None or step < gan.disc_start:
        rec, terms = _reconstruction_terms(output.recon, x, config, perceptual)
        total = _nll(rec, output.logvar, config) + weighted_kl
    else:
        weight = gan.weight * ramp_at(step, gan.disc_start, gan.ramp_steps)
        # The balance needs the gradients of both losses by themselves. They are taken at the reconstruction, once, and
        # handed on from there: differentiating the sum would run through LPIPS and the discriminator a second time.
        recon = output.recon.detach().requires_grad_()
        rec, terms = _reconstruction_terms(recon, x, config, perceptual)
        nll = _nll(rec, output.logvar, config)
        g_loss = G_LOSSES[gan.loss](adversary.module.logits(recon))
        grads = [torch.autograd.grad(adversary.loss_scale * loss, recon)[0] for loss in (nll, g_loss)]
        nll_grad, g_grad = (grad / adversary.loss_scale for grad in grads)
        balance = torch.tensor(1.0 / x[0].numel(), device=x.device)
        if gan.adaptive:
            at_last = (
                torch.autograd.grad(output.recon, adversary.last_layer, grad, retain_graph=True)[0]
                for grad in (nll_grad, g_grad)
            )
            max_weight = gan.max_adaptive_weight / x[0].numel()  # the papers' unit is a sum over an image
            balance = adaptive_weight(*at_last, max_weight=max_weight, average=adversary.average)
        terms |= {"g_loss": g_loss, "adaptive_weight": balance * x[0].numel()}
        total = (
            _nll(rec.detach(), output.logvar, config)  # for the gradient of a learned logvar
            + weighted_kl
            + (weight * balance * g_loss).detach()
            + _zero_with_gradient(output.recon, nll_grad + weight * balance * g_grad)
        )
    terms |= {"kl_loss": kl, "output_logvar": output.logvar, **_posterior_terms(output.moments)}
    return total, {"loss": total.detach(), **{name: value.detach() for name, value in terms.items()}}


def _reconstruction_terms(
    recon: Tensor, x: Tensor, config: LossConfig, perceptual: LPIPS | None
) -> tuple[Tensor, Terms]:
    terms = {"rec_loss": REC_LOSSES[config.rec](recon, x, config.rec_delta)}
    total = config.rec_weight * terms["rec_loss"]
    if perceptual is not None:
        with torch.no_grad():
            target = perceptual.features(x)
        terms["perceptual_loss"] = perceptual.distance(recon, target).float().mean()
        total = total + config.perceptual.weight * terms["perceptual_loss"]
    return total, terms


def _nll(rec: Tensor, logvar: Tensor, config: LossConfig) -> Tensor:
    return nll_loss(rec, logvar) if config.logvar.learned or config.logvar.init else rec


def _zero_with_gradient(tensor: Tensor, grad: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient with respect to `tensor` is `grad`, of the same shape."""
    product = (tensor * grad.detach()).sum()
    return product - product.detach()


@torch.no_grad()
def _posterior_terms(moments: Tensor) -> Terms:
    logvar = moments.float().chunk(2, dim=1)[1]
    clamped = (logvar < LOGVAR_MIN) | (logvar > LOGVAR_MAX)
    std = torch.exp(0.5 * logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)).mean()
    return {"posterior_std": std, "clamped_logvar": clamped.float().mean()}


def discriminator_loss(
    discriminate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    recon: Tensor,
    x: Tensor,
    config: AdversarialConfig,
    adversary: Adversary,
) -> tuple[Tensor, Terms]:
    """Total loss of the discriminator on reconstructions (detached here) and their targets, and its terms.

    discriminate: the discriminator's forward, wrapped for several devices. Returns: () with graph, mean over patches.
    """
    real = x.detach().requires_grad_(config.r1_weight > 0)
    logits_real, logits_fake = (logits.float() for logits in discriminate(real, recon.detach()))
    d_loss = D_LOSSES[config.loss](logits_real, logits_fake)
    terms = {"d_loss": d_loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    total = d_loss
    if config.r1_weight:
        terms["r1_penalty"] = r1_penalty(logits_real, real)
        total = total + 0.5 * config.r1_weight * terms["r1_penalty"]
    if adversary.lecam is not None:
        terms["lecam"] = adversary.lecam(logits_real, logits_fake)
        total = total + config.lecam_weight * terms["lecam"]
        adversary.lecam.update(logits_real.detach(), logits_fake.detach(), adversary.average)
    return total, {name: value.detach() for name, value in terms.items()}


def apply_updates(
    updates: Sequence[tuple[torch.optim.Optimizer, Iterable[Tensor]]],
    max_grad_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
    before: Callable[[list[float]], None] | None = None,
) -> list[float]:
    """Clip the gradients of each optimizer's own parameters, let all of them move, and clear the gradients.

    scaler: of fp16, one for all: it is updated after the last optimizer, so that all gradients meet the scale that they
    were multiplied with.
    before: called with the gradient norms when nothing has moved yet; may raise.
    Returns: gradient norms before clipping, one per optimizer.
    """
    norms = []
    for optimizer, parameters in updates:
        if scaler is not None:
            scaler.unscale_(optimizer)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                [parameter for parameter in parameters if parameter.grad is not None], max_grad_norm, norm
            )
        norms.append(norm)
    values = torch.stack(norms).tolist()  # the one time that a step waits for the device
    if before is not None:
        before(values)
    for optimizer, _ in updates:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    return values


def lr_at(step: int, training: TrainingConfig, lr: float | None = None, first_step: int = 0) -> float:
    """Learning rate of optimizer update `step` (the first is 0): warm-up from `first_step` on, then the schedule.

    lr: the peak; None: training.lr.
    Source of the cosine: Loshchilov & Hutter 2017, equation 5, one period.
    """
    peak = training.lr if lr is None else lr
    step, steps = step - first_step, training.steps - first_step
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    progress = min(1.0, (step - training.warmup_steps) / max(1, steps - training.warmup_steps))
    falling = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
    return peak * (training.final_lr_ratio + (1.0 - training.final_lr_ratio) * falling)
