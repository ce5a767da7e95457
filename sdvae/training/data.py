"""Which images a run trains on and which it is measured on. No torch."""

from __future__ import annotations

from pathlib import Path

from sdvae.data.sources import find_images
from sdvae.errors import ConfigError
from sdvae.training.config import DataConfig

__all__ = ["split_images"]


def split_images(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """Paths for training and for validation; without `val_path`, every n-th of the sorted images is held out."""
    paths = [image.path for image in find_images(data.path)]
    if data.val_path is not None:
        return paths, [image.path for image in find_images(data.val_path)][: data.num_val_images]
    if data.num_val_images >= len(paths):
        raise ConfigError(
            f"'data.num_val_images' is {data.num_val_images}, but {data.path} has {len(paths)} images; "
            "lower it or set data.val_path"
        )
    if data.num_val_images == 0:
        return paths, []
    held_out = {index * len(paths) // data.num_val_images for index in range(data.num_val_images)}
    return (
        [path for index, path in enumerate(paths) if index not in held_out],
        [path for index, path in enumerate(paths) if index in held_out],
    )
