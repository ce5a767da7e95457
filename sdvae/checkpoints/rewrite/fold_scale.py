"""Fold the scale of a VAE into its weights, for programs that have a scale of their own hard-coded.

Works on dicts of tensors with diffusers' names of today, in float64, rounds once into the dtype of each tensor, and
leaves its input as it is; tensors that do not change are shared with the result. Left out: files, and what scale a VAE
should have (calibration). The other rewrite that leaves the function unchanged is in `fp16.py`.

Letters: C latent channels; k and d the gain and offset of z' = k * z + d, per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.fit import DEFAULTS
from sdvae.checkpoints.formats import SCALE_FIELDS
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.network import Autoencoder
from sdvae.model.posterior import LOGVAR_MAX, LOGVAR_MIN
from sdvae.model.scale import LatentScale

__all__ = ["FoldCheck", "check_fold", "checked_scale", "fold_problem", "fold_scale", "rounded"]


def checked_scale(fields: Mapping[str, Any], channels: int) -> LatentScale:
    """The scale that the fields of config.json state, if they have one meaning; a missing field has its default.

    Raises: ConfigError for fields that contradict each other, of the wrong length, not finite or not positive.
    Source: the pipelines of diffusers. Those of the SDXL family read the mean and std and never shift_factor, those
    of SD3 and FLUX read shift_factor and neither of the two, so all three together have no one meaning.
    """
    scaling_factor, shift_factor, mean, std = (fields.get(name, DEFAULTS[name]) for name in SCALE_FIELDS)
    scaling_factor = _number("scaling_factor", scaling_factor, positive=True)
    shift_factor = None if shift_factor is None else _number("shift_factor", shift_factor)
    if (mean is None) != (std is None):
        given, absent = ("latents_std", "latents_mean") if mean is None else ("latents_mean", "latents_std")
        raise ConfigError(f"{given} is given without {absent}; pipelines then ignore it. Give both, or set it to null")
    if mean is None:
        return LatentScale(scaling_factor=scaling_factor, shift_factor=shift_factor)
    if shift_factor:
        raise ConfigError(
            f"shift_factor {shift_factor} stands beside latents_mean and latents_std: SDXL pipelines read only the "
            "latter, SD3 and FLUX pipelines only the former. Set what your pipeline does not read to null"
        )
    return LatentScale(
        scaling_factor=scaling_factor,
        latents_mean=_channel_values("latents_mean", mean, channels),
        latents_std=_channel_values("latents_std", std, channels, positive=True),
    )


def fold_scale(
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    scaling_factor: float,
    shift_factor: float | None = None,
    add_quant_convs: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rewrite a VAE so that the scale given here gives the latents that the VAE's own scale gave before.

    For programs with a hard-coded scale. z' = latents / scaling_factor + shift_factor is k * z + d per channel; this
    goes into quant_conv and, inverted, into post_quant_conv, or into encoder.conv_out and decoder.conv_in where there
    are none. The decoder's conv_in pads z with zeros, which an offset d would turn into other values along the border:
    without post_quant_conv, d other than 0 is refused. `add_quant_convs` adds whichever of the two is missing, as 1x1
    convolutions; FLUX-style loaders do not take such a file.

    Exact as long as log variances stay inside their clamp, see `fold_problem`, but for one rounding of each changed
    weight: relative 2**-24 in float32, 2**-11 in float16, 2**-8 in bfloat16; std changes by half the absolute rounding
    of logvar's bias, which is some tens. A file in half precision was rounded once before: fold float32 where you can.

    Returns: tensors and fields: scaling_factor and shift_factor as given, latents_mean and latents_std None.
    Raises: ConfigError for impossible factors; CheckpointError for layers that are missing or have other shapes, an
    offset without post_quant_conv, and weights that overflow their dtype.
    """
    tensors, fields = dict(tensors), dict(fields)
    channels = _latent_channels(tensors)
    mean, gain = (each.flatten().expand(channels) for each in checked_scale(fields, channels).affine())  # (C,)
    k = gain / _number("scaling_factor to fold into", scaling_factor, positive=True)
    shift = 0.0 if shift_factor is None else _number("shift_factor to fold into", shift_factor)
    d = shift - k * mean
    d = d.where(d.abs() > 4 * torch.finfo(torch.float64).eps * abs(shift), 0.0)  # what rounding leaves of 0 is 0

    if add_quant_convs:
        tensors |= _identity("quant_conv", 2 * channels, tensors) | _identity("post_quant_conv", channels, tensors)
        fields |= {"use_quant_conv": True, "use_post_quant_conv": True}
    encoder = "quant_conv" if "quant_conv.weight" in tensors else "encoder.conv_out"
    decoder = "post_quant_conv" if "post_quant_conv.weight" in tensors else "decoder.conv_in"
    if decoder == "decoder.conv_in" and d.any():
        raise CheckpointError(
            f"the fold shifts z by {d.abs().max():.4g}, and there is no post_quant_conv to undo it: decoder.conv_in "
            "pads z with zeros, so the image would change along its border. Add quant convs (--add-quant-convs, "
            "add_quant_convs=True), which programs for files without them do not take"
            + (
                f", or fold into shift_factor {float((k * mean)[0])!r}, which needs no offset"
                if _equal(k * mean)
                else ""
            )
        )

    def put(name: str, value: Tensor) -> None:
        tensors[name] = rounded(name, value, tensors[name].dtype)

    weight, bias = _conv(tensors, encoder, axis=0, size=2 * channels)
    gains = torch.cat([k, torch.ones_like(k)])  # of mean and logvar; std grows by k, so logvar by 2 log k
    put(f"{encoder}.weight", weight * gains.view(-1, 1, 1, 1))
    put(f"{encoder}.bias", bias * gains + torch.cat([d, 2 * k.log()]))
    weight, bias = _conv(tensors, decoder, axis=1, size=channels)
    weight = weight / k.view(1, -1, 1, 1)  # of z = (z' - d) / k
    put(f"{decoder}.weight", weight)
    put(f"{decoder}.bias", bias - (weight * d.view(1, -1, 1, 1)).sum((1, 2, 3)))
    fields |= {
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "latents_mean": None,
        "latents_std": None,
    }
    return tensors, fields


