"""The model card of a VAE folder: README.md with the front matter that the hub reads.

Every number and name comes from the VAE's files, the folder of its training run or an evaluation of exactly this VAE.
What none of them holds is left out, and named as missing. Folders of this machine are not published: of a path, the
card has the last name. Left out: uploading (`checkpoints/push.py`), and pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from sdvae._version import __version__
from sdvae.checkpoints.describe import describe_vae
from sdvae.checkpoints.formats import CARD_NAME, CONFIG_NAME
from sdvae.checkpoints.store import autoencoder_digest, load_autoencoder
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.evaluation.report import count, number, plain, signed, when
from sdvae.evaluation.result import EvaluationResult
from sdvae.files import write_atomic

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["Card", "build_card", "write_card"]

Row = dict[str, Any]

_TAGS = ["autoencoder", "vae", "sdvae"]
_PLACEHOLDER = "REPO_ID"
_MARK = re.compile(r"<!-- Written by sdvae card.*?; text (?P<text>[0-9a-f]{16}) -->\n\Z")
_SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_VALIDATION = {  # keys of metrics.jsonl; docs/training.md has their definitions
    "val/psnr": "PSNR (dB) ↑",
    "val/lpips": "LPIPS ↓",
    "val/kl": "KL (nats per image)",
    "val/posterior_std": "mean standard deviation of z",
}
_STARTS = {"default": "random weights", "linear": "about the best linear transform of the training crops"}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors headers say it
_HUB_METRICS = {"psnr": "psnr", "ssim": "ssim", "lpips_alex": "lpips", "lpips_vgg": "lpips", "rfid": "fid"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model card, and what it says is missing."""

    text: str
    missing: tuple[str, ...]


def build_card(
    vae: str | Path,
    *,
    run: str | Path | None = None,
    result: EvaluationResult | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> Card:
    """Compose the model card of a VAE folder.

    run: the folder of the training run that made it. result: an evaluation that measured it. license: as the hub names
    it; None: what the VAE's notes record. repo: "org/name", for the commands in the card; None: a placeholder.
    Raises: CheckpointError for a VAE that does not load; ConfigError for a run or result of another VAE.
    """
    path = Path(vae).expanduser()
    facts = _describe(path)
    entry = None if result is None else _entry(result, facts["digest"])
    run_facts = None if run is None else _Run(Path(run).expanduser(), path, facts)
    chosen_license = license or facts["notes"].get("license")
    missing = tuple(_missing(facts, run_facts, entry, chosen_license))
    title = repo.rpartition("/")[2] if repo else _title(path.resolve())
    body = (
        _environment()
        .get_template("card.md")
        .render(
            title=title,
            repo=repo or _PLACEHOLDER,
            ratio=facts["spatial_compression_ratio"],
            config=facts["config"],
            variant=_variant(facts),
            to_latents=_to_latents(facts["config"]),
            network=list(_network(facts)),
            scale=[(name, plain(facts["config"][name])) for name in _SCALE_FIELDS],
            scale_origin=_scale_origin(facts, run_facts),
            history=list(_history(facts["notes"])),
            training=None if run_facts is None else run_facts.view(),
            evaluation=None if result is None or entry is None else _evaluation(result, entry),
            precision=None if entry is None else _precision(entry),
            loaders=[_loader(verdict) for verdict in facts["loaders"]],
            limits=list(_limits(facts)),
            missing=missing,
        )
    )
    front = _front_matter(title, chosen_license, result, entry)
    return Card(text=_marked(f"---\n{front}\n---\n\n{body.strip()}\n", facts["digest"]), missing=missing)


def write_card(folder: str | Path, card: Card, *, overwrite: bool = False, dry_run: bool = False) -> tuple[Path, str]:
    """Write README.md into the VAE's folder, in one step.

    overwrite: also replace a README.md that sdvae did not write, or that was changed since.
    Returns: its path, and `new`, `replaced` or `up to date`. Raises: OutputExistsError.
    """
    path = Path(folder).expanduser() / CARD_NAME
    status = "new"
    if path.exists():
        present = path.read_text(encoding="utf-8", errors="replace")
        status = "up to date" if present == card.text else "replaced"
        if status == "replaced" and not overwrite and (reason := _not_ours(present)):
            raise OutputExistsError(f"{path} {reason}; replace it with --overwrite, or keep a copy under another name")
    if not dry_run and status != "up to date":
        write_atomic(card.text.encode(), path)
    return path, status


def _marked(text: str, digest: str) -> str:
    """The text with a comment behind it that tells a generated card, its VAE, and whether it was changed since."""
    return f"{text}\n<!-- Written by sdvae card, {__version__}; vae {digest}; text {_text_digest(text)} -->\n"


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _not_ours(text: str) -> str | None:
    match = _MARK.search(text)
    if match is None:
        return "was not written by sdvae card"
    return None if _text_digest(text[: match.start()]) == match["text"] else "was changed since sdvae card wrote it"


# The VAE


def _describe(path: Path) -> Row:
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{path} is no folder of a VAE with its {CONFIG_NAME}; make one first: sdvae convert {path} DIR"
        )
    facts = describe_vae(path)
    if facts["class_name"] != "AutoencoderKL":
        raise ConfigError(f"{path} holds a {facts['class_name']}; cards are written for AutoencoderKL")
    if not facts["loads"]:
        raise CheckpointError(f"{path}: no card is written for a VAE that does not load: {facts['reason']}")
    return facts


