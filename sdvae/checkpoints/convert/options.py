"""What `convert` can be asked for. Imports no torch, so that the help of the command comes at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdvae.checkpoints.formats import FAMILIES
from sdvae.checkpoints.keys import PREFIXES
from sdvae.errors import ConfigError

__all__ = ["DTYPES", "LDM_SCALING_FACTOR", "MAX_SHARD_SIZE", "TARGETS", "ConvertOptions"]

TARGETS = ("diffusers", "ldm", "onnx")
DTYPES = ("float32", "float16", "bfloat16")

# What programs that take LDM files multiply z by: nothing in such a file tells them another.
LDM_SCALING_FACTOR = FAMILIES["Stable Diffusion 1 or 2"].scaling_factor
MAX_SHARD_SIZE = "10GB"  # the default of diffusers' save_pretrained

_VARIANT = re.compile(r"[A-Za-z0-9_-]+")
_SIZE = re.compile(r"\d+(?:\.\d+)?(?:KB|MB|GB|TB)")  # what huggingface_hub, which splits, understands
_ONLY_FOR = {  # option -> the targets that have a place for it
    "variant": ("diffusers",),
    "max_shard_size": ("diffusers",),
    "prefix": ("ldm",),
    "into": ("diffusers",),
}
# Where things lie, and how the command behaves: the same result, so no part of what the result was made with.
_NOT_IN_NOTES = frozenset({"config", "source_variant", "into", "images", "verify", "overwrite", "dry_run", "license"})


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How a VAE is written.

    Raises: ConfigError for values that do not exist or do not go together.
    """

    to: str = "diffusers"  # one of TARGETS
    dtype: str | None = None  # of the weights in the file, one of DTYPES; None keeps each as it is
    variant: str | None = None  # diffusers: diffusion_pytorch_model.<variant>.safetensors
    max_shard_size: str | None = None  # diffusers: such as "10GB"; larger weights are split into several files
    prefix: str = ""  # ldm: before each name, one of keys.PREFIXES
    scaling_factor: float | None = None  # of the source, where its files do not say, or say it wrong
    shift_factor: float | None = None  # the same
    fold_scale: float | None = None  # rewrite the weights so that this scaling_factor gives the latents of the source
    fold_shift: float | None = None  # the same for shift_factor; None is no shift
    add_quant_convs: bool = False  # with fold_scale: into 1x1 convolutions of their own where there are none
    license: str | None = None  # recorded with the result; None keeps what the source says
    config: Path | None = None  # config.json for the source, instead of the one beside it
    source_variant: str | None = None  # which of the source folder's weights, such as fp16
    into: Path | None = None  # a pipeline folder, of which the result is a copy with this VAE
    images: Path | None = None  # photographs that a folded encoder is measured on; None: the bundled ones
    verify: bool = True  # load the result back and compare it with the source
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        _one_of("to", self.to, TARGETS)
        _one_of("dtype", self.dtype, (None, *DTYPES))
        _one_of("prefix", self.prefix, PREFIXES)
        for name, targets in _ONLY_FOR.items():
            if getattr(self, name) and self.to not in targets:
                raise ConfigError(f"{_spelled(name)} is for --to {' and '.join(targets)}, not for --to {self.to}")
        if self.to == "onnx" and self.dtype == "bfloat16":
            raise ConfigError("--dtype bfloat16 is not for --to onnx: choose float32 or float16")
        if self.variant is not None and not _VARIANT.fullmatch(self.variant):
            raise ConfigError(f"--variant {self.variant!r}: expected letters and digits, such as fp16")
        if self.max_shard_size is not None and not _SIZE.fullmatch(self.max_shard_size):
            raise ConfigError(f"--max-shard-size {self.max_shard_size!r}: expected a size such as {MAX_SHARD_SIZE}")
        for name in ("scaling_factor", "fold_scale"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{_spelled(name)} is {value}; a scale is a number above 0")
        for name in ("shift_factor", "fold_shift"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ConfigError(f"{_spelled(name)} is {value}; expected a finite number")
        for name in ("fold_shift", "add_quant_convs", "images"):
            if getattr(self, name) and self.fold_scale is None:
                raise ConfigError(f"{_spelled(name)} belongs to --fold-scale, which is not given")

    def to_notes(self) -> dict[str, Any]:
        """The options that the result depends on, without those that have their default."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _NOT_IN_NOTES and (field.name == "to" or getattr(self, field.name) != field.default)
        }

    def source_fields(self) -> Mapping[str, float]:
        """Config fields of the source that were said outright."""
        given = {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        return {name: value for name, value in given.items() if value is not None}


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        names = ", ".join(repr(choice) for choice in known if choice is not None)
        raise ConfigError(f"{_spelled(name)} is {value!r}; known are {names}")


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")
