"""Gates for continuous integration: conditions on a result that make `sdvae evaluate` fail. Standard library only.

An expression is the condition of failure, `[VAE:]NAME<NUMBER` with one of < <= > >=. NAME is one of

    psnr                  the mean of a metric, or the number of a set metric; lpips is lpips_alex, fid is rfid
    psnr.low              of its summary: low, high, std, median, p5, p95; of a set metric: std
    delta.psnr            the mean difference from the reference; .low, .high of its interval; .won, .lost: shares
    worst.psnr            the worst image; of metrics with a target its distance from that
    failed                the number of images that could not be read

Without a VAE it holds for every candidate. A number that does not exist fails its gate: silence is no proof.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdvae.errors import ConfigError
from sdvae.evaluation.protocol import METRIC_NAMES, SET_METRICS
from sdvae.report.result import EvaluationResult

__all__ = ["Gate", "check_gates", "gate_needs", "parse_gate"]

ALIASES = {"lpips": "lpips_alex", "fid": "rfid"}
# What may come behind a metric, by scope and kind; the first is meant where nothing does.
_FIELDS = {
    ("summary", "image"): ("mean", "low", "high", "std", "median", "p5", "p95"),
    ("summary", "set"): ("value", "std"),
    ("delta", "image"): ("delta", "low", "high", "won", "lost"),
    ("delta", "set"): ("delta",),
    ("worst", "image"): ("",),
}
_OPERATORS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "<": (operator.lt, "below"),
    "<=": (operator.le, "at or below"),
    ">": (operator.gt, "above"),
    ">=": (operator.ge, "at or above"),
}
_EXPRESSION = re.compile(r"(?:(?P<vae>.+):)?\s*(?P<name>[^\s:<>=]+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>[^\s<>=]+)")
_NAME = re.compile(r"(?:(?P<scope>delta|worst)\.)?(?P<metric>[^.]+)(?:\.(?P<field>.+))?")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition of failure."""

    expression: str  # as given
    vae: str | None  # id of a VAE; None: every candidate
    scope: str  # "summary", "delta", "worst" or "failed"
    metric: str  # full name; empty for "failed"
    field: str  # of the summary or of the comparison; empty for "worst" and "failed"
    sign: str
    limit: float


def parse_gate(text: str) -> Gate:
    """Read an expression such as `psnr<24.5` or `mine:delta.lpips.high>0.005`.

    Raises: ConfigError for what is none; for an unknown name with the nearest known one.
    """
    match = _EXPRESSION.fullmatch(text.strip())
    limit = _finite_number(match["limit"]) if match else None
    if match is None or limit is None:
        raise ConfigError(
            f"the gate '{text}' is no condition; expected [VAE:]NAME<NUMBER (or <=, >, >=), e.g. psnr<24.5 or "
            "delta.lpips>0.005: it fails where that holds"
        )
    vae = match["vae"].strip() if match["vae"] else None
    scope, metric, field = _parse_name(match["name"], text)
    if scope == "failed" and vae is not None:
        raise ConfigError(f"the gate '{text}' names a VAE, but unreadable images are of the whole run: failed>0")
    return Gate(
        expression=text.strip(), vae=vae, scope=scope, metric=metric, field=field, sign=match["sign"], limit=limit
    )


def gate_needs(gate: Gate) -> tuple[tuple[str, ...], bool]:
    """Metrics that must be measured, and whether a reference must be there, for the gate to be judged at all."""
    return (gate.metric,) if gate.metric else (), gate.scope == "delta"


def check_gates(gates: Iterable[Gate], result: EvaluationResult) -> list[dict[str, Any]]:
    """The `gates` of result.json: expression, passed, value (of the VAE nearest to failure, or None) and reason."""
    return [_check(gate, result) for gate in gates]


def _finite_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _parse_name(name: str, text: str) -> tuple[str, str, str]:
    """Scope, metric and field."""
    if name == "failed":
        return "failed", "", ""
    match = _NAME.fullmatch(name)
    given = match["metric"] if match else name
    metric = ALIASES.get(given, given)
    if match is None or metric not in METRIC_NAMES:
        raise ConfigError(f"the gate '{text}' has the unknown name '{given}'; {_suggestion(given)}")
    scope, kind = match["scope"] or "summary", "set" if metric in SET_METRICS else "image"
    if (scope, kind) not in _FIELDS:
        raise ConfigError(f"the gate '{text}': {metric} is one number for the whole set; it has no worst image")
    fields = _FIELDS[scope, kind]
    field = match["field"] or fields[0]
    if field not in fields:
        expected = f"expected one of {', '.join(fields)}" if len(fields) > 1 else "nothing comes behind the metric"
        raise ConfigError(f"the gate '{text}' has the unknown part '.{field}'; {expected}")
    return scope, metric, field