@dataclass(frozen=True, kw_only=True)
class FoldCheck:
    """How far a folded VAE is from the one it was made from, measured on images; largest values over all of them."""

    latents_error: float  # of the latents of the mean of z, absolute
    std_error: float  # of the posterior's standard deviation in units of latents, relative to it
    recon_error: float  # of images decoded from the same latents, absolute, where x is in [-1, 1]
    logvar_min: float  # of the VAE before, not clamped
    logvar_max: float
    problem: str | None  # why the fold is not exact, or None


@torch.inference_mode()
def check_fold(old: Autoencoder, new: Autoencoder, x: Tensor) -> FoldCheck:
    """Encode and decode images with a VAE and with the one that `fold_scale` made of it, and compare.

    Each is used with the scale that its own config states. Both decode the latents of `old`.
    x: (B, 3, H, W), [-1, 1], on the device of both. Errors are computed in float64.
    """
    channels = int(old.config.latent_channels)
    scale, new_scale = (checked_scale(vae.config, channels) for vae in (old, new))
    gain, new_gain = (each.affine()[1].to(x.device) for each in (scale, new_scale))  # (C, 1, 1) or (1, 1, 1)
    posterior, new_posterior = (vae.encode(x.to(vae.dtype)).latent_dist for vae in (old, new))
    latents = scale.to_latents(posterior.mean.double())  # (B, C, h, w)
    new_latents = new_scale.to_latents(new_posterior.mean.double())
    std_ratio = (new_posterior.std.double() * new_gain) / (posterior.std.double() * gain)
    recon = old.decode(posterior.mean).sample.double()
    new_recon = new.decode(new_scale.to_z(latents).to(new.dtype)).sample.double()
    logvar = posterior.moments.double()[:, channels:].transpose(0, 1).flatten(1)  # (C, B * h * w)
    errors = {
        "latents_error": float((new_latents - latents).abs().max()),
        "std_error": float((std_ratio - 1).abs().max()),
        "recon_error": float((new_recon - recon).abs().max()),
    }
    problem = fold_problem(logvar.amin(1), logvar.amax(1), (gain / new_gain).flatten().expand(channels))
    if not all(map(math.isfinite, errors.values())):
        problem = "encoding or decoding gives NaN or infinite values, before the fold or after it"
    return FoldCheck(**errors, logvar_min=float(logvar.min()), logvar_max=float(logvar.max()), problem=problem)


