"""Says what a path holds, and from which evidence: file names and the header of a safetensors file, never the weights.

Imports no torch. Pickle files are not opened here; `read` opens them with `weights_only=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sdvae.errors import CheckpointError, some

__all__ = [
    "CARD_NAME",
    "CLASS_NAME",
    "CONFIG_NAME",
    "FAMILIES",
    "PICKLE_SUFFIXES",
    "SCALE_FIELDS",
    "STEM",
    "WEIGHTS_NAME",
    "WEIGHT_SUFFIXES",
    "Family",
    "Found",
    "Kind",
    "Layout",
    "VaeFiles",
    "family_of",
    "find_vae_files",
    "identify",
    "json_text",
    "layout_of",
    "list_names",
    "read_json",
    "read_shapes",
    "shard_names",
]

CARD_NAME = "README.md"  # the model card, where the hub looks for it
CLASS_NAME = "AutoencoderKL"  # of the model, in config.json
CONFIG_NAME = "config.json"
STEM = "diffusion_pytorch_model"  # of the weights files in a folder of diffusers
WEIGHTS_NAME = f"{STEM}.safetensors"  # as diffusers saves a model in one file
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of config.json: z -> latents
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {".safetensors"}

# In the order in which diffusers looks for them.
_PLAIN = tuple(f"{STEM}.{end}" for end in ("safetensors.index.json", "safetensors", "bin.index.json", "bin"))
_VARIANT = re.compile(
    rf"{STEM}\.(?:(?P<one>[^.]+)\.(?:safetensors|bin)|(?:safetensors|bin)\.index\.(?P<many>[^.]+)\.json)"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")

_VAE_KEY = re.compile(
    r"(?P<prefix>.*?)(?:encoder\.down|decoder\.up)"
    r"(?:(?P<ldm>\.\d+\.block)|_blocks\.\d+\.resnets)\.\d+\.norm1\.weight"
)
_DIFFUSION_MODEL = "model.diffusion_model."
_TINY_KEY = re.compile(r"(?:encoder\.layers\.|decoder\.layers\.|)\d+\.conv\.0\.weight")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class Kind(StrEnum):
    """What a path can hold; the value reads well in a message."""

    FOLDER = "diffusers VAE folder"
    PIPELINE = "diffusers pipeline folder"
    FILE = "VAE file with diffusers keys"
    PREFIXED = "file with diffusers VAE keys behind a prefix"
    LDM = "VAE file with LDM keys"
    LDM_CHECKPOINT = "whole checkpoint with LDM keys"
    TINY = "tiny autoencoder (TAESD)"
    PICKLE = "pickle file"
    OTHER = "file that holds no VAE known here"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a path holds."""

    kind: Kind
    evidence: str  # a phrase: which file or key showed it
    weights: Path  # the weights file, or the index of several
    config: Path | None  # the config.json that belongs to it, if there is one
    prefix: str = ""  # before the VAE's keys; known where the keys have been looked at


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the keys of a weights file are laid out."""

    kind: Kind
    evidence: str
    prefix: str = ""  # before the VAE's own keys

    @property
    def is_ldm(self) -> bool:
        """Whether the names are LDM's; else they are diffusers'."""
        return self.kind in (Kind.LDM, Kind.LDM_CHECKPOINT)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a whole checkpoint of one diffusion model says about its VAE."""

    keys: tuple[str, ...]  # parts of names, each of which some name has
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None = None


