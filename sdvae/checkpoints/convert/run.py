"""Conversion between the layouts that a VAE's files have: read, perhaps rewrite and cast, write, and prove it.

A result takes its place only after it was read back from the disk and compared with its source; until then it lies
hidden beside it, so a conversion that fails or is killed leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.compat.facts import WeightFacts
from sdvae.checkpoints.compat.loaders import LoaderVerdict, loader_verdicts
from sdvae.checkpoints.convert.options import LDM_SCALING_FACTOR, ConvertOptions
from sdvae.checkpoints.convert.pipeline import read_pipeline
from sdvae.checkpoints.convert.place import Place
from sdvae.checkpoints.convert.verify import (
    Verification,
    build,
    check_fields,
    check_ldm_shapes,
    check_tensors,
    compare,
    same_bits,
)
from sdvae.checkpoints.convert.work import Work, dtype_names, ldm_tensors, prepare
from sdvae.checkpoints.formats import FAMILIES, SCALE_FIELDS, WEIGHTS_NAME, read_shapes
from sdvae.checkpoints.read import read_checkpoint
from sdvae.checkpoints.rewrite.fold_scale import FoldCheck
from sdvae.checkpoints.store import keep_card
from sdvae.checkpoints.write import planned_shards, write_diffusers_folder, write_ldm_file
from sdvae.errors import CheckpointError, some
from sdvae.model.network import Autoencoder

__all__ = ["ConvertOptions", "ConvertReport", "convert", "write_diffusers_folder"]


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was read, what was written, and what was checked."""

    status: str  # written, up to date, or what a dry run would do: new or replace
    source: str  # without the folders of this machine
    source_kind: str
    source_evidence: str
    source_digest: str  # see `autoencoder_digest`
    source_dtypes: tuple[str, ...]
    remarks: tuple[str, ...]  # what was inferred or assumed about the source
    target: str
    to: str
    dtypes: tuple[str, ...]
    num_bytes: int  # of the weights, and of what is copied of a pipeline
    num_copied_files: int  # of a pipeline; else 0
    num_shards: int  # files that the weights are split into; 1: not split
    config: Mapping[str, Any]  # every field, as it was written
    rewrites: tuple[str, ...]  # what was done to the weights beyond names and types, also by earlier conversions
    fold: FoldCheck | None  # how exact the fold is, in float32, over photographs
    verification: Verification | None  # None: not asked for, or nothing was written
    onnx: Mapping[str, Any] | None  # the exporter's own report
    loaders: tuple[LoaderVerdict, ...]  # which programs take the result
    warnings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 0

    def to_json(self) -> dict[str, Any]:
        verification = self.verification.to_json() if self.verification else None
        return {"command": "convert", **asdict(self), "verification": verification, "exit_code": self.exit_code}


def convert(src: str | Path | None, dst: str | Path, options: ConvertOptions | None = None) -> ConvertReport:
    """Write a VAE in another layout, type or scale, or into a copy of a pipeline, and check what was written.

    src: any reference that `read_checkpoint` takes; None is the bundled VAE. dst: a folder, or for to="ldm" a
        .safetensors file.
    Returns: a report. Run again with the same arguments, it finds the result up to date and writes nothing.
    Raises: OutputExistsError where something else is at dst; CheckpointError for a source that cannot be read, values
        that the new type cannot hold, a fold of a scale that is only assumed or that would not be exact, and a result
        that differs from its source by more than `verify_conversion.TOLERANCES`; ConfigError for options that do not
        go together.
    """
    chosen = options or ConvertOptions()
    target = Path(dst).expanduser()
    pipeline = read_pipeline(chosen.into) if chosen.into else None
    place = Place(target, chosen, pipeline)
    place.check_early()
    work = prepare(src, chosen, pipeline)
    place.check_not_source(work.source)
    if place.holds(work):
        return _report("up to date", work, place)
    place.check_free()
    if pipeline:
        pipeline.check_fits(work.fields)
        pipeline.check_space(target, work.num_bytes)
    if chosen.dry_run:
        return _report("replace" if target.exists() else "new", work, place)
    with place.new() as fresh:
        verification, onnx = _write_and_verify(work, fresh, place)
    return _report("written", work, place, verification, onnx)


# Writing and proof


def _write_and_verify(work: Work, fresh: Path, place: Place) -> tuple[Verification | None, Mapping[str, Any] | None]:
    """Write into the hidden place, and read it back from there."""
    options, pipeline = place.options, place.pipeline
    if options.to == "onnx":
        return _export_onnx(work, fresh, options)
    if options.to == "ldm":
        write_ldm_file(fresh, work.tensors, work.fields, work.notes, prefix=options.prefix)
        return (_verify(work, fresh, options) if options.verify else None), None
    folder = fresh
    if pipeline:
        (folder := fresh / "vae").mkdir()
    write_diffusers_folder(
        folder,
        work.tensors,
        work.fields,
        work.notes,
        variant=options.variant,
        max_shard_size=options.max_shard_size,
    )
    verification = _verify(work, folder, options) if options.verify else None
    if pipeline:
        pipeline.copy_to(fresh)
    else:
        keep_card(place.target, fresh)
    return verification, None


