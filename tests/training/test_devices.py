"""A run on two processes (gloo, CPU) against one process with the joined batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork, fork_launched, run_sdvae
from gradients_of_a_run import run_and_record
from safetensors.torch import load_file

import sdvae
from sdvae.config import dump_config
from sdvae.training.config import EquivarianceConfig, LogvarConfig, TrainConfig

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(sdvae.__file__).parents[1])}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def updates_of(config: TrainConfig, folder: Path, processes: int) -> list[list[dict[str, list[list[torch.Tensor]]]]]:
    """Per step and process: gradients and weights that the generator's and the discriminator's optimizer were given."""
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    if processes == 1:
        started = [fork(run_and_record, str(path), folder, folder=folder)]
    else:
        started = fork_launched(run_and_record, str(path), folder, count=processes, folder=folder)
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [
        [torch.load(folder / f"step-{step}-rank-{rank}.pt") for rank in range(processes)]
        for step in range(config.training.steps)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(
    make_config: Any, tmp_path: Path, perceptual: Any, adversarial: Any, norm: str
) -> None:
    """Of generator and discriminator, with every loss at work; without draws of z, which differ per process.

    Fails where a pass goes around the wrapped module, where gradients are exchanged with any but the last of the
    accumulated passes, where the balance or batch statistics are a process's own, or where the processes see
    overlapping samples.
    """
    loss = {
        "sample_posterior": False,
        "perceptual": perceptual,
        "adversarial": adversarial(norm=norm, lecam_weight=0.1, r1_weight=0.1, max_adaptive_weight=1e9),
        "logvar": LogvarConfig(learned=True),
        "equivariance": EquivarianceConfig(probability=0.7, min_scale=1.0),
    }
    # at a rate that moves nothing: where a gradient is zero but for rounding, Adam would make whole steps of it
    one = make_config("one", batch_size=4, accumulation=2, steps=3, lr=1e-9, loss=loss)
    two = make_config("two", batch_size=2, accumulation=2, steps=3, lr=1e-9, loss=loss)
    alone = updates_of(one, tmp_path / "alone", 1)
    together = updates_of(two, tmp_path / "together", 2)
    assert [len(step[0]["gradients"]) for step in alone] == [1, 2, 2]  # the discriminator sets in with the second step
    for (expected,), (first, second) in zip(alone, together, strict=True):
        for optimizer in range(len(expected["gradients"])):
            total = torch.cat([grad.flatten() for grad in expected["gradients"][optimizer]])
            for process in (first, second):
                found = torch.cat([grad.flatten() for grad in process["gradients"][optimizer]])
                assert float((found - total).norm()) < 1e-4 * float(total.norm())
            for kind in ("gradients", "weights"):
                pairs = zip(first[kind][optimizer], second[kind][optimizer], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), kind

    rows = [
        [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        for config in (one, two)
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]], "each row is written once"
    for expected, found in zip(*rows, strict=True):  # of training and of validation, gathered from both
        for name in expected.keys() - {"train/images_per_s", "train/seconds_per_step"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.slow
def test_two_processes_through_the_command_line_stop_resume_and_report_once(
    make_config: Any, adversarial: Any, photos: Path, tmp_path: Path
) -> None:
    """From tar shards, where each process has a position of its own to go on from."""
    pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for image in sorted(photos.iterdir())[shard::2]:
                tar.add(image, arcname=image.name)
    data = {"source": "webdataset", "path": str(tmp_path / "shards"), "val_path": str(photos), "shuffle_buffer": 3}
    config = make_config("run", data=data, accumulation=2, loss={"adversarial": adversarial()}, checkpoint_every=2)
    path = tmp_path / "config.yaml"

    path.write_text(dump_config(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "sdvae", "train", str(path)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on the held-out images") == 1, "only the main process reports"
    run_dir = Path(config.run_dir)
    whole = load_file(run_dir / "checkpoints/step-00000006/model.safetensors")
    discriminator = load_file(run_dir / "checkpoints/step-00000006/model_1.safetensors")
    states = [
        torch.load(run_dir / f"checkpoints/step-00000006/random_states_{rank}.pkl", weights_only=False)
        for rank in range(2)
    ]
    assert not torch.equal(*(state["torch_manual_seed"] for state in states)), "both draw the same z of their images"

    # as if it had been killed after step 4; draws of z of both processes must go on where they were
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    for process in fork_launched(run_sdvae, ["train", str(path), "--resume"], count=2, folder=tmp_path):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    again = load_file(run_dir / "checkpoints/step-00000006/model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    again = load_file(run_dir / "checkpoints/step-00000006/model_1.safetensors")
    assert [name for name in discriminator if not torch.equal(discriminator[name], again[name])] == []


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(make_config: Any, tmp_path: Path) -> None:
    config = make_config("run", steps=100_000, checkpoint_every=0, log_every=1)
    path, metrics = tmp_path / "config.yaml", Path(config.run_dir) / "metrics.jsonl"
    path.write_text(dump_config(config), encoding="utf-8")
    first, second = fork_launched(run_sdvae, ["train", str(path)], count=2, folder=tmp_path)
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert first.poll() is None and second.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        second.terminate()
        errors = first.communicate()[1] + second.communicate()[1]
    finally:
        first.kill()
        second.kill()
    logged = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped by SIGTERM after step {logged} of 100000" in errors
    assert f"stopped by a signal to another process after step {logged} of 100000" in errors
    (checkpoint,) = (Path(config.run_dir) / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{logged:08d}"
    assert (checkpoint / "random_states_1.pkl").exists()
