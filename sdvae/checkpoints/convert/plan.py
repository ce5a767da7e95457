"""What a conversion is to do: its source is read, folded and cast, and its target looked at. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.pipeline import Pipeline, read_pipeline
from sdvae.checkpoints.fit import autoencoder_digest, build, first_not_finite, full_config, load_weights
from sdvae.checkpoints.formats import CONFIG_NAME, FAMILIES, SCALE_FIELDS, WEIGHT_SUFFIXES, Kind, identify
from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.notes import ASSUMED_NOTE, from_metadata, read_config
from sdvae.checkpoints.read import Checkpoint, public_name, read_checkpoint
from sdvae.checkpoints.rewrite.fold_scale import FoldCheck, check_fold, fold_scale
from sdvae.checkpoints.store import why_no_vae_folder
from sdvae.checkpoints.tensor_files import differing
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError, some
from sdvae.files import check_replaceable
from sdvae.model.network import Autoencoder

__all__ = ["Conversion", "Place", "plan"]

_PHOTOS = Path(__file__).parents[2] / "assets" / "photos"
_MAX_PHOTOS = 16
_PHOTO_SIDE_LATENTS = 16  # 128 px at a compression ratio of 8
_ONNX_FILES = ("model.onnx", "model.onnx_data", CONFIG_NAME)


# The target


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
            check_replaceable(self.target, overwrite=self.options.overwrite, is_ours=self.why_not_replace)
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

    def why_not_replace(self, folder: Path) -> str | None:
        if self.pipeline:
            return self.pipeline.why_not_replace(folder)
        return _why_no_onnx_folder(folder) if self.options.to == "onnx" else why_no_vae_folder(folder)

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
        return read_config(self.weights_path(self.target) / CONFIG_NAME)

    def weights_path(self, target: Path) -> Path:
        """The file or folder of a target that has the weights and their configuration."""
        if self.options.to == "onnx":
            return target / "vae_encoder"
        return target / "vae" if self.pipeline else target

    def holds(self, conversion: Conversion) -> bool:
        """Whether the result is there already: the same weights, configuration and notes."""
        try:
            fields, notes = self._stored_config()
            if notes != conversion.notes or full_config(fields) != conversion.fields:
                return False
            if self.options.to == "onnx":
                return _why_no_onnx_folder(self.target) is None
            if self.options.to == "ldm":
                with safe_open(self.target, framework="pt") as file:
                    found = {name: file.get_tensor(name) for name in file.keys()}
                return not differing(found, conversion.stored)
            if self.pipeline and not self.pipeline.is_copied_to(self.target):
                return False
            return not differing(read_checkpoint(self.weights_path(self.target)).tensors, conversion.tensors)
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


# The source and what becomes of it


def _check_scale_known(source: Checkpoint) -> None:
    """Raise CheckpointError where a fold would make a guess of ours a part of the weights."""
    if "scaling_factor" not in source.assumed:
        return
    channels = source.fields["latent_channels"]
    scales = {n: f.scaling_factor for n, f in FAMILIES.items() if f.latent_channels == channels}
    raise CheckpointError(
        f"{source.found.weights}: the scale cannot be folded, for nothing in the files shows what it is now: "
        + ", ".join(f"{name} has scaling_factor {scale}" for name, scale in scales.items())
        + ". Say which is meant: "
        + " or ".join(f"--scaling-factor {scale}" for scale in scales.values())
    )


def _folded(
    stored: Mapping[str, Tensor], fields: Mapping[str, Any], options: ConvertOptions
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert options.fold_scale is not None
    wide = {name: t.float() if t.element_size() < 4 else t for name, t in stored.items()}  # rounded once, in `_cast`
    tensors, folded = fold_scale(
        wide,
        fields,
        scaling_factor=options.fold_scale,
        shift_factor=options.fold_shift,
        add_quant_convs=options.add_quant_convs,
    )
    return tensors, full_config(folded)


def _measured_fold(old: Autoencoder, new: Autoencoder, images: Path | None) -> FoldCheck:
    """Compare the VAE before and after, in float32, on photographs. Raises: CheckpointError where it is not exact."""
    from sdvae.data.images import image_to_x, read_image
    from sdvae.data.sources.find import find_images
    from sdvae.data.transforms import resize_and_crop

    found = find_images(images or _PHOTOS)
    found = found[:: math.ceil(len(found) / _MAX_PHOTOS)]
    side = _PHOTO_SIDE_LATENTS * old.spatial_compression_ratio
    checks = []
    for image in found:
        pixels = resize_and_crop(read_image(image.path, min_side_px=side).pixels, side, "center")
        check = check_fold(old, new, image_to_x(pixels)[None])
        if check.problem:
            raise CheckpointError(f"the scale cannot be folded exactly: on {image.key}, {check.problem}")
        checks.append(check)
    return FoldCheck(
        latents_error=max(check.latents_error for check in checks),
        std_error=max(check.std_error for check in checks),
        recon_error=max(check.recon_error for check in checks),
        logvar_min=min(check.logvar_min for check in checks),
        logvar_max=max(check.logvar_max for check in checks),
        problem=None,
    )


def _cast(tensors: Mapping[str, Tensor], source: Mapping[str, Tensor], options: ConvertOptions) -> Mapping[str, Tensor]:
    """In the type that was asked for, else as in the source, where added tensors go with the decoder's first."""
    dtype = options.dtype or ("float32" if options.to == "onnx" else None)  # ONNX models have one type throughout
    like = source["decoder.conv_in.weight"].dtype
    result = {
        name: tensor.to(getattr(torch, dtype) if dtype else source[name].dtype if name in source else like)
        for name, tensor in tensors.items()
    }
    if name := first_not_finite(result):
        kind = result[name].dtype
        raise CheckpointError(
            f"`{name}` reaches {tensors[name].abs().max():.4g}, and {str(kind).removeprefix('torch.')} ends at "
            f"{torch.finfo(kind).max:.4g}: choose another dtype"
        )
    return result


