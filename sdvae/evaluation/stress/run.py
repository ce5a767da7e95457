"""Stress tests of an autoencoder: what one pass over one set at one size does not show.

Repeated passes, sizes, tiles, dtypes and draws of z. Each test returns the part of result.json of its name, see
docs/evaluation-result.md. Nothing is drawn at random but z, from a stream per image. Images go one by one, so sizes may
differ and memory does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import Pixels, image_to_x, round_to_8_bits
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import ConfigError, SdvaeError
from sdvae.evaluation.stress.seam_score import SEAM_THRESHOLD, SeamScore, colour_step, seam_score
from sdvae.evaluation.stress.tiling import Tiling
from sdvae.metrics.table import IMAGE_METRICS, Compute
from sdvae.model.posterior import image_generator

__all__ = ["STRESS_TESTS", "cycles", "precision", "resolution", "run_stress", "sampling", "seams"]

CYCLES = (1, 2, 5, 10)
SIZES_PX = (128, 256, 512, 768, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_PX = 1024  # of larger images the centre is taken: the pass without tiles has to fit into memory

Images = Sequence[tuple[str, Pixels]]  # key, (H, W, 3)
Metrics = Mapping[str, Compute]
Note = Callable[[str], None]  # takes a sentence for the reader of the result


def no_note(sentence: str) -> None: ...


class Means:
    """Mean of each metric over the images that it is defined for."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.sums = dict.fromkeys(metrics, 0.0)
        self.counts = dict.fromkeys(metrics, 0)

    def add(self, recon: Tensor, image: Tensor) -> None:
        """recon, image: (1, 3, H, W), [0, 1], multiples of 1/255."""
        for name, metric in self.metrics.items():
            try:
                value = float(metric(recon, image))
            except ConfigError:  # the image is too small for it
                continue
            if not np.isnan(value):
                self.sums[name] += value
                self.counts[name] += 1

    def values(self) -> dict[str, float | None]:
        return {name: self.sums[name] / count if count else None for name, count in self.counts.items()}


def levels(pixels: Pixels, subject: OpenedVae) -> Tensor:
    """(1, 3, H, W), [0, 1], multiples of 1/255, where the subject computes."""
    return round_to_8_bits(image_to_x(pixels)[None]).to(subject.device)


def reconstruct(subject: OpenedVae, x: Tensor) -> Tensor:
    """x (1, 3, H, W) -> recon of the same shape, through the mode, not clamped."""
    return subject.decode(subject.encode(x).z, *x.shape[-2:])


@torch.inference_mode()
def cycles(
    subject: OpenedVae,
    images: Images,
    metrics: Metrics,
    *,
    counts: Sequence[int] = CYCLES,
) -> dict[str, Any]:
    """Encode and decode again and again, as if saved as a picture and opened each time: 8 bits after every pass.

    z is the mode. Returns: `cycles`, the counts; `metrics`, metric -> mean over images against the originals after so
    many passes, one per count; `num_images`.
    """
    counts = sorted(set(counts))
    means = [Means(metrics) for _ in counts]
    for _, pixels in images:
        original, recon = levels(pixels, subject), levels(pixels, subject)
        for count in range(1, counts[-1] + 1):
            recon = round_to_8_bits(reconstruct(subject, recon * 2 - 1))
            if count in counts:
                means[counts.index(count)].add(recon, original)
    values = [each.values() for each in means]
    return {
        "cycles": list(counts),
        "metrics": {name: [each[name] for each in values] for name in metrics},
        "num_images": len(images),
    }


@torch.inference_mode()
def resolution(
    subject: OpenedVae,
    images: Images,
    metrics: Metrics,
    *,
    sizes: Sequence[int] = SIZES_PX,
    note: Note = no_note,
) -> list[dict[str, Any]]:
    """The same images at several sizes: central squares, resized with an antialiased Lanczos filter, never enlarged.

    Returns: per size `size_px`, `metrics` (means; empty where no image is large enough) and `num_images`.
    """
    means = {size: Means(metrics) for size in sorted(set(sizes))}
    counts = dict.fromkeys(means, 0)
    for _, pixels in images:
        for size in means:
            if min(pixels.shape[:2]) < size:
                continue
            original = levels(resize_and_crop(pixels, size, "center"), subject)
            means[size].add(round_to_8_bits(reconstruct(subject, original * 2 - 1)), original)
            counts[size] += 1
    rows = [
        {"size_px": size, "metrics": each.values() if counts[size] else {}, "num_images": counts[size]}
        for size, each in means.items()
    ]
    if len(set(counts.values())) > 1:
        note(
            "Resolution: images are never enlarged, so the larger sizes are measured over fewer of them: "
            + ", ".join(f"{count} at {size} px" for size, count in counts.items())
            + "."
        )
    return rows


