"""Where curves and pictures go besides metrics.jsonl: accelerate's trackers, by name."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ConfigError

__all__ = ["TRACKERS", "flat_config", "log_picture", "resolve_trackers"]

# name -> module that it needs
TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}
_TAKES_PICTURES = ("tensorboard", "wandb", "aim", "swanlab", "trackio")


def resolve_trackers(names: Sequence[str] | None) -> list[str]:
    """The trackers to use. names: None stands for tensorboard, where it is installed.

    Raises: ConfigError for an unknown name, or one whose package is not installed.
    """
    if names is None:
        return ["tensorboard"] if _is_installed("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(TRACKERS)}"
            raise ConfigError(f"'training.trackers' has the unknown tracker '{name}'; {hint}")
        if not _is_installed(name):
            raise ConfigError(
                f"'training.trackers' has {name}, which is not installed: pip install {TRACKERS[name]}, "
                "or choose another; metrics.jsonl is always written"
            )
    return list(names)


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names with values that every tracker takes: numbers, truth values, text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def log_picture(tracker: Any, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Hand (H, W, 3) pixels to one of accelerate's trackers, if it takes pictures."""
    if tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    elif tracker.name in _TAKES_PICTURES and hasattr(tracker, "log_images"):
        tracker.log_images({name: [pixels]}, step=step)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(TRACKERS[name]) is not None
