"""What an evaluation will do, decided before anything heavy is loaded: images, networks, gates. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import choose_images, find_images
from sdvae.errors import ConfigError
from sdvae.evaluation.gates import Gate, gate_needs, parse_gate
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import FID_MIN_IMAGES, SET_METRICS, Protocol

__all__ = ["ORIGINALS", "Entrant", "EvaluationPlan", "plan_evaluation"]

ORIGINALS = "originals"  # the owner of the original images' features; no VAE has this id
_BUNDLED = "sdvae-mini"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """An autoencoder that takes part."""

    id: str  # short, unique, by which the result refers to it
    ref: str | None  # as given; None: the bundled one
    role: Literal["candidate", "reference"]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Everything that is known before a network is loaded."""

    source: str
    num_found: int
    files: tuple[ImageFile, ...]
    entrants: tuple[Entrant, ...]
    out: Path
    protocol: Protocol  # its metrics are those that can be computed on so many images
    skipped_metrics: tuple[tuple[str, str], ...]  # name, reason
    gates: tuple[Gate, ...]
    options: EvaluateOptions

    @property
    def reference(self) -> Entrant | None:
        return next((entrant for entrant in self.entrants if entrant.role == "reference"), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "num_found": self.num_found,
            "num_images": len(self.files),
            "vaes": [{"id": each.id, "ref": each.ref, "role": each.role} for each in self.entrants],
            "out": str(self.out),
            "protocol": self.protocol.to_json(),
            "skipped_metrics": [{"name": name, "reason": reason} for name, reason in self.skipped_metrics],
            "stress": list(self.options.stress),
            "gates": [gate.expression for gate in self.gates],
        }


def plan_evaluation(
    images: str | Path,
    vaes: Sequence[str | Path | None],
    reference: str | Path | None,
    out: str | Path,
    protocol: Protocol,
    options: EvaluateOptions,
) -> EvaluationPlan:
    """Raises: ConfigError for images, gates or an output folder that cannot be."""
    entrants = tuple(_entrants(vaes or (None,), reference))
    gates = tuple(parse_gate(text) for text in options.gates)
    for gate in gates:
        if gate.vae is not None and gate.vae not in (ids := [entrant.id for entrant in entrants]):
            raise ConfigError(f"'{gate.expression}': '{gate.vae}' does not take part; there are {', '.join(ids)}")
        needed, needs_reference = gate_needs(gate)
        if lacking := [name for name in needed if name not in protocol.metrics]:
            raise ConfigError(f"'{gate.expression}' needs {lacking[0]}, which is not measured: add it to --metrics")
        if needs_reference and reference is None:
            raise ConfigError(f"'{gate.expression}' compares with a reference: name one with --reference")
    out = Path(out)
    place = next(place for place in (out, *out.parents) if place.exists())
    if not place.is_dir():
        raise ConfigError(f"{place} is a file; expected a folder for the report")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place}: no permission to write here; choose another --out")
    if options.fid_statistics is not None and not options.fid_statistics.is_file():
        raise ConfigError(f"{options.fid_statistics}: no such file; expected .npz with the statistics of originals")
    if options.save_fid_statistics is not None:
        if not set(protocol.metrics) & set(SET_METRICS):
            raise ConfigError(
                "the originals' statistics come with rfid: add it to --metrics, or leave --save-fid-stats"
            )
        if options.save_fid_statistics.is_dir():
            raise ConfigError(f"{options.save_fid_statistics} is a folder; expected a file name for the statistics")
    found = find_images(images)
    files = choose_images(found, protocol.max_images)
    skipped = _impossible(protocol, len(files), options)
    metrics = tuple(name for name in protocol.metrics if name not in dict(skipped))
    return EvaluationPlan(
        source=str(images),
        num_found=len(found),
        files=tuple(files),
        entrants=entrants,
        out=out,
        protocol=replace(protocol, metrics=metrics),
        skipped_metrics=tuple(skipped),
        gates=gates,
        options=options,
    )


def _impossible(protocol: Protocol, num_images: int, options: EvaluateOptions) -> list[tuple[str, str]]:
    skipped = []
    for name in SET_METRICS:
        if name not in protocol.metrics:
            continue
        if num_images < FID_MIN_IMAGES:
            skipped.append((name, f"it compares sets of images and needs {FID_MIN_IMAGES} or more; there is one"))
        elif name == "kid" and options.fid_statistics is not None:
            skipped.append((name, "it needs the originals' features; a file of statistics has moments alone"))
    return skipped


def _entrants(vaes: Sequence[str | Path | None], reference: str | Path | None) -> list[Entrant]:
    refs: list[tuple[str | None, Literal["candidate", "reference"]]] = [
        (None if ref is None else str(ref), "candidate") for ref in vaes
    ]
    if reference is not None:
        refs.append((str(reference), "reference"))
    entrants: list[Entrant] = []
    for ref, role in refs:
        base, number = _short_name(ref), 2
        name = base
        while name == ORIGINALS or any(entrant.id == name for entrant in entrants):
            name, number = f"{base}-{number}", number + 1
        entrants.append(Entrant(id=name, ref=ref, role=role))
    return entrants


def _short_name(ref: str | None) -> str:
    """The last part of a path or hub id that tells something, as a plain word."""
    if ref is None:
        return _BUNDLED
    path = Path(ref)
    parts = [part for part in path.parts if part not in ("vae", "diffusion_pytorch_model.safetensors", "/", "..", ".")]
    stem = re.sub(r"\.(safetensors|ckpt|pt|pth|bin)$", "", parts[-1]) if parts else "vae"
    return re.sub(r"[^\w.+-]+", "-", stem).strip("-.") or "vae"
