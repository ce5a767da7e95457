"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EMA", "ema_decay_at"]


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the update after optimizer update `step` (the first is 0): short memory first, `decay` in the long run.

    Source: tf.train.ExponentialMovingAverage, min(decay, (1 + step) / (10 + step)).
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Float32 averages of trainable tensors, in their order; one `update` per optimizer update."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.averages = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Move every average towards its parameter: average = d * average + (1 - d) * parameter."""
        weight = 1.0 - ema_decay_at(self.num_updates, self.decay)
        torch._foreach_lerp_(self.averages, [parameter.detach().float() for parameter in parameters], weight)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Write the averages into `parameters`."""
        for average, parameter in zip(self.averages, parameters, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
