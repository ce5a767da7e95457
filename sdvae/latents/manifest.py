"""What a latent cache holds, with digests: OUT/manifest.jsonl, which `encode` writes and `verify` reads. No torch.

A header line says what all files have in common, then follows one line per file, sorted by path. docs/latent-caches.md
describes it for other readers. Every line was true of its file when it was written; a file that is not listed was
written by a run that did not come to its end.

A run of the whole folder is part 1 of 1. Each other part has a manifest of its own, manifest.part-2-of-8.jsonl, of the
same form. A line names its settings by their digest, so manifests are joined by putting their lines together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdvae._version import __version__
from sdvae.errors import LatentFileError
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader, Preprocessing, VaeRecord, from_json_strict, reason_of
from sdvae.latents.parts import WHOLE, Part

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "CacheSettings",
    "Manifest",
    "ManifestFile",
    "ManifestItem",
    "PartState",
    "find_part_manifests",
    "manifest_name",
    "read_lines",
    "read_manifest",
    "read_state",
]

MANIFEST_NAME = "manifest.jsonl"
SCHEMA = "sdvae.latent-cache/2"
_SCHEMA_1 = "sdvae.latent-cache/1"  # of version 0.1: settings by number, items without size and time of their source
_PART_PREFIX, _PART_SUFFIX = "manifest.part-", ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestItem:
    """One latent in a file."""

    key: str  # path of the image below the folder that was encoded, with "/"
    source_digest: str  # sha256:<hex> of the image file's bytes
    source_width: int  # px, upright, before resizing and cropping
    source_height: int
    shape: tuple[int, ...]  # (C, h, w) of each of its tensors
    source_size_bytes: int | None = None  # with the time: a quick sign that the image is unchanged; None in old lines
    source_mtime_ns: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestFile:
    """One file of the cache."""

    path: str  # below the folder of the manifest, with "/"
    digest: str  # sha256:<hex> of its bytes
    size_bytes: int
    mtime_ns: int  # with size_bytes: a quick sign for the next run that the digest still holds
    settings: tuple[str, ...]  # digests of those that its items have: one, unless runs with others are mixed
    items: tuple[ManifestItem, ...]  # in the order of the file

    def is_unchanged(self, out: Path) -> bool:
        """Whether the file has the size and the time that this line says: a quick sign that the line is true."""
        try:
            status = (out / self.path).stat()
        except OSError:
            return False
        return (self.size_bytes, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


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

    @property
    def digest(self) -> str:
        """sha256:<hex> of all but the VAE's name: a path and a hub id may mean the same."""
        return _settings_digest(asdict(self))


@dataclass(frozen=True, kw_only=True)
class PartState:
    """The part of a run that a manifest is of, and how far it is."""

    index: int = 1  # from 1
    count: int = 1
    complete: bool = True  # false from when it begins to write until it has come to its end
    num_failed: int = 0  # images that it could not encode

    @property
    def part(self) -> Part:
        return Part(self.index, self.count)