def _title(folder: Path) -> str:
    """The folder's name; that of the run for the folders that a run makes."""
    return folder.parent.name if folder.name in ("vae", "vae-best") and folder.parent.name else folder.name


def _variant(facts: Row) -> str | None:
    """As in diffusion_pytorch_model.<variant>.safetensors, where there are no plain weights."""
    match = re.fullmatch(r"diffusion_pytorch_model\.([^.]+)\.safetensors", Path(facts["weights"]).name)
    return match[1] if match else None


def _to_latents(config: Row) -> str:
    z = "(z - vae.config.shift_factor)" if config["shift_factor"] else "z"
    return f"{z} * vae.config.scaling_factor"


def _network(facts: Row) -> Iterator[tuple[str, str]]:
    config = facts["config"]
    yield "compression of each side", str(facts["spatial_compression_ratio"])
    for field in ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "act_fn"):
        yield f"`{field}`", plain(config[field])
    yield "attention in the middle", plain(config["mid_block_add_attention"])
    yield "quant_conv, post_quant_conv", f"{plain(config['use_quant_conv'])}, {plain(config['use_post_quant_conv'])}"
    yield "parameters", count(facts["num_parameters"])
    yield (
        "stored as",
        f"{', '.join(_DTYPES.get(name, name) for name in facts['dtypes'])}, {facts['size_bytes'] / 1e6:.1f} MB",
    )
    yield "digest", f"`{facts['digest']}`"


def _scale_origin(facts: Row, run: _Run | None) -> str:
    if calibration := facts["notes"].get("calibration"):
        errors = calibration.get("standard_errors", {})
        uncertain = [f"{name} {plain(value)}" for name, value in errors.items() if value is not None]
        measured = ", ".join(f"`{name}`" for name in errors) or "`scaling_factor`"
        sentence = f"Measured by `sdvae calibrate`: {measured}, over {count(calibration.get('num_images'))} images"
        return sentence + (f"; standard errors: {'; '.join(uncertain)}." if uncertain else ".")
    if run is not None and (images := run.calibrated_on):
        return (
            f"`scaling_factor` was measured at the end of training, from draws of z of {count(images)} training crops."
        )
    return "Where these numbers come from is not recorded."


def _history(notes: Row) -> Iterator[str]:
    if source := notes.get("source"):
        yield f"Made from {source}" + (f" (`{notes['source_digest']}`)" if "source_digest" in notes else "")
    elif "source_digest" in notes:
        yield f"Made from the VAE `{notes['source_digest']}`"
    yield from notes.get("rewrites", ())


def _loader(verdict: Row) -> Row:
    return {
        "name": verdict["loader"],
        "takes": verdict["takes"],
        "scale_from": verdict["scale_from"],
        "reasons": "; ".join(verdict["reasons"]),
    }


def _limits(facts: Row) -> Iterator[str]:
    ratio = facts["spatial_compression_ratio"]
    yield (
        "A diffusion model fits the latents that it was trained on. Whether those of another autoencoder are alike is "
        "what the swap test of `sdvae evaluate --reference` measures."
    )
    if ratio > 1:
        yield (
            f"diffusers' `encode` drops what a side has beyond a multiple of {ratio} pixels. `sdvae encode` pads, and "
            f"`sdvae decode` crops back."
        )
    yield "A reconstruction is not the original: detail that the latent does not hold is lost."
    if facts["config"]["force_upcast"]:
        yield "`force_upcast` is set: pipelines that read it compute this autoencoder in float32."


