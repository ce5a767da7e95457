"""The limits of the number formats in which an autoencoder can be computed, and how far a magnitude is from them."""

from __future__ import annotations

import math

import torch

__all__ = ["LIMITS", "SHORT", "headroom_bits"]

LIMITS = {name: torch.finfo(getattr(torch, name)).max for name in ("float32", "bfloat16", "float16")}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def headroom_bits(peak: float, dtype: str) -> float:
    """How often a magnitude may double before `dtype` overflows; below 0 where it does already."""
    return math.log2(LIMITS[dtype]) - math.log2(max(peak, torch.finfo(torch.float32).tiny))
