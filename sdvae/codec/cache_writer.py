"""Writes the files of a latent cache, one by one and each whole. What the manifest says of them is in listing.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sdvae.codec.listing import ListedFile, list_file, shape_of
from sdvae.codec.options import SHARDED_FORMATS
from sdvae.codec.plan import Item
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader
from sdvae.latents.registry import TensorItem, encode_file, read_items
from sdvae.latents.safetensors import check_finite

__all__ = ["CacheWriter"]


class CacheWriter:
    """The files of some jobs: `add` for each latent (from any thread), and `finish` for each shard."""

    def __init__(self, out: Path, format: str, jobs: Iterable[Item], written: dict[str, ListedFile]) -> None:
        self.out = out
        self.format = format
        self._written = written  # takes the files that are written, by path below `out`
        self._shard: list[TensorItem] = []  # of the shard that is being filled
        self._redone: dict[Path, set[str]] = {}  # keys that are encoded anew, by shard
        for job in jobs:
            self._redone.setdefault(job.output, set()).add(job.key)

    def add(self, output: Path, header: LatentHeader, tensors: Mapping[str, Tensor]) -> None:
        """Write one latent, or keep it for `finish`. Raises: LatentFileError for values not finite; OSError."""
        check_finite(header, tensors, output)
        item = (header, {name: tensor.contiguous() for name, tensor in tensors.items()})
        if self.format in SHARDED_FORMATS:
            self._shard.append(item)
        else:
            self._write_file(output, [item])

    def finish(self, output: Path) -> None:
        """Write a shard: what was added since the last one, and of the old shard what was up to date.

        Raises: LatentFileError where the old one cannot be read; OSError.
        """
        added, self._shard = self._shard, []
        old = list(read_items(output, self.format)) if output.exists() else []
        kept = [item for item in old if item[0].source.key not in self._redone[output]]
        if items := sorted([*added, *kept], key=lambda item: item[0].source.key):
            if added or len(kept) < len(old):
                self._write_file(output, items)
        else:
            output.unlink(missing_ok=True)  # all that it held is stale, and failed now

    def _write_file(self, output: Path, items: Sequence[TensorItem]) -> None:
        data = encode_file(items, self.format)
        write_atomic(data, output)
        listed = list_file(self.out, output, data, [(header, shape_of(tensors)) for header, tensors in items])
        self._written[listed.file.path] = listed
