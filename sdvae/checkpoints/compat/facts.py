"""What names and shapes say about the weights of a KL-VAE as they lie on disk, for `loaders` to judge. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SD_GROUPS", "WeightFacts", "weight_facts"]

Shapes = Mapping[str, tuple[int, ...]]

SD_GROUPS = 32  # `Normalize` of latent-diffusion's model.py a506df57, for every group norm
_OWN_NAME = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightFacts:
    """Weights as they lie on disk."""

    path: str  # as the user calls them, for commands to paste
    is_folder: bool
    suffix: str  # of the weights file; .json for the index of several
    has_config: bool  # a config.json lies beside the weights
    variant: str | None  # fp16, ema, ...: where the folder has no plain weights
    dtypes: Mapping[str, int]  # as a safetensors header writes them -> tensors
    # names and shapes
    prefix: str | None  # before the names of the VAE; None where they are not those of a KL-VAE
    own: Shapes  # of the VAE's weights, without the prefix
    extras: tuple[str, ...]  # names that are not the VAE's
    is_checkpoint: bool  # a diffusion model lies in the same file
    naming: str | None  # "diffusers" or "ldm"; None for both at once or neither
    has_both_halves: bool
    widths: tuple[int, ...]  # channels of each level of the encoder
    blocks: int  # residual blocks of each level of the encoder
    latent_channels: int
    image_channels: tuple[int, int]  # of the encoder, and of the decoder
    quant_convs: tuple[bool, bool]  # quant_conv and post_quant_conv are there
    attention_dims: frozenset[int]  # of the attention's weights: 2 linear layers, 4 1x1 convolutions; empty without it
    has_legacy_attention: bool  # under its names of diffusers before 0.17
    # configuration
    norm_groups: int
    scale: tuple[float, float] | None  # scaling_factor and shift_factor; None where they are not known
    has_channel_scale: bool  # each latent channel has a mean and a std of its own


def weight_facts(
    shapes: Shapes,
    *,
    path: str,
    is_folder: bool,
    suffix: str,
    fields: Mapping[str, Any] | None = None,
    has_config: bool = False,
    variant: str | None = None,
    dtypes: Mapping[str, int] | None = None,
) -> WeightFacts:
    """Look at the names and shapes of a file, and at what is known beside them.

    shapes: under the names in the file. fields: of config.json, of the file's header, or inferred; None: not known.
    """
    end = "decoder.conv_in.weight"
    prefix = min((name.removesuffix(end) for name in shapes if name.endswith(end)), key=len, default=None)
    start = prefix or ""
    names = {name: name.removeprefix(start) for name in shapes if name.startswith(start)}
    own = {bare: shapes[name] for name, bare in names.items() if _OWN_NAME.match(bare)}
    config = fields or {}
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    attention = r".*\.(?:attentions\.0|attn_1)\.(?:to_q|query|q)\.weight"
    blocks = r"encoder\.(?:down_blocks\.0\.resnets|down\.0\.block)\.(\d+)\."
    return WeightFacts(
        path=path,
        is_folder=is_folder,
        suffix=suffix,
        has_config=has_config,
        variant=variant,
        dtypes=dtypes or {},
        prefix=prefix,
        own=own,
        extras=tuple(name for name in shapes if name.removeprefix(start) not in own),
        is_checkpoint=any(name.startswith("model.diffusion_model.") for name in shapes),
        naming=_naming(own),
        has_both_halves={"encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"} <= own.keys(),
        widths=_widths(own),
        blocks=len({match[1] for name in own if (match := re.match(blocks, name))}),
        latent_channels=_axis(own, "decoder.conv_in.weight", 1),
        image_channels=(_axis(own, "encoder.conv_in.weight", 1), _axis(own, "decoder.conv_out.weight", 0)),
        quant_convs=("quant_conv.weight" in own, "post_quant_conv.weight" in own),
        attention_dims=frozenset(len(shape) for name, shape in own.items() if re.fullmatch(attention, name)),
        has_legacy_attention=any(re.search(r"\.attentions\.\d+\.query\.", name) for name in own),
        norm_groups=int(config.get("norm_num_groups") or SD_GROUPS),
        scale=None if factor is None else (float(factor), float(shift or 0.0)),
        has_channel_scale=config.get("latents_mean") is not None or config.get("latents_std") is not None,
    )


def _naming(own: Shapes) -> str | None:
    found = {
        "diffusers": any(re.match(r"(en|de)coder\.(down|up)_blocks\.", name) for name in own),
        "ldm": any(re.match(r"(en|de)coder\.(down|up)\.\d", name) for name in own),
    }
    return next((name for name in found if found[name]), None) if sum(found.values()) == 1 else None


def _widths(own: Shapes) -> tuple[int, ...]:
    stem = "encoder.down_blocks.{}.resnets.0" if _naming(own) == "diffusers" else "encoder.down.{}.block.0"
    levels: list[int] = []
    while shape := own.get(f"{stem.format(len(levels))}.conv1.weight"):
        levels.append(shape[0])
    return tuple(levels)


def _axis(own: Shapes, name: str, axis: int) -> int:
    shape = own.get(name, ())
    return shape[axis] if len(shape) == 4 else 0
