"""What a run tells a person while it goes on: lines of numbers, and on a terminal a bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["Display", "duration"]

logger = logging.getLogger(__name__)

# of the many values that are logged, those that a line has room for
_SHOWN = ("loss", "rec_loss", "perceptual_loss", "kl_loss", "g_loss", "d_loss", "adaptive_weight", "grad_norm", "lr")


class Display:
    """Throughput and time left, from the steps of this process: what a resumed run did before does not count."""

    def __init__(self, first_step: int, steps: int, images_per_step: int, silent: bool) -> None:
        from tqdm import tqdm

        self.steps, self.images_per_step = steps, images_per_step
        self.window = (time.perf_counter(), first_step)
        self.bar: tqdm[Any] = tqdm(
            total=steps, initial=first_step, unit="step", desc="train", disable=True if silent else None
        )

    def step(self) -> None:
        self.bar.update()

    def rates(self, step: int) -> dict[str, float]:
        """Speed since the last call. Returns: seconds_per_step, images_per_s."""
        now = time.perf_counter()
        seconds = (now - self.window[0]) / max(1, step - self.window[1])
        self.window = (now, step)
        return {"seconds_per_step": seconds, "images_per_s": self.images_per_step / seconds}

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Log the most telling values. values: as they are logged, with train/ or val/ before their names."""
        short = {name.split("/")[-1]: value for name, value in values.items()}
        is_validation = any(name.startswith("val/") for name in values)
        names = list(short) if is_validation else [name for name in _SHOWN if name in short]
        shown = [f"{name} {short[name]:.4g}" for name in names]
        if "seconds_per_step" in short:
            left = duration((self.steps - step) * short["seconds_per_step"])
            shown.append(f"{short['images_per_s']:.3g} images/s, {left} left")
        self.bar.clear()
        logger.info("step %d/%d%s: %s", step, self.steps, " validation" if is_validation else "", ", ".join(shown))
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 42 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    whole = round(seconds)
    for unit, length, below, below_length in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // below_length} {below}"
    return f"{whole} s"
