"""What the folder of a training run says about a VAE that the run made. No code of the run is loaded, only files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sdvae.card.text import public_text, published
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.formats import CONFIG_NAME
from sdvae.checkpoints.store import load_autoencoder
from sdvae.errors import ConfigError
from sdvae.report.text import count

__all__ = ["RunRecord"]

Row = dict[str, Any]

_VALIDATION = {  # keys of metrics.jsonl; docs/training.md has their definitions
    "val/psnr": "PSNR (dB) ↑",
    "val/lpips": "LPIPS ↓",
    "val/kl": "KL (nats per image)",
    "val/posterior_std": "mean standard deviation of z",
}
_STARTS = {"default": "random weights", "linear": "about the best linear transform of the training crops"}


class RunRecord:
    """The folder of a training run, and how a VAE relates to it.

    facts: of the VAE, as `describe_vae` gives them. Raises: ConfigError for a folder that is none of a run, or of a run
    that made another VAE.
    """

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
        """The section "Training" of the VAE's card."""
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
            "yaml": yaml.safe_dump(published(self.config), sort_keys=False, allow_unicode=True)
            .strip()
            .replace("```", "'''"),
        }

    def _facts(self) -> Iterator[tuple[str, str]]:
        data, training, seen = (self.config.get("data", {}), self.config.get("training", {}), self.environment)
        if "path" in data:
            yield "images", public_text(data["path"])
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
            yield "started from", _STARTS.get(training["init"]) or public_text(str(training["init"]))
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
