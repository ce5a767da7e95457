"""From measured blocks to a result: means, intervals, set metrics, latent health, comparisons, stress, pictures."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from sdvae._version import __version__
from sdvae.errors import ImageError
from sdvae.evaluation.blocks import Measured
from sdvae.evaluation.compare import paired_differences, set_differences
from sdvae.evaluation.gallery import choose_gallery, gallery_entry
from sdvae.evaluation.images import Prepared, evenly_spaced, prepare, slice_of, stand_digest
from sdvae.evaluation.measure import read_images
from sdvae.evaluation.plan import ORIGINALS, EvaluationPlan
from sdvae.evaluation.protocol import CORE_METRICS, FID_MIN_IMAGES
from sdvae.evaluation.set_metrics import SET_METRIC_ROWS, measure_sets
from sdvae.evaluation.setup import Setup
from sdvae.evaluation.stress.run import run_stress
from sdvae.evaluation.swap import swap_obstacle
from sdvae.files import write_atomic
from sdvae.metrics.bootstrap import slice_summaries, summarise
from sdvae.metrics.fid import statistics_bytes
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.report.result import EvaluationResult

__all__ = ["conclude"]

_FEW_FOR_RFID = 2048  # fewer images than features leave their covariance singular


def conclude(setup: Setup, measured: Measured, started: float) -> EvaluationResult:
    """All that follows from what was measured; gates and published numbers are left to the caller.

    Images for stress tests and pictures are read again. started: time.perf_counter() of the run's begin.
    Raises: ImageError where no image could be read.
    """
    plan = setup.plan
    if not measured.images:
        first = measured.unreadable[0]
        raise ImageError(
            f"none of the {len(plan.files)} images can be read; the first: {first['key']}: {first['reason']}"
        )
    slices = [slice_of(image["key"]) for image in measured.images]
    rows = [_metric_row(name) for name in plan.protocol.metrics]
    skipped = [*plan.skipped_metrics, *setup.networks.skipped]
    sets: dict[str, dict[str, Any]] = {id_: {} for id_ in setup.subjects}
    if setup.networks.set_metrics and len(measured.images) < FID_MIN_IMAGES:
        skipped += [(name, "only one image could be read") for name in setup.networks.set_metrics]
    elif setup.networks.set_metrics:
        sets = _measure_sets(setup, measured)
    spaced = evenly_spaced(len(measured.images), plan.options.stress_images if plan.options.stress else 0)
    images_for_stress = _read_whole(plan, _read_again(plan, measured, spaced))
    chosen = choose_gallery(measured.values, len(measured.images), plan.options.gallery_images)
    gallery = _read_again(plan, measured, chosen)
    comparisons = _comparisons(setup, measured, sets, rows)
    lost = len(spaced) - len(images_for_stress), len(chosen) - len(gallery)
    return EvaluationResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        sdvae_version=__version__,
        protocol=plan.protocol.to_json(),
        dataset=_dataset(setup, measured, slices),
        metrics=rows,
        skipped_metrics=[{"name": name, "reason": reason} for name, reason in skipped],
        vaes=_vaes(setup, measured, slices, sets, images_for_stress),
        comparisons=comparisons,
        warnings=[*_warnings(measured, "rfid" in next(iter(sets.values()))), *_lost_warnings(*lost)],
        per_image={
            "keys": [image["key"] for image in measured.images],
            "widths": [image["width"] for image in measured.images],
            "heights": [image["height"] for image in measured.images],
            "slices": slices,
            "values": measured.values,
        },
        gallery=[gallery_entry(prepared, setup.subjects, plan.protocol) for prepared in gallery],
        environment={
            "device": str(setup.device),
            "num_processes": setup.processes.count,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "seconds": time.perf_counter() - started,
            "inputs": setup.inputs,
        },
    )


def _warnings(measured: Measured, has_rfid: bool) -> list[str]:
    """What a reader of the numbers must know."""
    count = len(measured.images)
    found = [
        f"{id_}: {broken} of {count} reconstructions hold values that are not finite, which count as black or white"
        for id_, broken in measured.nonfinite.items()
        if broken
    ]
    for name, column in next(iter(measured.values.values())).items():
        if lacking := column.count(None):
            metric = IMAGE_METRICS[name]
            small = sum(min(image["width"], image["height"]) < metric.min_px for image in measured.images)
            reason = f"{small} are smaller than its {metric.min_px} px" if small else "they lack what it measures"
            found.append(f"{metric.title} leaves out {lacking} of {count} images: {reason}")
    if has_rfid and count < _FEW_FOR_RFID:
        found.append(f"rFID over {count} images is far above that over thousands; compare it on these images alone")
    return found


def _metric_row(name: str) -> dict[str, Any]:
    if name in SET_METRIC_ROWS:
        return SET_METRIC_ROWS[name]
    fields = ("name", "title", "unit", "better", "target", "decimals", "definition", "source")
    return {field: getattr(IMAGE_METRICS[name], field) for field in fields} | {"kind": "image"}


def _measure_sets(setup: Setup, measured: Measured) -> dict[str, dict[str, Any]]:
    if setup.plan.options.save_fid_statistics is not None:
        identity = {"images": stand_digest(setup.plan.files), "protocol": setup.plan.protocol.to_json()}
        statistics = statistics_bytes(measured.features[ORIGINALS].moments, identity)
        write_atomic(statistics, setup.plan.options.save_fid_statistics)
    return measure_sets(measured.features, setup.plan.protocol, setup.fid_reference)


def _vaes(
    setup: Setup,
    measured: Measured,
    slices: Sequence[str],
    sets: dict[str, dict[str, Any]],
    images_for_stress: Sequence[tuple[Prepared, Prepared]],
) -> list[dict[str, Any]]:
    plan = setup.plan
    bootstrap = {"seed": plan.protocol.seed, "resamples": plan.protocol.resamples}
    core_metrics = {name: function for name, function in setup.networks.metrics.items() if name in CORE_METRICS}
    found = []
    for entrant in plan.entrants:
        subject, values = setup.subjects[entrant.id], measured.values[entrant.id]
        scale = subject.scale
        configured = (None, None) if scale.is_per_channel else (scale.scaling_factor, scale.shift_factor)
        found.append(
            {
                "id": entrant.id,
                "ref": subject.name,
                "role": entrant.role,
                "class_name": subject.class_name,
                "digest": subject.digest,
                "dtype": subject.dtype_name,
                "num_parameters": subject.num_parameters,
                "spatial_compression_ratio": subject.spatial_compression_ratio,
                "latent_channels": subject.latent_channels,
                "scaling_factor": scale.scaling_factor,
                "shift_factor": scale.shift_factor,
                "summary": summarise(values, **bootstrap) | sets[entrant.id],
                "slices": slice_summaries(values, slices, **bootstrap),
                "seconds_per_megapixel": {
                    step: seconds / (measured.pixels / 1e6) for step, seconds in measured.seconds[entrant.id].items()
                },
                "latents": measured.latents[entrant.id].health(*configured),
                "stress": run_stress(
                    plan.options.stress,
                    subject,
                    [(image.key, image.pixels) for image, _ in images_for_stress],
                    [(whole.key, whole.pixels) for _, whole in images_for_stress],
                    core_metrics,
                    plan.protocol.seed,
                ),
            }
        )
    return found


def _comparisons(
    setup: Setup, measured: Measured, sets: dict[str, dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    plan, reference = setup.plan, setup.plan.reference
    if reference is None:
        return []
    bootstrap = {"seed": plan.protocol.seed, "resamples": plan.protocol.resamples}
    subjects = setup.subjects
    return [
        {
            "vae": id_,
            "reference": reference.id,
            "metrics": paired_differences(measured.values[id_], measured.values[reference.id], rows, **bootstrap)
            | set_differences(sets[id_], sets[reference.id], rows),
            "swap": measured.swaps[id_].result(id_, reference.id)
            if id_ in measured.swaps
            else {"skipped": swap_obstacle(subjects[id_], subjects[reference.id])},
        }
        for id_ in (entrant.id for entrant in plan.entrants if entrant.role == "candidate")
    ]


def _dataset(setup: Setup, measured: Measured, slices: Sequence[str]) -> dict[str, Any]:
    whole = hashlib.sha256()
    for image in measured.images:
        whole.update(f"{image['key']}\0{image['digest']}\n".encode(errors="surrogateescape"))
    sides = [side for image in measured.images for side in (image["width"], image["height"])]
    return {
        "source": setup.plan.source,
        "num_found": setup.plan.num_found,
        "num_images": len(measured.images),
        "digest": f"sha256:{whole.hexdigest()}",
        "unreadable": measured.unreadable,
        "slices": {name: slices.count(name) for name in sorted({*slices})} if any(slices) else {},
        "sizes": {
            "min_px": min(sides),
            "max_px": max(sides),
            "distinct": len({(image["width"], image["height"]) for image in measured.images}),
        },
    }


def _read_again(plan: EvaluationPlan, measured: Measured, places: Sequence[int]) -> list[Prepared]:
    """Some of the measured images, without those that have gone or changed since."""
    digests = {measured.images[place]["index"]: measured.images[place]["digest"] for place in places}
    items = [item for _, item in read_images(plan, list(digests))]
    return [item for item in items if isinstance(item, Prepared) and item.digest == digests[item.index]]


def _read_whole(plan: EvaluationPlan, images: Sequence[Prepared]) -> list[tuple[Prepared, Prepared]]:
    """Each with the same image neither resized nor cropped, without those that have just gone."""
    whole = replace(plan.protocol, size_px=None, crop="none")
    pairs = []
    for image in images:
        with suppress(ImageError):
            pairs.append((image, prepare(image.index, plan.files[image.index], whole)))
    return pairs


def _lost_warnings(from_stress: int, from_gallery: int) -> list[str]:
    """What a reader must know of images that went after they were measured."""
    counts = {"stress tests": from_stress, "pictures": from_gallery}
    return [
        f"the {name} leave out {count} images, which have gone or changed since they were measured"
        for name, count in counts.items()
        if count
    ]