def _missing(facts: Row, run: _Run | None, entry: Row | None, license: str | None) -> Iterator[str]:
    if license is None:
        yield "license: not stated"
    if run is None:
        yield "training: not recorded"
    if not facts["notes"].get("calibration") and not (run is not None and run.calibrated_on):
        yield "scale: where scaling_factor comes from is not recorded"
    if entry is None:
        yield "quality: not measured"
    if entry is None or not _precision(entry):
        yield "float16 and bfloat16: not measured"


# The training run


class _Run:
    """The folder of a training run, read as plain files, and how the VAE of the card relates to it."""

    def __init__(self, folder: Path, vae: Path, facts: Row) -> None:
        self.config: Row = _read_yaml(folder / "config.yaml")
        self.environment: Row = _read_json(folder / "environment.json")
        self.rows = _read_rows(folder / "metrics.jsonl")
        self.is_finished = (folder / "vae" / CONFIG_NAME).is_file()
        self.which, self.relation = _relation(folder, vae, facts)
        self.best: Row = _read_json(folder / "checkpoints" / "best.json")

    @property
    def calibrated_on(self) -> int | None:
        """Training crops that the VAE's own scaling_factor was measured on."""
        images: int | None = self.config.get("training", {}).get("num_calibration_images")
        return images if self.is_finished and self.relation == "equal" else None

    def view(self) -> Row:
        made = f"the run's `{self.which}`" + (", the step that was best in validation" if "best" in self.which else "")
        relations = {
            "equal": f"These weights are {made}.",
            "scale": f"These weights are {made}; the scale was set anew afterwards.",
            "source": f"These weights were made from {made}, see the history.",
        }
        return {
            "relation": relations[self.relation],
            "facts": list(self._facts()),
            "validation": self._validation(),
            "yaml": yaml.safe_dump(_published(self.config), sort_keys=False, allow_unicode=True)
            .strip()
            .replace("```", "'''"),
        }

    def _facts(self) -> Iterator[tuple[str, str]]:
        data, training, seen = (self.config.get("data", {}), self.config.get("training", {}), self.environment)
        if "path" in data:
            yield "images", _public(data["path"])
        if "num_train_images" in seen:
            images = seen["num_train_images"]
            yield "number of training images", "not known of a stream" if images is None else count(images)
        if "crop_px" in data:
            yield "crops", f"{data['crop_px']} px"
        if steps := max((row["step"] for row in self.rows), default=None):
            yield "steps", f"{count(steps)} of {count(training.get('steps'))} planned"
        if "batch_size" in training and "num_processes" in seen:
            parts = (training["batch_size"], training.get("accumulation", 1), seen["num_processes"])
            yield "images in a step", f"{parts[0] * parts[1] * parts[2]} ({parts[0]} x {parts[1]} x {parts[2]} devices)"
        if "init" in training:
            yield "started from", _STARTS.get(training["init"]) or _public(str(training["init"]))
        if "trained" in training:
            yield "trained part", str(training["trained"])
        if "num_trained_parameters" in seen:
            yield "trained parameters", count(seen["num_trained_parameters"])
        if "precision" in training:
            yield "precision", "float32" if training["precision"] == "no" else str(training["precision"])
        versions = [f"{name} {seen[name]}" for name in ("sdvae", "torch", "python") if name in seen]
        if versions:
            yield "software", ", ".join(versions) + (f", on {seen['device']}" if "device" in seen else "")

    def _validation(self) -> Row | None:
        """What was logged for exactly these weights, as far as the run tells."""
        rows = [row for row in self.rows if any(name in row for name in _VALIDATION)]
        if self.relation == "source" or not rows:
            return None
        step = self.best.get("step") if self.which == "vae-best" else max(row["step"] for row in self.rows)
        row = next((row for row in rows if row["step"] == step), None)
        if row is None:
            return None
        numbers = [(title, f"{row[name]:.4g}") for name, title in _VALIDATION.items() if row.get(name) is not None]
        return {"step": step, "images": self.environment.get("num_val_images"), "rows": numbers}


