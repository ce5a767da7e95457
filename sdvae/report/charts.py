"""Charts of the report as inline SVG: sizes, positions and labels only. Colours and fonts are the style sheet's.

A chart names the VAE that a mark belongs to by a class (`v0`, `v1`, ...); the style sheet gives each class one colour,
in light and in dark. Every chart carries a sentence for those who do not see it. Standard library and markupsafe only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from sdvae.report.text import number

__all__ = [
    *("bar", "bins", "delta_strip", "difference_histogram", "dumbbells", "heat_map", "lines", "ridges", "strip"),
    *("caption", "px", "stroke"),  # of which charts are made
]

MAX_BINS = 36
NUMBERS_IN_HEAT_MAP = 8  # more channels leave no room for a number in each cell

Series = tuple[str, str, Sequence[tuple[float, float | None]]]  # label, class, points


def strip(value: float, low: float | None, high: float | None, scale: tuple[float, float], label: str) -> Markup:
    """A dot with its interval on a thin line that spans `scale`."""
    place = _scale(scale, (6, 234))
    whisker = "" if low is None or high is None else stroke("whisker", place(low), 7, place(high), 7)
    marks = stroke("rule", 2, 7, 238, 7) + whisker + _dot("dot", place(value), 7, 4.5)
    return _svg(240, 14, "strip", label, marks)


def delta_strip(
    delta: float, low: float | None, high: float | None, extent: float, sign: float, verdict: str, label: str
) -> Markup:
    """A difference with its interval against 0, turned so that the right side is always the better one.

    extent: the largest distance from 0 that the row shows. sign: 1, or -1 where a smaller value is better.
    """
    place = _scale((-extent, extent), (5, 135))
    sides = Markup('<rect class="bad-side" x="0" y="2" width="70" height="18" rx="3"/>') + Markup(
        '<rect class="good-side" x="70" y="2" width="70" height="18" rx="3"/>'
    )
    whisker = "" if low is None or high is None else stroke("whisker", place(sign * low), 11, place(sign * high), 11)
    dot = _dot("dot" if whisker else "dot hollow", place(sign * delta), 11, 4)
    return _svg(140, 22, f"strip delta {verdict}", label, sides + stroke("zero", 70, 0, 70, 22) + whisker + dot)


def bins(values: Sequence[float]) -> list[float]:
    """Edges of equal bins over all values: more of them for more values; at least one."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = 0.5 * max(abs(high), 1e-6)
        low, high = low - pad, high + pad
    count = min(MAX_BINS, max(6, round(2.5 * math.sqrt(len(values)))))
    return [low + (high - low) * index / count for index in range(count + 1)]


def ridges(rows: Sequence[tuple[str, Sequence[float]]], label: str) -> Markup:
    """Histograms of several VAEs, one above the other on one axis; a tick marks each mean. rows: class, values."""
    edges = bins([value for _, values in rows for value in values])
    place = _scale((edges[0], edges[-1]), (8, 332))
    counts = [_histogram(values, edges) for _, values in rows]
    top = max(max(row) / max(len(values), 1) for row, (_, values) in zip(counts, rows, strict=True)) or 1
    height = 36
    marks = Markup()
    for index, ((name, values), row) in enumerate(zip(rows, counts, strict=True)):
        base = (index + 1) * height
        steps = [f"M{px(place(edges[0]))} {base}"]
        for left, right, count in zip(edges, edges[1:], row, strict=False):
            y = base - (height - 6) * count / max(len(values), 1) / top
            steps.append(f"L{px(place(left))} {px(y)}L{px(place(right))} {px(y)}")
        path = "".join(steps) + f"L{px(place(edges[-1]))} {base}Z"
        mean = place(sum(values) / len(values)) if values else place(edges[0])
        marks += Markup('<g class="{}"><path class="area" d="{}"/>{}{}</g>').format(
            name, path, stroke("rule", 8, base, 332, base), stroke("mean", mean, base - height + 8, mean, base)
        )
    base = len(rows) * height
    return _svg(340, base + 20, "chart", label, marks + _x_axis(place, (edges[0], edges[-1]), base))