@dataclass(kw_only=True)
class Manifest:
    """The files of a cache, or of a part of a run."""

    format: str  # one of `CACHE_FORMATS`
    files: dict[str, ManifestFile] = field(default_factory=dict)  # by path
    settings: dict[str, CacheSettings] = field(default_factory=dict)  # by digest; those of the files, in their order
    state: PartState = PartState()
    sdvae_version: str = __version__

    @property
    def num_files(self) -> int:
        return len(self.files)

    @property
    def num_items(self) -> int:
        return sum(len(file.items) for file in self.files.values())

    def common(self, name: str) -> Any:
        """A field of the settings if all files agree on it, else None."""
        values = [getattr(settings, name) for settings in self.settings.values()]
        return values[0] if values and all(value == values[0] for value in values) else None

    def add(self, out: Path, path: Path, data: bytes, items: Sequence[tuple[LatentHeader, tuple[int, ...]]]) -> None:
        """List a file that holds `data`. items: of each latent its header and the shape of its tensors."""
        settings = {each.digest: each for each in {CacheSettings.of(header): None for header, _ in items}}
        relative = path.relative_to(out).as_posix()
        for digest, each in settings.items():
            self.settings.setdefault(digest, each)
        self.files[relative] = ManifestFile(
            path=relative,
            digest=f"sha256:{sha256(data).hexdigest()}",
            size_bytes=len(data),
            mtime_ns=path.stat().st_mtime_ns,
            settings=tuple(sorted(settings)),
            items=tuple(
                ManifestItem(
                    key=header.source.key,
                    source_digest=header.source.digest,
                    source_width=header.source.width,
                    source_height=header.source.height,
                    shape=shape,
                    source_size_bytes=header.source.size_bytes,
                    source_mtime_ns=header.source.mtime_ns,
                )
                for header, shape in items
            ),
        )

    def update(self, other: Manifest) -> None:
        """Take over all lines of another one; its lines win."""
        self.files.update(other.files)
        for digest, settings in other.settings.items():
            self.settings.setdefault(digest, settings)

    def only(self, paths: Iterable[str]) -> Manifest:
        """The lines of these files, sorted, and the settings that they have."""
        files = {path: self.files[path] for path in sorted(self.files.keys() & set(paths))}
        used = {digest: self.settings[digest] for file in files.values() for digest in file.settings}
        return Manifest(format=self.format, files=files, settings=used, state=self.state)

    def write(self, out: Path) -> Path:
        """Write OUT/manifest.jsonl, or that of a part, whole or not at all; one that says the same already stays.

        Raises: OSError.
        """
        header = {
            "schema": SCHEMA,
            "format": self.format,
            "vae": _plain(self.common("vae")),
            "preprocessing": _plain(self.common("preprocessing")),
            "store": self.common("store"),
            "latent_dtype": self.common("latent_dtype"),
            "settings": {digest: asdict(settings) for digest, settings in self.settings.items()},
            "num_files": self.num_files,
            "num_items": self.num_items,
            "sdvae_version": self.sdvae_version,
            "part": asdict(self.state),
        }
        lines = [header, *(asdict(self.files[path]) for path in sorted(self.files))]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
        path = out / manifest_name(self.state.part)
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(data, path)
        return path


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a cache; `path` is the folder or the file.

    Raises: LatentFileError if there is none, it is damaged, or comes from a later version.
    """
    path = Path(path)
    path = path / MANIFEST_NAME if path.is_dir() else path
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise LatentFileError(
            f"{path}: cannot be read as the manifest of a latent cache: {reason_of(error)}"
        ) from error
    header = _parse_header(lines[0] if lines else "", path)
    try:
        settings, names = _settings(header)
        files: dict[str, ManifestFile] = {}
        for line in lines[1:]:
            data = json.loads(line)
            if unknown := [name for name in data["settings"] if name not in names]:
                raise ValueError(f"there are no settings {unknown[0]!r}")
            data["settings"] = [names[name] for name in data["settings"]]
            file = from_json_strict(ManifestFile, data)
            if file.path in files:
                raise ValueError(f"{file.path} is listed twice")
            files[file.path] = file
        manifest = Manifest(
            format=header["format"],
            files=files,
            settings=settings,
            state=_state(header),
            sdvae_version=header["sdvae_version"],
        )
        counts = (header["num_files"], header["num_items"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LatentFileError(f"{path}: damaged manifest: {error}") from error
    if counts != (manifest.num_files, manifest.num_items):
        raise LatentFileError(
            f"{path}: damaged manifest: lists {manifest.num_files} files with {manifest.num_items} items, but its "
            f"header says {counts[0]} and {counts[1]}"
        )
    return manifest


def read_lines(manifests: Iterable[Path]) -> Manifest:
    """The lines of some manifests; later ones win. Those that are missing, or damaged, have none."""
    lines = Manifest(format="")
    for path in manifests:
        with contextlib.suppress(LatentFileError):  # missing, or one that the plan found replaceable
            lines.update(read_manifest(path))
    return lines


def read_state(path: Path) -> tuple[str, PartState] | None:
    """What the first line of a manifest says: its format, and its part; None if there is no manifest.

    Raises: LatentFileError if it is not one of sdvae's.
    """
    try:
        with path.open(encoding="ascii") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise LatentFileError(
            f"{path}: cannot be read as the manifest of a latent cache: {reason_of(error)}"
        ) from error
    header = _parse_header(line, path)
    try:
        return str(header["format"]), _state(header)
    except (TypeError, ValueError) as error:
        raise LatentFileError(f"{path}: damaged manifest: {error}") from error


def manifest_name(part: Part) -> str:
    """manifest.part-2-of-8.jsonl; of the whole manifest.jsonl."""
    return MANIFEST_NAME if part == WHOLE else f"{_PART_PREFIX}{part.name}{_PART_SUFFIX}"


def find_part_manifests(out: Path) -> dict[Part, Path]:
    """The manifests of parts in a folder, in the order of the parts."""
    found = {}
    for path in out.glob(f"{_PART_PREFIX}*{_PART_SUFFIX}"):
        name = path.name.removeprefix(_PART_PREFIX).removesuffix(_PART_SUFFIX)
        if part := Part.from_name(name):
            found[part] = path
    return dict(sorted(found.items()))


def _parse_header(line: str, path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(line)
        schema = header["schema"]
        known = isinstance(header["format"], str)
    except (KeyError, TypeError, ValueError) as error:
        raise LatentFileError(
            f"{path}: no manifest of a latent cache (its first line has no schema {SCHEMA})"
        ) from error
    if schema not in (SCHEMA, _SCHEMA_1) or not known:
        raise LatentFileError(f"{path}: a manifest of schema {schema!r}; this sdvae reads {SCHEMA}: upgrade sdvae")
    return dict(header)


def _settings(header: Mapping[str, Any]) -> tuple[dict[str, CacheSettings], dict[Any, str]]:
    """Settings by digest, and the digest for what lines call them: in old manifests that is a number.

    Records may gain fields, and with them other digests; then settings have another name here than in the file.
    """
    said = header["settings"]
    named = dict(enumerate(said)) if header["schema"] == _SCHEMA_1 else dict(said)
    found = {name: from_json_strict(CacheSettings, data) for name, data in named.items()}
    if header["schema"] == SCHEMA and (wrong := [name for name in named if name != _settings_digest(named[name])]):
        raise ValueError(f"the settings {wrong[0]!r:.24} are not those of this digest")
    names = {name: settings.digest for name, settings in found.items()}
    return {settings.digest: settings for settings in found.values()}, names


def _settings_digest(data: Mapping[str, Any]) -> str:
    nameless = {**data, "vae": {name: value for name, value in data["vae"].items() if name != "name"}}
    return f"sha256:{sha256(json.dumps(nameless, sort_keys=True).encode()).hexdigest()}"


def _state(header: Mapping[str, Any]) -> PartState:
    """Old manifests of a whole folder do not say so. Raises: ValueError."""
    return from_json_strict(PartState, header["part"]) if "part" in header else PartState()


def _plain(record: VaeRecord | Preprocessing | None) -> dict[str, Any] | None:
    return None if record is None else asdict(record)


def _unreadable(path: Path, error: Exception) -> LatentFileError:
    return LatentFileError(f"{path}: cannot be read as the manifest of a latent cache: {reason_of(error)}")
