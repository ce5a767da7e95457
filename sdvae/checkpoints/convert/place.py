"""Where the result of a conversion goes: whether it may, and whether it is there already."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.pipeline import Pipeline
from sdvae.checkpoints.convert.verify import full_config, same_bits
from sdvae.checkpoints.convert.work import Work, ldm_tensors
from sdvae.checkpoints.formats import CONFIG_NAME, WEIGHT_SUFFIXES, Kind, identify, read_json
from sdvae.checkpoints.notes import from_metadata, notes_of
from sdvae.checkpoints.read import Checkpoint, read_checkpoint
from sdvae.checkpoints.store import why_no_vae_folder
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError, some
from sdvae.files import check_replaceable, new_file, new_folder

__all__ = ["Place"]

_ONNX_FILES = ("model.onnx", "model.onnx_data", CONFIG_NAME)


class Place:
    """The target of a conversion: whether it may be written to, and what is there."""

    def __init__(self, target: Path, options: ConvertOptions, pipeline: Pipeline | None) -> None:
        self.target, self.options, self.pipeline = target, options, pipeline

    def check_early(self) -> None:
        """What can be said before the source is read. Raises: ConfigError, OutputExistsError."""
        if self.options.to == "ldm" and self.target.suffix != ".safetensors":
            raise ConfigError(f"{self.target}: an LDM file is written as .safetensors: give DST that suffix")
        if self.options.to == "diffusers" and self.target.suffix == ".safetensors":
            raise ConfigError(f"{self.target}: --to diffusers writes a folder; a single file is --to ldm")
        if self.pipeline:
            self.pipeline.check_target(self.target)
        # The same conversion may have been done, or the source itself may be there, where advice to overwrite would be
        # wrong; to know, the source has to be read.
        if self._made_with() != self.options.to_notes() and not self._has_weights():
            self.check_free()

    def check_not_source(self, source: Checkpoint) -> None:
        """Raises: ConfigError where the source would be replaced by the result."""
        weights, target = source.found.weights.resolve(), self.target.resolve()
        if weights == target or weights.is_relative_to(target):
            raise ConfigError(f"{self.target} holds the source itself, {weights.name}: choose another DST")

    def check_free(self) -> None:
        """Raises: OutputExistsError where something is in the way."""
        if not self.options.overwrite and (made := self._made_with()) is not None:
            raise OutputExistsError(
                f"{self.target} exists, and was made {_difference(made, self.options.to_notes())}; choose another "
                f"path, or give --overwrite (overwrite=True)"
            )
        if self.options.to != "ldm":
            check_replaceable(self.target, overwrite=self.options.overwrite, is_ours=self._why_not_replace)
        elif self.target.is_dir():
            raise OutputExistsError(
                f"{self.target} is a folder; an LDM file is written as one file: choose another DST"
            )
        elif self.target.exists():
            if not self.options.overwrite:
                raise OutputExistsError(
                    f"{self.target} exists; choose another path, or give --overwrite (overwrite=True)"
                )
            if (kind := identify(self.target).kind) not in (Kind.FILE, Kind.LDM, Kind.PREFIXED):
                raise OutputExistsError(f"{self.target} would be replaced, but is a {kind}; choose another path")

    def _why_not_replace(self, folder: Path) -> str | None:
        if self.pipeline:
            return self.pipeline.why_not_replace(folder)
        return _why_no_onnx_folder(folder) if self.options.to == "onnx" else why_no_vae_folder(folder)

    def new(self) -> AbstractContextManager[Path]:
        """A path that takes the target's place when the block ends without error."""
        if self.options.to == "ldm":
            return new_file(self.target)
        return new_folder(self.target, overwrite=self.options.overwrite, is_ours=self._why_not_replace)

    # What is there

    def _has_weights(self) -> bool:
        files = self.target.rglob("*") if self.target.is_dir() else (self.target,)
        return any(path.suffix in WEIGHT_SUFFIXES and path.is_file() for path in files)

    def _made_with(self) -> Mapping[str, Any] | None:
        """The options of the conversion whose result is there; None where there is none."""
        try:
            conversion = self._stored_config()[1].get("conversion")
        except (CheckpointError, OSError, SafetensorError):
            return None
        if not isinstance(conversion, dict):
            return None
        return {name: value for name, value in conversion.items() if name != "pipeline"}

    def _stored_config(self) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Fields and notes of what is there."""
        if self.options.to == "ldm":
            with safe_open(self.target, framework="pt") as file:
                return from_metadata(file.metadata())
        path = self._weights_folder() / CONFIG_NAME
        config = read_json(path)
        return {name: value for name, value in config.items() if not name.startswith("_")}, notes_of(config, path)

    def _weights_folder(self) -> Path:
        if self.options.to == "onnx":
            return self.target / "vae_encoder"
        return self.target / "vae" if self.pipeline else self.target

    def holds(self, work: Work) -> bool:
        """Whether the result is there already: the same weights, configuration and notes."""
        try:
            fields, notes = self._stored_config()
            if notes != work.notes or full_config(fields) != work.fields:
                return False
            if self.options.to == "onnx":
                return _why_no_onnx_folder(self.target) is None
            if self.options.to == "ldm":
                with safe_open(self.target, framework="pt") as file:
                    found = {name: file.get_tensor(name) for name in file.keys()}
                return same_bits(found, ldm_tensors(work.tensors, self.options.prefix))
            if self.pipeline and not self.pipeline.is_copied_to(self.target):
                return False
            return same_bits(read_checkpoint(self._weights_folder()).tensors, work.tensors)
        except (CheckpointError, OSError, SafetensorError):
            return False


def _difference(made: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """How a result was made, as far as something else is asked for now: "with --prefix vae., without --dtype"."""
    names = [name for name in {**made, **asked} if made.get(name) != asked.get(name)]
    if not names:
        return "with these options, but from another source, or it was changed since"
    return ", ".join(_as_given(name, made.get(name)) for name in names)


def _as_given(name: str, value: Any) -> str:
    option = "--" + name.replace("_", "-")
    if value is None:
        return f"without {option}"
    return f"with {option}" if value is True else f"with {option} {value}"


def _why_no_onnx_folder(folder: Path) -> str | None:
    """Why a folder must not be replaced by an export, as a phrase; None where it holds one and nothing else."""
    for part in ("vae_encoder", "vae_decoder"):
        if not (folder / part / "model.onnx").is_file() or not (folder / part / CONFIG_NAME).is_file():
            return f"holds no VAE as ONNX: no {part}/model.onnx with its {CONFIG_NAME}"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    known = {f"vae_{side}/{name}" for side in ("encoder", "decoder") for name in _ONNX_FILES}
    others = sorted(files - known)
    return f"holds more than a VAE as ONNX: {some(others)}" if others else None
