"""Streaming statistics of z against the same numbers computed at once."""

from __future__ import annotations

import pytest
import torch

from sdvae.evaluation.latents import LatentStatistics


def test_streaming_equals_all_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1), torch.tensor([0.0, 30.0, -2.0]).view(1, 3, 1, 1)
    parts = [torch.randn(n, 3, 4, 6, generator=generator) * scale + shift for n in (1, 5, 2)]
    statistics = LatentStatistics(3)
    for part in parts:
        statistics.update(part)
    z = torch.cat(parts).double()
    assert statistics.mean.tolist() == pytest.approx(z.mean(dim=(0, 2, 3)).tolist())
    assert statistics.std.tolist() == pytest.approx(z.var(dim=(0, 2, 3), correction=0).sqrt().tolist())
    assert statistics.scaling_factor == pytest.approx(1 / float(z.std(correction=0)))
