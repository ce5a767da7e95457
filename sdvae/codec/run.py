"""`encode_folder` and `decode_folder`: everything that is needed, looked up and planned, then done.

`plan.py` decides what is to be done; `image_encoder.py` and `image_decoder.py` do it for each file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sdvae.checkpoints.opened import VaeRef, open_vae
from sdvae.codec.cache_writer import CacheWriter
from sdvae.codec.engine import CodecTally, prepare_folder
from sdvae.codec.image_decoder import ImageDecoder
from sdvae.codec.image_encoder import ImageEncoder
from sdvae.codec.launched import join_launched
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.planning.plan import LatentSource, find_latents, plan_decode, plan_encode
from sdvae.codec.reports import DecodeReport, EncodeReport, join_reports
from sdvae.data.batches import OnProgress
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import find_inputs
from sdvae.errors import ConfigError
from sdvae.latents.kohya import SCALING_FACTORS
from sdvae.latents.listing import CacheListing, merge_finished_parts
from sdvae.latents.manifest import Manifest
from sdvae.latents.parts import WHOLE
from sdvae.model.scale import LatentScale

__all__ = ["DecodeRun", "EncodeRun", "decode_folder", "encode_folder"]


class EncodeRun:
    """Images -> latent files: everything that is needed, looked up and planned; `run` does it.

    Raises: ConfigError for images, options or an output folder that cannot be; CheckpointError for the VAE.
    """

    def __init__(
        self,
        images: str | Path | Sequence[ImageFile],
        out: str | Path,
        vae: VaeRef = None,
        options: EncodeOptions | None = None,
    ) -> None:
        self.options = options or EncodeOptions()
        self.out = Path(out)
        if isinstance(images, (str, Path)):
            dataset = {name: getattr(self.options, name) for name in ("split", "subset", "image_column")}
            images = find_inputs(images, **dataset)
        self._on_ray = self.options.engine == "ray"
        if self._on_ray:
            _check_ray(vae)
        self._ref = vae
        self.vae = open_vae(vae, **self.options.opening | ({"device": "cpu"} if self._on_ray else {}))
        self.encoder = ImageEncoder(self.out, self.options, self.vae)
        self.plan = plan_encode(images, self.out, self.options, self.encoder.preprocessing, self.encoder.record)

    def run(self, on_progress: OnProgress | None = None) -> EncodeReport:
        """Encode what the plan says. Raises: SdvaeError where the disk is full."""
        prepare_folder(self.plan, self.out)
        listing = CacheListing(self.out, self.options.format, self.options.part)
        outputs = [item.output for item in self.plan.items if item.action != "fail"]
        listing.begin(outputs, replaced=[job.output for job in self.plan.jobs])
        written = Manifest(format=self.options.format)
        try:
            tally, device = self._carry_out(written, on_progress)
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
        return EncodeReport(**fields, format=self.options.format, manifest=str(manifest))

    def _carry_out(self, written: Manifest, on_progress: OnProgress | None) -> tuple[CodecTally, str]:
        """Do the jobs of the plan. Returns: what happened, and on which device.

        written: takes the files that were written, also where this raises.
        """
        if self._on_ray:
            from sdvae.codec.ray import encode_on_ray

            return encode_on_ray(
                self.plan, self.out, self.options, self._ref, self.encoder.record, written, on_progress
            )
        writer = CacheWriter(self.out, self.options.format, self.plan.jobs)
        try:
            return self.encoder.encode(self.plan, writer, on_progress), str(self.vae.device)
        finally:
            written.update(writer.written)


class DecodeRun:
    """Latent files -> images: everything that is needed, looked up and planned; `run` does it.

    Raises: ConfigError for latents, options or an output folder that cannot be; CheckpointError for the VAE;
        LatentFileError where all latents are of another VAE.
    """

    def __init__(
        self,
        latents: str | Path | Sequence[LatentSource],
        out: str | Path,
        vae: VaeRef = None,
        options: DecodeOptions | None = None,
    ) -> None:
        self.options = options or DecodeOptions()
        self.out = Path(out)
        files = find_latents(latents) if isinstance(latents, (str, Path)) else latents
        self.vae = open_vae(vae, **self.options.opening)
        self.decoder = ImageDecoder(self.out, self.options, self.vae)
        self.plan = plan_decode(files, self.out, self.options, self.decoder.record)

    def run(self, on_progress: OnProgress | None = None) -> DecodeReport:
        """Decode what the plan says. Raises: SdvaeError where the disk is full."""
        prepare_folder(self.plan, self.out)
        tally = self.decoder.decode(self.plan, on_progress)
        return DecodeReport(**tally.to_fields(self.plan, self.out, self.vae))


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
    processes, options = join_launched(options or EncodeOptions())
    report = EncodeRun(images, out, vae, options).run(on_progress if processes.is_main else None)
    return join_reports(processes.gather(report))


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
    processes, options = join_launched(options or DecodeOptions())
    report = DecodeRun(latents, out, vae, options).run(on_progress if processes.is_main else None)
    return join_reports(processes.gather(report))


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
