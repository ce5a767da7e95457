"""Runs a training config and writes down gradients and weights at each update, one file per process and step."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdvae.training import loop

__all__ = ["run_and_record"]


def run_and_record(config_path: str, folder: Path) -> None:
    """Train, in a process of its own: the function that applies updates is replaced for good."""
    apply_updates = loop.apply_updates
    rank, step = os.environ.get("RANK", "0"), 0

    def recorded(updates: Iterable[Any], *args: Any) -> list[float]:
        nonlocal step
        gradients = [[p.grad.clone() for p in parameters if p.grad is not None] for _, parameters in updates]
        weights = [[p.detach().clone() for p in parameters] for _, parameters in updates]
        torch.save({"gradients": gradients, "weights": weights}, folder / f"step-{step}-rank-{rank}.pt")
        step += 1
        return apply_updates(updates, *args)

    loop.apply_updates = recorded
    loop.train(config_path)
