"""The errors that users meet, each with the exit code of the command line. Standard library only.

A message names the thing, says what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "LatentFileError",
    "MissingWeightsError",
    "NothingThereError",
    "OutputExistsError",
    "SdvaeError",
    "TrainingError",
    "TrainingInterrupted",
    "some",
]


class SdvaeError(Exception):
    """Base of all errors that sdvae raises on purpose."""

    exit_code = 1  # 1 failed; 2 wrong usage or config


class ConfigError(SdvaeError):
    """A setting, option or configuration file is wrong, or a path names nothing."""

    exit_code = 2


class OutputExistsError(ConfigError):
    """The output is there already and overwriting was not asked for."""


class CheckpointError(SdvaeError):
    """A VAE cannot be loaded or saved."""


class MissingWeightsError(CheckpointError):
    """Weights are neither on this machine nor within reach."""


class NothingThereError(MissingWeightsError, ConfigError):
    """A path given for a VAE names nothing on this machine, and is no hub id: wrong usage, as for any other path."""

    exit_code = 2


class ImageError(SdvaeError):
    """A file cannot be read as an image."""


class LatentFileError(SdvaeError):
    """A latent file cannot be read, or does not belong to this VAE."""


class TrainingError(SdvaeError):
    """Training cannot go on, for example because the loss is not finite."""


class TrainingInterrupted(TrainingError):
    """Training was asked to stop, and has written a checkpoint."""

    exit_code = 130


def some(names: Collection[str], limit: int = 6) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(list(names)[:limit]) or "nothing"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