def difference_histogram(differences: Sequence[float], sign: float, label: str) -> Markup:
    """Histogram of paired differences; bars on the better side of 0 are marked so. sign: as `delta_strip`."""
    extent = max((abs(value) for value in differences), default=0) or 1
    half = max(4, min(MAX_BINS, round(2.5 * math.sqrt(len(differences)))) // 2)
    edges = [extent * index / half for index in range(-half, half + 1)]  # 0 is an edge: no bar is on both sides
    counts = _histogram(differences, edges)
    place, base = _scale((-extent, extent), (8, 332)), 84
    marks = Markup()
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            height = 76 * count / max(counts)
            good = (left + right) * sign > 0
            marks += Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                "good" if good else "bad",
                px(place(left) + 0.5),
                px(base - height),
                px(max(place(right) - place(left) - 1, 1)),
                px(height),
                f"{count} images",
            )
    mean = place(sum(differences) / len(differences))
    marks += (
        stroke("rule", 8, base, 332, base) + stroke("zero", 170, 0, 170, base) + stroke("mean", mean, 2, mean, base)
    )
    return _svg(340, base + 20, "chart", label, marks + _x_axis(place, (-extent, extent), base, signed=True))


def lines(
    series: Sequence[Series],
    label: str,
    *,
    x_title: str,
    x_ticks: Sequence[float],
    x_log: bool = False,
    y_log: bool = False,
    points: bool = True,
) -> Markup:
    """Lines over one x axis. Values that do not exist leave a gap; on a logarithmic axis so do those not above 0."""
    seen = [
        (label_, name, [(x, y) for x, y in values if y is not None and (y > 0 or not y_log)])
        for label_, name, values in series
    ]
    ys = [math.log10(y) if y_log else y for _, _, values in seen for _, y in values]
    if not ys:
        return Markup()
    low, high = min(ys), max(ys)
    pad = 0.08 * (high - low) or max(abs(high) * 0.05, 0.05)
    y_place = _scale((low - pad, high + pad), (168, 10))
    turn: Callable[[float], float] = math.log2 if x_log else float
    x_ends = (turn(min(x_ticks)), turn(max(x_ticks)))
    x_place = _scale(x_ends if x_ends[0] < x_ends[1] else (x_ends[0] - 1, x_ends[1] + 1), (48, 328))
    marks = Markup()
    ticks = _log_ticks(low, high) if y_log else nice_ticks(low - pad, high + pad, 4)
    for tick, text in zip(ticks, _powers(ticks) if y_log else _labels(ticks), strict=True):
        y = y_place(tick)
        marks += stroke("grid", 44, y, 332, y) + caption("end", 40, y + 3.5, text)
    for tick in x_ticks:
        marks += caption("middle", x_place(turn(tick)), 184, f"{tick:g}")
    marks += caption("middle title", 190, 199, x_title)
    for name_of_line, name, values in seen:
        spots = [(x_place(turn(x)), y_place(math.log10(y) if y_log else y), x, y) for x, y in values]
        path = "M" + "L".join(f"{px(x)} {px(y)}" for x, y, _, _ in spots)
        dots = Markup().join(
            Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(
                px(x), px(y), f"{name_of_line}, {raw_x:g}: {_significant(raw_y)}"
            )
            for x, y, raw_x, raw_y in (spots if points else ())
        )
        if spots:
            marks += Markup('<g class="{}"><path class="line" d="{}"/>{}</g>').format(name, path, dots)
    return _svg(340, 204, "chart", label, marks)


def heat_map(matrix: Sequence[Sequence[float | None]], label: str) -> Markup:
    """A square matrix of values in [-1, 1]: strength as opacity, sign as one of two colours."""
    count = len(matrix)
    cell = 200 / count
    marks = Markup()
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            known = value if value is not None else 0.0
            x, y = 20 + column * cell, row * cell
            marks += Markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
            ).format(
                "minus" if known < 0 else "plus",
                px(x + 0.5),
                px(y + 0.5),
                px(cell - 1),
                px(cell - 1),
                f"{min(abs(known), 1):.2f}",
                f"channels {row} and {column}: {number(value, 2)}",
            )
            if count <= NUMBERS_IN_HEAT_MAP:
                name = "middle number on-dark" if abs(known) > 0.65 else "middle number"
                marks += caption(name, x + cell / 2, y + cell / 2 + 4, number(value, 2))
    every = math.ceil(count / 8)
    for index in range(0, count, every):
        centre = (index + 0.5) * cell
        marks += caption("end", 16, centre + 3.5, str(index)) + caption("middle", 20 + centre, 214, str(index))
    return _svg(224, 218, "chart heat", label, marks)


