"""What a latent file says of itself: one JSON object in the safetensors header. No torch.

Planning and inspecting read this and never the tensors, which `safetensors.py` adds. docs/latent-files.md describes
the format for readers in other languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from sdvae.errors import LatentFileError

if TYPE_CHECKING:
    from sdvae.checkpoints.opened import OpenedVae

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "LATENT_SUFFIX",
    "TENSOR_NAMES",
    "LatentHeader",
    "Padding",
    "Preprocessing",
    "Size",
    "SourceRecord",
    "Space",
    "Store",
    "VaeRecord",
    "from_json_strict",
    "is_latent_file",
    "parse_header",
    "read_header",
]

T = TypeVar("T")

FORMAT = "sdvae-latent"
FORMAT_VERSION = 1
LATENT_SUFFIX = ".safetensors"

Space = Literal["moments", "z"]  # which tensors the file has: mean and logvar, or z
Store = Literal["moments", "mode", "sample"]  # how they came about
TENSOR_NAMES: dict[Space, tuple[str, ...]] = {"moments": ("mean", "logvar"), "z": ("z",)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Width and height of an image, px."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What was added around the image before encoding, px."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The image file that was encoded."""

    key: str  # path below the folder that was encoded, with "/"
    digest: str  # sha256:<hex> of the file's bytes
    size_bytes: int
    mtime_ns: int  # with size_bytes: a quick sign that the file is unchanged, before its bytes are read again
    width: int  # px, upright, before resizing and cropping
    height: int


@dataclass(frozen=True, kw_only=True)
class VaeRecord:
    """The VAE that encoded it."""

    name: str  # how the user called it: a path, a hub id, the name of the bundled one
    digest: str  # sha256:<hex> of configuration and weights: the identity that decoding compares
    dtype: str  # of the computation
    spatial_compression_ratio: int  # px per latent position, along one side
    scaling_factor: float
    shift_factor: float | None  # None: 0
    latents_mean: tuple[float, ...] | None = None  # per channel; both count where both are given, else neither does
    latents_std: tuple[float, ...] | None = None
    tile_size_px: int | None = None  # of blended tiling, which changes what comes out; None: the result of one pass
    tile_overlap: float | None = None  # share of a tile

    @classmethod
    def of(cls, vae: OpenedVae) -> VaeRecord:
        model: Any = vae.model
        execution = model.execution
        blended = execution.tiling == "blended"
        return cls(
            name=vae.name,
            digest=vae.digest,
            dtype=vae.dtype_name,
            spatial_compression_ratio=vae.spatial_compression_ratio,
            scaling_factor=vae.scale.scaling_factor,
            shift_factor=vae.scale.shift_factor,
            latents_mean=vae.scale.latents_mean,
            latents_std=vae.scale.latents_std,
            tile_size_px=execution.tile_sample_min_size if blended else None,
            tile_overlap=execution.tile_overlap_factor if blended else None,
        )

    @property
    def computation(self) -> str:
        """What a result depends on beside weights and input: the dtype, and blended tiles if there are any."""
        if self.tile_size_px is None:
            return self.dtype
        return f"{self.dtype} in tiles of {self.tile_size_px} px that overlap by {self.tile_overlap:g}"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How the file became pixels. Two equal records give equal pixels for equal files."""

    version: int  # of sdvae's image reading, raised when it changes pixel values
    background: str  # colour under transparent pixels
    size: int | None  # short side after resizing, px; None: not resized
    crop: str  # none or center
    # JPEGs were decoded at 1/2, 1/4 or 1/8 while their short side stayed this many times `size`; None: whole
    jpeg_margin: int | None = None

    @property
    def digest(self) -> str:
        """sha256:<hex> over the fields above; without `jpeg_margin` where it is None, as before there was one."""
        data = asdict(self)
        if self.jpeg_margin is None:
            del data["jpeg_margin"]
        return _digest(data)

    @property
    def min_side_px(self) -> int | None:
        """To this short side a JPEG may be reduced while it is decoded; None: not at all."""
        return None if self.size is None or self.jpeg_margin is None else self.size * self.jpeg_margin

    def differs_for(self, source: SourceRecord, other: Preprocessing) -> bool:
        """Whether the other one may give other pixels for this file. Every large one might be a JPEG."""
        if replace(self, jpeg_margin=None) != replace(other, jpeg_margin=None):
            return True
        return self._reduction(source) != other._reduction(source)

    def _reduction(self, source: SourceRecord) -> int:
        """At which part of its size the file is decoded, if it is a JPEG."""
        short, limit = min(source.width, source.height), self.min_side_px
        return 1 if limit is None else next((part for part in (8, 4, 2) if short // part >= limit), 1)


@dataclass(frozen=True, kw_only=True)
class LatentHeader:
    """Everything that a latent file records beside its tensors."""

    space: Space
    store: Store
    latent_dtype: Literal["float16", "float32"]
    seed: int | None  # of the draw: for store=sample, and for the `latents` of a kohya-npz file; else None
    source: SourceRecord
    image: Size  # what was encoded and what decoding returns: after resizing and cropping, before padding
    padding: Padding
    preprocessing: Preprocessing
    vae: VaeRecord
    notes: tuple[str, ...]  # of the image reader, e.g. that only the first frame was taken
    sdvae_version: str

    @property
    def latent_digest(self) -> str:
        """sha256:<hex> over all that decides the tensors. A copied or touched file keeps it."""
        data = self.to_json()
        for name in ("size_bytes", "mtime_ns"):
            del data["source"][name]
        for name in ("name", "latents_mean", "latents_std"):  # the digest of the VAE covers the last two
            del data["vae"][name]
        if self.vae.tile_size_px is None:  # as files say that were written before it could be anything else
            del data["vae"]["tile_size_px"], data["vae"]["tile_overlap"]
        if self.preprocessing.jpeg_margin is None:  # likewise
            del data["preprocessing"]["jpeg_margin"]
        del data["sdvae_version"]
        return _digest(data)

    def to_json(self) -> dict[str, Any]:
        """The object as it stands in the file."""
        data = {"format_version": FORMAT_VERSION} | asdict(self)
        data["preprocessing"]["digest"] = self.preprocessing.digest
        data["notes"] = list(self.notes)
        for name in ("latents_mean", "latents_std"):
            if data["vae"][name] is not None:
                data["vae"][name] = list(data["vae"][name])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatentHeader:
        """The inverse of `to_json`. Fields that this version does not know are passed over.

        Raises: ValueError, which names the field that is missing or wrong.
        """
        header = cast(LatentHeader, _build(cls, data, ""))
        if (header.space == "moments") != (header.store == "moments"):
            raise ValueError(f"space is '{header.space}', but store is '{header.store}'")
        return header

    def to_metadata(self) -> dict[str, str]:
        """The header as safetensors metadata, which holds text only."""
        return {"format": FORMAT, "sdvae": json.dumps(self.to_json())}  # ASCII: a name may hold no UTF-8


def from_json_strict(kind: type[T], data: Any) -> T:
    """A dataclass from its JSON object, strictly typed. Raises: ValueError, which names the field."""
    return cast(T, _build(kind, data, ""))


def read_header(path: Path) -> LatentHeader:
    """What a latent file says of itself, without reading its tensors.

    Raises: LatentFileError for a file that cannot be read, is cut off, is no latent file of sdvae, or comes from a
    later version of the format.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks that the file is as long as its header says
            metadata, names = file.metadata(), set(file.keys())
    except (OSError, SafetensorError) as error:
        raise LatentFileError(f"{path}: cannot be read as a latent file: {_reason(error)}") from error
    header = _parse_metadata(metadata, path)
    if names != set(TENSOR_NAMES[header.space]):
        expected = " and ".join(TENSOR_NAMES[header.space])
        raise LatentFileError(
            f"{path}: damaged latent file: holds the tensors {sorted(names)}; "
            f"expected {expected} for space '{header.space}'"
        )
    return header


