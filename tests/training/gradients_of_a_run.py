"""Runs a training config and writes down gradients and weights at each update, one file per process and step.

Started by tests on one process or, by torchrun, on several: gradients_of_a_run.py CONFIG FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdvae.training import loop

apply_updates = loop.apply_updates


def record(folder: Path) -> None:
    rank, step = os.environ.get("RANK", "0"), 0

    def recorded(updates: Iterable[Any], *args: Any) -> list[float]:
        nonlocal step
        gradients = [[p.grad.clone() for p in parameters if p.grad is not None] for _, parameters in updates]
        weights = [[p.detach().clone() for p in parameters] for _, parameters in updates]
        torch.save({"gradients": gradients, "weights": weights}, folder / f"step-{step}-rank-{rank}.pt")
        step += 1
        return apply_updates(updates, *args)

    loop.apply_updates = recorded


if __name__ == "__main__":
    config_path, out_dir = sys.argv[1:]
    record(Path(out_dir))
    loop.train(config_path)
