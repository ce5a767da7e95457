"""Shards that the webdataset library reads: tar files with three or two members for each latent. No torch.

    cats/a%2Ejpg.json  cats/a%2Ejpg.mean.npy  cats/a%2Ejpg.logvar.npy      (or .json and .z.npy)

webdataset ends a sample's key at the first dot of the file name, so that a.jpg and a.png would be one sample: dots and
all that is not plain ASCII stand as %XX in the key. The JSON is the header of the latent. Equal items give equal bytes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import LatentFileError
from sdvae.latents.header import TENSOR_NAMES, ArrayItem, LatentHeader, parse_header, reason_of

__all__ = ["escape_key", "file_name", "is_file_name", "read_headers", "read_items", "to_bytes"]

_JSON = ".json"


def file_name(number: int, part: str = "") -> str:
    """The name of a shard, counted from 0: shard-000000.tar, or of a part of a run shard-2-of-8-000000.tar."""
    return f"shard-{part}{part and '-'}{number:06d}.tar"


def is_file_name(name: str) -> bool:
    """Whether `file_name` gives this name to some shard."""
    return re.fullmatch(r"shard-(\d+-of-\d+-)?\d{6,}\.tar", name) is not None


def escape_key(key: str) -> str:
    """The `__key__` of a sample; `urllib.parse.unquote` is the inverse."""
    escaped = quote(key.encode("utf-8", "surrogateescape"), safe="/").replace(".", "%2E")
    return re.sub(r"(^|/)__", r"\1%5F_", escaped)  # webdataset passes over __names__ that look like its own


def to_bytes(items: Sequence[ArrayItem]) -> bytes:
    """The shard, members in the order of the items."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for header, arrays in items:
            key = escape_key(header.source.key)
            _add(tar, key + _JSON, json.dumps(header.to_json()).encode("ascii"))
            for name in TENSOR_NAMES[header.space]:
                _add(tar, f"{key}.{name}.npy", _npy(arrays[name]))
    return buffer.getvalue()


def read_headers(path: Path) -> list[LatentHeader]:
    """What the latents of a shard say of themselves, without reading their arrays. Raises: LatentFileError."""
    return [_header(data, key, path) for key, name, data in _members(path, only=_JSON) if name == _JSON]


def read_items(path: Path) -> Iterator[ArrayItem]:
    """Headers and arrays, one by one. Raises: LatentFileError."""
    header, arrays, current = None, dict[str, NDArray[Any]](), ""
    for key, name, data in _members(path):
        if name == _JSON:
            if header is not None:
                yield header, _complete(header, arrays, path)
            header, arrays, current = _header(data, key, path), {}, key
        elif header is None or key != current:
            raise LatentFileError(f"{path}: damaged latent file: {key}{name} stands without its header")
        else:
            arrays[name.removeprefix(".").removesuffix(".npy")] = _array(data, f"{key}{name}", path)
    if header is not None:
        yield header, _complete(header, arrays, path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes, name: str, path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(io.BytesIO(data))
        return array
    except (ValueError, EOFError) as error:
        raise LatentFileError(f"{path}: damaged latent file: {name} is no array: {error}") from error


def _members(path: Path, only: str = "") -> Iterator[tuple[str, str, bytes]]:
    """Key, rest of the name and content of each member whose name ends in `only`."""
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(only):
                    folder, slash, base = member.name.rpartition("/")
                    stem, dot, rest = base.partition(".")
                    file = tar.extractfile(member)
                    yield folder + slash + stem, dot + rest, b"" if file is None else file.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise LatentFileError(f"{path}: cannot be read as a shard of latents: {reason_of(error)}") from error


def _check_end(path: Path) -> None:
    """A tar that was cut off between two members passes for a shorter one, but for its missing end mark."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
        if size % tarfile.RECORDSIZE or any(file.read()):
            raise tarfile.ReadError("cut off: it has no end mark")


def _header(data: bytes, key: str, path: Path) -> LatentHeader:
    header = parse_header(data, path)
    if escape_key(header.source.key) != key:
        raise LatentFileError(f"{path}: damaged latent file: {key}{_JSON} is the header of {header.source.key!r}")
    return header


def _complete(header: LatentHeader, arrays: dict[str, NDArray[Any]], path: Path) -> dict[str, NDArray[Any]]:
    if set(arrays) != set(TENSOR_NAMES[header.space]):
        expected = " and ".join(TENSOR_NAMES[header.space])
        raise LatentFileError(
            f"{path}: damaged latent file: {header.source.key!r} has the arrays {sorted(arrays)}; expected {expected}"
        )
    return arrays
