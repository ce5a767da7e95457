"""A diffusers pipeline on disk with its VAE replaced: everything else is copied byte for byte.

Left out: whether a diffusion model works with another VAE. It was trained on the latents of the old one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdvae.checkpoints.fit import full_config
from sdvae.checkpoints.formats import CLASS_NAME, CONFIG_NAME, SCALE_FIELDS, read_json
from sdvae.checkpoints.notes import NOTES_FIELD
from sdvae.checkpoints.store import why_no_vae_folder
from sdvae.errors import CheckpointError, ConfigError, some

__all__ = ["INDEX_NAME", "Pipeline", "read_pipeline"]

INDEX_NAME = "model_index.json"
_VAE = "vae"  # name of the component, and of its folder
_VAE_ENTRY = ["diffusers", "AutoencoderKL"]  # library and class, as diffusers looks them up


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline folder whose VAE is to be replaced."""

    folder: Path
    index: Mapping[str, Any]  # model_index.json
    vae_config: Mapping[str, Any]  # config.json of the VAE that it has
    files: Mapping[str, int]  # what is copied: path below the folder, posix -> bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied, those of the new VAE not counted."""
        return sum(self.files.values())

    def fingerprint(self) -> str:
        """Changes with the names, sizes and times of the files that are copied. Returns: "sha256:<hex>"."""
        stamps = [f"{name}\n{size}\n{(self.folder / name).stat().st_mtime_ns}\n" for name, size in self.files.items()]
        return f"sha256:{sha256(''.join(stamps).encode('utf-8', 'surrogateescape')).hexdigest()}"

    def check_target(self, target: Path) -> None:
        """Raises: ConfigError where the copy would lie in the pipeline itself, or around it."""
        own, other = self.folder.resolve(), target.expanduser().resolve()
        if own == other:
            raise ConfigError(f"{target} is the pipeline itself, which stays as it is: choose another folder")
        for inner, outer, relation in ((other, own, "lies inside"), (own, other, "is a folder around")):
            if inner.is_relative_to(outer):
                raise ConfigError(f"{target} {relation} the pipeline {self.folder}: choose another folder")

    def check_space(self, target: Path, vae_bytes: int) -> None:
        """Raises: CheckpointError where the disk of `target` has too little left for a copy."""
        parent = next(folder for folder in target.expanduser().resolve().parents if folder.is_dir())
        free, needed = shutil.disk_usage(parent).free, self.num_bytes + vae_bytes
        if free < needed:
            raise CheckpointError(
                f"{parent} has {free / 1e9:.2f} GB left, and the pipeline takes {needed / 1e9:.2f} GB"
            )

    def check_fits(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Whether a VAE with these fields can take the place of the old one.

        Returns: sentences about what changes for those who use the pipeline.
        Raises: CheckpointError where the shape of the latents differs.
        """
        before, after = full_config(self.vae_config), full_config(fields)
        for name, read in (("latent_channels", _channels), ("spatial_compression_ratio", _ratio)):
            if (old := read(before)) != (new := read(after)):
                raise CheckpointError(
                    f"this VAE has {name} {new}, the one in {self.folder} has {old}: the pipeline's diffusion model "
                    f"was made for latents of that shape and cannot use others. Take a VAE with {name} {old}"
                )
        remarks = []
        for name in SCALE_FIELDS:
            old, new = (_plain(config[name]) for config in (before, after))
            if old != new:
                remarks.append(f"{name} {_shown(old)} -> {_shown(new)}")
        if not remarks:
            return ()
        return (
            f"the latents are scaled in another way ({', '.join(remarks)}). This pipeline reads that from the VAE's "
            f"{CONFIG_NAME}, so it stays right; what assumes the old numbers does not: latents that were cached "
            f"before, trainers with a scale in their settings, single files made from this pipeline. "
            f"--fold-scale {before['scaling_factor']} keeps the old scale",
        )

    def copy_to(self, target: Path) -> None:
        """Copy all but the VAE into an existing folder. Links are followed: the copy stands alone. Raises: OSError."""
        for name in self.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name == INDEX_NAME and self.index[_VAE] != _VAE_ENTRY:
                index = {**self.index, _VAE: _VAE_ENTRY}
                (target / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copy2(self.folder / name, target / name)

    def is_copied_to(self, target: Path) -> bool:
        """Whether a folder holds all that `copy_to` writes, by names and sizes."""
        there = _files(target)
        return there.keys() == self.files.keys() and all(
            there[name] == size for name, size in self.files.items() if name != INDEX_NAME
        )

    def why_not_replace(self, folder: Path) -> str | None:
        """Why a folder must not be replaced by a copy of this pipeline, as a phrase; None if it is an earlier one."""
        config = folder / _VAE / CONFIG_NAME
        if not (folder / INDEX_NAME).is_file() or not config.is_file():
            return f"holds no pipeline: no {INDEX_NAME} with a VAE"
        if NOTES_FIELD not in read_json(config):
            return f"holds a pipeline that sdvae did not write: {_VAE}/{CONFIG_NAME} has no `{NOTES_FIELD}`"
        if reason := why_no_vae_folder(folder / _VAE):
            return f"its {_VAE}/ {reason}"
        if others := sorted(set(_files(folder, leave_out=(_VAE,))) - set(self.files)):
            return f"holds files that the new pipeline would not have: {some(others, 3)}"
        return None


def read_pipeline(folder: Path) -> Pipeline:
    """Look at a pipeline folder.

    Raises: ConfigError where nothing is there; CheckpointError where it is none, or has no VAE that can be replaced.
    """
    folder = folder.expanduser()
    if not folder.exists():
        raise ConfigError(f"no pipeline at '{folder}': {folder.absolute()} does not exist. Pass an existing folder")
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        raise CheckpointError(f"{folder}: not a diffusers pipeline: no {INDEX_NAME} in it")
    index = read_json(index_path)
    entry = index.get(_VAE)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] != CLASS_NAME:
        raise CheckpointError(
            f"{index_path}: `{_VAE}` is {json.dumps(entry)}; only a pipeline whose VAE is an {CLASS_NAME} can have it "
            f"replaced by another"
        )
    config_path = folder / _VAE / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError(f"{config_path} is not there; it says what latents the diffusion model was made for")
    return Pipeline(folder=folder, index=index, vae_config=read_json(config_path), files=_files(folder))


# At the top of a pipeline, but no part of it: the VAE, and what downloading it left.
_NOT_COPIED = (_VAE, ".cache", ".git")


def _files(folder: Path, leave_out: Collection[str] = _NOT_COPIED) -> dict[str, int]:
    """Path -> bytes of every file, sorted, without some folders at the top."""

    def walk() -> Iterator[Path]:
        for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
            if Path(parent) == folder:
                folders[:] = [name for name in folders if name not in leave_out]
            yield from (Path(parent) / name for name in names)

    return dict(sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in walk()))


def _raise(error: OSError) -> None:
    raise error


def _channels(config: Mapping[str, Any]) -> int:
    return int(config["latent_channels"])


def _ratio(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _plain(value: Any) -> Any:
    return value or None  # a shift of 0 is none


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
