"""Conversion between the layouts that a VAE's files have: read, perhaps rewrite and cast, write, and prove it.

A result takes its place only after it was read back from the disk and compared with its source; until then it lies
hidden beside it, so a conversion that fails or is killed leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.checkpoints.compat.facts import weight_facts
from sdvae.checkpoints.compat.loaders import LoaderVerdict, loader_verdicts
from sdvae.checkpoints.convert.options import LDM_SCALING_FACTOR, ConvertOptions
from sdvae.checkpoints.convert.plan import Conversion, plan
from sdvae.checkpoints.convert.verify import Verification, verify
from sdvae.checkpoints.convert.write import add_the_rest, new_output, write
from sdvae.checkpoints.formats import FAMILIES, SCALE_FIELDS, WEIGHTS_NAME
from sdvae.checkpoints.rewrite.fold_scale import FoldCheck
from sdvae.checkpoints.write import planned_shards

__all__ = ["ConvertReport", "convert"]


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
        that differs from its source by more than `verify.TOLERANCES`; ConfigError for options that do not
        go together.
    """
    chosen = options or ConvertOptions()
    conversion = plan(src, Path(dst).expanduser(), chosen)
    if conversion.status == "up to date" or chosen.dry_run:
        return _report(conversion, conversion.status)
    with new_output(conversion.place) as fresh:
        onnx = write(conversion, fresh)
        verification = verify(conversion, fresh) if chosen.verify else None
        add_the_rest(conversion.place, fresh)
    return _report(conversion, "written", verification, onnx)


def _report(
    conversion: Conversion,
    status: str,
    verification: Verification | None = None,
    onnx: Mapping[str, Any] | None = None,
) -> ConvertReport:
    place, source = conversion.place, conversion.source
    size = place.options.max_shard_size
    num_shards = len(planned_shards(conversion.stored, WEIGHTS_NAME, size).filename_to_tensors) if size else 1
    return ConvertReport(
        status=status,
        source=conversion.name,
        source_kind=str(source.found.kind),
        source_evidence=source.found.evidence,
        source_digest=conversion.digest,
        source_dtypes=_dtype_names(source.tensors),
        remarks=source.remarks,
        target=str(place.target),
        to=place.options.to,
        dtypes=_dtype_names(conversion.tensors),
        num_bytes=conversion.num_bytes + (place.pipeline.num_bytes if place.pipeline else 0),
        num_copied_files=len(place.pipeline.files) if place.pipeline else 0,
        num_shards=num_shards,
        config=conversion.fields,
        rewrites=tuple(conversion.notes.get("rewrites", ())),
        fold=conversion.fold,
        verification=verification,
        onnx=onnx,
        warnings=_warnings(conversion),
        loaders=_loaders(conversion, num_shards),
    )


def _warnings(conversion: Conversion) -> tuple[str, ...]:
    place, fields, assumed = conversion.place, conversion.fields, conversion.source.assumed
    warnings = list(place.pipeline.check_fits(fields)) if place.pipeline else []
    if assumed:
        said = ", ".join(f"{name} {fields[name]}" for name in assumed)
        options = " ".join(f"--{name.replace('_', '-')} ..." for name in assumed)
        warnings.append(f"{said} is assumed, and the result records that; say what it is: {options}")
    if place.options.to == "ldm" and place.options.fold_scale is None:
        warnings += _unread_scale(fields)
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


def _loaders(conversion: Conversion, num_shards: int) -> tuple[LoaderVerdict, ...]:
    options = conversion.place.options
    if options.to == "onnx":
        return ()
    is_ldm = options.to == "ldm"
    facts = weight_facts(
        {name: tuple(tensor.shape) for name, tensor in conversion.stored.items()},
        path=str(conversion.place.target),
        is_folder=not is_ldm,
        suffix=".json" if num_shards > 1 else ".safetensors",
        fields=conversion.fields,
        has_config=not is_ldm,
        variant=options.variant,
    )
    return loader_verdicts(facts)


def _dtype_names(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The types that occur, such as ("bfloat16", "float32"), in alphabetical order."""
    return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
