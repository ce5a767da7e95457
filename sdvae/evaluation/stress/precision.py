"""Stress test: the reconstruction in each dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.evaluation.stress.passes import Images, Means, Note, levels, no_note, reconstruct
from sdvae.metrics.table import build_metric

__all__ = ["DTYPES", "precision"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _PrecisionRow:
    def __init__(self, subject: OpenedVae) -> None:
        self.subject = subject
        self.name = str(subject.dtype).removeprefix("torch.")
        self.max_difference, self.finite, self.error = 0.0, True, ""
        self.against_exact, self.against_original = (
            Means({"psnr": build_metric("psnr")}),
            Means({"psnr": build_metric("psnr")}),
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
