"""Is a VAE that was written the one that was read? Bits, configuration, names, and what encode and decode compute.

Works on what is read back from the disk. Numbers are compared as `latents`, so that a VAE whose scale was folded into
its weights can be compared with the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdvae.checkpoints.convert.plan import Conversion
from sdvae.checkpoints.fit import full_config, load_weights
from sdvae.checkpoints.formats import read_shapes
from sdvae.checkpoints.read import read_checkpoint
from sdvae.checkpoints.rewrite.fold_scale import checked_scale
from sdvae.checkpoints.tensor_files import differing
from sdvae.errors import CheckpointError, some
from sdvae.model.network import Autoencoder

__all__ = ["TOLERANCES", "Comparison", "Verification", "compare", "ldm_shapes", "verify"]

# The largest error allowed, as a share of the root mean square of what is compared, by the coarsest type of the
# weights. A cast moves each weight by up to 2^-11 (float16) or 2^-8 (bfloat16) of itself. Measured: sdvae-mini 0.001
# and 0.054; the worst of 24 untrained networks, whose faint output exaggerates, 0.043 and 0.26, and 6e-5 after a
# fold in float32. A wrong weight is found by its bits before; this is about what rounding does to the function.
TOLERANCES = {"float64": 5e-4, "float32": 5e-4, "float16": 0.1, "bfloat16": 0.5}

_SEED = 0
_SIDE_LATENTS = 16  # of the picture that is encoded, in latent positions


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output of both autoencoders, on the same input, in float32."""

    name: str  # latents, logvar, std or recon
    max_abs_error: float
    rms: float  # root mean square of the source's output
    tolerance: float  # the largest max_abs_error that passes

    @property
    def passed(self) -> bool:
        return self.max_abs_error <= self.tolerance  # False for NaN


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked of a result, after it was read back from the disk."""

    identical: bool  # every weight equals the source's, bit for bit
    num_tensors: int
    names_checked: bool  # LDM: names and shapes are those of the original program's class
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "comparisons": [asdict(comparison) for comparison in self.comparisons]}


# Exact checks


def check_tensors(found: Mapping[str, Tensor], meant: Mapping[str, Tensor], where: object) -> None:
    """Raises: CheckpointError unless what was read back equals what was to be written, bit for bit."""
    if wrong := sorted(found.keys() ^ meant.keys()):
        raise CheckpointError(f"{where}: read back with other weights than were written: {some(wrong, 3)}")
    if wrong := differing(found, meant):
        raise CheckpointError(
            f"{where}: {len(wrong)} weights were read back with other values than were written: {some(wrong, 3)}"
        )


def check_fields(found: Mapping[str, Any], meant: Mapping[str, Any], where: object) -> None:
    """Raises: CheckpointError unless the configuration that was read back is the one that was to be written."""
    one, other = full_config(found), full_config(meant)
    if wrong := [name for name in other if one[name] != other[name]]:
        pairs = "; ".join(f"{name} is {one[name]!r}, not {other[name]!r}" for name in wrong)
        raise CheckpointError(f"{where}: read back with another configuration: {pairs}")


# The names that the original program's class has


def check_ldm_names(path: Path, prefix: str, fields: Mapping[str, Any], where: object) -> None:
    """Raises: CheckpointError unless names (after the prefix) and shapes are those of the LDM class of this size."""
    stored = read_shapes(path)
    if strangers := [name for name in stored if not name.startswith(prefix)]:
        raise CheckpointError(f"{where}: names without the prefix `{prefix}`: {some(strangers, 3)}")
    shapes = {name.removeprefix(prefix): shape for name, shape in stored.items()}
    expected = ldm_shapes(fields)
    lacking, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    other = {name for name in expected.keys() & shapes.keys() if expected[name] != tuple(shapes[name])}
    said = [
        f"{len(names)} {word} ({some(sorted(names), 3)})"
        for names, word in ((lacking, "missing"), (extra, "unknown"), (other, "wrongly shaped"))
        if names
    ]
    if said:
        raise CheckpointError(f"{where}: not what loaders of LDM files expect: {', '.join(said)}")


def ldm_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original program's autoencoder for a configuration, without prefix.

    Stated here a second time and in another way than in `keys`, as the plan of that class, so that one checks the
    other. In it `up.0` is the level of full resolution, which is computed last.
    Source: Encoder and Decoder in ldm/modules/diffusionmodules/model.py of CompVis/latent-diffusion.
    """
    config = full_config(fields)
    widths, layers, z = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    top = len(widths) - 1
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, fan_in: int, fan_out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in, kernel, kernel)
        shapes[f"{name}.bias"] = (fan_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, fan_in: int, fan_out: int) -> None:
        norm(f"{name}.norm1", fan_in)
        conv(f"{name}.conv1", fan_in, fan_out)
        norm(f"{name}.norm2", fan_out)
        conv(f"{name}.conv2", fan_out, fan_out)
        if fan_in != fan_out:
            conv(f"{name}.nin_shortcut", fan_in, fan_out, kernel=1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        if config["mid_block_add_attention"]:
            norm(f"{name}.attn_1.norm", width)
            for matrix in ("q", "k", "v", "proj_out"):
                conv(f"{name}.attn_1.{matrix}", width, width, kernel=1)
        block(f"{name}.block_2", width, width)

    conv("encoder.conv_in", config["in_channels"], widths[0])
    fan_in = widths[0]
    for level, width in enumerate(widths):
        for index in range(layers):
            block(f"encoder.down.{level}.block.{index}", fan_in, width)
            fan_in = width
        if level < top:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", widths[top])
    norm("encoder.norm_out", widths[top])
    conv("encoder.conv_out", widths[top], 2 * z)
    if config["use_quant_conv"]:
        conv("quant_conv", 2 * z, 2 * z, kernel=1)

    if config["use_post_quant_conv"]:
        conv("post_quant_conv", z, z, kernel=1)
    conv("decoder.conv_in", z, widths[top])
    middle("decoder.mid", widths[top])
    fan_in = widths[top]
    for level in range(top, -1, -1):
        for index in range(layers + 1):
            block(f"decoder.up.{level}.block.{index}", fan_in, widths[level])
            fan_in = widths[level]
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", fan_in, fan_in)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], config["out_channels"])
    return shapes


# Numbers


@torch.no_grad()
def compare(source: Autoencoder, result: Autoencoder, dtypes: Iterable[torch.dtype]) -> tuple[Comparison, ...]:
    """Encode one picture and decode the same latents with both autoencoders, and measure how far apart they are.

    Inputs are seeded: a picture of smooth noise, and latents of which half are the source's own, half normal draws.
    dtypes: of the weights of the result; the coarsest sets the tolerance.
    Returns: four comparisons, in the units of `latents` and of recon, [-1, 1]. `logvar` is that of `latents`.
    """
    tolerance = max(TOLERANCES.get(str(dtype).removeprefix("torch."), max(TOLERANCES.values())) for dtype in dtypes)
    x = _picture(source)
    ours, theirs = _Scaled(source), _Scaled(result)
    expected, found = ours.encode(x), theirs.encode(x)
    latents = torch.cat([expected["latents"], _normal(expected["latents"])])
    expected["recon"], found["recon"] = ours.decode(latents), theirs.decode(latents)
    return tuple(_comparison(name, found[name], expected[name], tolerance) for name in expected)


def _comparison(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Comparison:
    rms = expected.double().square().mean().sqrt().item()
    error = (found.double() - expected.double()).abs().max().item()
    # A constant output has a root mean square, but may be small beside the numbers that it was computed from.
    return Comparison(name=name, max_abs_error=error, rms=rms, tolerance=tolerance * max(rms, 1e-3))


class _Scaled:
    """An autoencoder seen from the side of a diffusion model."""

    def __init__(self, vae: Autoencoder) -> None:
        self.vae = vae
        self.scale = checked_scale(vae.config, vae.config["latent_channels"])
        self.gain = self.scale.affine()[1].float()  # (C, 1, 1) or (1, 1, 1)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(x).latent_dist
        return {
            "latents": self.scale.to_latents(posterior.mean),
            "logvar": posterior.logvar + 2 * self.gain.log(),  # not clamped again, as a posterior would be
            "std": posterior.std * self.gain,
        }

    def decode(self, latents: Tensor) -> Tensor:
        recon: Tensor = self.vae.decode(self.scale.to_z(latents)).sample
        return recon


def _picture(vae: Autoencoder) -> Tensor:
    """A seeded picture with large shapes and fine grain. Returns: (1, in_channels, H, H), [-1, 1]."""
    side = max(_SIDE_LATENTS * vae.spatial_compression_ratio, 32)
    generator = torch.Generator().manual_seed(_SEED)
    shapes = torch.rand(1, vae.config["in_channels"], 6, 6, generator=generator) * 2.4 - 1.2
    grain = torch.randn(1, vae.config["in_channels"], side, side, generator=generator) * 0.05
    return (F.interpolate(shapes, size=(side, side), mode="bicubic", align_corners=False) + grain).clamp(-1, 1)


def _normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(_SEED + 1))


# The whole


def verify(conversion: Conversion, path: Path) -> Verification:
    """Compare what is on the disk with what was to be written, and its function with the source's.

    ONNX models are run against torch where they are written; of them, what cast and fold change is measured here.
    Raises: CheckpointError for a result that differs from its source by more than `TOLERANCES`.
    """
    where = "the result"
    place = conversion.place
    tensors = conversion.tensors
    if place.options.to == "onnx":
        vae = conversion.result_vae
    else:
        result = read_checkpoint(place.weights_path(path))
        check_tensors(result.tensors, tensors, where)
        check_fields(result.fields, conversion.fields, where)
        tensors, vae = result.tensors, load_weights(result.network, result.tensors)
    if place.options.to == "ldm":
        check_ldm_names(path, place.options.prefix, conversion.fields, where)
    identical = not differing(tensors, conversion.source.tensors)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    comparisons = compare(conversion.source_vae, vae, dtypes)
    if failed := [comparison for comparison in comparisons if not comparison.passed]:
        said = "; ".join(f"{c.name} by {c.max_abs_error:.3g}, allowed {c.tolerance:.3g}" for c in failed)
        raise CheckpointError(f"the result is not kept, for it does not compute what the source does: {said}")
    return Verification(
        identical=identical,
        num_tensors=len(tensors),
        names_checked=place.options.to == "ldm",
        comparisons=comparisons,
    )
