"""Train, measure, export and use Stable-Diffusion-style image autoencoders (KL-VAEs).

The public names below are imported on first use, so that `import sdvae` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdvae._version import __version__

if TYPE_CHECKING:
    from sdvae.calibration.measure import CalibrateOptions, calibrate
    from sdvae.checkpoints.convert.options import ConvertOptions
    from sdvae.checkpoints.convert.run import convert
    from sdvae.checkpoints.store import load_autoencoder, save_autoencoder, to_diffusers
    from sdvae.codec.options import DecodeOptions, EncodeOptions
    from sdvae.codec.run import decode_folder, encode_folder
    from sdvae.evaluation.options import EvaluateOptions
    from sdvae.evaluation.runner import evaluate
    from sdvae.model.autoencoder import AutoencoderKL
    from sdvae.model.optimize import optimize
    from sdvae.training.loop import train

_HOMES = {
    "AutoencoderKL": "sdvae.model.autoencoder",
    "load_autoencoder": "sdvae.checkpoints.store",
    "save_autoencoder": "sdvae.checkpoints.store",
    "to_diffusers": "sdvae.checkpoints.store",
    "convert": "sdvae.checkpoints.convert.run",
    "optimize": "sdvae.model.optimize",
    "CalibrateOptions": "sdvae.calibration.measure",
    "ConvertOptions": "sdvae.checkpoints.convert.options",
    "DecodeOptions": "sdvae.codec.options",
    "EncodeOptions": "sdvae.codec.options",
    "EvaluateOptions": "sdvae.evaluation.options",
    "encode_folder": "sdvae.codec.run",
    "decode_folder": "sdvae.codec.run",
    "calibrate": "sdvae.calibration.measure",
    "evaluate": "sdvae.evaluation.runner",
    "train": "sdvae.training.loop",
}

__all__ = [
    "AutoencoderKL",
    "CalibrateOptions",
    "ConvertOptions",
    "DecodeOptions",
    "EncodeOptions",
    "EvaluateOptions",
    "__version__",
    "calibrate",
    "convert",
    "decode_folder",
    "encode_folder",
    "evaluate",
    "load_autoencoder",
    "optimize",
    "save_autoencoder",
    "to_diffusers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdvae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
