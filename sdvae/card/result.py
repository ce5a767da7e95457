"""What an evaluation or a precision audit says about a VAE that it measured, as the model card shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvae.card.text import public_text
from sdvae.errors import ConfigError
from sdvae.report.result import EvaluationResult
from sdvae.report.text import count, number, plain, signed, when

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["AuditRecord", "entry_of", "hub_results", "load_audit", "precision_of", "view_of"]

Row = dict[str, Any]

_HUB_METRICS = {"psnr": "psnr", "ssim": "ssim", "lpips_alex": "lpips", "lpips_vgg": "lpips", "rfid": "fid"}


def entry_of(result: EvaluationResult, digest: str) -> Row:
    """What `vaes` of the result holds for the VAE with this digest. Raises: ConfigError where it was not measured."""
    for entry in result.vaes:
        if entry["digest"] == digest:
            return entry
    measured = ", ".join(f"{entry['id']} {entry['digest']}" for entry in result.vaes)
    raise ConfigError(
        f"the evaluation measured other VAEs than the one of the card, {digest}: {measured}. A rewrite or another "
        f"scale makes another VAE; measure this one: sdvae evaluate IMAGES --vae VAE"
    )


def view_of(result: EvaluationResult, entry: Row) -> Row:
    """The section "Evaluation" of a VAE's card, beside the references that were measured with it."""
    shown = [entry, *(other for other in result.vaes if other["role"] == "reference" and other is not entry)]
    by_name = {metric["name"]: metric for metric in result.metrics}
    measured = [metric for metric in result.metrics if _value(entry, metric["name"]) is not None]
    comparisons = [each for each in result.comparisons if each["vae"] == entry["id"]]
    return {
        "num_images": result.dataset["num_images"],
        "unreadable": len(result.dataset["unreadable"]),
        "dataset": public_text(str(result.dataset["source"])),
        "when": when(result.created),
        "device": result.environment.get("device", "a device that is not recorded"),
        "version": result.sdvae_version,
        "columns": ["this VAE", *(public_text(str(other["ref"])) for other in shown[1:])],
        "rows": [
            {"name": _metric_title(metric), "cells": [_cell(metric, vae, result) for vae in shown]}
            for metric in measured
        ],
        "comparisons": [_comparison(each, by_name, result) for each in comparisons],
        "skipped": [f"{skipped['name']} ({skipped['reason']})" for skipped in result.skipped_metrics],
        "warnings": result.warnings,
        "protocol": list(_protocol(result)),
    }


def _value(entry: Row, metric: str) -> float | None:
    summary = entry["summary"].get(metric) or {}
    value: float | None = summary.get("mean", summary.get("value"))
    return value


def _metric_title(metric: Row) -> str:
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    arrow = {"higher": "↑", "lower": "↓"}.get(metric["better"]) or f"→ {metric['target']:g}"
    return f"{metric['title']}{unit} {arrow}"


def _cell(metric: Row, entry: Row, result: EvaluationResult) -> str:
    summary, decimals = entry["summary"].get(metric["name"]) or {}, metric["decimals"]
    value = _value(entry, metric["name"])
    text = number(value, decimals)
    if summary.get("low") is not None:
        text += f" [{number(summary['low'], decimals)}, {number(summary['high'], decimals)}]"
    elif metric["kind"] == "set" and summary.get("std") is not None:
        text += f" ± {number(summary['std'], decimals)}"
    images = summary.get("count")
    return text + (f" ({count(images)} images)" if value is not None and images != result.dataset["num_images"] else "")


def _comparison(comparison: Row, by_name: Mapping[str, Row], result: EvaluationResult) -> Row:
    reference = next(vae for vae in result.vaes if vae["id"] == comparison["reference"])
    rows = []
    for name, delta in comparison["metrics"].items():
        if name not in by_name or delta["delta"] is None:
            continue
        decimals = by_name[name]["decimals"]
        text = signed(delta["delta"], decimals)
        if delta.get("low") is not None:
            text += f" [{signed(delta['low'], decimals)}, {signed(delta['high'], decimals)}]"
        rows.append({"name": _metric_title(by_name[name]), "delta": text, "verdict": delta["verdict"]})
    swap = (comparison.get("swap") or {}).get("sentence")
    return {"reference": public_text(str(reference["ref"])), "rows": rows, "swap": swap}