def _suggestion(name: str) -> str:
    known = (*METRIC_NAMES, *ALIASES, "failed", "delta", "worst")
    near = difflib.get_close_matches(name, known, n=1)
    hints = {"delta": "did you mean 'delta.METRIC'?", "worst": "did you mean 'worst.METRIC'?"}
    if near:
        return hints.get(near[0], f"did you mean '{near[0]}'?")
    return f"metrics: {', '.join(METRIC_NAMES)}"


def _check(gate: Gate, result: EvaluationResult) -> dict[str, Any]:
    if gate.scope == "failed":
        return _judged(gate, [("", float(len(result.dataset["unreadable"])), "")], unit="")
    vaes = [vae for vae in result.vaes if (vae["role"] == "candidate" if gate.vae is None else vae["id"] == gate.vae)]
    if not vaes:
        known = ", ".join(vae["id"] for vae in result.vaes)
        lacking = "there is no candidate" if gate.vae is None else f"there is no VAE '{gate.vae}'"
        return {"expression": gate.expression, "passed": False, "value": None, "reason": f"{lacking}; VAEs: {known}"}
    metric = next((metric for metric in result.metrics if metric["name"] == gate.metric), None)
    unit = metric["unit"] if metric and gate.field not in ("won", "lost") else ""
    return _judged(gate, [(f"{vae['id']}: ", *_look_up(gate, vae, result)) for vae in vaes], unit=unit)


def _judged(gate: Gate, found: Sequence[tuple[str, float | None, str]], *, unit: str) -> dict[str, Any]:
    """found: per VAE its name as a prefix, the number, and why there is none."""
    holds, words = _OPERATORS[gate.sign]
    known = [(value, whose) for whose, value, _ in found if value is not None]
    failing = [(value, whose) for value, whose in known if holds(value, gate.limit)]
    nearest = (min if "<" in gate.sign else max)(known, default=None)
    name = ".".join(part for part in _name_parts(gate) if part)
    reasons = [f"{whose}{why}" for whose, value, why in found if value is None]
    reasons += [f"{whose}{name} is {_text(value, unit)}, {words} {_text(gate.limit, unit)}" for value, whose in failing]
    if not reasons and nearest:
        reasons = [f"{nearest[1]}{name} is {_text(nearest[0], unit)}, not {words} {_text(gate.limit, unit)}"]
    return {
        "expression": gate.expression,
        "passed": not failing and len(known) == len(found),
        "value": nearest[0] if nearest else None,
        "reason": "; ".join(reasons),
    }


def _name_parts(gate: Gate) -> tuple[str, ...]:
    if gate.scope == "failed":
        return ("failed",)
    scope = "" if gate.scope == "summary" else gate.scope
    return scope, gate.metric, "" if gate.field in ("mean", "value", "delta") else gate.field


def _text(value: float, unit: str) -> str:
    return f"{value:.6g} {unit}".rstrip()


def _look_up(gate: Gate, vae: Mapping[str, Any], result: EvaluationResult) -> tuple[float | None, str]:
    """The number that the gate is about, or why there is none."""
    if gate.metric not in vae["summary"]:
        skipped = next((each["reason"] for each in result.skipped_metrics if each["name"] == gate.metric), None)
        return None, f"{gate.metric} was not measured: {skipped or f'add {gate.metric} to --metrics'}"
    if gate.scope == "delta":
        comparison = next((each for each in result.comparisons if each["vae"] == vae["id"]), None)
        if vae["role"] == "reference":
            return None, "it is the reference itself: a difference is that of a candidate"
        if comparison is None:
            return None, "it was compared with nothing: name a reference with --reference"
        entry = comparison["metrics"].get(gate.metric, {})
        value = entry.get(gate.field)
    elif gate.scope == "worst":
        value = _worst(gate.metric, vae["id"], result)
    else:
        value = vae["summary"][gate.metric].get(gate.field)
    if value is None or not math.isfinite(value):
        return None, f"{'.'.join(part for part in _name_parts(gate) if part)} has no value: too few images have one"
    return float(value), ""


def _worst(name: str, vae: str, result: EvaluationResult) -> float | None:
    metric = next(metric for metric in result.metrics if metric["name"] == name)
    column = result.per_image.get("values", {}).get(vae, {}).get(name, ())
    values = [value for value in column if value is not None and math.isfinite(value)]
    if metric["better"] == "target":
        values = [abs(value - metric["target"]) for value in values]
    return (min if metric["better"] == "higher" else max)(values, default=None)
