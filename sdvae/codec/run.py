"""`encode_folder` and `decode_folder`: everything that is needed, looked up and planned, then done.

`planning/` decides what is to be done; `image_encoder.py` and `image_decoder.py` do it for each file. Processes that a
launcher started (accelerate launch, torchrun) divide the files, and each has the plan and the report of all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sdvae.checkpoints.opened import OpenedVae, VaeRef, open_vae
from sdvae.codec.engine import carry_out
from sdvae.codec.image_decoder import ImageDecoder
from sdvae.codec.image_encoder import ImageEncoder
from sdvae.codec.options import DecodeOptions, EncodeOptions, RunOptions
from sdvae.codec.planning.encode import check_format, plan_encode
from sdvae.codec.planning.files import LatentSource, find_latents, plan_decode
from sdvae.codec.planning.plan import Plan
from sdvae.codec.reports import DecodeReport, EncodeReport, join_reports
from sdvae.data.batches import OnProgress
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import find_inputs
from sdvae.errors import ConfigError
from sdvae.files import remove_leftovers
from sdvae.latents.header import VaeRecord
from sdvae.latents.kohya import SCALING_FACTORS
from sdvae.latents.listing import CacheListing, merge_finished_parts
from sdvae.latents.parts import WHOLE, Part
from sdvae.model.scale import LatentScale
from sdvae.processes import Processes, count_processes, join_processes

__all__ = ["DecodeRun", "EncodeRun", "decode_folder", "encode_folder", "join_launched", "vae_record"]

Options = TypeVar("Options", bound=RunOptions)


class EncodeRun:
    """Images -> latent files: everything that is needed, looked up and planned; `run` does it.

    plan: of this process. divided: whether the processes of a launcher divide the images; else each does all.
    Raises: ConfigError for images, options or an output folder that cannot be; CheckpointError for the VAE.
    """

    def __init__(
        self,
        images: str | Path | Sequence[ImageFile],
        out: str | Path,
        vae: VaeRef = None,
        options: EncodeOptions | None = None,
        *,
        divided: bool = True,
    ) -> None:
        options = options or EncodeOptions()
        self.processes, self.options = join_launched(options) if divided else (Processes(), options)
        self.out = Path(out)
        if isinstance(images, (str, Path)):
            which = {"split": options.split, "subset": options.subset, "image_column": options.image_column}
            images = find_inputs(images, **which)
        self._on_ray = self.options.engine == "ray"
        if self._on_ray:
            _check_ray(vae)
        self._ref = vae
        self.vae = open_vae(vae, **self.options.opening | ({"device": "cpu"} if self._on_ray else {}))
        check_format(self.options, self.vae)
        record = vae_record(self.vae)
        self.plan = plan_encode(images, self.out, self.options, record)
        self.encoder = ImageEncoder(self.out, self.options, self.vae, record, self.plan.jobs)

    def plan_of_all(self) -> Plan:
        return Plan.joined(self.processes.gather(self.plan))

    def run(self, on_progress: OnProgress | None = None) -> EncodeReport:
        """Encode what the plan says. Returns: the report of all processes. Raises: SdvaeError for a full disk."""
        on_progress = on_progress if self.processes.is_main else None
        _prepare_folder(self.plan, self.out)
        listing = CacheListing(self.out, self.options.format, self.options.part)
        outputs = [item.output for item in self.plan.items if item.action != "fail"]
        listing.begin(outputs, replaced=[job.output for job in self.plan.jobs])
        written = self.encoder.written
        try:
            if self._on_ray:
                from sdvae.codec.ray import encode_on_ray

                tally, device = encode_on_ray(
                    self.plan, self.out, self.options, self._ref, self.encoder.record, written, on_progress
                )
            else:
                tally, device = carry_out(self.encoder, self.plan, on_progress), str(self.vae.device)
        except BaseException:
            with contextlib.suppress(OSError):  # the next run completes the list
                listing.close(written, complete=False, num_failed=0)
            raise
        if self.options.format == "kohya-npz":
            tally.warnings += _scale_warnings(self.vae.scale, self.options.trainer_suffix)
        fields = tally.to_fields(self.plan, self.out, self.vae) | {"device": device}
        manifest = listing.close(written, complete=True, num_failed=fields["failed"])
        if self.options.part != WHOLE:
            merged, warnings = merge_finished_parts(self.out)
            manifest, fields["warnings"] = merged or manifest, (*fields["warnings"], *warnings)
        report = EncodeReport(**fields, format=self.options.format, manifest=str(manifest))
        return join_reports(self.processes.gather(report))


class DecodeRun:
    """Latent files -> images: everything that is needed, looked up and planned; `run` does it.

    plan, divided: as of `EncodeRun`.
    Raises: ConfigError for latents, options or an output folder that cannot be; CheckpointError for the VAE;
        LatentFileError where all latents are of another VAE.
    """

    def __init__(
        self,
        latents: str | Path | Sequence[LatentSource],
        out: str | Path,
        vae: VaeRef = None,
        options: DecodeOptions | None = None,
        *,
        divided: bool = True,
    ) -> None:
        options = options or DecodeOptions()
        self.processes, self.options = join_launched(options) if divided else (Processes(), options)
        self.out = Path(out)
        files = find_latents(latents) if isinstance(latents, (str, Path)) else latents
        self.vae = open_vae(vae, **self.options.opening)
        record = vae_record(self.vae)
        self.plan = plan_decode(files, self.out, self.options, record)
        self.decoder = ImageDecoder(out=self.out, options=self.options, vae=self.vae, record=record)

    def plan_of_all(self) -> Plan:
        return Plan.joined(self.processes.gather(self.plan))

    def run(self, on_progress: OnProgress | None = None) -> DecodeReport:
        """Decode what the plan says. Returns: the report of all processes. Raises: SdvaeError for a full disk."""
        _prepare_folder(self.plan, self.out)
        tally = carry_out(self.decoder, self.plan, on_progress if self.processes.is_main else None)
        report = DecodeReport(**tally.to_fields(self.plan, self.out, self.vae))
        return join_reports(self.processes.gather(report))


def encode_folder(
    images: str | Path | Sequence[ImageFile],
    out: str | Path,
    vae: VaeRef = None,
    options: EncodeOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> EncodeReport:
    """Encode images to one latent file each, or to shards; what is up to date already is skipped.

    images: a folder (its tree is mirrored), a file, a glob or a .txt list; tar files of images or a folder or glob of
        these; a dataset: parquet or arrow files, a folder of these, "hf://datasets/owner/name"; or what `find_images`
        returned.
    vae: a folder, a file or a hub id; None for the bundled one; a loaded model runs where and as it is.
    Under a launcher (torchrun, accelerate launch) the processes divide the images, and each returns the report of all.
    Files that fail are recorded in the report, and the rest goes on.
    Raises: ConfigError and CheckpointError before anything is written; SdvaeError if the disk is full.
    """
    return EncodeRun(images, out, vae, options).run(on_progress)


def decode_folder(
    latents: str | Path | Sequence[LatentSource],
    out: str | Path,
    vae: VaeRef = None,
    options: DecodeOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> DecodeReport:
    """Decode latent files to one image each, at the size that was encoded; what is up to date already is skipped.

    latents: a folder (its tree is mirrored), a file or a glob, or what `find_latents` returned. Files that keep the
        posterior decode from its mean.
    vae: as for `encode_folder`; latents of another VAE are refused unless the options allow it.
    Under a launcher the processes divide the files, as for `encode_folder`. Files that fail are recorded in the report,
    and the rest goes on.
    Raises: ConfigError, CheckpointError and LatentFileError before anything is written; SdvaeError if the disk is full.
    """
    return DecodeRun(latents, out, vae, options).run(on_progress)


def vae_record(vae: OpenedVae) -> VaeRecord:
    """What latent files say of a VAE."""
    execution = vae.model.execution
    blended = execution.tiling == "blended"
    return VaeRecord(
        name=vae.name,
        digest=vae.digest,
        dtype=str(vae.dtype).removeprefix("torch."),
        spatial_compression_ratio=vae.spatial_compression_ratio,
        scaling_factor=vae.scale.scaling_factor,
        shift_factor=vae.scale.shift_factor,
        latents_mean=vae.scale.latents_mean,
        latents_std=vae.scale.latents_std,
        tile_size_px=execution.tile_sample_min_size if blended else None,
        tile_overlap=execution.tile_overlap_factor if blended else None,
    )


def join_launched(options: Options) -> tuple[Processes, Options]:
    """Meet the other processes that the same launcher started, each with its part and its CUDA device.

    Returns: this process among them, and the options for it.
    Raises: ConfigError if the options divide the work already, or the launcher does not say where to meet.
    """
    count = count_processes()
    if count == 1:
        return Processes(), options
    if options.shard is not None:
        raise ConfigError(
            f"shard is '{options.shard}', but a launcher started {count} processes (WORLD_SIZE), which divide the "
            "images among themselves: leave out --shard, or start one process"
        )
    if isinstance(options, EncodeOptions) and options.engine != "local":
        raise ConfigError(f"engine is {options.engine}, which starts its workers itself: run it without a launcher")
    processes = join_processes(options.device)
    return processes, replace(options, shard=str(Part(processes.rank + 1, count)))


def _prepare_folder(plan: Plan, out: Path) -> None:
    """Make the output folder, where it is not there, and remove what killed runs left in it. Raises: ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: this folder cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"{out}: this folder cannot be written to")
    remove_leftovers({out} | {item.output.parent for item in plan.items})


def _check_ray(vae: VaeRef) -> None:
    """Raises: ConfigError where Ray is not installed, or its workers could not load the VAE."""
    from sdvae.codec.ray import check_installed

    check_installed()
    if vae is not None and not isinstance(vae, (str, Path)):
        raise ConfigError("engine ray loads the VAE in every worker: give its folder, file or hub id, not a loaded one")


def _scale_warnings(scale: LatentScale, suffix: str) -> list[str]:
    """What to say where kohya's trainers would scale the latents of this VAE wrongly; empty where they do it right."""
    expected = SCALING_FACTORS[suffix]
    differing = [] if scale.scaling_factor == expected else [f"scaling_factor {scale.scaling_factor}"]
    if scale.is_per_channel:
        differing.append("latents_mean and latents_std")
    elif scale.shift_factor:
        differing.append(f"shift_factor {scale.shift_factor}")
    if not differing:
        return []
    return [
        f"kohya's {suffix} trainers multiply every latent by {expected} and do nothing else to it, but this VAE has "
        f"{' and '.join(differing)}: fold the scale first (sdvae convert VAE DST --fold-scale {expected}), and encode "
        "with the result"
    ]