def bar(value: float, limit: float, *, centred: bool) -> Markup:
    """A bar as long as value / limit; centred ones grow to both sides of 0. It stands beside its number: no label."""
    share = max(-1.0, min(1.0, value / limit)) if limit else 0.0
    left = 50 + min(share, 0) * 48 if centred else 1
    width = abs(share) * (48 if centred else 98)
    rule = stroke("zero", 50, 0, 50, 12) if centred else Markup()
    mark = Markup('<rect class="bar" x="{}" y="2" width="{}" height="8" rx="1.5"/>').format(
        px(left), px(max(width, 0.8))
    )
    return Markup(
        '<svg class="strip" viewBox="0 0 100 12" width="100" height="12" aria-hidden="true">{}{}</svg>'
    ).format(rule, mark)


def dumbbells(rows: Sequence[tuple[float | None, float | None]], classes: tuple[str, str], label: str) -> Markup:
    """One row per channel: the values of two VAEs on one axis, joined. rows: (first, second), some value known."""
    values = [value for pair in rows for value in pair if value is not None]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or max(abs(high) * 0.1, 0.1)
    place, height = _scale((low - pad, high + pad), (30, 330)), 20
    marks = Markup()
    for index, (first, second) in enumerate(rows):
        y = index * height + 12
        marks += caption("end", 22, y + 3.5, str(index)) + stroke("grid", 30, y, 330, y)
        if first is not None and second is not None:
            marks += stroke("join", place(first), y, place(second), y)
        for name, value in zip(classes, (first, second), strict=True):
            if value is None:
                continue
            marks += Markup('<g class="{}">{}</g>').format(name, _dot("dot", place(value), y, 4.5, _significant(value)))
    base = len(rows) * height + 6
    return _svg(340, base + 20, "chart", label, marks + _x_axis(place, (low - pad, high + pad), base))


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    step = _step(low, high, count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float, count: int) -> float:
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    whole = list(range(math.ceil(low), math.floor(high) + 1))
    every = math.ceil(len(whole) / 5) or 1
    return [float(power) for power in whole[::every]] or [low, high]


def _powers(exponents: Sequence[float]) -> list[str]:
    return [f"{10.0**each:g}" if each == round(each) and -4 < each < 5 else f"{10.0**each:.1e}" for each in exponents]


def _labels(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as tell neighbours apart exactly, whatever the metric has elsewhere."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 0.0
    decimals = next((n for n in range(8) if abs(round(step, n) - step) < 1e-6 * step), 8)
    return [_minus(f"{tick:.{decimals}f}") for tick in ticks]


def _histogram(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        counts[min(len(counts) - 1, max(0, math.floor((value - edges[0]) / width)))] += 1
    return counts


def _scale(domain: tuple[float, float], target: tuple[float, float]) -> Callable[[float], float]:
    (low, high), (start, end) = domain, target
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _x_axis(place: Callable[[float], float], ends: tuple[float, float], y: float, *, signed: bool = False) -> Markup:
    marks = Markup()
    ticks = nice_ticks(*ends, 5)
    for tick, text in zip(ticks, _labels(ticks), strict=True):
        plus = "+" if signed and tick > 0 else ""
        marks += stroke("rule", place(tick), y, place(tick), y + 3) + caption(
            "middle", place(tick), y + 15, plus + text
        )
    return marks


def _significant(value: float) -> str:
    return _minus(f"{value:.4g}")


def _minus(text: str) -> str:
    digits = text.lstrip("-")
    return text if text == digits else ("−" + digits if digits.strip("0.") else digits)


def px(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough, and short."""
    return f"{value:.1f}".removesuffix(".0")


def stroke(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(name, px(x1), px(y1), px(x2), px(y2))


def _dot(name: str, x: float, y: float, radius: float, title: str = "") -> Markup:
    inside = Markup("<title>{}</title>").format(title) if title else Markup()
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}">{}</circle>').format(name, px(x), px(y), radius, inside)


def caption(name: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(name, px(x), px(y), text)


def _svg(width: float, height: float, name: str, label: str, marks: Markup) -> Markup:
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(name, px(width), px(height), px(width), px(height), escape(label), marks)
