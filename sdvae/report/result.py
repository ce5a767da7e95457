"""What an evaluation found: plain data that is also result.json. Standard library only.

The fields are described in docs/evaluation-result.md. Everything that the report shows is in here, so that it renders
again from this file alone, and numbers of different files can be put side by side.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sdvae.errors import ConfigError

__all__ = ["SCHEMA", "EvaluationResult", "load_result"]

SCHEMA = "sdvae.evaluation/1"  # the number goes up when a reader of the old fields would misread the new ones
_LARGE = ("per_image", "gallery")


@dataclass(kw_only=True)
class EvaluationResult:
    """One evaluation of one or more autoencoders on one set of images."""

    created: str  # UTC, ISO 8601
    sdvae_version: str
    protocol: dict[str, Any]
    dataset: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    skipped_metrics: list[dict[str, Any]]
    vaes: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    published: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    per_image: dict[str, Any] = field(default_factory=dict)
    gallery: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Numbers that JSON lacks (not finite ones) become None, so an object is what its file says."""
        for each in fields(self):
            setattr(self, each.name, _plain(getattr(self, each.name)))

    @property
    def exit_code(self) -> int:
        """1 where a gate failed, else 3 where images could not be read, else 0."""
        if any(not gate["passed"] for gate in self.gates):
            return 1
        return 3 if self.dataset["unreadable"] else 0

    def to_json(self, *, large: bool = True) -> dict[str, Any]:
        """Plain values only.

        large: with the values of each image and the pictures of the gallery.
        """
        names = [each.name for each in fields(self) if large or each.name not in _LARGE]
        return {"schema": SCHEMA} | {name: getattr(self, name) for name in names}


def load_result(path: str | Path) -> EvaluationResult:
    """Read result.json. Raises: ConfigError for what is none, or one of a later version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); expected the result.json of sdvae evaluate") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"{path}: its schema is {schema!r}; this version of sdvae reads {SCHEMA!r}")
    known = {each.name for each in fields(EvaluationResult)}
    required = known - {"published", "gates", "warnings", "per_image", "gallery"}
    if lacking := sorted(required - data.keys()):
        raise ConfigError(f"{path}: no result of sdvae evaluate: it lacks {', '.join(lacking)}")
    return EvaluationResult(**{name: value for name, value in data.items() if name in known})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
