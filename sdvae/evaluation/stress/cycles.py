"""Stress test: encode and decode again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.evaluation.stress.passes import Images, Means, Metrics, levels, reconstruct

__all__ = ["CYCLES", "cycles"]

CYCLES = (1, 2, 5, 10)


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
