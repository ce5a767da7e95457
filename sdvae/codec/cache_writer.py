"""Writes the files of a latent cache, one by one and each whole. The manifest lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sdvae.codec.planning.plan import Item
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader
from sdvae.latents.manifest import Manifest
from sdvae.latents.registry import FORMATS, TensorItem
from sdvae.latents.safetensors import check_finite

__all__ = ["CacheWriter"]


class CacheWriter:
    """The files of some jobs: `add` for each latent (from any thread), and `finish` for each shard."""

    def __init__(self, out: Path, format: str, jobs: Iterable[Item]) -> None:
        self.out = out
        self.format = FORMATS[format]
        self.written = Manifest(format=format)  # the files that were written
        self._shard: list[TensorItem] = []  # of the shard that is being filled
        self._redone: dict[Path, set[str]] = {}  # keys that are encoded anew, by shard
        for job in jobs:
            self._redone.setdefault(job.output, set()).add(job.key)

    def add(self, output: Path, header: LatentHeader, tensors: Mapping[str, Tensor]) -> None:
        """Write one latent, or keep it for `finish`. Raises: LatentFileError for values not finite; OSError."""
        check_finite(header, tensors, output)
        item = (header, {name: tensor.contiguous() for name, tensor in tensors.items()})
        if self.format.is_sharded:
            self._shard.append(item)
        else:
            self._write_file(output, [item])

    def finish(self, output: Path) -> None:
        """Write a shard: what was added since the last one, and of the old shard what was up to date.

        Raises: LatentFileError where the old one cannot be read; OSError.
        """
        added, self._shard = self._shard, []
        old = list(self.format.read_items(output)) if output.exists() else []
        kept = [item for item in old if item[0].source.key not in self._redone[output]]
        if items := sorted([*added, *kept], key=lambda item: item[0].source.key):
            if added or len(kept) < len(old):
                self._write_file(output, items)
        else:
            output.unlink(missing_ok=True)  # all that it held is stale, and failed now

    def _write_file(self, output: Path, items: Sequence[TensorItem]) -> None:
        data = self.format.encode(items)
        write_atomic(data, output)
        shapes = [(header, tuple(next(iter(tensors.values())).shape)) for header, tensors in items]
        self.written.add(self.out, output, data, shapes)
