"""Runs that are stopped, politely or not, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, fork_sdvae
from safetensors.torch import load_file

from sdvae.config import dump_config
from sdvae.errors import TrainingInterrupted
from sdvae.training import loop
from sdvae.training.config import TrainConfig
from sdvae.training.interruption import stop_on_signals
from sdvae.training.loop import train


def start(config: TrainConfig, folder: Path, *options: str, seconds_per_file: float = 0.0) -> Forked:
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return fork_sdvae("train", path, *options, folder=folder, seconds_per_file=seconds_per_file)


def wait_for(condition: Callable[[], Any], process: Forked, pause_s: float = 0.05) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, process.stderr_path.read_text()
        time.sleep(pause_s)
    raise AssertionError("it never happened")


def weights(run_dir: str, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / f"checkpoints/step-{step:08d}/{name}.safetensors")


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written_loses_nothing_that_was_whole(
    make_config: Any, adversarial: Any, tmp_path: Path
) -> None:
    changes = {"steps": 12, "checkpoint_every": 1, "num_checkpoints": 3, "loss": {"adversarial": adversarial()}}
    whole, killed = make_config("whole", **changes), make_config("killed", **changes)
    checkpoints = Path(killed.run_dir) / "checkpoints"
    process = start(killed, tmp_path, seconds_per_file=0.2)
    # a folder that is being written, once there are whole ones
    wait_for(
        lambda: len(list(checkpoints.glob("step-????????"))) > 2 and any(checkpoints.glob("*.partial/*")), process, 0
    )
    process.kill()
    process.communicate()
    left = [path.name for path in checkpoints.iterdir()]
    assert any(name.endswith(".partial") for name in left), f"killed too late to prove anything: {left}"

    resumed = start(killed, tmp_path, "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert not list(checkpoints.glob("*.partial"))
    undisturbed = start(whole, tmp_path)  # not in this process, whose number of threads may be another
    _, errors = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, errors
    for name in ("model", "model_1"):
        expected, found = weights(whole.run_dir, 12, name), weights(killed.run_dir, 12, name)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_first(make_config: Any, tmp_path: Path, number: signal.Signals) -> None:
    config = make_config(steps=100_000, checkpoint_every=0, log_every=1)
    process = start(config, tmp_path)
    metrics = Path(config.run_dir) / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    logged = json.loads(metrics.read_text().splitlines()[-1])["step"]
    (checkpoint,) = (Path(config.run_dir) / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{logged:08d}"
    assert f"{number.name} after step {logged}" in errors and "--resume goes on" in errors


def test_an_interrupted_run_resumes_bit_for_bit(make_config: Any, adversarial: Any, monkeypatch: Any) -> None:
    changes = {"steps": 7, "checkpoint_every": 0, "loss": {"adversarial": adversarial(disc_start=2)}}
    whole, stopped = make_config("whole", **changes), make_config("stopped", **changes)
    train(whole)
    original, calls = loop.lr_at, []

    def signalled(*args: Any, **kwargs: Any) -> float:
        calls.append(args)
        if len(calls) == 4:  # in step 3, which has two learning rates
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "lr_at", signalled)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3 of 7"):
        train(stopped)
    monkeypatch.setattr(loop, "lr_at", original)
    train(stopped, resume=True)
    for name in ("model", "model_1"):
        expected, found = weights(whole.run_dir, 7, name), weights(stopped.run_dir, 7, name)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_the_second_signal_acts_at_once_and_handlers_are_put_back() -> None:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us ignoring it
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.signal == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