def _verify(work: Work, path: Path, options: ConvertOptions) -> Verification:
    """Compare what is on the disk with what was to be written, and its function with the source's."""
    where = "the result"
    result = read_checkpoint(path)
    check_tensors(result.tensors, work.tensors, where)
    check_fields(result.fields, work.fields, where)
    if options.to == "ldm":
        shapes = read_shapes(path)
        if strangers := [name for name in shapes if not name.startswith(options.prefix)]:
            raise CheckpointError(f"{where}: names without the prefix `{options.prefix}`: {some(strangers, 3)}")
        bare = {name.removeprefix(options.prefix): shape for name, shape in shapes.items()}
        check_ldm_shapes(bare, work.fields, where)
    return _compared(work, result.tensors, build(result.tensors, result.fields), options)


def _compared(work: Work, tensors: Mapping[str, Tensor], vae: Autoencoder, options: ConvertOptions) -> Verification:
    comparisons = compare(work.source_vae, vae, {tensor.dtype for tensor in tensors.values()})
    if failed := [comparison for comparison in comparisons if not comparison.passed]:
        said = "; ".join(f"{c.name} by {c.max_abs_error:.3g}, allowed {c.tolerance:.3g}" for c in failed)
        raise CheckpointError(f"the result is not kept, for it does not compute what the source does: {said}")
    return Verification(
        identical=same_bits(tensors, work.source.tensors),
        num_tensors=len(tensors),
        names_checked=options.to == "ldm",
        comparisons=comparisons,
    )


def _export_onnx(work: Work, folder: Path, options: ConvertOptions) -> tuple[Verification | None, Mapping[str, Any]]:
    """The exporter runs its models against torch itself; what cast and fold change is measured here."""
    from sdvae.checkpoints.convert.onnx import export_onnx

    vae = build(work.tensors, work.fields)
    verification = _compared(work, work.tensors, vae, options) if options.verify else None
    dtype = getattr(torch, options.dtype or "float32")
    return verification, export_onnx(vae, folder, dtype=dtype, notes=work.notes).to_json()


# The report


def _report(
    status: str,
    work: Work,
    place: Place,
    verification: Verification | None = None,
    onnx: Mapping[str, Any] | None = None,
) -> ConvertReport:
    options, pipeline = place.options, place.pipeline
    return ConvertReport(
        status=status,
        source=work.name,
        source_kind=str(work.source.found.kind),
        source_evidence=work.source.found.evidence,
        source_digest=work.digest,
        source_dtypes=dtype_names(work.source.tensors),
        remarks=work.source.remarks,
        target=str(place.target),
        to=options.to,
        dtypes=dtype_names(work.tensors),
        num_bytes=work.num_bytes + (pipeline.num_bytes if pipeline else 0),
        num_copied_files=len(pipeline.files) if pipeline else 0,
        num_shards=_num_shards(work, options),
        config=work.fields,
        rewrites=tuple(work.notes.get("rewrites", ())),
        fold=work.fold,
        verification=verification,
        onnx=onnx,
        loaders=_loaders(work, place),
        warnings=_warnings(work, place),
    )


def _loaders(work: Work, place: Place) -> tuple[LoaderVerdict, ...]:
    options = place.options
    if options.to == "onnx":
        return ()
    is_ldm = options.to == "ldm"
    tensors = ldm_tensors(work.tensors, options.prefix) if is_ldm else work.tensors
    facts = WeightFacts(
        path=str(place.target),
        is_folder=not is_ldm,
        suffix=".json" if _num_shards(work, options) > 1 else ".safetensors",
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        fields=work.fields,
        has_config=not is_ldm,
        variant=options.variant,
    )
    return loader_verdicts(facts)


def _num_shards(work: Work, options: ConvertOptions) -> int:
    if options.max_shard_size is None:
        return 1
    return len(planned_shards(work.tensors, WEIGHTS_NAME, options.max_shard_size).filename_to_tensors)


def _warnings(work: Work, place: Place) -> tuple[str, ...]:
    warnings = list(place.pipeline.check_fits(work.fields)) if place.pipeline else []
    if work.source.assumed:
        said = ", ".join(f"{name} {work.fields[name]}" for name in work.source.assumed)
        options = " ".join(f"--{name.replace('_', '-')} ..." for name in work.source.assumed)
        warnings.append(f"{said} is assumed, and the result records that; say what it is: {options}")
    if place.options.to == "ldm" and place.options.fold_scale is None:
        warnings += _unread_scale(work.fields)
    return tuple(warnings)


def _unread_scale(fields: Mapping[str, Any]) -> Iterator[str]:
    """What the readers of an LDM file do not learn."""
    given = {name: fields[name] for name in SCALE_FIELDS if fields[name]}
    channels = fields["latent_channels"]
    scales = [asdict(family) for family in FAMILIES.values() if family.latent_channels == channels]
    if given in [{name: scale[name] for name in SCALE_FIELDS if scale.get(name)} for scale in scales]:
        return  # the scale of a known diffusion model, and so of its interface
    said = ", ".join(f"{name} {value}" for name, value in given.items())
    yield (
        f"an LDM file carries no scale that user interfaces read: they take that of their diffusion model. This VAE "
        f"has {said}: where the model's is another, fold it in: --fold-scale {LDM_SCALING_FACTOR} for Stable Diffusion "
        f"1 and 2"
    )
