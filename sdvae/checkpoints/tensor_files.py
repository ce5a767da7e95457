"""Tensors in safetensors files, pickles and shards: found at once, read one by one, and no file runs code; and written.

Knows nothing of autoencoders: names are those in the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdvae.checkpoints import formats
from sdvae.errors import CheckpointError, some

__all__ = ["Readers", "differing", "open_tensors", "save_tensors"]

# Name -> what reads that tensor. Of safetensors files and pickles made since 2020, reading is left to the moment when
# the values are looked at.
Readers = dict[str, Callable[[], Tensor]]


def open_tensors(weights: Path) -> tuple[Readers, dict[str, str]]:
    """What reads each tensor of a file, or of the files that an index names; and the metadata of a safetensors header.

    Raises: CheckpointError that names the file, where it is missing, damaged or unsafe.
    """
    if weights.suffix == ".json":
        return _open_shards(weights), {}
    if not weights.is_file():
        raise CheckpointError(f"{weights}: named by the index beside it, but not there; copy or download it again")
    if weights.suffix in formats.PICKLE_SUFFIXES:
        return {name: partial(_itself, tensor) for name, tensor in _read_pickle(weights).items()}, {}
    try:
        file: Any = safe_open(weights, framework="pt")
        return {name: partial(_get, file, name, weights) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        formats.read_shapes(weights)  # explains damage better than the library
        raise CheckpointError(f"{weights}: cannot be read: {error}") from error


def _get(file: Any, name: str, path: Path) -> Tensor:
    try:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    except Exception as error:  # the library's, or torch's about a type that it lacks
        raise CheckpointError(f"{path}: `{name}` cannot be read: {error}") from error


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _open_shards(index: Path) -> Readers:
    files = formats.shard_names(index)
    readers: Readers = {}
    for file in sorted(set(files.values())):
        shard, _ = open_tensors(index.with_name(file))
        if strays := [name for name in shard if files.get(name) != file]:
            raise CheckpointError(f"{index}: {file} holds weights that the index does not place there: {strays[0]}")
        readers |= shard
    if lacking := sorted(files.keys() - readers.keys()):
        raise CheckpointError(f"{index}: {len(lacking)} weights are not in the files that it names: {some(lacking, 3)}")
    return readers


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped, so that of a whole checkpoint only the VAE's part is read. Files of torch before 1.6 cannot be.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: refused, for it is damaged or holds more than tensors and could run code "
            f"({type(error).__name__}). If you trust its source, open it and save its state dict as .safetensors"
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(tensor, Tensor) for tensor in data.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, or one under `state_dict`; found {_contents(data)}")
    return dict(data)


def _contents(data: object) -> str:
    if not isinstance(data, Mapping):
        return f"one {type(data).__name__}"
    return "a dict with " + some([f"{name}: {type(value).__name__}" for name, value in data.items()], 3)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, in a folder that is to be put in place as a whole. Raises: OSError."""
    # the library refuses tensors that share memory, as those of a pickle may
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(own, path, metadata=dict(metadata))
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from error


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal in type and bits: -0.0 is not 0.0, and nan is itself."""
    names = sorted(one.keys() ^ other.keys())
    for name in (name for name in other if name in one):
        pair = (one[name], other[name])
        same_kind = pair[0].dtype == pair[1].dtype and pair[0].shape == pair[1].shape
        bits = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in pair)
        if not same_kind or not torch.equal(*bits):
            names.append(name)
    return names
