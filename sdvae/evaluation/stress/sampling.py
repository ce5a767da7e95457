"""Stress test: z as the mode of the posterior, and as a draw from it."""

from __future__ import annotations

from typing import Any

import torch

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.evaluation.stress.passes import Images, Means, Metrics, Note, levels, no_note
from sdvae.metrics.table import build_metric
from sdvae.model.posterior import image_generator

__all__ = ["sampling"]


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
    of_mode, of_sample, between = Means(metrics), Means(metrics), Means({"psnr": build_metric("psnr")})
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
