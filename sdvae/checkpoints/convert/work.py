"""What a conversion is to write: the weights of a source, perhaps folded and cast, with its fields and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.pipeline import Pipeline
from sdvae.checkpoints.convert.verify import build, full_config
from sdvae.checkpoints.fit import first_not_finite
from sdvae.checkpoints.formats import FAMILIES, SCALE_FIELDS
from sdvae.checkpoints.hub import is_hub_id
from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.notes import ASSUMED_NOTE
from sdvae.checkpoints.read import BUNDLED_NAME, Checkpoint, read_checkpoint
from sdvae.checkpoints.rewrite.fold_scale import FoldCheck, check_fold, fold_scale
from sdvae.checkpoints.store import autoencoder_digest
from sdvae.errors import CheckpointError
from sdvae.model.network import Autoencoder

__all__ = ["public_name", "Work", "dtype_names", "ldm_tensors", "prepare"]

_PHOTOS = Path(__file__).parents[2] / "assets" / "photos"
_MAX_PHOTOS = 16
_PHOTO_SIDE_LATENTS = 16  # 128 px at a compression ratio of 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A source, and what becomes of it."""

    name: str
    source: Checkpoint
    source_vae: Autoencoder  # float32
    digest: str
    tensors: Mapping[str, Tensor]  # as they are to be written, under diffusers' names
    fields: Mapping[str, Any]
    notes: Mapping[str, Any]
    fold: FoldCheck | None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def prepare(src: str | Path | None, chosen: ConvertOptions, pipeline: Pipeline | None) -> Work:
    """Read a source, fold and cast it as asked, and note what was done.

    pipeline: the one that the result goes into. Raises: CheckpointError for a source that cannot be read, a fold of a
    scale that is only assumed or that would not be exact, and values that the new type cannot hold; ConfigError for
    fields that have no meaning together.
    """
    source = read_checkpoint(
        src, config=chosen.config, variant=chosen.source_variant, fields=chosen.source_fields() or None
    )
    if chosen.fold_scale is not None:
        _check_scale_known(source)
    fields = full_config(source.fields)
    vae = build(source.tensors, fields)
    digest = autoencoder_digest(vae)
    tensors: Mapping[str, Tensor] = source.tensors
    fold = None
    if chosen.fold_scale is not None:
        tensors, fields = _folded(source.tensors, fields, chosen)
        fold = _measured_fold(vae, build(tensors, fields), chosen.images)
    # ONNX models have one type throughout
    tensors = _cast(tensors, source.tensors, chosen.dtype or ("float32" if chosen.to == "onnx" else None))
    name = public_name(src)
    return Work(
        name=name,
        source=source,
        source_vae=vae,
        digest=digest,
        tensors=tensors,
        fields=fields,
        notes=_notes(source, name, digest, chosen, pipeline),
        fold=fold,
    )


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
    stored: Mapping[str, Tensor], fields: Mapping[str, Any], chosen: ConvertOptions
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert chosen.fold_scale is not None
    wide = {name: t.float() if t.element_size() < 4 else t for name, t in stored.items()}  # rounded once, in `_cast`
    tensors, folded = fold_scale(
        wide,
        fields,
        scaling_factor=chosen.fold_scale,
        shift_factor=chosen.fold_shift,
        add_quant_convs=chosen.add_quant_convs,
    )
    return tensors, full_config(folded)


def _measured_fold(old: Autoencoder, new: Autoencoder, images: Path | None) -> FoldCheck:
    """Compare the VAE before and after, in float32, on photographs. Raises: CheckpointError where it is not exact."""
    from sdvae.data.images import image_to_x, read_image
    from sdvae.data.sources.files import find_images
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


def _cast(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], dtype: str | None) -> Mapping[str, Tensor]:
    """dtype: its name; None: as stored, where added tensors go with the decoder's first."""
    like = stored["decoder.conv_in.weight"].dtype
    result = {
        name: tensor.to(getattr(torch, dtype) if dtype else stored[name].dtype if name in stored else like)
        for name, tensor in tensors.items()
    }
    if name := first_not_finite(result):
        kind = result[name].dtype
        raise CheckpointError(
            f"`{name}` reaches {tensors[name].abs().max():.4g}, and {_dtype_name(kind)} ends at "
            f"{torch.finfo(kind).max:.4g}: choose another dtype"
        )
    return result


def _notes(
    source: Checkpoint, name: str, digest: str, chosen: ConvertOptions, pipeline: Pipeline | None
) -> dict[str, Any]:
    anew = ("conversion", "source", "source_digest", ASSUMED_NOTE)
    notes = {key: value for key, value in source.notes.items() if key not in anew}
    rewrites = list(notes.pop("rewrites", []))
    if chosen.fold_scale is not None:
        before = {field: source.fields.get(field) for field in SCALE_FIELDS if source.fields.get(field) is not None}
        was = ", ".join(f"{field} {value}" for field, value in before.items())
        shift = f", shift_factor {chosen.fold_shift}" if chosen.fold_shift else ""
        rewrites.append(f"folded {was} into scaling_factor {chosen.fold_scale}{shift}")
        for measured_before in ("calibration", "previous"):  # numbers of a z that is no more
            notes.pop(measured_before, None)
    conversion = chosen.to_notes() | ({"pipeline": pipeline.fingerprint()} if pipeline else {})
    notes |= {"source": name, "source_digest": digest, "conversion": conversion}
    notes |= {"rewrites": rewrites} if rewrites else {}
    notes |= {ASSUMED_NOTE: list(source.assumed)} if source.assumed else {}
    return notes | ({"license": chosen.license} if chosen.license else {})


def public_name(src: str | Path | None) -> str:
    """What the source is called, without the folders of this machine."""
    if src is None:
        return BUNDLED_NAME
    path = Path(src).expanduser()
    return str(src) if not path.exists() and is_hub_id(src) else path.resolve().name


def ldm_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Under the names that they have in an LDM file."""
    return {prefix + name: tensor for name, tensor in to_ldm(tensors).items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_names(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The types that occur, such as ("bfloat16", "float32"), in alphabetical order."""
    return tuple(sorted({_dtype_name(tensor.dtype) for tensor in tensors.values()}))
