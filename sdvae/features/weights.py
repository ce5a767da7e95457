"""Weights of frozen networks: where they are looked for, and how they are read.

Looked for in an explicit path, in $SDVAE_WEIGHTS, in torch hub's cache; then downloaded into that cache. Left out: the
networks themselves; a new one needs a row in the table here and the shapes of its tensors from its own module.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdvae.errors import CheckpointError, MissingWeightsError

__all__ = ["KNOWN_WEIGHTS", "SEARCH_VARIABLE", "KnownWeights", "find_weights", "load_weights"]

SEARCH_VARIABLE = "SDVAE_WEIGHTS"  # folders or files, separated as in PATH
_TIMEOUT_S = 10.0  # without an answer for this long, a download has failed; the library itself would wait for ever

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """One published file. Its name ends, before the suffix, in the first hex digits of its SHA-256."""

    url: str
    size_mb: int  # of the download
    other_names: tuple[str, ...] = ()  # of files with the same tensors, or with the part of them that is used

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def sha256_prefix(self) -> str:
        return PurePosixPath(self.url).stem.rpartition("-")[2]

    @property
    def file_names(self) -> tuple[str, ...]:
        """In the order of preference within one folder."""
        return (self.file_name, *self.other_names)


def _imagenet(file_name: str, size_mb: int, stem: str) -> KnownWeights:
    names = (f"{stem}_features.safetensors", f"{stem}_features_fp16.safetensors")
    return KnownWeights(url=f"https://download.pytorch.org/models/{file_name}", size_mb=size_mb, other_names=names)


# The first three as torchvision 0.28 publishes them (IMAGENET1K_V1); of their tensors only `features.*` is used.
# The last as torch-fidelity 0.4.0 does (feature_extractor_inceptionv3.py), converted from TensorFlow's of 2015-12-05.
KNOWN_WEIGHTS: dict[str, KnownWeights] = {
    "vgg16": _imagenet("vgg16-397923af.pth", 528, "vgg16"),
    "alexnet": _imagenet("alexnet-owt-7be5be79.pth", 233, "alexnet"),
    "squeezenet1_1": _imagenet("squeezenet1_1-b8a52dc0.pth", 5, "squeezenet1_1"),
    "inception": KnownWeights(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        size_mb=91,
        other_names=("fid_inception_2015-12-05.safetensors", "fid_inception_2015-12-05_fp16.safetensors"),
    ),
}


def find_weights(
    name: str,
    explicit: str | Path | None = None,
    *,
    option: str = "weights_path",
    without: str = "",
    allow_download: bool = True,
) -> Path:
    """Path of a known network's weights on this machine, downloaded where it must be.

    name: a key of KNOWN_WEIGHTS.
    explicit: a file of any name, or a folder that holds one of the known names; nothing else is then looked at.
    option: what the user calls `explicit`; without: how the user does without these weights. Both for the message.
    allow_download: HF_HUB_OFFLINE=1 forbids it as well.
    Raises: MissingWeightsError, which names every place tried and every way to provide the file.
    """
    known = KNOWN_WEIGHTS[name]
    if explicit is not None:
        path = Path(explicit).expanduser()
        tried = [f"{option} = {explicit}: {_lack(path, known)}"]
        found = path if path.is_file() else _known_file(path, known)
        return found or _raise_missing(name, tried, option, without)
    tried = []
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [(f"${SEARCH_VARIABLE}", place) for place in _search_path()] + [("torch hub's cache", cache)]
    for origin, place in places:
        if found := _known_file(place, known):
            return found
        tried.append(f"{origin}, {place}: {_lack(place, known)}")
    if not os.environ.get(SEARCH_VARIABLE):
        tried.insert(0, f"${SEARCH_VARIABLE}: not set")
    if not allow_download or _is_offline():
        tried.append(f"{known.url}: not asked, {'HF_HUB_OFFLINE is set' if _is_offline() else 'not allowed here'}")
        return _raise_missing(name, tried, option, without)
    try:
        return _download(known, cache / known.file_name)
    # OSError: no network, no server, no disk; RuntimeError: the hash; HTTPException: what is no HTTP
    except (OSError, RuntimeError, HTTPException) as error:
        tried.append(f"{known.url}: {type(error).__name__}: {error}")
        return _raise_missing(name, tried, option, without)


def _search_path() -> list[Path]:
    return [Path(part).expanduser() for part in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if part]


def _known_file(place: Path, known: KnownWeights) -> Path | None:
    """The file itself, if its name is a known one, or the first such file in the folder."""
    if place.is_file():
        return place if place.name in known.file_names else None
    return next((place / file_name for file_name in known.file_names if (place / file_name).is_file()), None)


def _lack(place: Path, known: KnownWeights) -> str:
    if place.is_file():
        return "a file of another name"
    return f"holds none of {', '.join(known.file_names)}" if place.is_dir() else "not there"


def _is_offline() -> bool:
    # The values that huggingface_hub takes for yes; its constant would keep the value from the time of its import.
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download(known: KnownWeights, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("downloading %s (%d MB) to %s", known.url, known.size_mb, target)
    with _socket_timeout(_TIMEOUT_S):
        # writes beside the target, compares the hash, then renames
        torch.hub.download_url_to_file(known.url, str(target), known.sha256_prefix, progress=sys.stderr.isatty())
    return target


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)  # torch.hub passes none of its own
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _raise_missing(name: str, tried: list[str], option: str, without: str) -> Path:
    known = KNOWN_WEIGHTS[name]
    target = Path(torch.hub.get_dir()) / "checkpoints" / known.file_name
    ways = [
        f"{option}: set it to the file, or to a folder that holds {' or '.join(known.file_names)}",
        f"${SEARCH_VARIABLE}: set it to such a folder (several are separated by '{os.pathsep}')",
        f"by hand: fetch {known.url} ({known.size_mb} MB) to {target}",
    ]
    raise MissingWeightsError(
        f"no weights of {name}. Looked for\n"
        + "".join(f"  {place}\n" for place in tried)
        + "Any of these provides them:\n"
        + "\n".join(f"  {way}" for way in ways)
        + (f"\nOr do without them: {without}" if without else "")
    )


def load_weights(
    path: Path, shapes: Mapping[str, torch.Size], *, optional: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """The named tensors of a weights file, in float32 on the CPU; its other tensors are left.

    path: .safetensors, or a pickle of torch, from which only tensors are read.
    shapes: names and shapes that the file must hold; optional: those that it may hold.
    Raises: CheckpointError for a file that is damaged, or lacks tensors, or has them in other shapes or not finite.
    """
    tensors = _read(path)
    shapes = {**shapes, **{name: shape for name, shape in (optional or {}).items() if name in tensors}}
    found = {name: tuple(tensors[name].shape) for name in shapes if name in tensors}
    missing = [f"{name} {tuple(shape)}" for name, shape in shapes.items() if name not in found]
    wrong = [
        f"{name}, file {shape}, expected {tuple(shapes[name])}"
        for name, shape in found.items()
        if shape != tuple(shapes[name])
    ]
    problems = {"missing": missing, "wrongly shaped": wrong}
    if parts := [f"{len(names)} tensors {problem} ({_first(names)})" for problem, names in problems.items() if names]:
        held = f"; it holds {_first(sorted(tensors))}" if missing else ""
        raise CheckpointError(f"{path}: not the weights that are needed: {'; '.join(parts)}{held}")
    weights = {name: tensors[name].float() for name in shapes}
    if strays := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: {len(strays)} tensors have values that are not finite ({_first(strays)})")
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, fetch it again: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: refused, for it is damaged or holds more than tensors and could run code "
            f"({type(error).__name__}); fetch it again"
        ) from error
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(data).__name__} with other content")
    return dict(data)


def _first(names: list[str]) -> str:
    return "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "") if names else "nothing"
