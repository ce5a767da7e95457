"""An evaluation as one HTML file that opens without a network: EvaluationResult -> text. No torch, no numpy.

Everything that the page shows comes from the result, so it renders again from result.json. Names of files, references
and every other text in it are treated as hostile: the template escapes all, and the page's policy allows no request.
Charts are drawn in charts.py; what the page looks like is in templates/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sdvae.report import charts
from sdvae.report.result import EvaluationResult
from sdvae.report.text import count, json_data, number, percent, plain, signed, significant, when

__all__ = ["render_report"]

HEADLINE_METRICS = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "rfid", "ms_ssim", "dists", "ciede2000", "l1")
NUM_HEADLINES = 4
NUM_COLOURS = 7  # of VAEs in report.css; the reference has its own. More VAEs share colours, and keep their names

Row = dict[str, Any]


def render_report(result: EvaluationResult) -> str:
    """The whole page: styles, script, charts and the gallery's pictures inside, nothing else needed to show it."""
    environment = _environment()
    source = partial(_source, environment)
    return environment.get_template("report.html.j2").render(
        **_view(result), css=source("report.css"), js=source("report.js"), charts=charts
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sdvae.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, signed, count, significant, percent, when, json_data, plain)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _source(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # ours: no text of a result is in it


# What the page shows


def _view(result: EvaluationResult) -> dict[str, Any]:
    vaes = _styled(result.vaes)
    metrics = _measured(result)
    names = {metric["name"] for metric in metrics}
    headline = [name for name in HEADLINE_METRICS if name in names][:NUM_HEADLINES]
    headline = headline or [metric["name"] for metric in metrics[:NUM_HEADLINES]]
    comparisons = _comparisons(result, vaes)
    return {
        "result": result,
        "vaes": vaes,
        "by_id": {vae["id"]: vae for vae in vaes},
        "reference": next((vae for vae in vaes if vae["role"] == "reference"), None),
        "metrics": metrics,
        "metric_of": _metrics_by_name(result),
        "headline": headline,
        "comparisons": comparisons,
        "leaders": [] if comparisons else _leaders(vaes, metrics, headline),
        "glance": _glance(vaes, metrics, headline),
        "summary": [_summary_row(metric, vaes, comparisons) for metric in metrics],
        "distributions": _distributions(result, vaes, metrics, headline),
        "slices": _slices(result, vaes, metrics, headline),
        "stress": _stress(vaes, result),
        "latents": [_latents(vae) for vae in vaes if vae.get("latents")],
        "autocorrelation": _autocorrelation(vaes),
        "spectra": _spectra(vaes),
        "swaps": [_swap(comparison, result) for comparison in comparisons if comparison["swap"]],
        "gallery": _gallery(result, vaes, metrics, headline),
        "published_metrics": _published_metrics(result),
    }


def _styled(vaes: Sequence[Row]) -> list[Row]:
    """With the class that gives each its colour: the reference its own, the others in their order."""
    colours = iter(range(len(vaes)))
    return [vae | {"css": "vref" if vae["role"] == "reference" else f"v{next(colours) % NUM_COLOURS}"} for vae in vaes]


def _measured(result: EvaluationResult) -> list[Row]:
    """Metrics that some VAE has a number for, each with what the page says about its direction."""
    seen = {name for vae in result.vaes for name in vae["summary"]}
    return [metric for name, metric in _metrics_by_name(result).items() if name in seen]


def _metrics_by_name(result: EvaluationResult) -> dict[str, Row]:
    return {metric["name"]: metric | {"arrow": _arrow(metric)} for metric in result.metrics}


def _arrow(metric: Row) -> Row:
    if metric["better"] == "target":
        target = f"{metric['target']:g}"
        return {"sign": f"→ {target}", "words": f"closer to {target} is better"}
    return {
        "sign": "↑" if metric["better"] == "higher" else "↓",
        "words": f"{metric['better']} is better",
    }


def _sign(metric: Row) -> float:
    """1 where a larger difference is the better one. Those of target metrics are differences of distances."""
    return 1.0 if metric["better"] == "higher" else -1.0


def _goodness(metric: Row, value: float) -> float:
    return -abs(value - metric["target"]) if metric["better"] == "target" else _sign(metric) * value


def _mean(vae: Row, metric: str) -> float | None:
    """The number that stands for a VAE: the mean over images, or the value of the set."""
    entry = vae["summary"].get(metric) or {}
    value: float | None = entry.get("mean", entry.get("value"))
    return value


def _best(vaes: Iterable[Row], metric: Row) -> set[str]:
    """Ids with the best number; none where there is nothing to choose between, or all are equal."""
    scores = {vae["id"]: _goodness(metric, value) for vae in vaes if (value := _mean(vae, metric["name"])) is not None}
    if len(scores) < 2 or len(set(scores.values())) == 1:
        return set()
    top = max(scores.values())
    return {name for name, score in scores.items() if score == top}


def _comparisons(result: EvaluationResult, vaes: Sequence[Row]) -> list[Row]:
    css = {vae["id"]: vae["css"] for vae in vaes}
    rows = []
    for comparison in result.comparisons:
        verdicts = [entry["verdict"] for entry in comparison["metrics"].values() if entry.get("low") is not None]
        rows.append(
            comparison
            | {
                "css": css[comparison["vae"]],
                "reference_css": css[comparison["reference"]],
                "swap": comparison.get("swap"),
                "answer": _answer(verdicts),
            }
        )
    return rows


def _answer(verdicts: Sequence[str]) -> tuple[str, str]:
    """What stands between the names of the two VAEs, and after them."""
    total = len(verdicts)
    if not total:
        return "was measured beside", "in no metric that has an interval to decide by"
    tally = {verdict: verdicts.count(verdict) for verdict in ("better", "worse", "undecided")}
    if tally["undecided"] == total:
        return "cannot be told from", "in its only metric" if total == 1 else f"in any of {total} metrics"
    lead = "better" if tally["better"] >= tally["worse"] else "worse"
    rest = " and ".join(f"{verdict} in {n}" for verdict, n in tally.items() if n and verdict != lead)
    where = f"in all {total} metrics" if total > 1 else "in its only metric"
    where = f"in {tally[lead]} of {total} metrics" if rest else where
    return f"is {lead} than", where + (f", {rest}" if rest else "")


def _leaders(vaes: Sequence[Row], metrics: Sequence[Row], headline: Sequence[str]) -> list[Row]:
    """For each headline metric the VAE with the best number: the answer where there is no reference."""
    rows = []
    for metric in _named(metrics, headline):
        best = _best(vaes, metric) if len(vaes) > 1 else {vaes[0]["id"]}
        for vae in vaes:
            if vae["id"] in best and (value := _mean(vae, metric["name"])) is not None:
                rows.append({"vae": vae, "metric": metric, "value": value})
    return rows


def _named(metrics: Sequence[Row], names: Sequence[str]) -> list[Row]:
    return [metric for name in names for metric in metrics if metric["name"] == name]


def _ordered(metrics: Sequence[Row], headline: Sequence[str]) -> list[Row]:
    """Headline metrics first."""
    return _named(metrics, headline) + [metric for metric in metrics if metric["name"] not in headline]


def _heat(metric: Row, values: Mapping[tuple[str, str], float], *, of_equals: float) -> dict[tuple[str, str], float]:
    """From 0, the metric's worst of these values, to 1, its best. of_equals: where all are alike."""
    scores = {place: _goodness(metric, value) for place, value in values.items()}
    low, high = min(scores.values()), max(scores.values())
    return {place: (score - low) / (high - low) if high > low else of_equals for place, score in scores.items()}


def _glance(vaes: Sequence[Row], metrics: Sequence[Row], headline: Sequence[str]) -> list[Row]:
    """One card per headline metric: every VAE's number on one scale."""
    cards = []
    for metric in _named(metrics, headline):
        entries = [(vae, vae["summary"].get(metric["name"])) for vae in vaes]
        ends = [
            end
            for _, entry in entries
            if entry
            for end in (entry.get("mean", entry.get("value")), entry.get("low"), entry.get("high"))
            if end is not None
        ]
        if not ends:
            continue
        low, high = min(ends), max(ends)
        pad = 0.05 * (high - low) or 0.5 * max(abs(high), 1e-6)
        best = _best(vaes, metric)
        rows = [
            {"vae": vae, "entry": entry, "value": _mean(vae, metric["name"]), "best": vae["id"] in best}
            for vae, entry in entries
            if entry
        ]
        cards.append({"metric": metric, "rows": rows, "scale": (low - pad, high + pad)})
    return cards


def _summary_row(metric: Row, vaes: Sequence[Row], comparisons: Sequence[Row]) -> Row:
    """A metric's numbers of all VAEs. `proven` are those whose lead the paired interval shows.

    Intervals are paired with the reference only. So a VAE's lead is proven where it is better than the reference, and
    the reference's where every other one is worse.
    """
    name = metric["name"]
    deltas = [comparison["metrics"].get(name) for comparison in comparisons]
    verdicts = {
        comparison["vae"]: delta["verdict"] for comparison, delta in zip(comparisons, deltas, strict=True) if delta
    }
    proven = {vae for vae, verdict in verdicts.items() if verdict == "better"}
    if verdicts and set(verdicts.values()) == {"worse"}:
        proven = {comparisons[0]["reference"]}
    ends = [
        abs(end)
        for delta in deltas
        if delta
        for end in (delta.get("delta"), delta.get("low"), delta.get("high"))
        if end is not None
    ]
    return {
        "metric": metric,
        "cells": [(vae, vae["summary"].get(name)) for vae in vaes],
        "best": _best(vaes, metric),
        "proven": proven,
        "deltas": list(zip(comparisons, deltas, strict=True)),
        "extent": 1.1 * max(ends, default=0) or 1.0,
        "sign": _sign(metric),
    }


def _column(result: EvaluationResult, vae: str, metric: str) -> list[float | None]:
    values = result.per_image.get("values", {}).get(vae, {}).get(metric, []) if result.per_image else []
    return list(values)


def _distributions(
    result: EvaluationResult, vaes: Sequence[Row], metrics: Sequence[Row], headline: Sequence[str]
) -> list[Row]:
    """Per metric: histograms of all VAEs, and of the paired differences to the reference."""
    cards = []
    for metric in (metric for metric in _ordered(metrics, headline) if metric["kind"] == "image"):
        columns = {vae["id"]: _column(result, vae["id"], metric["name"]) for vae in vaes}
        rows = [
            (vae["css"], known)
            for vae in vaes
            if (known := [value for value in columns[vae["id"]] if value is not None])
        ]
        if not rows:
            continue
        pairs = []
        for comparison in result.comparisons:
            differences = _differences(metric, columns[comparison["vae"]], columns[comparison["reference"]])
            if differences:
                pairs.append({"vae": comparison["vae"], "reference": comparison["reference"], "values": differences})
        cards.append(
            {"metric": metric, "rows": rows, "pairs": pairs, "sign": _sign(metric), "open": metric["name"] in headline}
        )
    return cards


def _differences(metric: Row, ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    if metric["better"] == "target":
        return [abs(a - metric["target"]) - abs(b - metric["target"]) for a, b in pairs]
    return [a - b for a, b in pairs]


def _slices(
    result: EvaluationResult, vaes: Sequence[Row], metrics: Sequence[Row], headline: Sequence[str]
) -> list[Row]:
    """Per metric a table of slices by VAEs; `heat` from 0 (the metric's worst cell) to 1 (its best)."""
    names = list(dict.fromkeys(name for vae in vaes for name in vae.get("slices", {})))
    tables = []
    for metric in _ordered(metrics, headline) if names else ():
        cells = {
            (name, vae["id"]): entry
            for name in names
            for vae in vaes
            if (entry := vae["slices"].get(name, {}).get(metric["name"])) and entry["mean"] is not None
        }
        if not cells:
            continue
        heat = _heat(metric, {place: entry["mean"] for place, entry in cells.items()}, of_equals=0.5)
        rows = [
            {
                "name": name,
                "images": result.dataset["slices"].get(name),
                "cells": [(vae, cells.get((name, vae["id"])), heat.get((name, vae["id"]), 0.0)) for vae in vaes],
            }
            for name in names
        ]
        tables.append({"metric": metric, "rows": rows, "open": metric["name"] in headline})
    return tables


def _stress(vaes: Sequence[Row], result: EvaluationResult) -> Row:
    """What there is of the stress tests, gathered by test instead of by VAE."""
    ran = [vae for vae in vaes if vae.get("stress")]
    metrics = _metrics_by_name(result)
    cycles = {vae["id"]: vae["stress"]["cycles"] for vae in ran if vae["stress"].get("cycles")}
    sizes = {vae["id"]: vae["stress"]["resolution"] for vae in ran if vae["stress"].get("resolution")}
    view: Row = {
        name: [(vae, vae["stress"][name]) for vae in ran if vae["stress"].get(name)] for name in _STRESS_TABLES
    }
    view["cycles"] = [
        {
            "metric": metrics[name],
            "series": [
                (vae["id"], vae["css"], list(zip(run["cycles"], run["metrics"][name], strict=True)))
                for vae in ran
                if (run := cycles.get(vae["id"])) and name in run["metrics"]
            ],
            "x": sorted({number for run in cycles.values() for number in run["cycles"]}),
        }
        for name in _union(run["metrics"] for run in cycles.values())
        if name in metrics
    ]
    view["resolution"] = [
        {
            "metric": metrics[name],
            "series": [
                (vae["id"], vae["css"], [(row["size_px"], row["metrics"].get(name)) for row in sizes[vae["id"]]])
                for vae in ran
                if vae["id"] in sizes
            ],
            "x": sorted({row["size_px"] for rows in sizes.values() for row in rows if row["metrics"]}),
        }
        for name in _union(row["metrics"] for rows in sizes.values() for row in rows)
        if name in metrics
    ]
    counts = {name: [(row["size_px"], row["num_images"]) for row in rows] for name, rows in sizes.items()}
    distinct = [each for index, each in enumerate(counts.values()) if each not in list(counts.values())[:index]]
    view["resolution_counts"] = [
        ([name for name in counts if counts[name] == each] if len(distinct) > 1 else [], each) for each in distinct
    ]
    view["num_images"] = sorted({run["num_images"] for run in cycles.values()})
    view["notes"] = [(vae, vae["stress"]["notes"]) for vae in ran if vae["stress"].get("notes")]
    view["any"] = bool(ran)
    return view


_STRESS_TABLES = ("seams", "precision", "sampling")


def _union(dictionaries: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in dictionaries for name in each))


def _spectra(vaes: Sequence[Row]) -> list[charts.Series]:
    """Mean over channels as shares of the total, so that latents of different scale share an axis."""
    rows: list[charts.Series] = []
    for vae in vaes:
        spectrum = (vae.get("latents") or {}).get("power_spectrum") or {}
        means = _means(spectrum.get("power") or [])
        if total := sum(value for value in means if value is not None):
            shares = [None if value is None else value / total for value in means]
            rows.append((vae["id"], vae["css"], list(zip(spectrum["frequency"], shares, strict=True))))
    return rows


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    known = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [sum(column) / len(column) if column else None for column in known]


def _latents(vae: Row) -> Row:
    health = vae["latents"]
    channels = health["channels"]
    limits = {
        name: max((abs(row[name]) for row in channels if row.get(name) is not None), default=0.0)
        for name in ("mean", "std", "posterior_std", "kl", "skew", "kurtosis")
    }
    spectrum = health.get("power_spectrum") or {}
    frequency = spectrum.get("frequency") or []
    power = spectrum.get("power") or []
    series: list[charts.Series] = [
        (f"channel {index}", f"{vae['css']} faint", list(zip(frequency, row, strict=True)))
        for index, row in enumerate(power)
    ]
    if series:
        series.append(("mean over channels", vae["css"], list(zip(frequency, _means(power), strict=True))))
    return {"vae": vae, "health": health, "channels": channels, "limits": limits, "spectrum": series}


def _autocorrelation(vaes: Sequence[Row]) -> list[charts.Series]:
    return [
        (vae["id"], vae["css"], list(zip((1, 2, 4, 8), values, strict=False)))
        for vae in vaes
        if vae.get("latents") and (values := vae["latents"].get("autocorrelation"))
    ]


def _swap(comparison: Row, result: EvaluationResult) -> Row:
    swap = comparison["swap"]
    ids = (comparison["vae"], comparison["reference"])
    drift = swap.get("drift")
    channels = []
    if drift:
        for name in ("mean", "std"):
            ours, theirs = (drift[name][each] for each in ids)
            rows = list(zip(ours, theirs, strict=True))
            if any(value is not None for pair in rows for value in pair):
                channels.append({"name": name, "rows": rows})
    metrics = _metrics_by_name(result)
    crossed = swap.get("cross_decode") or {}
    tables = []
    for name in _union(entry for row in crossed.values() for entry in row.values()):
        values = {
            (encoder, decoder): entry[name]
            for encoder, row in crossed.items()
            for decoder, entry in row.items()
            if entry.get(name) is not None
        }
        if name in metrics and values:
            heat = _heat(metrics[name], values, of_equals=1.0)
            tables.append({"metric": metrics[name], "values": values, "heat": heat})
    return {
        "comparison": comparison,
        "swap": swap,
        "drift": drift,
        "channels": channels,
        "ids": ids,
        "tables": tables,
    }


def _gallery(result: EvaluationResult, vaes: Sequence[Row], metrics: Sequence[Row], headline: Sequence[str]) -> Row:
    """Cards, and the numbers that the page's script sorts by: only those of the pictures shown."""
    keys = result.per_image.get("keys", []) if result.per_image else []
    place = {key: index for index, key in enumerate(keys)}
    per_image = [metric for metric in metrics if metric["kind"] == "image"] if keys else []
    shown = [vae for vae in vaes if any(vae["id"] in card["reconstructions"] for card in result.gallery)]
    cards, data = [], []
    for card in result.gallery:
        index = place.get(card["key"])
        values = {
            vae["id"]: {
                metric["name"]: column[index]
                for metric in per_image
                if index is not None and index < len(column := _column(result, vae["id"], metric["name"]))
            }
            for vae in shown
        }
        slices = result.per_image.get("slices", []) if result.per_image else []
        name = slices[index] if index is not None and index < len(slices) else None
        left, top, width, height = card["crop"] or (0, 0, card["width"], card["height"])
        cards.append(
            card
            | {
                "values": values,
                "slice": name,
                "crop_width": width,
                "crop_height": height,
                "crop_left": left,
                "crop_top": top,
                "cropped": (width, height) != (card["width"], card["height"]),
            }
        )
        data.append({"key": card["key"], "slice": name, "values": values})
    reference = next((vae["id"] for vae in vaes if vae["role"] == "reference"), None)
    fields = ("name", "title", "unit", "better", "target", "decimals")
    return {
        "cards": cards,
        "vaes": shown,
        "metrics": per_image,
        "headline": [name for name in headline if name in {metric["name"] for metric in per_image}],
        "slices": sorted({row["slice"] for row in data if row["slice"]}),
        "data": {
            "vaes": [vae["id"] for vae in shown],
            "reference": reference,
            "metrics": [{name: metric.get(name) for name in fields} for metric in per_image],
            "images": data,
        },
    }


def _published_metrics(result: EvaluationResult) -> list[str]:
    return _union(row["metrics"] for row in result.published)
