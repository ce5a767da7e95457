"""Stress test: the same images at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.data.transforms import resize_and_crop
from sdvae.evaluation.stress.passes import Images, Means, Metrics, Note, levels, no_note, reconstruct

__all__ = ["SIZES_PX", "resolution"]

SIZES_PX = (128, 256, 512, 768, 1024)


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