@torch.inference_mode()
def seams(
    subject: OpenedVae,
    images: Images,
    *,
    note: Note = no_note,
) -> list[dict[str, Any]]:
    """The model's own tiles against the pass without tiles.

    Images in which two whole tiles do not fit are continued by mirroring along their longer side. Returns: for
    `blended`, the one mode that there is, `score` (the largest seam score of an image where tiles meet; above
    `threshold` it is a seam), `median_score`, `num_visible` (images with a seam), `colour_step` (the largest
    difference of colour shift between neighbouring tiles, grey levels), `max_difference` (of x in [-1, 1], anywhere)
    and `num_images`. Empty, with a note, for a model without tiles.
    """
    try:
        with subject.tiled("blended"):
            tiling = Tiling.of(subject.model)
    except ConfigError as error:
        note(f"Seams: not measured; {error}.")
        return []
    found: list[SeamScore] = []
    difference = colour = 0.0
    num_mirrored = num_small = 0
    for _, pixels in images:
        piece = _centre(pixels)
        canvas = tiling.canvas(piece)
        num_mirrored += canvas is not piece
        x = levels(canvas, subject) * 2 - 1
        with subject.tiled("off"):
            whole = reconstruct(subject, x)
        with subject.tiled("blended"):
            tiled = reconstruct(subject, x)
        difference = max(difference, float((tiled - whole).abs().max()))
        image, reference = _grey_levels(tiled), _grey_levels(whole)
        rows, columns = tiling.middles(canvas.shape[:2])
        colour = max(colour, colour_step(image, reference, rows=rows, columns=columns))
        rows, columns = tiling.lines(canvas.shape[:2])
        try:
            found.append(seam_score(image, reference, rows=rows, columns=columns))
        except ConfigError:
            num_small += 1
    if num_mirrored:
        note(
            f"Seams: {num_mirrored} of {len(images)} images hold no two tiles of {tiling.describe()}, "
            "and were continued by mirroring."
        )
    if num_small:
        note(f"Seams: {num_small} of {len(images)} images are too small to say what a usual line in them is.")
    worst = max(found, key=lambda each: each.score, default=None)
    if worst is not None:
        line = (
            f"the strongest line where they meet, {worst.step:.2f} grey levels, is {'a' if worst.found else 'no'} seam"
        )
        note(f"Seams: blended tiles shift colours against each other by up to {colour:.2f} grey levels; {line}.")
    return [
        {
            "mode": "blended",
            "score": worst.score if worst else None,
            "median_score": float(np.median([each.score for each in found])) if found else None,
            "threshold": SEAM_THRESHOLD,
            "num_visible": sum(each.found for each in found),
            "colour_step": colour,
            "max_difference": difference,
            "num_images": len(images),
        }
    ]


