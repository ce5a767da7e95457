"""What names and shapes say about the weights of a KL-VAE as they lie on disk, for `loaders` to judge. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["SD_GROUPS", "WeightFacts"]

Shapes = Mapping[str, tuple[int, ...]]

SD_GROUPS = 32  # `Normalize` of latent-diffusion's model.py a506df57, for every group norm
_OWN_NAME = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightFacts:
    """Weights as they lie on disk."""

    path: str  # as the user calls them, for commands to paste
    is_folder: bool
    suffix: str  # of the weights file; .json for the index of several
    shapes: Shapes  # under the names in the file
    fields: Mapping[str, Any] | None = None  # of config.json, of the file's header, or inferred; None: not known
    has_config: bool = False  # a config.json lies beside the weights
    variant: str | None = None  # fp16, ema, ...: where the folder has no plain weights
    dtypes: Mapping[str, int] = field(default_factory=dict)  # as a safetensors header writes them -> tensors

    @cached_property
    def prefix(self) -> str | None:
        """What stands before the names of the VAE; None where they are not those of a KL-VAE."""
        end = "decoder.conv_in.weight"
        return min((name.removesuffix(end) for name in self.shapes if name.endswith(end)), key=len, default=None)

    @cached_property
    def own(self) -> Shapes:
        """Shapes of the VAE's weights, without the prefix."""
        prefix = self.prefix or ""
        names = {name: name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)}
        return {own: self.shapes[name] for name, own in names.items() if _OWN_NAME.match(own)}

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """Names that are not the VAE's."""
        return tuple(name for name in self.shapes if name.removeprefix(self.prefix or "") not in self.own)

    @cached_property
    def is_checkpoint(self) -> bool:
        """Whether a diffusion model lies in the same file."""
        return any(name.startswith("model.diffusion_model.") for name in self.shapes)

    @cached_property
    def naming(self) -> str | None:
        """ "diffusers" or "ldm"; None for both at once or neither."""
        found = {
            "diffusers": any(re.match(r"(en|de)coder\.(down|up)_blocks\.", name) for name in self.own),
            "ldm": any(re.match(r"(en|de)coder\.(down|up)\.\d", name) for name in self.own),
        }
        return next((name for name in found if found[name]), None) if sum(found.values()) == 1 else None

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder."""
        stem = "encoder.down_blocks.{}.resnets.0" if self.naming == "diffusers" else "encoder.down.{}.block.0"
        levels: list[int] = []
        while shape := self.own.get(f"{stem.format(len(levels))}.conv1.weight"):
            levels.append(shape[0])
        return tuple(levels)

    @cached_property
    def blocks(self) -> int:
        """Residual blocks of each level of the encoder."""
        pattern = r"encoder\.(?:down_blocks\.0\.resnets|down\.0\.block)\.(\d+)\."
        return len({match[1] for name in self.own if (match := re.match(pattern, name))})

    @property
    def latent_channels(self) -> int:
        return self._axis("decoder.conv_in.weight", 1)

    @property
    def image_channels(self) -> tuple[int, int]:
        return self._axis("encoder.conv_in.weight", 1), self._axis("decoder.conv_out.weight", 0)

    def _axis(self, name: str, axis: int) -> int:
        shape = self.own.get(name, ())
        return shape[axis] if len(shape) == 4 else 0

    @property
    def quant_convs(self) -> tuple[bool, bool]:
        """Whether quant_conv and post_quant_conv are there."""
        return "quant_conv.weight" in self.own, "post_quant_conv.weight" in self.own

    @property
    def has_both_halves(self) -> bool:
        return {"encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"} <= self.own.keys()

    @cached_property
    def attention_dims(self) -> frozenset[int]:
        """Dimensions of the attention's weights: 2 as linear layers, 4 as 1x1 convolutions; empty without attention."""
        pattern = r".*\.(?:attentions\.0|attn_1)\.(?:to_q|query|q)\.weight"
        return frozenset(len(shape) for name, shape in self.own.items() if re.fullmatch(pattern, name))

    @cached_property
    def has_legacy_attention(self) -> bool:
        """Whether the attention has its names of diffusers before 0.17."""
        return any(re.search(r"\.attentions\.\d+\.query\.", name) for name in self.own)

    @property
    def norm_groups(self) -> int:
        return int((self.fields or {}).get("norm_num_groups") or SD_GROUPS)

    @property
    def scale(self) -> tuple[float, float] | None:
        """scaling_factor and shift_factor; None where they are not known."""
        fields = self.fields or {}
        if (scale := fields.get("scaling_factor")) is None:
            return None
        return float(scale), float(fields.get("shift_factor") or 0.0)

    @property
    def has_channel_scale(self) -> bool:
        """Whether each latent channel has a mean and a std of its own."""
        fields = self.fields or {}
        return fields.get("latents_mean") is not None or fields.get("latents_std") is not None
