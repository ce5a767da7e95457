"""Numbers as people read them."""

from __future__ import annotations

import pytest

from sdvae.report import text


@pytest.mark.parametrize(
    ("value", "decimals", "plain", "signed"),
    [
        (1234.5, 1, "1,234.5", "+1,234.5"),
        (-0.031, 3, "−0.031", "−0.031"),
        (-0.0001, 2, "0.00", "0.00"),
        (0.0, 2, "0.00", "0.00"),
        (None, 2, "n/a", "n/a"),
    ],
)
def test_numbers_have_a_real_minus_and_no_negative_zero(
    value: float | None, decimals: int, plain: str, signed: str
) -> None:
    assert (text.number(value, decimals), text.signed(value, decimals)) == (plain, signed)


@pytest.mark.parametrize(
    ("share", "expected"), [(1, "100 %"), (0.999, "> 99 %"), (0.5, "50 %"), (0.001, "< 1 %"), (0, "0 %"), (None, "n/a")]
)
def test_a_share_reads_as_all_or_nothing_only_where_it_is(share: float | None, expected: str) -> None:
    assert text.percent(share) == expected
