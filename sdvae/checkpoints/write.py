"""Weights and configuration into a diffusers folder, perhaps sharded.

Writes where it is told, into a folder of its caller's; `files.new_folder` replaces what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdvae.checkpoints.fit import config_json
from sdvae.checkpoints.formats import CONFIG_NAME, WEIGHTS_NAME, json_text
from sdvae.checkpoints.notes import NOTES_FIELD, header_metadata
from sdvae.checkpoints.tensor_files import save_tensors
from sdvae.model.network import AutoencoderConfig

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

__all__ = ["planned_shards", "write_diffusers_folder"]


def write_diffusers_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    variant: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors into an existing folder, as diffusers names them.

    tensors: those of a VAE with these fields, under diffusers' names; each keeps its type.
    variant: as in diffusion_pytorch_model.<variant>.safetensors.
    max_shard_size: such as "10GB"; larger weights are split into files of at most this size, with an index. Then
        config.json alone carries the notes, else the header of the weights does too.
    Raises: ConfigError for impossible fields; OSError.
    """
    config = config_json(AutoencoderConfig(**fields)) | ({NOTES_FIELD: dict(notes)} if notes else {})
    (folder / CONFIG_NAME).write_text(json_text(config), encoding="utf-8")
    _write_weights(folder, tensors, header_metadata(config, notes), variant, max_shard_size)


def _write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    variant: str | None,
    max_shard_size: str | None,
) -> None:
    name = WEIGHTS_NAME.replace(".safetensors", f".{variant}.safetensors") if variant else WEIGHTS_NAME
    if max_shard_size is None:
        save_tensors(tensors, folder / name, metadata)
        return
    split = planned_shards(tensors, name, max_shard_size)
    if not split.is_sharded:
        save_tensors(tensors, folder / name, metadata)
        return
    for file, names in split.filename_to_tensors.items():
        save_tensors({tensor: tensors[tensor] for tensor in names}, folder / file, {"format": "pt"})
    end = f"index.{variant}.json" if variant else "index.json"
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / f"{WEIGHTS_NAME}.{end}").write_text(json_text(index), encoding="utf-8")


def planned_shards(tensors: Mapping[str, Tensor], name: str, max_shard_size: str) -> StateDictSplit:
    """Which weights go into which file, `name` or several of its kind; nothing is written."""
    from huggingface_hub import split_torch_state_dict_into_shards

    # Sizes alone: weights that share memory, as those of a pickle may, would all go into one file.
    sizes = {tensor: torch.empty_like(value, device="meta") for tensor, value in tensors.items()}
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    return split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=max_shard_size)
