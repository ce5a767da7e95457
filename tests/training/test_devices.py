"""A run on two processes (gloo, CPU) against one process with the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdvae.config import dump_config
from sdvae.training.config import LossConfig
from sdvae.training.loop import train


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_with_the_joined_batch(make_config, tmp_path: Path) -> None:
    """Without draws of z, which differ per process. A gradient that is not averaged gives other weights at once."""
    loss = LossConfig(rec="l2", sample_posterior=False)
    # a large epsilon-free first step of Adam would amplify rounding: several steps at a small rate, compared loosely
    one = replace(make_config("one", batch_size=4, ema_decay=0.0), loss=loss)
    two = replace(make_config("two", batch_size=2, ema_decay=0.0), loss=loss)
    config = tmp_path / "two.yaml"
    config.write_text(dump_config(two), encoding="utf-8")

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sdvae"]
    done = subprocess.run(
        [*command, "train", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on the held-out images") == 1, "only the main process reports"

    expected = load_file(train(one).vae_dir / "diffusion_pytorch_model.safetensors")
    found = load_file(Path(two.run_dir) / "vae" / "diffusion_pytorch_model.safetensors")
    start = load_file(
        train(replace(one, training=replace(one.training, steps=1, lr=1e-12)), overwrite=True).vae_dir
        / "diffusion_pytorch_model.safetensors"
    )
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert apart < 0.02 * moved