def fold_problem(logvar_min: Tensor, logvar_max: Tensor, k: Tensor) -> str | None:
    """Why a fold by k is not exact for log variances of this range, or None if it is.

    Programs clamp logvar to [-30, 20]. A value at the clamp, before the fold or after it, no longer follows 2 log k.
    Each (C,); logvar before the fold and before the clamp, natural log.
    """
    growth = 2 * k.double().log()
    for c in range(len(k)):
        low, high, step = float(logvar_min[c]), float(logvar_max[c]), float(growth[c])
        if not step:
            continue
        if not (LOGVAR_MIN < low and low + step > LOGVAR_MIN and high < LOGVAR_MAX and high + step < LOGVAR_MAX):
            return (
                f"log variance of channel {c} is {low:.4g} to {high:.4g}, after the fold {low + step:.4g} to "
                f"{high + step:.4g}; it is clamped to {LOGVAR_MIN:g} to {LOGVAR_MAX:g}, and what meets the clamp "
                "does not scale with the rest"
            )
    return None


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 value in the dtype in which the tensor of this name is stored.

    Raises: CheckpointError for values beyond the dtype.
    """
    tensor = value.to(dtype)
    if not tensor.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} would reach {value.abs().max():.4g}, beyond the {torch.finfo(dtype).max:.4g} of {kind}; "
            "convert to float32 first"
        )
    return tensor


def _conv(tensors: Mapping[str, Tensor], name: str, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, in float64."""
    if missing := [key for key in (f"{name}.weight", f"{name}.bias") if key not in tensors]:
        raise CheckpointError(f"no tensor {missing[0]}; a scale is folded into whole VAEs")
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if weight.ndim != 4 or weight.shape[axis] != size:
        raise CheckpointError(f"{name}.weight is {tuple(weight.shape)}; expected 4 axes, and {size} in axis {axis}")
    return weight.double(), bias.double()


def _latent_channels(tensors: Mapping[str, Tensor]) -> int:
    weight = tensors.get("decoder.conv_in.weight")
    if weight is None or weight.ndim != 4:
        raise CheckpointError("decoder.conv_in.weight is missing or no convolution; a scale is folded into whole VAEs")
    return int(weight.shape[1])


def _identity(name: str, channels: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A 1x1 convolution that changes nothing, unless there is one of this name already."""
    if f"{name}.weight" in tensors:
        return {}
    like = tensors["decoder.conv_in.weight"]
    weight = torch.eye(channels, dtype=like.dtype, device=like.device).view(channels, channels, 1, 1)
    return {f"{name}.weight": weight, f"{name}.bias": like.new_zeros(channels)}


def _number(name: str, value: Any, positive: bool = False) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise ConfigError(f"{name} is {value!r}; expected a finite number{' above 0' if positive else ''}")
    return number


def _channel_values(name: str, values: Any, channels: int, positive: bool = False) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or len(values) != channels:
        raise ConfigError(f"{name} is {values!r}; expected a list of {channels} numbers, one per latent channel")
    return tuple(_number(f"{name}[{c}]", value, positive) for c, value in enumerate(values))


def _equal(values: Tensor) -> bool:
    return bool((values == values[0]).all())
