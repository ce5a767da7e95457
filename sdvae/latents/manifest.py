"""What a latent cache holds, with digests: OUT/manifest.jsonl, which `encode` writes and `verify` reads. No torch.

A header line says what all files have in common, then follows one line per file, sorted by path. docs/latent-caches.md
describes it for other readers. Every line was true of its file when it was written; a file that is not listed was
written by a run that did not come to its end.

A part of a run has a manifest of its own, manifest.part-2-of-8.jsonl, of the same form and with `part` in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdvae._version import __version__
from sdvae.errors import LatentFileError
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader, Preprocessing, VaeRecord, from_json_strict
from sdvae.latents.parts import Part

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "CacheSettings",
    "Manifest",
    "ManifestFile",
    "ManifestItem",
    "PartState",
    "find_part_manifests",
    "manifest_format",
    "part_manifest_name",
    "read_manifest",
    "read_part_state",
    "write_manifest",
]

MANIFEST_NAME = "manifest.jsonl"
SCHEMA = "sdvae.latent-cache/1"
_PART_PREFIX, _PART_SUFFIX = "manifest.part-", ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestItem:
    """One latent in a file."""

    key: str  # path of the image below the folder that was encoded, with "/"
    source_digest: str  # sha256:<hex> of the image file's bytes
    source_width: int  # px, upright, before resizing and cropping
    source_height: int
    shape: tuple[int, ...]  # (C, h, w) of each of its tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestFile:
    """One file of the cache."""

    path: str  # below the folder of the manifest, with "/"
    digest: str  # sha256:<hex> of its bytes
    size_bytes: int
    mtime_ns: int  # with size_bytes: a quick sign for the next run that the digest still holds
    settings: tuple[int, ...]  # which of `Manifest.settings` its items have: one, unless runs with others are mixed
    items: tuple[ManifestItem, ...]  # in the order of the file


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What decides the latents beside the images."""

    vae: VaeRecord
    preprocessing: Preprocessing
    store: str
    latent_dtype: str
    seed: int | None

    @classmethod
    def of(cls, header: LatentHeader) -> CacheSettings:
        return cls(
            vae=header.vae,
            preprocessing=header.preprocessing,
            store=header.store,
            latent_dtype=header.latent_dtype,
            seed=header.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PartState:
    """The part of a run that a manifest is of, and how far it is."""

    index: int  # from 1
    count: int
    complete: bool  # false from when it begins to write until it has come to its end
    num_failed: int  # images that it could not encode

    @property
    def part(self) -> Part:
        return Part(self.index, self.count)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files of a cache, or of a part of a run."""

    format: str  # one of `CACHE_FORMATS`
    settings: tuple[CacheSettings, ...]  # one, unless runs with different ones wrote into the same folder
    files: tuple[ManifestFile, ...]  # sorted by path
    sdvae_version: str = __version__
    part: PartState | None = None  # None: of the whole folder

    @property
    def num_files(self) -> int:
        return len(self.files)

    @property
    def num_items(self) -> int:
        return sum(len(file.items) for file in self.files)

    def common(self, name: str) -> Any:
        """A field of the settings where all files agree on it, else None."""
        values = [getattr(settings, name) for settings in self.settings]
        return values[0] if values and all(value == values[0] for value in values) else None

    @cached_property
    def by_path(self) -> Mapping[str, ManifestFile]:
        return {file.path: file for file in self.files}


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a cache; `path` is the folder or the file.

    Raises: LatentFileError where there is none, it is damaged, or comes from a later version.
    """
    path = _manifest_path(path)
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise LatentFileError(f"{path}: cannot be read as the manifest of a latent cache: {_reason(error)}") from error
    header = _parse_header(lines[0] if lines else "", path)
    try:
        settings = tuple(from_json_strict(CacheSettings, data) for data in header["settings"])
        files = tuple(from_json_strict(ManifestFile, json.loads(line)) for line in lines[1:])
        manifest = Manifest(
            format=header["format"],
            settings=settings,
            files=files,
            sdvae_version=header["sdvae_version"],
            part=_part_state(header),
        )
        counts = (header["num_files"], header["num_items"])
    except (KeyError, TypeError, ValueError) as error:
        raise LatentFileError(f"{path}: damaged manifest: {error}") from error
    unknown = {index for file in files for index in file.settings} - set(range(len(settings)))
    if unknown:
        raise LatentFileError(f"{path}: damaged manifest: there are no settings {min(unknown)}")
    if counts != (manifest.num_files, manifest.num_items):
        raise LatentFileError(
            f"{path}: damaged manifest: lists {manifest.num_files} files with {manifest.num_items} items, but its "
            f"header says {counts[0]} and {counts[1]}"
        )
    return manifest


def manifest_format(path: str | Path) -> str | None:
    """The format of a cache by the first line of its manifest; None where there is no manifest.

    Raises: LatentFileError where there is one that is not sdvae's.
    """
    header = _read_header(_manifest_path(path))
    return None if header is None else str(header["format"])


def read_part_state(path: Path) -> PartState | None:
    """What the first line of a part's manifest says of the part; None where there is none.

    Raises: LatentFileError where it is no manifest of a part.
    """
    if (header := _read_header(path)) is None:
        return None
    try:
        state = _part_state(header)
    except (TypeError, ValueError) as error:
        raise LatentFileError(f"{path}: damaged manifest: {error}") from error
    if state is None:
        raise LatentFileError(f"{path}: damaged manifest: its first line does not say of which part it is")
    return state


def part_manifest_name(part: Part) -> str:
    """manifest.part-2-of-8.jsonl"""
    return f"{_PART_PREFIX}{part.name}{_PART_SUFFIX}"


def find_part_manifests(out: Path) -> dict[Part, Path]:
    """The manifests of parts in a folder, in the order of the parts."""
    found = {}
    for path in out.glob(f"{_PART_PREFIX}*{_PART_SUFFIX}"):
        name = path.name.removeprefix(_PART_PREFIX).removesuffix(_PART_SUFFIX)
        if part := Part.from_name(name):
            found[part] = path
    return dict(sorted(found.items()))


def write_manifest(manifest: Manifest, out: Path) -> Path:
    """Write OUT/manifest.jsonl, or that of a part, whole or not at all; one that says the same already stays.

    Raises: OSError.
    """
    header = {
        "schema": SCHEMA,
        "format": manifest.format,
        "vae": _plain(manifest.common("vae")),
        "preprocessing": _plain(manifest.common("preprocessing")),
        "store": manifest.common("store"),
        "latent_dtype": manifest.common("latent_dtype"),
        "settings": [asdict(settings) for settings in manifest.settings],
        "num_files": manifest.num_files,
        "num_items": manifest.num_items,
        "sdvae_version": manifest.sdvae_version,
    }
    if manifest.part:
        header["part"] = asdict(manifest.part)
    lines = [header, *(asdict(file) for file in manifest.files)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
    path = out / (part_manifest_name(manifest.part.part) if manifest.part else MANIFEST_NAME)
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(data, path)
    return path


def _manifest_path(path: str | Path) -> Path:
    path = Path(path)
    return path / MANIFEST_NAME if path.is_dir() else path


def _read_header(path: Path) -> Mapping[str, Any] | None:
    """The first line; None where there is no file. Raises: LatentFileError where it is not that of a manifest."""
    try:
        with path.open(encoding="ascii") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise LatentFileError(f"{path}: cannot be read as the manifest of a latent cache: {_reason(error)}") from error
    return _parse_header(line, path)


def _part_state(header: Mapping[str, Any]) -> PartState | None:
    """Raises: ValueError."""
    return from_json_strict(PartState, header["part"]) if "part" in header else None


def _parse_header(line: str, path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(line)
        schema = header["schema"]
        known = isinstance(header["format"], str)
    except (KeyError, TypeError, ValueError) as error:
        raise LatentFileError(
            f"{path}: no manifest of a latent cache (its first line has no schema {SCHEMA})"
        ) from error
    if schema != SCHEMA or not known:
        raise LatentFileError(f"{path}: a manifest of schema {schema!r}; this sdvae reads {SCHEMA}: upgrade sdvae")
    return dict(header)


def _plain(record: VaeRecord | Preprocessing | None) -> dict[str, Any] | None:
    return None if record is None else asdict(record)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
