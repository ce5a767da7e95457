"""Which files of a folder are a latent cache, of which format, and what their latents say of themselves. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdvae.codec.options import SHARDED_FORMATS
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents import kohya
from sdvae.latents import parquet as parquet_cache
from sdvae.latents import webdataset as tar_cache
from sdvae.latents.header import LATENT_SUFFIX, LatentHeader, read_header
from sdvae.latents.manifest import MANIFEST_NAME, find_part_manifests, manifest_format
from sdvae.latents.parts import Part

__all__ = ["check_output_folder", "find_cache_files", "part_of_shard", "read_headers", "shard_name"]


@dataclass(frozen=True)
class _Kind:
    is_file_name: Callable[[str], bool]
    read_headers: Callable[[Path], list[LatentHeader]]


_KINDS = {
    "safetensors": _Kind(lambda name: name.endswith(LATENT_SUFFIX), lambda path: [read_header(path)]),
    "kohya-npz": _Kind(kohya.is_file_name, lambda path: [kohya.read_header(path)]),
    "webdataset": _Kind(tar_cache.is_file_name, tar_cache.read_headers),
    "parquet": _Kind(parquet_cache.is_file_name, parquet_cache.read_headers),
}
_SHARD_NAMES = {"webdataset": tar_cache.file_name, "parquet": parquet_cache.file_name}


def read_headers(path: Path, format: str) -> list[LatentHeader]:
    """The headers of the latents in a file, in its order. Raises: LatentFileError."""
    return _KINDS[format].read_headers(path)


def shard_name(number: int, format: str, part: Part | None = None) -> str:
    """The name of a shard, for a sharded format; each part of a run has names of its own."""
    return _SHARD_NAMES[format](number, part.name if part else "")


def part_of_shard(path: Path) -> Part | None:
    """The part of a run that `shard_name` gave this name to; None where it was a whole run."""
    match = re.search(r"-(\d+-of-\d+)-\d+\.", path.name)
    return Part.from_name(match[1]) if match else None


def find_cache_files(out: Path, format: str) -> list[Path]:
    """Files whose names are those of a format, sorted; hidden ones left out. Shards lie in the folder itself.

    What they hold is not looked at: they may be of others.
    """
    found = _walk(out, _KINDS[format].is_file_name, deep=format not in SHARDED_FORMATS)
    return sorted(found, key=lambda path: path.relative_to(out).as_posix())


def check_output_folder(out: Path, format: str, overwrite: bool) -> None:
    """Raises: ConfigError where latents of this format cannot go into the folder: it holds another's, or is a file."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the output")
    try:
        manifests = [out / MANIFEST_NAME, *find_part_manifests(out).values()] if out.is_dir() else []
        found = next((format for format in map(manifest_format, manifests) if format), None)
    except LatentFileError as error:
        if not overwrite:
            raise ConfigError(f"{error}: it would be replaced; move it away, or give --overwrite") from error
        found = None
    if found is None:
        found = next((name for name in _KINDS if _holds(out, name)), None)
    if found is not None and found != format:
        raise ConfigError(
            f"{out} holds latents of the format {found}; one folder takes one format: choose another for {format}, or "
            f"delete its files and its {MANIFEST_NAME}"
        )


def _holds(out: Path, format: str) -> bool:
    """Whether a file of this format lies in a folder."""
    kind = _KINDS[format]
    for path in _walk(out, kind.is_file_name, deep=format not in SHARDED_FORMATS):
        try:
            kind.read_headers(path)
            return True
        except (LatentFileError, ConfigError):  # of others, or it cannot be known here
            continue
    return False


def _walk(out: Path, is_file_name: Callable[[str], bool], deep: bool) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(out):
        subfolders[:] = [name for name in subfolders if deep and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if is_file_name(name) and not name.startswith("."))
