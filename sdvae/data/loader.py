"""Batches of training crops, the same ones whatever the number of workers, and from any position.

Sample number p of a run is a function of (seed, p) alone: which image, which crop, whether flipped. So a run continues
at the right sample by knowing one number, and the devices of a run split the samples without overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sdvae.data.images import image_to_x, read_image
from sdvae.data.transforms import random_crop_flip

__all__ = ["CropDataset", "PositionSampler", "build_loader"]


class CropDataset(Dataset[Tensor]):
    """Random square crops of image files, indexed by the position in the run (any whole number from 0 on).

    Every image serves once per epoch, in an order shuffled anew for each. Items: x, (3, crop_px, crop_px), [-1, 1].
    """

    def __init__(self, paths: Sequence[Path], crop_px: int, seed: int, cache_images: bool = False) -> None:
        self.paths = list(paths)
        self.crop_px = crop_px
        self.seed = seed
        self.cache: dict[Path, np.ndarray] | None = {} if cache_images else None

    def __getitem__(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.paths))
        path = self.paths[_shuffled(len(self.paths), self.seed, epoch)[place]]
        rng = np.random.default_rng((self.seed, 1, position))
        return image_to_x(random_crop_flip(self._pixels(path), self.crop_px, rng))

    def _pixels(self, path: Path) -> np.ndarray:
        if self.cache is None:
            return read_image(path).pixels
        if path not in self.cache:
            self.cache[path] = read_image(path).pixels
        return self.cache[path]


class PositionSampler(Sampler[int]):
    """Positions first + rank, first + rank + world_size, ... without end."""

    def __init__(self, first: int, rank: int = 0, world_size: int = 1) -> None:
        self.first, self.rank, self.world_size = first, rank, world_size

    def __iter__(self) -> Iterator[int]:
        position = self.first + self.rank
        while True:
            yield position
            position += self.world_size


def build_loader(
    dataset: CropDataset, *, batch_size: int, first: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader[Tensor]:
    """Endless batches x, (batch_size, 3, crop_px, crop_px), from sample `first` of the run on."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=PositionSampler(first, rank, world_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # its own, or starting the loader would draw from the random state that a resumed run has just restored
        generator=torch.Generator(),
    )


@lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)
