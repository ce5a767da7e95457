"""Room in a number format, counted in doublings."""

from __future__ import annotations

import math

import pytest

from sdvae.precision.number_formats import LIMITS, headroom_bits


def test_the_limits_are_the_largest_finite_numbers() -> None:
    assert LIMITS["float16"] == (2 - 2**-10) * 2.0**15 == 65504
    assert LIMITS["bfloat16"] == (2 - 2**-7) * 2.0**127 and LIMITS["float32"] == (2 - 2**-23) * 2.0**127


def test_headroom_counts_doublings() -> None:
    limit = LIMITS["float16"]
    assert headroom_bits(limit, "float16") == 0 and headroom_bits(limit / 4, "float16") == 2
    assert headroom_bits(1.0, "bfloat16") == pytest.approx(128, abs=0.01)
    assert math.isfinite(headroom_bits(0.0, "float16"))
