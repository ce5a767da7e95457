"""The formats of latent caches, read alike: headers and tensors of any file. docs/latent-caches.md compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.errors import LatentFileError
from sdvae.latents import kohya
from sdvae.latents import parquet as parquet_cache
from sdvae.latents import webdataset as tar_cache
from sdvae.latents.header import LatentHeader
from sdvae.latents.safetensors import LatentFile, check_tensors

__all__ = ["TensorItem", "encode_file", "read_items"]

TensorItem = tuple[LatentHeader, Mapping[str, Tensor]]


def encode_file(items: Sequence[TensorItem], format: str) -> bytes:
    """A file of a cache; the formats that have a file for each image take one item.

    The tensors are those that `header.space` names, and for kohya-npz `latents` and perhaps `latents_flipped`.
    """
    if format == "safetensors":
        ((header, tensors),) = items
        return LatentFile(header=header, tensors=tensors).to_bytes()
    arrays = [(header, {name: tensor.numpy() for name, tensor in tensors.items()}) for header, tensors in items]
    if format == "kohya-npz":
        return kohya.to_bytes(*arrays[0])
    return tar_cache.to_bytes(arrays) if format == "webdataset" else parquet_cache.to_bytes(arrays)


def read_items(path: Path, format: str) -> Iterator[tuple[LatentHeader, dict[str, Tensor]]]:
    """The latents of a file, in its order: headers, and the tensors that `header.space` names, (C, h, w) on the CPU.

    Raises: LatentFileError for damage: also for shapes, types and values that do not go with the header.
    """
    if format == "safetensors":
        file = LatentFile.read(path)
        items = iter([(file.header, dict(file.tensors))])
    else:
        items = ((header, _to_tensors(arrays)) for header, arrays in _read_arrays(path, format))
    for header, tensors in items:
        for name, tensor in tensors.items():
            if tensor.dtype != getattr(torch, header.latent_dtype):
                raise LatentFileError(
                    f"{path}: damaged latent file: {name} is {tensor.dtype}; its header says {header.latent_dtype}"
                )
        check_tensors(header, tensors, path)
        yield header, tensors


def _read_arrays(path: Path, format: str) -> Iterator[tar_cache.CacheItem]:
    if format == "kohya-npz":
        return iter([kohya.read_arrays(path)])
    return tar_cache.read_items(path) if format == "webdataset" else parquet_cache.read_items(path)


def _to_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