def _relation(folder: Path, vae: Path, facts: Row) -> tuple[str, str]:
    """Which of the run's VAEs the card's VAE is: the same; the same weights with another scale; or made from it."""
    candidates = [folder / name for name in ("vae", "vae-best") if (folder / name / CONFIG_NAME).is_file()]
    if not candidates:
        raise ConfigError(f"{folder} has neither vae/ nor vae-best/; a card is about a VAE that a run has written")
    models = {candidate.name: load_autoencoder(candidate) for candidate in candidates}
    digests = {name: autoencoder_digest(model) for name, model in models.items()}
    for relation, digest in (("equal", facts["digest"]), ("source", facts["notes"].get("source_digest"))):
        if name := next((name for name, found in digests.items() if found == digest), None):
            return name, relation
    weights = load_autoencoder(vae).state_dict()
    for name, model in models.items():
        if _equal(weights, model.state_dict()):
            return name, "scale"
    listed = ", ".join(f"{name} {digest}" for name, digest in digests.items())
    raise ConfigError(f"the run {folder} made another VAE than {vae}: it has {listed}, the folder {facts['digest']}")


def _equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _read_yaml(path: Path) -> Row:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; expected the folder of a run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings of a run")
    return data


def _read_json(path: Path) -> Row:
    """{} where the run has no such file."""
    if not path.is_file():
        return {}
    try:
        data: Row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    return data


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON object per line ({error})") from None


def _published(value: Any) -> Any:
    """Settings without the folders of this machine."""
    if isinstance(value, dict):
        return {name: _published(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_published(item) for item in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    """The last name of a path that says where things lie on this machine; any other text as it is."""
    for flavour, start in ((PurePosixPath, r"/|~|\.\.?/"), (PureWindowsPath, r"[A-Za-z]:[\\/]|\\\\")):
        if re.match(start, text):
            return flavour(text).name
    return text


# The evaluation


def _entry(result: EvaluationResult, digest: str) -> Row:
    for entry in result.vaes:
        if entry["digest"] == digest:
            return entry
    measured = ", ".join(f"{entry['id']} {entry['digest']}" for entry in result.vaes)
    raise ConfigError(
        f"the evaluation measured other VAEs than the one of the card, {digest}: {measured}. A rewrite or another "
        f"scale makes another VAE; measure this one: sdvae evaluate IMAGES --vae VAE"
    )


def _evaluation(result: EvaluationResult, entry: Row) -> Row:
    shown = [entry, *(other for other in result.vaes if other["role"] == "reference" and other is not entry)]
    by_name = {metric["name"]: metric for metric in result.metrics}
    measured = [metric for metric in result.metrics if _value(entry, metric["name"]) is not None]
    comparisons = [each for each in result.comparisons if each["vae"] == entry["id"]]
    return {
        "num_images": result.dataset["num_images"],
        "unreadable": len(result.dataset["unreadable"]),
        "dataset": _public(str(result.dataset["source"])),
        "when": when(result.created),
        "version": result.sdvae_version,
        "columns": ["this VAE", *(_public(str(other["ref"])) for other in shown[1:])],
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
    return {"reference": _public(str(reference["ref"])), "rows": rows, "swap": swap}


def _protocol(result: EvaluationResult) -> Iterator[tuple[str, str]]:
    for name, value in result.protocol.items():
        if name == "fid" and isinstance(value, dict):
            value = {key: _public(str(item)) for key, item in value.items()}
        yield name, plain(value)
    yield "digest of the images", f"`{result.dataset['digest']}`"
    yield (
        "environment",
        plain(
            {name: result.environment[name] for name in ("device", "torch", "diffusers") if name in result.environment}
        ),
    )


def _precision(entry: Row) -> list[tuple[str, str]]:
    """Outcome of the precision test of the evaluation, for each type but float32."""
    rows = (entry.get("stress") or {}).get("precision") or []
    return [(row["dtype"], _precision_of(row)) for row in rows if row["dtype"] != "float32"]


def _precision_of(row: Row) -> str:
    if "error" in row:
        return f"failed: {row['error']}".replace("|", r"\|").replace("\n", " ")
    if not row["finite"]:
        return "values overflow: not usable without float32"
    return f"finite; PSNR against float32 {number(row['psnr_against_fp32'], 1)} dB"


# Front matter and text


def _front_matter(title: str, license: str | None, result: EvaluationResult | None, entry: Row | None) -> str:
    from huggingface_hub import ModelCardData

    results = [] if result is None or entry is None else list(_eval_results(result, entry))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        tags=list(_TAGS),
        model_name=title if results else None,  # the hub shows results under a name
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _eval_results(result: EvaluationResult, entry: Row) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    dataset = _public(str(result.dataset["source"]))
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


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sdvae.evaluation", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "count": count}
    return environment


def cell(value: object) -> str:
    """Text for a cell of a table or a line: on one line, with nothing in it that Markdown or HTML would act on."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", r"\|")
