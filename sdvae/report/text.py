"""Numbers, times and other values as the text of a page. Standard library and markupsafe only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from markupsafe import Markup

__all__ = ["count", "json_data", "number", "percent", "plain", "signed", "significant", "when"]


def number(value: float | None, decimals: int) -> str:
    """With a real minus sign; n/a for what does not exist."""
    if value is None:
        return "n/a"
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.lstrip("-")


def signed(value: float | None, decimals: int) -> str:
    text = number(value, decimals)
    return "+" + text if value is not None and value > 0 and text.strip("0.,") else text


def count(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def significant(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}".replace("-", "−")


def percent(share: float | None) -> str:
    """Whole percents; what is not quite all or nothing never reads as 100 or 0."""
    if share is None:
        return "n/a"
    whole = round(100 * share)
    if whole in (0, 100) and share not in (0, 1):
        return "> 99 %" if whole else "< 1 %"
    return f"{whole} %"


def when(created: str) -> str:
    """An ISO time as people write it; what is no such time stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M}" + (" UTC" if moment.utcoffset() is not None else "")


def plain(value: Any) -> str:
    """A value of the protocol or environment in one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "none"
    return significant(value, 6) if isinstance(value, float) else str(value)


def json_data(value: Any) -> Markup:
    """JSON for a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII only
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
