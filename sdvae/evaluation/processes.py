"""One process or several: which one this is, and waiting for the others. `accelerate launch -m sdvae evaluate ...`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sdvae.model.device import choose_device

__all__ = ["Processes", "join_processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def join_processes(device: str) -> Processes:
    """Meet the other processes that the same launcher started; alone where none did.

    device: a name for `choose_device`. On several CUDA devices, each process takes one.
    Raises: ConfigError where the device is not there.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, chosen)
    from accelerate import PartialState

    state = PartialState(cpu=chosen.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)
