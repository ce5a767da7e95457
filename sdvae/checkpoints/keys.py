"""Names and shapes of weights: pure dict -> dict, no tensors and no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["current_attention_names", "fields_from_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

# diffusers before 0.17 saved the mid-block attention under the names on the left.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")


def current_attention_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the one in use today. Where a file has both generations of one weight, neither is renamed."""
    names = list(names)
    known = set(names)

    def current(name: str) -> str:
        if not (match := _LEGACY_NAME.fullmatch(name)):
            return name
        renamed = match[1] + _LEGACY_ATTENTION[match[2]] + match[3]
        return name if renamed in known else renamed

    return {name: current(name) for name in names}


def fields_from_shapes(shapes: Shapes) -> dict[str, object]:
    """The fields of config.json that weights with diffusers keys decide by themselves.

    Left out: what no shape shows (scaling_factor, norm_num_groups, act_fn, ...), and what the weights lack.
    """
    fields: dict[str, object] = {}
    for field, name, axis in (
        ("in_channels", "encoder.conv_in.weight", 1),
        ("out_channels", "decoder.conv_out.weight", 0),
        ("latent_channels", "decoder.conv_in.weight", 1),
    ):
        if len(shapes.get(name, ())) == 4:
            fields[field] = shapes[name][axis]
    widths: list[int] = []
    while shape := shapes.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(shape[0])
    if widths:
        fields["block_out_channels"] = widths
        fields["layers_per_block"] = len(
            {n.split(".")[4] for n in shapes if n.startswith("encoder.down_blocks.0.resnets.")}
        )
        fields["use_quant_conv"] = "quant_conv.weight" in shapes
        fields["use_post_quant_conv"] = "post_quant_conv.weight" in shapes
        fields["mid_block_add_attention"] = any(".mid_block.attentions." in name for name in shapes)
    return fields
