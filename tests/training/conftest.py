"""Small photographs made of smooth noise, a config that trains on them in a second, a small LPIPS and discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from sdvae.training.config import (
    AdversarialConfig,
    DataConfig,
    LossConfig,
    PerceptualConfig,
    TrainConfig,
    TrainingConfig,
)

MODEL = {
    "block_out_channels": [8, 16, 16],
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process; `train` resets it, a test that builds a run by itself does not."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def adversarial() -> Callable[..., AdversarialConfig]:
    """Settings of a discriminator small enough for crops of 32 px, at work from the second step on."""
    base = AdversarialConfig(weight=0.5, disc_start=1, channels=8, num_layers=2)
    return lambda **changes: replace(base, **changes)


@pytest.fixture(scope="session")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> PerceptualConfig:
    """LPIPS on an AlexNet with random weights, which needs no file from outside."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    state = alexnet(weights=None).state_dict()
    save_file({name: value for name, value in state.items() if name.startswith("features.")}, path)
    return PerceptualConfig(weight=0.5, net="alex", weights_path=str(path))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(7):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make_config(photos: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(
        name: str = "run", *, data: dict[str, Any] | None = None, loss: dict[str, Any] | None = None, **training: Any
    ) -> TrainConfig:
        base = TrainingConfig(
            steps=6,
            batch_size=2,
            warmup_steps=2,
            log_every=2,
            checkpoint_every=3,
            val_every=0,
            num_calibration_images=4,
            cpu=True,
        )
        return TrainConfig(
            run_dir=str(tmp_path / name),
            data=replace(DataConfig(path=str(photos), num_val_images=2, crop_px=32), **(data or {})),
            model=MODEL,
            loss=replace(LossConfig(rec="l2"), **(loss or {})),
            training=replace(base, **training),
        )

    return make
