"""Writes files of every format, as `python tests/golden/make.py FOLDER` in an empty folder of a version's own.

v0.1.0 beside this file was written so by version 0.1.0, before its code was reorganized. What a version wrote is never
written again: later versions are held to it. A new format gets a folder of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["CACHES", "STEPS", "make_inputs", "run"]

# Each cache with the options that encode it. kohya's trainers want sides that are multiples of 64.
CACHES: dict[str, Sequence[str]] = {
    "safetensors": (),
    "mode": ("--store", "mode", "--latent-dtype", "float16", "--size", "24"),
    "kohya": ("--format", "kohya-npz", "--flip", "--seed", "3", "--size", "64", "--crop", "center"),
    "webdataset": ("--format", "webdataset", "--store", "sample", "--seed", "7", "--shard-size", "2"),
    "parquet": ("--format", "parquet", "--background", "#204060"),
}
_ENCODE = ("--vae", "vae", "--device", "cpu", "--json")

# What is done, in this order, in a folder with the inputs; the JSON that a command prints is kept under the name.
STEPS: dict[str, Sequence[str]] = {
    **{f"encode-{name}": ("encode", "images", f"caches/{name}", *_ENCODE, *words) for name, words in CACHES.items()},
    "encode-part-1": ("encode", "images", "parts", *_ENCODE, "--shard", "1/2"),
    "encode-one-part": ("encode", "images", "one-part", *_ENCODE, "--shard", "2/2"),
    "encode-part-2": ("encode", "images", "parts", *_ENCODE, "--shard", "2/2"),
    "merge": ("merge", "parts", "--json"),
    "verify": ("verify", "caches/safetensors", "--images", "images", "--json"),
    "decode": ("decode", "caches/safetensors", "decoded", *_ENCODE),
    "calibrate": ("calibrate", "vae", "images", "--device", "cpu", "--json"),
    "convert-ldm": ("convert", "vae", "converted/ldm.safetensors", "--to", "ldm", "--json"),
    "convert-folded": (
        "convert", "vae", "converted/folded.safetensors", "--to", "ldm", "--fold-scale", "0.5", "--json",
    ),
    "convert-back": ("convert", "converted/ldm.safetensors", "converted/back", "--dtype", "float16", "--json"),
    "convert-copy": ("convert", "vae", "converted/calibrated", "--to", "diffusers", "--json"),
    "calibrate-write": (
        "calibrate", "converted/calibrated", "images", "--write", "--per-channel", "--device", "cpu", "--json",
    ),
    "fix-fp16": ("fix-fp16", "vae", "converted/fp16", "images", "--force", "--size", "32", "--probe-size", "32",
                 "--device", "cpu", "--json"),
    "check": ("check", "vae", "images", "--out", "check", "--size", "32", "--probe-size", "32", "--device", "cpu",
              "--json"),
    "evaluate": (
        "evaluate", "images", "--vae", "vae", "--reference", "converted/fp16", "--out", "evaluation", "--device", "cpu",
        "--metrics", "psnr,ssim,ciede2000,sharpness", "--stress", "cycles,sampling", "--stress-images", "2",
        "--gallery", "2", "--json",
    ),
    "train": ("train", "train.yaml", "--json"),
    "inspect-vae": ("inspect", "vae", "--json"),
    "inspect-latent": ("inspect", "caches/safetensors/sub/b.png.safetensors", "--json"),
    "inspect-cache": ("inspect", "caches/webdataset", "--json"),
}  # fmt: skip

_TRAIN = """\
run_dir: run
data: {path: train-images, num_val_images: 1, crop_px: 16, num_workers: 0}
model: {block_out_channels: [4, 4, 4, 8], norm_num_groups: 2, layers_per_block: 1, mid_block_add_attention: false}
loss: {rec: l1}
training: {steps: 4, batch_size: 1, warmup_steps: 1, log_every: 1, checkpoint_every: 2, num_checkpoints: 2,
           val_every: 0, num_calibration_images: 2, cpu: true}
"""


def make_inputs(folder: Path) -> None:
    """Pictures, a VAE and a training config."""
    from sdvae import AutoencoderKL, save_autoencoder

    rng = np.random.default_rng(0)
    for name, width, height, channels in (("a.png", 24, 16, 3), ("sub/b.png", 33, 40, 3), ("sub/c.png", 40, 24, 4)):
        levels = rng.integers(0, 256, (3, 4, channels), dtype=np.uint8)
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    (folder / "train-images").mkdir()
    for index in range(3):
        levels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((24, 16), Image.Resampling.BICUBIC).save(folder / f"train-images/{index}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.1,
    )
    save_autoencoder(vae, folder / "vae")
    (folder / "train.yaml").write_text(_TRAIN, encoding="utf-8")


def run(name: str, folder: Path) -> str:
    """Do a step of `STEPS` in a folder. Returns: what the command printed."""
    from click.testing import CliRunner

    from sdvae.cli.main import cli

    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(cli, list(STEPS[name]))
    finally:
        os.chdir(before)
    assert result.exit_code == 0, (name, result.output, result.exception)
    return result.stdout


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    make_inputs(folder)
    (folder / "json").mkdir()
    for name in STEPS:
        text = run(name, folder)
        (folder / "json" / f"{name}.json").write_text(json.dumps(json.loads(text), indent=1) + "\n", encoding="utf-8")
