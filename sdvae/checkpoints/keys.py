"""Names and shapes of weights: pure dict -> dict, no files. "Tensor" is anything with `shape` and `reshape`.

Two layouts name the same weights: diffusers' own, and that of the original program (LDM), which most user interfaces
want. The decoder's levels are counted from opposite ends, and LDM keeps the attention's matrices (C, C) as 1x1
convolutions (C, C, 1, 1).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sdvae.errors import CheckpointError

__all__ = [
    "PREFIXES",
    "current_attention_names",
    "fields_from_shapes",
    "from_ldm",
    "infer_fields",
    "linear_attention",
    "tidy",
    "to_ldm",
]

PREFIXES = ("", "first_stage_model.", "vae.")  # before a VAE's keys: none, in a Stable Diffusion checkpoint, in others

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")

# diffusers before 0.17 saved the mid-block attention under the names on the left.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")

# LDM name, diffusers name.
_RESIDUAL = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))

_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)(?:_blocks)?\.(\d{1,2})\.")
_LAYER = re.compile(r"(?:encoder|decoder)\.(?:down|up)(?:_blocks)?\.\d{1,2}\.(?:block|resnets)\.(\d{1,2})\.")
_ATTENTION_MATRIX = re.compile(
    r"(?:encoder|decoder)\.(?:mid\.attn_1\.(?:q|k|v|proj_out)|mid_block\.attentions\.0\.to_(?:q|k|v|out\.0))\.weight"
)

# Left in VAE files by training: the loss with its discriminator and perceptual network, and two counters. The original
# user interface drops these too (AUTOMATIC1111, modules/sd_vae.py).
_LEFTOVER = re.compile(r"loss\..*|discriminator\..*|model_ema\.(?:decay|num_updates)")
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}  # FLUX.2 and newer


def from_ldm(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename from LDM to diffusers' names of today; attention matrices come out as (C, C).

    tensors: under bare LDM names, attention as (C, C, 1, 1) or (C, C).
    Raises: CheckpointError that names the keys which no LDM VAE has.
    """
    table = _table(tensors)
    return linear_attention(_renamed(tensors, table, "LDM"))


