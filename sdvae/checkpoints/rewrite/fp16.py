"""Rescale activations inside a VAE that overflow in float16, with the function unchanged.

Works on dicts of tensors with diffusers' names of today, rounds once into the dtype of each tensor, and leaves its
input as it is; tensors that do not change are shared with the result. Left out: files, and finding out which exponents
a VAE needs. The other rewrite that leaves the function unchanged is in `fold_scale.py`.

Letters: s = 2 ** exponent, v the variance of a group of a GroupNorm, eps its epsilon.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.fit import DEFAULTS, build
from sdvae.checkpoints.rewrite.fold_scale import rounded
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.layers import NORM_EPS
from sdvae.model.network import Autoencoder

__all__ = ["MAX_EXPONENT", "StreamScale", "epsilon_effect", "fp16_underflow", "rescale_streams"]

MAX_EXPONENT = 64  # far beyond any use, and 2 ** 64 is still far inside float32


# Blocks that say what a scale does to them. Others may attend or resample in ways that it passes through.
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True, kw_only=True)
class StreamScale:
    """Exponents of two by which `rescale_streams` scales; 0 leaves as it is, negative ones make values smaller.

    Names in `blocks` are those of modules. Of a residual block, the output of conv1; of an attention, that of to_v;
    of its to_q, the queries, with the keys as much smaller.
    """

    encoder: int = 0  # the residual stream, from conv_in to conv_norm_out
    decoder: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)  # such as {"encoder.down_blocks.0.resnets.1": -4}

    def __post_init__(self) -> None:
        named = {"encoder": self.encoder, "decoder": self.decoder} | {f"blocks.{k}": e for k, e in self.blocks.items()}
        for name, exponent in named.items():
            if type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
                raise ConfigError(
                    f"StreamScale.{name} is {exponent!r}; expected a whole number, at most {MAX_EXPONENT} in size"
                )

    @property
    def changes(self) -> dict[str, int]:
        """The exponents that are not 0, by the name of the network or module."""
        named = {"encoder": self.encoder, "decoder": self.decoder, **self.blocks}
        return {name: exponent for name, exponent in named.items() if exponent}


def rescale_streams(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], scale: StreamScale) -> dict[str, Tensor]:
    """Scale activations inside a VAE by powers of two that its next GroupNorm cancels, so that float16 can hold them.

    What adds to the residual stream of a network is scaled, with its bias: conv_in, the second convolution of every
    residual block and the output projection of attention; and of convolutions that the whole stream passes through
    (shortcuts, down- and upsampling) the biases alone. `scale.blocks` scales conv1 of a block, which its norm2
    cancels; to_v of an attention, which to_out.0 undoes; or to_q, which to_k undoes. Each block says so itself, in
    `adds_to_stream` and `scales_inside`.

    A power of two rounds nothing, so opposite exponents restore the bits, except for weights that become subnormal in
    their dtype (`fp16_underflow`). The function changes by GroupNorm's epsilon alone, see `epsilon_effect`.
    Returns: the tensors; config.json stays the same, but for force_upcast, which is the caller's to clear.
    Raises: ConfigError for names of blocks that are not there; CheckpointError for layers without a GroupNorm that
    cancels the scale, and for weights that the dtype of their tensor cannot hold after it.
    """
    network = _network(tensors, fields)
    exponents: Counter[str] = Counter()  # of tensors, by name
    for name, module in network.named_modules():
        exponent = scale.encoder if name.startswith("encoder") else scale.decoder
        for part in getattr(module, "adds_to_stream", ()):
            exponents[f"{name}.{part}"] += exponent
    for name, exponent in scale.blocks.items():
        for part, sign in _inside_block(name, network).items():
            exponents[part] += sign * exponent
    result = dict(tensors)
    for name, exponent in exponents.items():
        if exponent and name in tensors:  # not each block has a shortcut
            result[name] = rounded(name, tensors[name].double() * 2.0**exponent, tensors[name].dtype)
            _check_rounding(name, tensors[name], result[name], exponent)
    return result


def epsilon_effect(variance: float, exponent: int) -> float:
    """Relative change of a GroupNorm's output when its input, of this variance per group, is scaled by s = 2**exponent.

    (s x - s m) / sqrt(s^2 v + eps) is (x - m) / sqrt(v + eps / s^2): about eps / (2 v) * |1 - 1 / s^2| as long as v and
    s^2 v are large against eps = 1e-6. Scaling up thus changes at most eps / (2 v); scaling down to s^2 v = 1e-4 is
    0.5 %, and more below. variance: v before the scaling.
    """
    if variance == 0:
        return 0.0  # x = m: the output is the bias alone
    return abs(math.sqrt((variance + NORM_EPS) / (variance + NORM_EPS / 4.0**exponent)) - 1)


def fp16_underflow(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each tensor's non-zero values that float16 holds as subnormal or as 0, so with fewer bits than others.

    Such a value is off by up to 2**-25 in place of 2**-11 of itself. Returns: only names with a share above 0.
    """
    smallest = torch.finfo(torch.float16).smallest_normal
    shares = {}
    for name, tensor in tensors.items():
        size = tensor[tensor != 0].abs()
        if lossy := int((size < smallest).sum()):
            shares[name] = lossy / size.numel()
    return shares


def _inside_block(block: str, network: Autoencoder) -> dict[str, int]:
    """The tensors to scale for a name in `StreamScale.blocks`, each with 1 or, for the inverse, -1."""
    choices = {
        name + suffix: {f"{name}.{part}": sign for part, sign in parts.items()}
        for name, module in network.named_modules()
        for suffix, parts in getattr(module, "scales_inside", {}).items()
    }
    if block not in choices:
        near = difflib.get_close_matches(block, choices, n=1)
        raise ConfigError(
            f"no block '{block}' to rescale; {f'did you mean {near[0]!r}' if near else f'there are {sorted(choices)}'}?"
        )
    return choices[block]


def _network(tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> Autoencoder:
    """The network of these tensors, without weights; a scale would pass through any layer that it does not have."""
    for field_name, known in _BLOCK_TYPES.items():
        if bad := set(fields.get(field_name, (known,))) - {known}:
            raise CheckpointError(f"{field_name} has {sorted(bad)}; only '{known}' can be rescaled")
    network = build({name: value for name, value in fields.items() if name in DEFAULTS}, "the VAE to rescale")
    expected = network.state_dict().keys()
    if unknown := tensors.keys() - expected:
        raise CheckpointError(f"{len(unknown)} tensors are not of AutoencoderKL, first {min(unknown)}; cannot rescale")
    if missing := {name.rpartition(".")[0] for name in expected - tensors.keys()}:
        raise CheckpointError(
            f"{len(missing)} layers are missing, first {min(missing)}; a network without its norms cancels no scale"
        )
    return network


def _check_rounding(name: str, before: Tensor, after: Tensor, exponent: int) -> None:
    lost = (after.double() * 2.0**-exponent - before.double()).abs().max()
    if lost > torch.finfo(before.dtype).eps * before.abs().max():
        kind = str(before.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} scaled by 2**{exponent} is too small for {kind} and would lose more than that type's precision; "
            "convert to float32 first, or use an exponent nearer to 0"
        )
