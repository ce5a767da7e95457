"""A saved tiny VAE, and folders of small pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.checkpoints.store import save_autoencoder
from sdvae.model.autoencoder import AutoencoderKL


def build_vae(seed: int) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            shift_factor=0.1,
        )
    return vae.eval()


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(build_vae(0), tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="session")
def other_vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(build_vae(1), tmp_path_factory.mktemp("vae") / "other")


@pytest.fixture(scope="session")
def vae(vae_path: Path) -> AutoencoderKL:
    from sdvae.checkpoints.store import load_autoencoder

    return load_autoencoder(vae_path)


@pytest.fixture
def make_images() -> Callable[[Path, Mapping[str, tuple[int, int]]], Path]:
    """Writes pictures of smooth noise: name -> (width, height)."""

    def make(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
        for index, (name, (width, height)) in enumerate(sizes.items()):
            levels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return folder

    return make
