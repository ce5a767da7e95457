"""What an evaluation measures and how: presets, and every choice that changes a number. No torch.

Two results may be compared number by number where their protocols have one digest. Batch size, device and the number
of processes are not in here: they change nothing beyond rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from sdvae.errors import ConfigError

__all__ = [
    "CORE_METRICS",
    "FID_MIN_IMAGES",
    "METRIC_GROUPS",
    "METRIC_NAMES",
    "NETWORK_METRICS",
    "PRESETS",
    "SET_METRICS",
    "Protocol",
    "metric_names",
]

IMAGE_METRIC_NAMES = (
    *("psnr", "ssim", "ms_ssim", "ssim_uniform7", "lpips_alex", "lpips_vgg", "dists"),
    *("l1", "bias_r", "bias_g", "bias_b", "ciede2000", "sharpness"),
)
SET_METRICS = ("rfid", "kid")
METRIC_NAMES = (*IMAGE_METRIC_NAMES, *SET_METRICS)
NETWORK_METRICS = ("lpips_alex", "lpips_vgg", "dists", *SET_METRICS)  # need frozen weights, and packages of the extra
CORE_METRICS = ("psnr", "ssim", "lpips_alex")  # of stress and swap tests, which measure the same images many times
FID_MIN_IMAGES = 2  # a covariance needs two

_PLAIN = tuple(name for name in METRIC_NAMES if name not in NETWORK_METRICS)
METRIC_GROUPS: dict[str, tuple[str, ...]] = {
    "all": METRIC_NAMES,
    "plain": _PLAIN,  # without any network
    "standard": tuple(name for name in METRIC_NAMES if name not in ("dists", "lpips_vgg", "kid")),
    "fast": ("psnr", "ssim", "lpips_alex", "l1", "bias_r", "bias_g", "bias_b"),
    "lpips": ("lpips_alex",),
    "fid": ("rfid",),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every choice that changes a number."""

    preset: str
    size_px: int | None = None  # short side after resizing (Lanczos, antialiased); None: nothing is resized
    crop: Literal["center", "none"] = "none"
    max_images: int | None = None  # the first so many, evenly spaced over the sorted names; None: all
    posterior: Literal["mode", "sample"] = "mode"
    seed: int = 0  # of samples, bootstrap and the subsets of KID
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    background: str = "white"
    tiling: Literal["off", "blended"] = "off"
    metrics: tuple[str, ...] = METRIC_GROUPS["standard"]
    fid_statistics: str | None = None  # digest of a file that stands for the originals; None: the originals themselves
    resamples: int = 9999  # of the bootstrap

    def __post_init__(self) -> None:
        if self.size_px is not None and self.size_px < 8:
            raise ConfigError(f"size is {self.size_px} px; expected 8 or more")
        if self.crop == "center" and self.size_px is None:
            raise ConfigError("a centre crop needs a size: give one, e.g. --size 256")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(f"the number of images is {self.max_images}; expected 1 or more")

    def to_json(self) -> dict[str, Any]:
        """With what is fixed for all, and the digest."""
        from sdvae.data.images import PREPROCESSING_VERSION  # not above: it loads Pillow, and help has no time for it

        data = dataclasses.asdict(self) | {
            "preprocessing_version": PREPROCESSING_VERSION,
            "metrics": list(self.metrics),
            "resample": "lanczos" if self.size_px else None,
            "rounding": "clamped and rounded to 8 bits",
            "padding": "edges repeated to the VAE's multiple, cut off again",
            "fid": {
                "extractor": "Inception 2015-12-05, pool features (torch-fidelity inception-v3-compat)",
                "resize": "TensorFlow 1 bilinear to 299 x 299, not antialiased",
                "reference": self.fid_statistics or "originals",
            },
        }
        del data["fid_statistics"]
        counted = {name: value for name, value in data.items() if name != "preset"}  # a name changes no number
        digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
        return data | {"digest": f"sha256:{digest}"}


# The first two: sets and sizes of the published tables (the SD VAE cards; ImageNet as in most papers). Those never
# said how they resized, so ours is stated instead.
PRESETS: dict[str, Protocol] = {
    "native": Protocol(preset="native"),
    "coco256": Protocol(preset="coco256", size_px=256, crop="center", metrics=METRIC_NAMES),
    "imagenet256": Protocol(preset="imagenet256", size_px=256, crop="center", metrics=METRIC_NAMES),
    "quick": Protocol(preset="quick", size_px=256, crop="center", max_images=64, metrics=METRIC_GROUPS["fast"]),
}


def metric_names(spec: str) -> tuple[str, ...]:
    """The metrics that a comma-separated list of names and groups means, in the order of display.

    Raises: ConfigError, which lists both.
    """
    chosen: set[str] = set()
    for part in (part.strip() for part in spec.split(",")):
        if part in METRIC_NAMES:
            chosen.add(part)
        elif part in METRIC_GROUPS:
            chosen.update(METRIC_GROUPS[part])
        else:
            raise ConfigError(
                f"'{part}' is no metric; metrics: {', '.join(METRIC_NAMES)}; groups: {', '.join(METRIC_GROUPS)}"
            )
    return tuple(name for name in METRIC_NAMES if name in chosen)
