"""What an evaluation takes besides its protocol: nothing in here changes a number beyond rounding. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdvae.errors import ConfigError

__all__ = ["STRESS_NAMES", "EvaluateOptions", "stress_names"]

STRESS_NAMES = ("cycles", "resolution", "seams", "precision", "sampling")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Where and how an evaluation runs, and what it makes besides numbers."""

    device: str = "auto"
    batch_size: int | None = None  # images of one size that go through a VAE together; None: what suits the device
    workers: int | None = None  # threads that read; None: one per core, at most 8
    weights_path: Path | None = None  # folder (or file) of the frozen networks' weights; None: the usual places
    skip_unavailable: bool = False  # leave metrics out whose package or weights cannot be had
    stress: tuple[str, ...] = ()
    stress_images: int = 4  # each costs 18 passes of every VAE for cycles alone
    swap_images: int = 64
    gallery_images: int = 24
    fid_statistics: Path | None = None  # .npz that stands for the originals
    save_fid_statistics: Path | None = None  # .npz to write the originals' statistics to
    published: str | None = None
    gates: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if self.stress_images < 1 or self.swap_images < 1 or self.gallery_images < 0:
            raise ConfigError("stress_images and swap_images must be 1 or more, gallery_images 0 or more")
        if unknown := [name for name in self.stress if name not in STRESS_NAMES]:
            raise ConfigError(_unknown_stress(unknown[0]))


def stress_names(spec: str) -> tuple[str, ...]:
    """The stress tests that a comma-separated list, "all" or "none" means. Raises: ConfigError, which lists them."""
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in (*STRESS_NAMES, "all", "none")]:
        raise ConfigError(_unknown_stress(unknown[0]))
    return STRESS_NAMES if "all" in parts else tuple(name for name in STRESS_NAMES if name in parts)


def _unknown_stress(name: str) -> str:
    return f"'{name}' is no stress test; expected all, none or of {', '.join(STRESS_NAMES)}"
