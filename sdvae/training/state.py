"""Everything that resuming a run needs, and the folders it is kept in.

A checkpoint `step-00000500/` is what accelerate saves: weights, optimizer, random states of every process, and the EMA
and the counters that it was told of. It is written under another name and then renamed, so a folder of that name is
always whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sdvae.errors import CheckpointError

__all__ = ["Progress", "checkpoint_dirs", "load_checkpoint", "save_checkpoint"]


class Progress:
    """Counters of a run: optimizer updates done, and training samples used by all devices together."""

    def __init__(self) -> None:
        self.step = 0
        self.num_samples = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.num_samples = state["step"], state["num_samples"]


def checkpoint_dirs(checkpoints_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in checkpoints_dir.glob("step-*") if path.is_dir() and path.suffix != ".partial")


def save_checkpoint(accelerator: Accelerator, checkpoints_dir: Path, step: int, num_kept: int) -> Path:
    """Save the state of everything the accelerator prepared or was told of, then drop all but the newest `num_kept`.

    Called by every process. Returns: the checkpoint's folder.
    """
    target = checkpoints_dir / f"step-{step:08d}"
    partial = target.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        for old in checkpoint_dirs(checkpoints_dir)[:-num_kept]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint_dir: Path) -> None:
    """Put back what `save_checkpoint` saved. Raises: CheckpointError, naming the folder."""
    try:
        accelerator.load_state(str(checkpoint_dir))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} does not fit this run: {error}. Resume with the run's own config.yaml, "
            "or start afresh in another run_dir."
        ) from error
