"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdvae._torchvision import ensure_torchvision_importable

ensure_torchvision_importable()


@pytest.fixture(scope="session")
def assets() -> Path:
    """External photographs and weights: $SDVAE_TEST_ASSETS, or shared/assets beside the repository."""
    named = os.environ.get("SDVAE_TEST_ASSETS")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"no external test assets at {folder}")
    return folder


@pytest.fixture
def tiny_vae():  # type: ignore[no-untyped-def]
    """A small seeded f8 autoencoder with 4 latent channels, in eval mode."""
    import torch

    from sdvae.model.autoencoder import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            sample_size=64,
        )
    return vae.eval()
