"""Everything that resuming a run needs, and the folders it is kept in.

A checkpoint `step-00000500/` is what accelerate saves: weights and optimizers of generator and discriminator, random
states of every process, and the objects that it was told of (averaged weights, counters, ...); and config.json with the
autoencoder's architecture. It is written under another name and then renamed, so a folder of that name is always
whole. The best one by a validation metric is named in `best.json` and outlives the rotation.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sdvae.errors import CheckpointError
from sdvae.files import put_in_place, write_atomic
from sdvae.model.autoencoder import AutoencoderKL

__all__ = ["Progress", "checkpoint_dirs", "load_checkpoint", "save_checkpoint"]


class Progress:
    """Where a run is: optimizer updates done, positions in the data, and the best validation so far."""

    def __init__(self) -> None:
        self.step = 0
        self.data: list[dict[str, Any]] = []  # state of the training data, one per process
        self.best_step: int | None = None
        self.best_metric = ""
        self.best_value = math.nan

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def checkpoint_dirs(checkpoints_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in checkpoints_dir.glob("step-*") if path.is_dir() and path.suffix != ".partial")


def save_checkpoint(
    accelerator: Accelerator, checkpoints_dir: Path, progress: Progress, vae: AutoencoderKL, num_kept: int
) -> Path:
    """Save the state of everything the accelerator prepared or was told of; keep the newest `num_kept` and the best.

    Called by every process. Returns: the checkpoint's folder.
    """
    target = _dir_of(checkpoints_dir, progress.step)
    partial = target.with_suffix(".partial")
    if accelerator.is_main_process:
        for left in checkpoints_dir.glob("*.partial"):  # of a save that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        vae.save_config(partial)
        put_in_place(partial, target)
        shutil.rmtree(partial, ignore_errors=True)  # what was there before
        kept = set(checkpoint_dirs(checkpoints_dir)[-num_kept:])
        if progress.best_step is not None:
            kept.add(_dir_of(checkpoints_dir, progress.best_step))
            _write_best(checkpoints_dir, progress)
        for old in checkpoint_dirs(checkpoints_dir):
            if old not in kept:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint_dir: Path) -> None:
    """Put back what `save_checkpoint` saved. Raises: CheckpointError, naming the folder."""
    try:
        accelerator.load_state(str(checkpoint_dir))
    except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} does not fit this run: {error}. Resume with the run's own config.yaml, "
            "or start afresh in another run_dir."
        ) from error


def _dir_of(checkpoints_dir: Path, step: int) -> Path:
    return checkpoints_dir / f"step-{step:08d}"


def _write_best(checkpoints_dir: Path, progress: Progress) -> None:
    best = {"step": progress.best_step, "metric": progress.best_metric, "value": progress.best_value}
    write_atomic(f"{json.dumps(best)}\n".encode(), checkpoints_dir / "best.json")
