"""A folder of small photographs made of smooth noise, and a config that trains on them in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdvae.training.config import DataConfig, LossConfig, TrainConfig, TrainingConfig

MODEL = {
    "block_out_channels": [8, 16, 16],
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
}


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
    def make(name: str = "run", *, data: dict[str, Any] | None = None, **training: Any) -> TrainConfig:
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
            loss=LossConfig(rec="l2"),
            training=replace(base, **training),
        )

    return make
