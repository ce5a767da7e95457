"""Training crops: a function of (seed, position) alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.loader import CropDataset, build_loader


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images, each of one colour, so that a crop tells its image."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for index in range(5):
        found.append(folder / f"{index}.png")
        Image.fromarray(np.full((40, 48, 3), 50 * index, np.uint8)).save(found[-1])
    return found


def image_of(crop: torch.Tensor) -> int:
    return round(float(crop.mean() + 1) * 127.5 / 50)


def test_every_image_serves_once_per_epoch_in_a_new_order(paths: list[Path]) -> None:
    dataset = CropDataset(paths, crop_px=32, seed=3)
    epochs = [[image_of(dataset[5 * epoch + place]) for place in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_samples_do_not_depend_on_workers_cache_or_where_the_run_began(paths: list[Path]) -> None:
    def batches(first: int, workers: int, cache: bool, count: int) -> torch.Tensor:
        dataset = CropDataset(paths, crop_px=32, seed=0, cache_images=cache)
        loader = build_loader(dataset, batch_size=2, first=first, num_workers=workers)
        return torch.cat(list(islice(loader, count)))

    plain = batches(0, 0, False, 6)
    assert torch.equal(plain, batches(0, 2, True, 6))
    assert torch.equal(plain[4:], batches(4, 0, True, 4))


def test_devices_split_the_samples_without_overlap(paths: list[Path]) -> None:
    dataset = CropDataset(paths, crop_px=32, seed=0)
    ranks = [
        torch.cat(list(islice(build_loader(dataset, batch_size=2, rank=rank, world_size=2), 3))) for rank in range(2)
    ]
    joined = torch.stack(ranks, dim=1).flatten(0, 1)
    assert torch.equal(joined, torch.stack([dataset[position] for position in range(12)]))


def test_starting_a_loader_leaves_the_random_state_alone(paths: list[Path]) -> None:
    dataset = CropDataset(paths, crop_px=32, seed=0)
    state = torch.get_rng_state()
    next(iter(build_loader(dataset, batch_size=1)))
    assert torch.equal(state, torch.get_rng_state())
