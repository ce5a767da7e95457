"""The names of the formats that latents are written in. No torch."""

from __future__ import annotations

__all__ = ["CACHE_FORMATS", "DEFAULT_KOHYA_SUFFIX", "KOHYA_SUFFIXES", "SHARDED_FORMATS"]

CACHE_FORMATS = ("safetensors", "kohya-npz", "webdataset", "parquet")
SHARDED_FORMATS = ("webdataset", "parquet")  # many images to a file; the others have a file for each
KOHYA_SUFFIXES = ("sd", "sdxl")
DEFAULT_KOHYA_SUFFIX = "sd"
