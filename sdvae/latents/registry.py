"""The formats of latent caches behind one interface: names, headers, tensors and bytes of files, and shards.

docs/latent-caches.md compares the formats.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents import kohya, parquet, safetensors, webdataset
from sdvae.latents.header import LATENT_SUFFIX, ArrayItem, LatentHeader, read_header
from sdvae.latents.parts import WHOLE, Part

__all__ = ["FORMATS", "CacheFormat", "part_of_shard"]


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How files of one format are named, read and written."""

    is_file_name: Callable[[str], bool]
    read_headers: Callable[[Path], list[LatentHeader]]  # in the order of the file; raises LatentFileError
    read_arrays: Callable[[Path], Iterator[tuple[LatentHeader, dict[str, Any]]]]  # of numpy or torch
    # A file; the formats that have a file for each image take one item. The arrays are those that `header.space` names,
    # and for kohya-npz `latents` and perhaps `latents_flipped`.
    to_bytes: Callable[[Sequence[ArrayItem]], bytes]
    name_of_shard: Callable[[int, str], str] | None = None  # None: a file for each image

    @property
    def is_sharded(self) -> bool:
        return self.name_of_shard is not None

    def shard_name(self, number: int, part: Part) -> str:
        """The name of a shard; each part of a run has names of its own."""
        assert self.name_of_shard is not None, "this format has no shards"
        return self.name_of_shard(number, "" if part == WHOLE else part.name)

    def find_files(self, out: Path) -> list[Path]:
        """Files whose names are those of the format, sorted; hidden ones left out. Shards lie in the folder itself.

        What they hold is not looked at: they may be of others.
        """
        return sorted(self._walk(out), key=lambda path: path.relative_to(out).as_posix())

    def is_in(self, out: Path) -> bool:
        """Whether a file of this format lies in a folder."""
        for path in self.find_files(out):
            try:
                self.read_headers(path)
                return True
            except (LatentFileError, ConfigError):  # of others, or it cannot be known here
                continue
        return False

    def read_items(self, path: Path) -> Iterator[tuple[LatentHeader, dict[str, Tensor]]]:
        """The latents of a file, in its order: headers, and the tensors that `header.space` names, (C, h, w), CPU.

        Raises: LatentFileError for damage: also for shapes, types and values that do not go with the header.
        """
        for header, arrays in self.read_arrays(path):
            tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
            for name, tensor in tensors.items():
                if tensor.dtype != getattr(torch, header.latent_dtype):
                    raise LatentFileError(
                        f"{path}: damaged latent file: {name} is {tensor.dtype}; its header says {header.latent_dtype}"
                    )
            safetensors.check_tensors(header, tensors, path)
            yield header, tensors

    def _walk(self, out: Path) -> Iterator[Path]:
        for folder, subfolders, names in os.walk(out):
            subfolders[:] = [name for name in subfolders if not self.is_sharded and not name.startswith(".")]
            yield from (Path(folder, name) for name in names if self.is_file_name(name) and not name.startswith("."))


FORMATS: dict[str, CacheFormat] = {
    "safetensors": CacheFormat(
        is_file_name=lambda name: name.endswith(LATENT_SUFFIX),
        read_headers=lambda path: [read_header(path)],
        read_arrays=lambda path: iter([safetensors.read_tensors(path)]),
        to_bytes=lambda items: safetensors.to_bytes(*items[0]),
    ),
    "kohya-npz": CacheFormat(
        is_file_name=kohya.is_file_name,
        read_headers=lambda path: [kohya.read_header(path)],
        read_arrays=lambda path: iter([kohya.read_arrays(path)]),
        to_bytes=lambda items: kohya.to_bytes(*items[0]),
    ),
    "webdataset": CacheFormat(
        is_file_name=webdataset.is_file_name,
        read_headers=webdataset.read_headers,
        read_arrays=webdataset.read_items,
        to_bytes=webdataset.to_bytes,
        name_of_shard=webdataset.file_name,
    ),
    "parquet": CacheFormat(
        is_file_name=parquet.is_file_name,
        read_headers=parquet.read_headers,
        read_arrays=parquet.read_items,
        to_bytes=parquet.to_bytes,
        name_of_shard=parquet.file_name,
    ),
}


def part_of_shard(path: Path) -> Part:
    """The part of a run that `CacheFormat.shard_name` gave this name to."""
    match = re.search(r"-(\d+-of-\d+)-\d+\.", path.name)
    return (Part.from_name(match[1]) if match else None) or WHOLE
