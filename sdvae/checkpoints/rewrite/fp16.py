"""Rescale activations inside a VAE that overflow in float16, with the function unchanged.

Works on dicts of tensors with diffusers' names of today, rounds once into the dtype of each tensor, and leaves its
input as it is; tensors that do not change are shared with the result. Left out: files, and finding out which exponents
a VAE needs. The other rewrite that leaves the function unchanged is in `fold_scale.py`.

Letters: s = 2 ** exponent, v the variance of a group of a GroupNorm, eps its epsilon.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.rewrite.fold_scale import rounded
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.layers import NORM_EPS

__all__ = ["MAX_EXPONENT", "StreamScale", "epsilon_effect", "fp16_underflow", "rescale_streams"]

MAX_EXPONENT = 64  # far beyond any use, and 2 ** 64 is still far inside float32


# The layers of AutoencoderKL by their names; the first group is the block, the second the part of it.
_BLOCK = r"(?:mid_block|(?:down|up)_blocks\.\d+)"
_RESNET = re.compile(rf"((?:en|de)coder\.{_BLOCK}\.resnets\.\d+)\.(norm1|conv1|norm2|conv2|conv_shortcut)")
_ATTENTION = re.compile(r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.(group_norm|to_q|to_k|to_v|to_out\.0)")
_RESAMPLER = re.compile(rf"(?:en|de)coder\.{_BLOCK}\.(?:down|up)samplers\.0\.conv")
_ENDS = re.compile(r"(?:en|de)coder\.(?:conv_in|conv_norm_out|conv_out)")
_REQUIRED = {
    _RESNET: {"norm1", "conv1", "norm2", "conv2"},
    _ATTENTION: {"group_norm", "to_q", "to_k", "to_v", "to_out.0"},
}
# Blocks whose layers are those above. Others may attend or resample in ways that a scale passes through.
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


def rescale_streams(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], scale: StreamScale) -> dict[str, Tensor]:
    """Scale activations inside a VAE by powers of two that its next GroupNorm cancels, so that float16 can hold them.

    What adds to the residual stream of a network is scaled: conv_in, the second convolution of every residual block
    and the output projection of attention, with their biases; and of convolutions that the whole stream passes through
    (shortcuts, down- and upsampling) the biases alone. `scale.blocks` scales conv1 of a block, which its norm2
    cancels; to_v of an attention, which to_out.0 undoes; or to_q, which to_k undoes.

    A power of two rounds nothing, so opposite exponents restore the bits, except for weights that become subnormal in
    their dtype (`fp16_underflow`). The function changes by GroupNorm's epsilon alone, see `epsilon_effect`.
    Returns: the tensors; config.json stays the same, but for force_upcast, which is the caller's to clear.
    Raises: ConfigError for names of blocks that are not there; CheckpointError for layers without a GroupNorm that
    cancels the scale, and for weights that the dtype of their tensor cannot hold after it.
    """
    _check_layout(tensors, fields)
    exponents: Counter[str] = Counter()  # of tensors, by name
    for network, exponent in (("encoder", scale.encoder), ("decoder", scale.decoder)):
        for name in tensors:
            if name.startswith(f"{network}.") and _feeds_stream(name):
                exponents[name] += exponent
    for block, exponent in scale.blocks.items():
        for name, sign in _inside_block(block, tensors).items():
            exponents[name] += sign * exponent
    result = dict(tensors)
    for name, exponent in exponents.items():
        if exponent:
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


def _feeds_stream(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    if re.fullmatch(r"(?:en|de)coder\.conv_in", module):
        return True
    if match := _RESNET.fullmatch(module):
        return match[2] == "conv2" or (match[2] == "conv_shortcut" and kind == "bias")
    if match := _ATTENTION.fullmatch(module):
        return match[2] == "to_out.0"
    return bool(_RESAMPLER.fullmatch(module)) and kind == "bias"


def _inside_block(block: str, tensors: Iterable[str]) -> dict[str, int]:
    """The tensors to scale for a name in `StreamScale.blocks`, each with 1 or, for the inverse, -1."""
    choices: dict[str, dict[str, int]] = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        if (match := _RESNET.fullmatch(module)) and match[2] == "conv1":
            choices.setdefault(match[1], {})[name] = 1
        elif match := _ATTENTION.fullmatch(module):
            if match[2] == "to_v":
                choices.setdefault(match[1], {})[name] = 1
            elif name.endswith(".to_out.0.weight"):
                choices.setdefault(match[1], {})[name] = -1
            elif match[2] in ("to_q", "to_k"):
                choices.setdefault(f"{match[1]}.to_q", {})[name] = 1 if match[2] == "to_q" else -1
    if block not in choices:
        near = difflib.get_close_matches(block, choices, n=1)
        raise ConfigError(
            f"no block '{block}' to rescale; {f'did you mean {near[0]!r}' if near else f'there are {sorted(choices)}'}?"
        )
    return choices[block]


def _check_layout(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Every layer is one that the rescaling knows, and has its norms: the scale would pass through any other."""
    for field_name, known in _BLOCK_TYPES.items():
        if bad := set(fields.get(field_name, (known,))) - {known}:
            raise CheckpointError(f"{field_name} has {sorted(bad)}; only '{known}' can be rescaled")
    names = [name.rpartition(".") for name in tensors if name.startswith(("encoder.", "decoder."))]
    layers = (_RESNET, _ATTENTION, _RESAMPLER, _ENDS)
    unknown = [
        f"{module}.{kind}"
        for module, _, kind in names
        if kind not in ("weight", "bias") or not any(layer.fullmatch(module) for layer in layers)
    ]
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors are not of AutoencoderKL, first {min(unknown)}; cannot rescale")
    modules = {module for module, _, _ in names}
    missing = {f"{net}.{end}" for net in ("encoder", "decoder") for end in ("conv_in", "conv_norm_out")} - modules
    for pattern, parts in _REQUIRED.items():
        blocks = {match[1] for module in modules if (match := pattern.fullmatch(module))}
        missing |= {f"{block}.{part}" for block in blocks for part in parts} - modules
    if missing:
        raise CheckpointError(
            f"{len(missing)} layers are missing, first {min(missing)}; a network without its norms cancels no scale"
        )


def _check_rounding(name: str, before: Tensor, after: Tensor, exponent: int) -> None:
    lost = (after.double() * 2.0**-exponent - before.double()).abs().max()
    if lost > torch.finfo(before.dtype).eps * before.abs().max():
        kind = str(before.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} scaled by 2**{exponent} is too small for {kind} and would lose more than that type's precision; "
            "convert to float32 first, or use an exponent nearer to 0"
        )
