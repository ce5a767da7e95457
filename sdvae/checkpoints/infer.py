"""The configuration of an autoencoder whose files do not state all of it: what the tensors show, and what is assumed.

Pure: names, shapes and a few values in, fields and sentences out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdvae.checkpoints.formats import CONFIG_NAME, FAMILIES, family_of
from sdvae.checkpoints.keys import STATISTICS
from sdvae.checkpoints.notes import ASSUMED_NOTE
from sdvae.checkpoints.tensor_files import Readers
from sdvae.errors import CheckpointError

__all__ = ["fields_from_shapes", "infer_fields", "inferred", "still_assumed"]

Shapes = Mapping[str, tuple[int, ...]]

_GROUPS = 32  # of every published autoencoder of this family; no tensor shows it
_SAMPLE_SIZE_PX = 512  # the tile of blended tiling; it does not change the function
_SD, _SDXL = FAMILIES["Stable Diffusion 1 or 2"], FAMILIES["SDXL"]
_ASSUMED = {"scaling_factor": _SD.scaling_factor}  # of a VAE of 4 channels whose files do not say
# scaling_factor of Playground v2.5, whose files hold edm_mean and edm_std; diffusers, single_file_utils
_PLAYGROUND = 0.5


def inferred(
    tensors: Mapping[str, Tensor], known: Mapping[str, Any], readers: Readers
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """The configuration of a VAE from its tensors, and from what else its file holds.

    known: fields that are taken as they are. readers: of everything in the file.
    Returns: all fields; names of those that are assumed; remarks about the others.
    Raises: CheckpointError if nothing shows a field, or the tensors contradict each other.
    """
    shown = infer_fields({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    fields = shown | dict(known)
    remarks: list[str] = []
    assumed: tuple[str, ...] = ()
    if inferred := [field for field in shown if field not in known]:
        remarks.append(f"no {CONFIG_NAME}: {', '.join(inferred)} inferred from the tensors")
    if "norm_num_groups" not in known:
        widths = fields["block_out_channels"]
        if bad := [width for width in widths if width % _GROUPS]:
            raise CheckpointError(
                f"norm_num_groups cannot be seen in the tensors, and the usual {_GROUPS} does not divide the widths "
                f"{bad}: put the VAE's {CONFIG_NAME} beside the file, or pass config= with its path"
            )
        fields["norm_num_groups"] = _GROUPS
        remarks.append(f"norm_num_groups assumed to be {_GROUPS}, as in all published VAEs of this kind")
    if "sample_size" not in known:
        fields["sample_size"] = _SAMPLE_SIZE_PX
        remarks.append(f"sample_size set to {_SAMPLE_SIZE_PX} px; it is the tile of blended tiling only")
    if "scaling_factor" not in known:
        scale, assumed, remark = _scale(fields, readers)
        fields = scale | fields
        remarks.append(remark)
    return fields, assumed, tuple(remarks)


def _scale(fields: Mapping[str, Any], readers: Readers) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """The scaling fields of a VAE whose files do not name them; which are assumed; a sentence on their origin."""
    channels = fields["latent_channels"]
    if statistics := [name for name in STATISTICS if name in readers]:
        means = {STATISTICS[name]: readers[name]().float().flatten().tolist() for name in statistics}
        return (
            means | {"scaling_factor": _PLAYGROUND},
            (),
            (
                f"latents_mean and latents_std from {' and '.join(STATISTICS)}; scaling_factor {_PLAYGROUND}, that of "
                f"Playground v2.5, which has such tensors"
            ),
        )
    name = family_of(readers)
    family = FAMILIES.get(name or "")
    if family and family.latent_channels == channels:
        scale = {"scaling_factor": family.scaling_factor, "shift_factor": family.shift_factor}
        shift = f", shift_factor {family.shift_factor}" if family.shift_factor else ""
        return (
            scale,
            (),
            f"scaling_factor {family.scaling_factor}{shift}: this is a whole checkpoint of {name}",
        )
    if channels == 4:
        return (
            dict(_ASSUMED),
            tuple(_ASSUMED),
            (
                f"scaling_factor assumed to be {_SD.scaling_factor}, that of Stable Diffusion 1 and 2; SDXL's is "
                f"{_SDXL.scaling_factor}, and the file does not say which is meant"
            ),
        )
    readings = "; ".join(
        f"{name} has scaling_factor {f.scaling_factor}, shift_factor {f.shift_factor}"
        for name, f in FAMILIES.items()
        if f.latent_channels == channels
    )
    raise CheckpointError(
        f"nothing says how these latents of {channels} channels are scaled: "
        + (f"{readings}. " if readings else f"no known diffusion model has latents of {channels} channels. ")
        + f"Put the VAE's {CONFIG_NAME} beside the file, pass config= with its path, or say it: "
        f'fields={{"scaling_factor": ..., "shift_factor": ...}} (convert has --scaling-factor and --shift-factor)'
    )


def still_assumed(
    notes: Mapping[str, Any], known: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields that an earlier conversion assumed and that nobody has said since, and remarks about them."""
    names = tuple(
        name
        for name, value in _ASSUMED.items()
        if name in notes.get(ASSUMED_NOTE, ()) and name not in given and known.get(name) == value
    )
    return names, tuple(
        f"{name} {known[name]}, that of Stable Diffusion 1 and 2, was assumed when these files were written; SDXL's is "
        f"{_SDXL.scaling_factor}, and nothing says which is meant"
        for name in names
    )


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