def _centre(pixels: Pixels) -> Pixels:
    top, left = (max(0, (length - _MAX_PX) // 2) for length in pixels.shape[:2])
    return pixels[top : top + _MAX_PX, left : left + _MAX_PX]


def _grey_levels(recon: Tensor) -> NDArray[np.float64]:
    """(1, 3, H, W), [-1, 1] -> (H, W, 3), 0..255, rounded."""
    levels: NDArray[np.float64] = (round_to_8_bits(recon)[0].permute(1, 2, 0).cpu().double() * 255).numpy()
    return levels


class _PrecisionRow:
    def __init__(self, subject: OpenedVae) -> None:
        self.subject = subject
        self.name = str(subject.dtype).removeprefix("torch.")
        self.max_difference, self.finite, self.error = 0.0, True, ""
        self.against_exact, self.against_original = (
            Means({"psnr": IMAGE_METRICS["psnr"].build()}),
            Means({"psnr": IMAGE_METRICS["psnr"].build()}),
        )

    def add(self, original: Tensor, exact: Tensor) -> None:
        if self.error:
            return
        try:
            recon = reconstruct(self.subject, original * 2 - 1)
        except RuntimeError as error:  # float32 has just done the same, so it is this dtype that has no kernel
            self.error = str(error).splitlines()[0]
            return
        self.finite = self.finite and bool(recon.isfinite().all())
        self.max_difference = max(self.max_difference, float((recon - exact).abs().max()))
        rounded = round_to_8_bits(recon)
        self.against_exact.add(rounded, round_to_8_bits(exact))
        self.against_original.add(rounded, original)

    def to_json(self) -> dict[str, Any]:
        if self.error:
            return {"dtype": self.name, "error": self.error}
        return {
            "dtype": self.name,
            "max_difference": self.max_difference if self.finite else None,
            "psnr_against_fp32": self.against_exact.values()["psnr"],
            "finite": self.finite,
            "psnr": self.against_original.values()["psnr"],
        }


@torch.inference_mode()
def precision(
    subject: OpenedVae,
    images: Images,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    note: Note = no_note,
) -> list[dict[str, Any]]:
    """The reconstruction in each dtype against that in float32. Holds one copy of the weights per dtype.

    Returns: per dtype `max_difference` (of x in [-1, 1], before rounding; null unless finite), `psnr_against_fp32` and
    `psnr` against the originals (dB, of 8-bit pixels, means over images, at most 100 per image; NaN counts as black),
    `finite`. With `error`, and nothing else, for a dtype that this device cannot compute in.
    """
    full = subject if subject.dtype == torch.float32 else subject.in_dtype(torch.float32)
    rows = {
        dtype: _PrecisionRow(full if dtype == torch.float32 else subject.in_dtype(dtype))
        for dtype in dict.fromkeys(dtypes)
    }
    for _, pixels in images:
        original = levels(pixels, subject)
        exact = reconstruct(full, original * 2 - 1)
        for row in rows.values():
            row.add(original, exact)
    for row in rows.values():
        if row.error:
            note(f"Precision: {row.name} does not run on {subject.device.type}: {row.error}.")
        elif not row.finite:
            note(f"Precision: {row.name} gives values that are not finite: use bfloat16 or float32.")
    return [row.to_json() for row in rows.values()]


@torch.inference_mode()
def sampling(
    subject: OpenedVae,
    images: Images,
    metrics: Metrics,
    *,
    seed: int = 0,
    note: Note = no_note,
) -> dict[str, Any] | None:
    """z as the mode of the posterior against z as a draw from it.

    Returns: `mode` and `sample` (metric -> mean over images) and `psnr_between_samples` (dB, between reconstructions of
    two draws, mean over images, at most 100 each; the less z is sure of, the lower). None, with a note, for an encoder
    without a posterior.
    """
    of_mode, of_sample, between = Means(metrics), Means(metrics), Means({"psnr": IMAGE_METRICS["psnr"].build()})
    for key, pixels in images:
        original = levels(pixels, subject)
        encoding = subject.encode(original * 2 - 1)
        if encoding.posterior is None:
            note(f"Sampling: not measured; the encoder of {subject.class_name} knows no distribution of z.")
            return None
        # The first draw is the one that the evaluation itself makes with this seed where it samples.
        draws = [encoding.draw([image_generator(seed, name)]) for name in (key, f"{key}\0second draw")]
        mode, first, second = (round_to_8_bits(subject.decode(z, *pixels.shape[:2])) for z in (encoding.z, *draws))
        of_mode.add(mode, original)
        of_sample.add(first, original)
        between.add(first, second)
    return {
        "mode": of_mode.values(),
        "sample": of_sample.values(),
        "psnr_between_samples": between.values()["psnr"],
    }


# Name -> (subject, images, metrics, seed, note) -> the value in the result
STRESS_TESTS: dict[str, Callable[[OpenedVae, Images, Metrics, int, Note], Any]] = {
    "cycles": lambda subject, images, metrics, seed, note: cycles(subject, images, metrics),
    "resolution": lambda subject, images, metrics, seed, note: resolution(subject, images, metrics, note=note),
    "seams": lambda subject, images, metrics, seed, note: seams(subject, images, note=note),
    "precision": lambda subject, images, metrics, seed, note: precision(subject, images, note=note),
    "sampling": lambda subject, images, metrics, seed, note: sampling(subject, images, metrics, seed=seed, note=note),
}

_OF_SIZE = ("resolution", "seams")


def run_stress(
    names: Sequence[str],
    subject: OpenedVae,
    images: Images,
    whole: Images,
    metrics: Metrics,
    seed: int = 0,
) -> dict[str, Any]:
    """The stress tests of these names.

    images: as measured; whole: the same at the size that they have on disk, for the tests that are about size.
    metrics: those that are to be measured; where an image is too small for one, that one is left out of its mean.
    Returns: name -> what the test found (None where it failed, with a note), and `notes`, sentences; empty without
    names. Raises: ConfigError for an unknown name.
    """
    if unknown := [name for name in names if name not in STRESS_TESTS]:
        raise ConfigError(f"'{unknown[0]}' is no stress test; expected {', '.join(STRESS_TESTS)}")
    if not names:
        return {}
    notes: list[str] = []
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = STRESS_TESTS[name](
                subject, whole if name in _OF_SIZE else images, metrics, seed, notes.append
            )
        except SdvaeError as error:  # the measurements that are done are worth more than this test
            found[name] = None
            notes.append(f"{name.capitalize()}: failed; {error}.")
    return found | {"notes": notes}
