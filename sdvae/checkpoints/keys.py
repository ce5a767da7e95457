"""Names and shapes of weights: pure dict -> dict, no files. "Tensor" is anything with `shape` and `reshape`.

Two layouts name the same weights: diffusers' own, and that of the original program (LDM), which most user interfaces
want. The decoder's levels are counted from opposite ends, and LDM keeps the attention's matrices (C, C) as 1x1
convolutions (C, C, 1, 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sdvae.checkpoints.formats import Layout
from sdvae.errors import CheckpointError

__all__ = [
    "PREFIXES",
    "STATISTICS",
    "current_attention_names",
    "from_ldm",
    "linear_attention",
    "tidy",
    "to_ldm",
    "vae_tensors",
]

PREFIXES = ("", "first_stage_model.", "vae.")  # before a VAE's keys: none, in a Stable Diffusion checkpoint, in others

# Tensors of some files that are no weights, but the scale of the latents -> field of config.json.
STATISTICS = {"edm_mean": "latents_mean", "edm_std": "latents_std"}

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


def vae_tensors(
    readers: Mapping[str, Callable[[], T]], layout: Layout, where: object
) -> tuple[dict[str, T], tuple[str, ...]]:
    """The VAE's tensors among those of a file, under diffusers' names of today, and remarks. Only these are read.

    where: the file, for messages. Raises: CheckpointError for keys that no autoencoder has.
    """
    prefix = layout.prefix
    own = [name for name in readers if name.startswith(prefix) and name not in STATISTICS]
    names, remarks = tidy(name.removeprefix(prefix) for name in own)
    tensors = {new: readers[prefix + name]() for name, new in names.items()}
    if others := len(readers.keys() - STATISTICS.keys()) - len(own):
        remarks += (f"{others} tensors that do not begin with `{prefix}` are not the VAE's and were not read",)
    if layout.is_ldm:
        try:
            return from_ldm(tensors), remarks
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
    current = current_attention_names(tensors)
    return linear_attention({current[name]: tensor for name, tensor in tensors.items()}), remarks


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