def _notes(source: Checkpoint, name: str, digest: str, place: Place) -> dict[str, Any]:
    options, pipeline = place.options, place.pipeline
    anew = ("conversion", "source", "source_digest", ASSUMED_NOTE)
    notes = {key: value for key, value in source.notes.items() if key not in anew}
    rewrites = list(notes.pop("rewrites", []))
    if options.fold_scale is not None:
        before = {field: source.fields.get(field) for field in SCALE_FIELDS if source.fields.get(field) is not None}
        was = ", ".join(f"{field} {value}" for field, value in before.items())
        shift = f", shift_factor {options.fold_shift}" if options.fold_shift else ""
        rewrites.append(f"folded {was} into scaling_factor {options.fold_scale}{shift}")
        for measured_before in ("calibration", "previous"):  # numbers of a z that is no more
            notes.pop(measured_before, None)
    conversion = options.to_notes() | ({"pipeline": pipeline.fingerprint()} if pipeline else {})
    notes |= {"source": name, "source_digest": digest, "conversion": conversion}
    notes |= {"rewrites": rewrites} if rewrites else {}
    notes |= {ASSUMED_NOTE: list(source.assumed)} if source.assumed else {}
    return notes | ({"license": options.license} if options.license else {})


# The whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A source, what becomes of it, and where that goes."""

    place: Place
    status: str  # up to date, new or replace
    name: str  # of the source
    source: Checkpoint
    source_vae: Autoencoder  # float32
    digest: str  # of the source
    tensors: Mapping[str, Tensor]  # as they are to be written, under diffusers' names
    stored: Mapping[str, Tensor]  # the same under the names that they have in the file
    fields: Mapping[str, Any]
    notes: Mapping[str, Any]
    fold: FoldCheck | None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def result_vae(self) -> Autoencoder:
        """The result in float32 as it is in memory, for formats whose files are not read back."""
        return load_weights(build(self.fields, "the result"), self.tensors)


def plan(src: str | Path | None, target: Path, options: ConvertOptions) -> Conversion:
    """Read a source, fold and cast it as asked, and look at what is there already. Nothing is written.

    Raises: CheckpointError for a source that cannot be read, a fold of a scale that is only assumed or that would not
    be exact, and values that the new type cannot hold; ConfigError for fields that have no meaning together;
    OutputExistsError if something else is at the target.
    """
    place = Place(target, options, read_pipeline(options.into) if options.into else None)
    place.check_early()
    name = public_name(src)
    source = read_checkpoint(
        src, config=options.config, variant=options.source_variant, fields=options.source_fields() or None
    )
    if options.fold_scale is not None:
        _check_scale_known(source)
    fields = full_config(source.fields)
    vae = load_weights(source.network, source.tensors)
    digest = autoencoder_digest(vae)
    notes = _notes(source, name, digest, place)
    tensors: Mapping[str, Tensor] = source.tensors
    fold = None
    if options.fold_scale is not None:
        tensors, fields = _folded(source.tensors, fields, options)
        fold = _measured_fold(vae, load_weights(build(fields, "the folded VAE"), tensors), options.images)
    tensors = _cast(tensors, source.tensors, options)
    stored = tensors
    if options.to == "ldm":
        stored = {options.prefix + name: tensor for name, tensor in to_ldm(tensors).items()}
    conversion = Conversion(
        place=place,
        status="replace" if target.exists() else "new",
        name=name,
        source=source,
        source_vae=vae,
        digest=digest,
        tensors=tensors,
        stored=stored,
        fields=fields,
        notes=notes,
        fold=fold,
    )
    place.check_not_source(source)
    if target.exists() and place.holds(conversion):
        return replace(conversion, status="up to date")
    place.check_free()
    if place.pipeline:
        place.pipeline.check_fits(fields)
        place.pipeline.check_space(target, conversion.num_bytes)
    return conversion
