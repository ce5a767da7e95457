"""Writes the files of a latent cache, one by one and each whole, and keeps its manifest true at every moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from sdvae.codec.cache_files import find_cache_files
from sdvae.codec.cache_formats import TensorItem, encode_file, read_items
from sdvae.codec.kohya import without_size
from sdvae.codec.latent_file import check_finite
from sdvae.codec.latent_header import LatentHeader
from sdvae.codec.manifest import (
    CacheSettings,
    Manifest,
    ManifestFile,
    ManifestItem,
    read_manifest,
    write_manifest,
)
from sdvae.codec.options import SHARDED_FORMATS
from sdvae.codec.plan import Item
from sdvae.errors import LatentFileError
from sdvae.files import write_atomic

__all__ = ["CacheWriter"]


class CacheWriter:
    """The files of one run: `begin`, then `add` for each latent (from any thread), `finish` for each shard, `close`."""

    def __init__(self, out: Path, format: str) -> None:
        self.out = out
        self.format = format
        self._listed: dict[str, _Listed] = {}  # what is known of files, by path
        self._written: set[str] = set()  # by this run
        self._shard: list[TensorItem] = []  # of the shard that is being filled
        self._redone: dict[Path, set[str]] = {}  # keys that this run encodes, by shard

    def begin(self, jobs: Iterable[Item]) -> None:
        """Take from the manifest what this run will replace: a killed run leaves no line that is not true.

        Raises: OSError.
        """
        try:
            old = read_manifest(self.out)
        except LatentFileError:  # none, or one that the plan found replaceable
            old = Manifest(format=self.format, settings=(), files=())
        for file in old.files:
            self._listed[file.path] = _Listed(file, tuple(old.settings[index] for index in file.settings))
        for job in jobs:
            self._redone.setdefault(job.output, set()).add(job.key)
        replaced = {self._relative(output) for output in self._redone}
        if replaced:
            self._write_manifest({path: listed for path, listed in self._listed.items() if path not in replaced})

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

    def close(self) -> Path:
        """Write the manifest of all files of this format that are there, of this run or not. Raises: OSError."""
        listed = {}
        for path in find_cache_files(self.out, self.format):
            relative, status = self._relative(path), path.stat()
            known = self._listed.get(relative)
            if known is None or (known.file.size_bytes, known.file.mtime_ns) != (status.st_size, status.st_mtime_ns):
                try:
                    items = [(header, _shape(tensors)) for header, tensors in read_items(path, self.format)]
                except LatentFileError:  # of others: the next plan says so where it is in the way
                    continue
                known = self._list(path, path.read_bytes(), items)
            listed[relative] = known
        if self.format == "kohya-npz":
            self._delete_replaced(listed)
        return self._write_manifest(listed)

    def _delete_replaced(self, listed: dict[str, _Listed]) -> None:
        """Delete what an earlier run wrote for an image that has another size now, and so another name."""
        written = {_kohya_identity(listed[path]): path for path in self._written if path in listed}
        for path, found in list(listed.items()):
            if written.get(_kohya_identity(found), path) != path:
                (self.out / path).unlink(missing_ok=True)
                del listed[path]

    def _write_file(self, output: Path, items: Sequence[TensorItem]) -> None:
        data = encode_file(items, self.format)
        write_atomic(data, output)
        self._written.add(self._relative(output))
        self._listed[self._relative(output)] = self._list(output, data, [(h, _shape(tensors)) for h, tensors in items])

    def _list(self, path: Path, data: bytes, items: Sequence[tuple[LatentHeader, tuple[int, ...]]]) -> _Listed:
        status = path.stat()
        file = ManifestFile(
            path=self._relative(path),
            digest=f"sha256:{sha256(data).hexdigest()}",
            size_bytes=len(data),
            mtime_ns=status.st_mtime_ns,
            settings=(),
            items=tuple(
                ManifestItem(
                    key=header.source.key,
                    source_digest=header.source.digest,
                    source_width=header.source.width,
                    source_height=header.source.height,
                    shape=shape,
                )
                for header, shape in items
            ),
        )
        return _Listed(file, tuple({CacheSettings.of(header): None for header, _ in items}))

    def _write_manifest(self, listed: Mapping[str, _Listed]) -> Path:
        numbers: dict[CacheSettings, int] = {}  # without the VAE's name: a path and a hub id may mean the same
        settings: list[CacheSettings] = []
        files = []
        for path in sorted(listed):
            indices = set()
            for found in listed[path].settings:
                nameless = replace(found, vae=replace(found.vae, name=""))
                if nameless not in numbers:
                    numbers[nameless] = len(settings)
                    settings.append(found)
                indices.add(numbers[nameless])
            files.append(replace(listed[path].file, settings=tuple(sorted(indices))))
        manifest = Manifest(format=self.format, settings=tuple(settings), files=tuple(files))
        return write_manifest(manifest, self.out)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


@dataclass(frozen=True)
class _Listed:
    file: ManifestFile  # its `settings` are empty: which numbers they have is known when all files are
    settings: tuple[CacheSettings, ...]


def _kohya_identity(listed: _Listed) -> tuple[str, str]:
    return without_size(listed.file.path), listed.file.items[0].key


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(next(iter(tensors.values())).shape)
