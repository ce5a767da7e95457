"""Whether an autoencoder can be used in a number format, in words, and whether its weights can be repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdvae.precision.activations import LayerPeak
from sdvae.precision.number_formats import LIMITS, SHORT, headroom_bits
from sdvae.precision.probe import Probe

__all__ = ["AT_RISK_BITS", "PRECISE_DB", "Verdict", "repair_of", "verdict_of"]

AT_RISK_BITS = 1.0  # with less than a factor of two to the limit, another image may well overflow
PRECISE_DB = 40.0  # PSNR against float32: above it a rounded pixel is off by 2.6 levels at most, as a root mean square

Level = Literal["safe", "at risk", "imprecise", "overflows"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an autoencoder can be used in a number format, in words."""

    dtype: str
    level: Level
    headroom_bits: float  # log2(limit / largest magnitude); below 0 it overflows
    layer: str  # the first that overflows, else the one with the least headroom
    sentence: str


def repair_of(name: str) -> Literal["stream", "block", None]:
    """Which power of two in the weights of an AutoencoderKL makes this layer's output smaller, function unchanged.

    "stream": the one of its whole network; "block": one of its residual block or attention; None: neither, since it is
    normalised already, or is what the network takes or gives.
    """
    part, *path = name.split(".")
    if part not in ("encoder", "decoder") or not path or path[0] in ("conv_out", "conv_norm_out", "conv_act"):
        return None
    if path[-1] in ("conv1", "to_q", "to_k", "to_v"):
        return "block"
    return None if path[-1] in ("norm1", "norm2", "nonlinearity", "group_norm") else "stream"


def verdict_of(layers: Sequence[LayerPeak], dtype: str, probe: Probe | None, class_name: str) -> Verdict:
    """Judge a number format by the peaks of all layers, in order of execution, and by what a probe of it showed.

    class_name: of the autoencoder; for an AutoencoderKL the words name the repair.
    """
    tightest = max(layers, key=lambda layer: layer.peak)
    bits = headroom_bits(tightest.peak, dtype)
    beyond = [layer for layer in layers if layer.peak > LIMITS[dtype]]
    tried = probe is not None and not probe.error
    psnr = probe.psnr_against_fp32 if probe is not None else None
    shown = beyond[0] if beyond else tightest
    level: Level = "safe"
    if beyond:
        level = "overflows"
        words = f"overflows at {shown.name} (peak {shown.peak:.3g}, limit {LIMITS[dtype]:.5g}): images come out black"
        words += _way_out(class_name, dtype, beyond)
    elif probe is not None and probe.not_finite:
        level = "overflows"
        words = f"gives infinity or NaN at {probe.not_finite[0]}, though no layer's float32 output is beyond its limit"
    elif bits < AT_RISK_BITS:
        level = "at risk"
        words = (
            f"at risk, {bits:.1f} bits of headroom at {shown.name} (peak {shown.peak:.3g}): another image may overflow"
        )
        words += _way_out(
            class_name, dtype, [layer for layer in layers if headroom_bits(layer.peak, dtype) < AT_RISK_BITS]
        )
    elif psnr is not None and psnr < PRECISE_DB:
        level = "imprecise"
        words = f"holds all values, but is imprecise: {psnr:.1f} dB against float32, expected {PRECISE_DB:g} dB or more"
    else:
        words = f"safe, {bits:.1f} bits of headroom at {shown.name} (peak {shown.peak:.3g})"
        words += f"; {psnr:.1f} dB against float32" if psnr is not None else ""
    if dtype != "float32" and not tried:
        words += f"; not tried: {probe.error if probe else 'no probe'}"
    return Verdict(dtype=dtype, level=level, headroom_bits=bits, layer=shown.name, sentence=f"{SHORT[dtype]}: {words}")


def _way_out(class_name: str, dtype: str, layers: Sequence[LayerPeak]) -> str:
    if dtype != "float16" or class_name != "AutoencoderKL":
        return ""
    if stuck := [layer.name for layer in layers if repair_of(layer.name) is None]:
        return f"; `sdvae fix-fp16` cannot repair {stuck[0]}: compute in bf16 or fp32"
    return "; `sdvae fix-fp16` can repair this"