def _protocol(result: EvaluationResult) -> Iterator[tuple[str, str]]:
    for name, value in result.protocol.items():
        if name == "fid" and isinstance(value, dict):
            value = {key: public_text(str(item)) for key, item in value.items()}
        yield name, plain(value)
    yield "digest of the images", f"`{result.dataset['digest']}`"
    yield (
        "environment",
        plain(
            {name: result.environment[name] for name in ("device", "torch", "diffusers") if name in result.environment}
        ),
    )


def precision_of(entry: Row) -> list[tuple[str, str]]:
    """Outcome of the precision test of the evaluation, for each type but float32."""
    rows = (entry.get("stress") or {}).get("precision") or []
    return [(row["dtype"], _outcome(row)) for row in rows if row["dtype"] != "float32"]


def _outcome(row: Row) -> str:
    if "error" in row:
        return f"failed: {row['error']}".replace("|", r"\|").replace("\n", " ")
    if not row["finite"]:
        return "values overflow: not usable without float32"
    return f"finite; PSNR against float32 {number(row['psnr_against_fp32'], 1)} dB"


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """What audit.json says about half precision."""

    vae: str
    digest: str
    num_images: int
    size_px: int  # of the central squares that the peaks were measured on
    device: str
    sentences: tuple[str, ...]  # the verdicts of float16 and bfloat16
    hazards: tuple[str, ...]
    tried: tuple[int, int] | None  # on how many images, of which size in px; None: neither format could be tried

    def check_digest(self, digest: str) -> None:
        """Raises: ConfigError unless the audit measured the VAE with this digest."""
        if self.digest != digest:
            raise ConfigError(
                f"the audit measured another VAE than the one of the card, {digest}: {self.vae} {self.digest}. A "
                f"rewrite or another scale makes another VAE; audit this one: sdvae check VAE --out DIR"
            )


def load_audit(path: str | Path) -> AuditRecord:
    """Read audit.json. Raises: ConfigError for what is none, or is damaged."""
    expected = "expected the audit.json of sdvae check VAE --out DIR"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(data, dict) or data.get("command") != "check":
        raise ConfigError(f"{path}: no audit; {expected}")
    try:
        return _audit_record(data)
    except _FieldError as error:
        raise ConfigError(f"{path}: {error}; {expected}") from None


def _audit_record(data: Row) -> AuditRecord:
    sentences = {_field(each, "dtype", str): _field(each, "sentence", str) for each in _field(data, "verdicts", list)}
    tried = [probe for probe in _field(data, "probes", list) if isinstance(probe, dict) and "error" not in probe]
    return AuditRecord(
        vae=_field(data, "vae", str),
        digest=_field(data, "digest", str),
        num_images=_field(data, "num_images", int),
        size_px=_field(data, "size_px", int),
        device=_field(data, "device", str),
        sentences=tuple(_field(sentences, dtype, str) for dtype in ("float16", "bfloat16")),
        hazards=tuple(map(str, _field(data, "hazards", list))),
        tried=(_field(tried[0], "num_images", int), _field(tried[0], "size_px", int)) if tried else None,
    )


class _FieldError(Exception):
    """A field that is missing, or holds something else than it should."""


def _field(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get(name), kind):
        raise _FieldError(f"its `{name}` is missing or damaged")
    return data[name]


def hub_results(result: EvaluationResult, entry: Row) -> Iterator[EvalResult]:
    """Numbers for the front matter, under the names that the hub has for metrics; those without one are left out."""
    from huggingface_hub import EvalResult

    dataset = public_text(str(result.dataset["source"]))
    for metric in result.metrics:
        name, value = metric["name"], _value(entry, metric["name"])
        if name in _HUB_METRICS and value is not None:
            yield EvalResult(
                task_type="image-to-image",
                task_name="Image reconstruction",
                dataset_type=dataset,
                dataset_name=f"{dataset}, {result.dataset['num_images']} images",
                metric_type=_HUB_METRICS[name],
                metric_name=metric["title"],
                metric_value=round(value, metric["decimals"]),
            )