# The constants of each program that runs the model.
FAMILIES = {
    # CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml; the same in Stability-AI/stablediffusion
    "Stable Diffusion 1 or 2": Family(
        keys=(f"{_DIFFUSION_MODEL}input_blocks.", "cond_stage_model."), latent_channels=4, scaling_factor=0.18215
    ),
    # Stability-AI/generative-models, configs/inference/sd_xl_base.yaml
    "SDXL": Family(
        keys=(f"{_DIFFUSION_MODEL}input_blocks.", "conditioner.embedders."), latent_channels=4, scaling_factor=0.13025
    ),
    # Stability-AI/sd3-ref, sd3_impls.py
    "SD3": Family(
        keys=(f"{_DIFFUSION_MODEL}joint_blocks.",), latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609
    ),
    # black-forest-labs/flux, src/flux/util.py
    "FLUX": Family(keys=("double_blocks.",), latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
}


@dataclass(frozen=True, kw_only=True)
class VaeFiles:
    """The VAE's own files among the names in a folder or repository."""

    folder: str  # "" or a subfolder such as "vae", posix
    weights: str  # name of the weights file, or of the index of several, in `folder`
    has_config: bool

    def path_of(self, name: str) -> str:
        """Name relative to where the search began."""
        return f"{self.folder}/{name}" if self.folder else name


def identify(path: Path, subfolder: str | None = None, variant: str | None = None) -> Found:
    """Say what an existing file or folder holds.

    variant: which of a folder's weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors; None is the plain
        one, or the only one.
    Raises: CheckpointError where a folder holds no VAE, a safetensors file is damaged, or a file holds two VAEs; it
        names what is there.
    """
    if path.is_dir():
        return _identify_folder(path, subfolder, variant)
    config = path.with_name(CONFIG_NAME)
    config_or_none = config if config.is_file() else None
    if path.suffix in PICKLE_SUFFIXES:
        return Found(kind=Kind.PICKLE, evidence=f"suffix {path.suffix}", weights=path, config=config_or_none)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: not a weights file; expected the suffix {', '.join(sorted(WEIGHT_SUFFIXES))}, or a folder that "
            f"holds such a file"
        )
    found = layout_of(read_shapes(path), path)
    return Found(kind=found.kind, evidence=found.evidence, weights=path, config=config_or_none, prefix=found.prefix)