def to_ldm(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename from diffusers to bare LDM names; attention matrices come out as (C, C, 1, 1). The inverse of `from_ldm`.

    Raises: CheckpointError that names the keys which no AutoencoderKL has.
    """
    current = current_attention_names(tensors)
    named = {current[name]: tensor for name, tensor in tensors.items()}
    table = {new: old for old, new in _table(named).items()}
    return {
        name: _reshaped(tensor, name, lambda shape: (*shape, 1, 1) if len(shape) == 2 else shape)
        for name, tensor in _renamed(named, table, "diffusers").items()
    }


def linear_attention(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors, attention matrices that are stored as 1x1 convolutions (C, C, 1, 1) as (C, C)."""
    return {
        name: _reshaped(tensor, name, lambda shape: shape[:2] if shape[2:] == (1, 1) else shape)
        for name, tensor in tensors.items()
    }


def _reshaped(tensor: Any, name: str, wanted: Any) -> Any:
    shape = tuple(tensor.shape)
    if _ATTENTION_MATRIX.fullmatch(name) and wanted(shape) != shape:
        return tensor.reshape(wanted(shape))
    return tensor


def _renamed(tensors: Mapping[str, T], table: Mapping[str, str], layout: str) -> dict[str, T]:
    stems = {name: name.rpartition(".") for name in tensors}
    unknown = [name for name, (stem, _, end) in stems.items() if stem not in table or end not in ("weight", "bias")]
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise CheckpointError(f"no autoencoder with {layout} keys has these: {', '.join(unknown[:6])}{more}")
    return {f"{table[stem]}.{end}": tensors[name] for name, (stem, _, end) in stems.items()}


def _table(names: Iterable[str]) -> dict[str, str]:
    """LDM -> diffusers, without ".weight" and ".bias", for as many levels and layers as the names have."""
    levels = {"encoder": 0, "decoder": 0}
    layers = 0
    for name in names:
        if match := _LEVEL.match(name):
            levels[match[1]] = max(levels[match[1]], int(match[2]) + 1)
        if match := _LAYER.match(name):
            layers = max(layers, int(match[1]) + 1)
    return dict([("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"), *_pairs(levels, layers)])


def _pairs(levels: Mapping[str, int], layers: int) -> Iterator[tuple[str, str]]:
    for side, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield f"{side}.conv_in", f"{side}.conv_in"
        for level in range(levels[side]):
            block = level if side == "encoder" else levels[side] - 1 - level
            ldm, new = f"{side}.{way}.{level}", f"{side}.{way}_blocks.{block}"
            yield f"{ldm}.{resample}.conv", f"{new}.{resample}rs.0.conv"
            for layer in range(layers):
                for part in _RESIDUAL:
                    yield f"{ldm}.block.{layer}.{part[0]}", f"{new}.resnets.{layer}.{part[1]}"
        for layer in range(2):
            for part in _RESIDUAL:
                yield f"{side}.mid.block_{layer + 1}.{part[0]}", f"{side}.mid_block.resnets.{layer}.{part[1]}"
        for part in _ATTENTION:
            yield f"{side}.mid.attn_1.{part[0]}", f"{side}.mid_block.attentions.0.{part[1]}"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"


def tidy(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map the names of a VAE's weights to those that layouts know, and leave out what training left behind.

    Returns: the map, without the names that are dropped; a sentence for each thing that was done.
    """
    known = dict.fromkeys(names)
    dropped = [name for name in known if _LEFTOVER.fullmatch(name)]
    kept = {name: _moved(name, known) for name in known if not _LEFTOVER.fullmatch(name)}
    remarks = []
    if dropped:
        more = ", ..." if len(dropped) > 1 else ""
        remarks.append(f"dropped {len(dropped)} tensors that training left in the file: {dropped[0]}{more}")
    for name, new in kept.items():
        if name != new:
            remarks.append(f"renamed `{name}` to `{new}`: some newer files keep it inside the encoder or decoder")
    return kept, tuple(remarks)


def _moved(name: str, known: Container[str]) -> str:
    for start, new in _MOVED.items():
        if name.startswith(start) and (moved := new + name.removeprefix(start)) not in known:
            return moved
    return name


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
    """The fields of config.json that weights with diffusers keys decide by themselves, as far as they are there.

    Where places contradict each other, the first counts: for hints in messages. `infer_fields` is strict.
    """
    return {field: next(iter(found.values())) for field, found in _readings(shapes).items() if found}


def infer_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of config.json that the shapes of an autoencoder's weights show.

    shapes: under diffusers' names of today. Not among the fields: what no shape shows, such as norm_num_groups and
    scaling_factor.
    Raises: CheckpointError where an encoder or a decoder is missing, and where two places contradict each other, with
        both readings.
    """
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if not any(name.startswith(f"{side}.") for name in shapes):
            raise CheckpointError(
                f"it has no {side}, only the {other}; an autoencoder needs both: pass a whole VAE file"
            )
    fields: dict[str, Any] = {}
    for field, found in _readings(shapes).items():
        values = list(found.values())
        if not values:
            raise CheckpointError(f"{field} cannot be read from the tensors: the one that shows it is missing")
        if any(value != values[0] for value in values):
            readings = "; ".join(f"{value!r} by {place}" for place, value in found.items())
            raise CheckpointError(f"the tensors contradict each other, {field} is {readings}")
        fields[field] = values[0]
    levels = len(fields["block_out_channels"])
    fields["down_block_types"] = ["DownEncoderBlock2D"] * levels
    fields["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return fields


def _readings(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Field -> place that shows it -> value there."""

    def along(name: str, axis: int, divisor: int = 1) -> dict[str, Any]:
        shape = shapes.get(f"{name}.weight", ())
        return {name: shape[axis] // divisor} if len(shape) == 4 else {}

    down, up = _widths(shapes, "encoder.down_blocks"), _widths(shapes, "decoder.up_blocks")[::-1]
    sides = [side for side, widths in (("encoder", down), ("decoder", up)) if widths]
    readings: dict[str, dict[str, Any]] = {
        "in_channels": along("encoder.conv_in", 1),
        "out_channels": along("decoder.conv_out", 0),
        "latent_channels": along("decoder.conv_in", 1)
        | along("encoder.conv_out", 0, 2)
        | along("quant_conv", 0, 2)
        | along("post_quant_conv", 0),
        "block_out_channels": {side: w for side, w in (("encoder", down), ("decoder", up)) if w},
        "layers_per_block": _layers(shapes, "encoder.down_blocks", 0) | _layers(shapes, "decoder.up_blocks", 1),
        "use_quant_conv": {"quant_conv": "quant_conv.weight" in shapes} if sides else {},
        "use_post_quant_conv": {"post_quant_conv": "post_quant_conv.weight" in shapes} if sides else {},
        "mid_block_add_attention": {
            side: any(name.startswith(f"{side}.mid_block.attentions.") for name in shapes) for side in sides
        },
    }
    return readings


def _widths(shapes: Shapes, blocks: str) -> list[int]:
    widths: list[int] = []
    while shape := shapes.get(f"{blocks}.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(shape[0])
    return widths


def _layers(shapes: Shapes, blocks: str, extra: int) -> dict[str, int]:
    """Block -> layers_per_block as it shows it; the decoder's blocks have `extra` more."""
    counts: dict[str, set[str]] = {}
    for name in shapes:
        if match := re.fullmatch(rf"({re.escape(blocks)}\.\d+)\.resnets\.(\d+)\..*", name):
            counts.setdefault(match[1], set()).add(match[2])
    return {block: len(layers) - extra for block, layers in counts.items()}
