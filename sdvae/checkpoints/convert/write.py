"""Writes the result of a conversion into a hidden place, which then takes that of its target."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from sdvae.checkpoints.convert.plan import Conversion, Place
from sdvae.checkpoints.notes import header_metadata
from sdvae.checkpoints.store import keep_card
from sdvae.checkpoints.tensor_files import save_tensors
from sdvae.checkpoints.write import write_diffusers_folder
from sdvae.files import new_file, new_folder

__all__ = ["add_the_rest", "new_output", "write"]


def new_output(place: Place) -> AbstractContextManager[Path]:
    """A path that takes the target's place when the block ends without error."""
    if place.options.to == "ldm":
        return new_file(place.target)
    return new_folder(place.target, overwrite=place.options.overwrite, is_ours=place.why_not_replace)


def write(conversion: Conversion, fresh: Path) -> Mapping[str, Any] | None:
    """Write the VAE. Returns: the exporter's report for ONNX, else None."""
    options = conversion.place.options
    if options.to == "onnx":
        from sdvae.checkpoints.convert.onnx import export_onnx

        dtype = getattr(torch, options.dtype or "float32")
        return export_onnx(conversion.result_vae, fresh, dtype=dtype, notes=conversion.notes).to_json()
    if options.to == "ldm":
        save_tensors(conversion.stored, fresh, header_metadata(conversion.fields, conversion.notes))
        return None
    folder = conversion.place.weights_path(fresh)
    folder.mkdir(exist_ok=True)
    write_diffusers_folder(
        folder,
        conversion.stored,
        conversion.fields,
        conversion.notes,
        variant=options.variant,
        max_shard_size=options.max_shard_size,
    )
    return None


def add_the_rest(place: Place, fresh: Path) -> None:
    """Copy what comes along with a VAE: the rest of its pipeline, or the card of the one that it replaces."""
    if place.pipeline:
        place.pipeline.copy_to(fresh)
    elif place.options.to == "diffusers":
        keep_card(place.target, fresh)