def _identify_folder(path: Path, subfolder: str | None, variant: str | None) -> Found:
    names = list_names(path, [subfolder] if subfolder else ["vae"])
    try:
        files = find_vae_files(names, subfolder, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if files is None and (path / "vae_encoder" / "model.onnx").is_file():
        raise CheckpointError(
            f"{path}: an ONNX export of a VAE, for onnxruntime; its weights are not read back: name the VAE that it "
            f"was made from"
        )
    if files is None:
        where = f"{subfolder}/" if subfolder else "it and in its folder vae/"
        names += [f"{entry.name}/" for entry in sorted(path.iterdir()) if entry.is_dir()]
        raise CheckpointError(
            f"{path}: no VAE in this folder: looked in {where} for {STEM}.safetensors, .bin, their variants and "
            f"indexes; it holds {some(names)}"
        )
    folder = path / files.folder
    return Found(
        kind=Kind.PIPELINE if files.folder or "model_index.json" in names else Kind.FOLDER,
        evidence=f"file {files.path_of(files.weights)}",
        weights=folder / files.weights,
        config=folder / CONFIG_NAME if files.has_config else None,
    )


def list_names(folder: Path, subfolders: Iterable[str] = ("vae",)) -> list[str]:
    """Files in a folder and in some of its subfolders, relative and posix, sorted."""
    folders = [folder, *(folder / name for name in subfolders)]
    files = [path for inside in folders if inside.is_dir() for path in inside.iterdir() if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def find_vae_files(names: Collection[str], subfolder: str | None = None, variant: str | None = None) -> VaeFiles | None:
    """Find the VAE among file names: in `subfolder` if given, else at the top, else in `vae/`.

    variant: of the weights, such as "fp16"; None is the plain one, or the only one.
    Raises: CheckpointError where the variant is not there, or only variants are, and more than one.
    """
    for folder in [""] + ["vae"] if subfolder is None else [subfolder.strip("/")]:
        start = f"{folder}/" if folder else ""
        own = {name.removeprefix(start) for name in names if name.startswith(start)}
        if weights := _choose_weights(own, variant):
            return VaeFiles(folder=folder, weights=weights, has_config=CONFIG_NAME in own)
    return None


def _choose_weights(names: Collection[str], variant: str | None) -> str | None:
    plain = [name for name in _PLAIN if name in names]
    variants: dict[str, list[str]] = {}
    for name in sorted(names):
        if (match := _VARIANT.fullmatch(name)) and not _SHARD.search(name):
            variants.setdefault(match["one"] or match["many"], []).append(name)
    if variant is None and plain:
        return plain[0]
    if variant is None and len(variants) > 1:
        raise CheckpointError(
            f"several variants of the weights ({', '.join(variants)}), and none that is plain; pass the path of the "
            f"file that is meant"
        )
    if variant is not None and variant not in variants and (variants or plain):
        there = [*(["the plain one"] if plain else []), *variants]
        raise CheckpointError(f"no variant '{variant}' of the weights; there is {', '.join(there)}")
    found = variants.get(variant, []) if variant is not None else [n for files in variants.values() for n in files]
    return min(found, key=lambda name: ("safetensors" not in name, "index" not in name), default=None)


def shard_names(index: Path) -> dict[str, str]:
    """Weight name -> file name, from the index of weights that were saved in several files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: an index of weights needs a `weight_map` of weight names to file names")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in WEIGHT_SUFFIXES:
            raise CheckpointError(f"{index}: {name!r} is not the name of a weights file beside the index")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def json_text(data: Mapping[str, Any]) -> str:
    """The text of a config.json or an index of weights. Raises: ValueError for a value that JSON does not have."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in a safetensors file, from its header alone.

    Raises: CheckpointError for a file that is truncated, damaged or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        raw = file.read(header_bytes) if header_bytes <= min(size, _MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        promised = 8 + header_bytes + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut off in its header{_what_it_is(start)}"
        ) from error
    if size != promised:
        raise CheckpointError(
            f"{path}: damaged: the file has {size} bytes, its header promises {promised}; copy or download it again"
        )
    return shapes


def _what_it_is(start: bytes) -> str:
    if start == b"version ":
        return "; it looks like a Git LFS pointer: `git lfs pull` fetches the weights themselves"
    if start[:2] == b"PK":
        return "; it looks like a file of torch.save: give it the suffix .bin or .pt"
    return "; copy or download it again"


def layout_of(names: Collection[str], path: Path) -> Layout:
    """How weights of these names are laid out, and the name that shows it. path: for the message.

    Raises: CheckpointError where the names are those of more than one VAE.
    """
    readings: dict[tuple[str, bool], str] = {}
    for name in names:
        if match := _VAE_KEY.fullmatch(name):
            readings.setdefault((match["prefix"], match["ldm"] is not None), name)
    if len(readings) > 1:
        shown = "; ".join(
            f"{'LDM' if ldm else 'diffusers'} keys {f'behind `{prefix}`' if prefix else 'without prefix'} (`{name}`)"
            for (prefix, ldm), name in readings.items()
        )
        raise CheckpointError(
            f"{path}: holds {len(readings)} autoencoders, and nothing says which one is meant: {shown}. Save the one "
            f"that is meant to a file of its own"
        )
    for (prefix, ldm), name in readings.items():
        whole = any(name.startswith(_DIFFUSION_MODEL) for name in names)
        kind = (Kind.LDM_CHECKPOINT if whole else Kind.LDM) if ldm else (Kind.PREFIXED if prefix else Kind.FILE)
        evidence = f"keys `{name}` and `{_DIFFUSION_MODEL}*`" if kind is Kind.LDM_CHECKPOINT else f"key `{name}`"
        return Layout(kind=kind, evidence=evidence, prefix=prefix)
    if match := next(filter(None, map(_TINY_KEY.fullmatch, names)), None):
        return Layout(kind=Kind.TINY, evidence=f"key `{match[0]}`")
    return Layout(kind=Kind.OTHER, evidence=f"{len(names)} keys: {some(sorted(names))}")


def family_of(names: Collection[str]) -> str | None:
    """Whose whole checkpoint has weights of these names: a key of FAMILIES, or None."""
    for family, known in FAMILIES.items():
        if all(any(key in name for name in names) for key in known.keys):
            return family
    return None