def is_latent_file(path: Path) -> bool:
    """Whether a file says that it is a latent file of sdvae, of any version."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _parse_metadata(metadata: Mapping[str, str] | None, path: Path) -> LatentHeader:
    """The header from safetensors metadata. Raises: LatentFileError, which names `path`."""
    if metadata is None or metadata.get("format") != FORMAT:
        raise LatentFileError(f"{path}: a safetensors file, but no latent file of sdvae (no format '{FORMAT}')")
    return parse_header(metadata.get("sdvae"), path)


def parse_header(text: str | bytes | None, path: Path) -> LatentHeader:
    """The header from its JSON. Raises: LatentFileError, which names `path`."""
    try:
        data = json.loads(text or b"")
        version = int(data["format_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise LatentFileError(f"{path}: damaged latent file: its header is no JSON with a format_version") from error
    if version > FORMAT_VERSION:
        raise LatentFileError(
            f"{path}: latent file of format version {version}; "
            f"this sdvae reads versions up to {FORMAT_VERSION}: upgrade sdvae"
        )
    try:
        return LatentHeader.from_json(data)
    except ValueError as error:
        raise LatentFileError(f"{path}: damaged latent file: {error}") from error


# Resolving the annotations takes longer than all the rest of reading a header.
@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@lru_cache
def _required(kind: Any) -> frozenset[str]:
    """The fields without a default: those with one came later, and older files lack them."""
    return frozenset(field.name for field in fields(kind) if field.default is MISSING)


def _build(kind: Any, value: Any, name: str) -> Any:
    """A value from JSON as the type that a field declares, strictly; `name` is the field's dotted place."""
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = _hints(cast(type, kind))
        if missing := sorted(_required(cast(type, kind)) - value.keys()):
            raise ValueError(f"{name or 'the header'} has no {', '.join(missing)}")
        parts = {
            field: _build(hint, value[field], f"{name}.{field}".lstrip("."))
            for field, hint in hints.items()
            if field in value
        }
        return cast(Callable[..., Any], kind)(**parts)
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _build(get_args(kind)[0], value, name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_build(get_args(kind)[0], item, name) for item in value)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise ValueError(f"{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _digest(data: Mapping[str, Any]) -> str:
    return "sha256:" + sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
