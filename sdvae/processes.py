"""Several processes of one run: which one this is, waiting for the others, and collecting what they report.

A launcher (accelerate launch, torchrun) starts the processes and says in the environment who is who. What they do, each
does alone; they only wait for and report to each other, over the CPU and with patience, because one may take hours
longer than another.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sdvae.errors import ConfigError, SdvaeError

__all__ = ["Processes", "count_processes", "is_main_process", "join_processes"]

Result = TypeVar("Result")

_PATIENCE = timedelta(days=30)  # for the slowest process; torch's own limit is half an hour


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    count: int = 1
    group: Any = None  # torch.distributed's; None for a process alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Within the context the main process goes first, so that the others find what it downloads or makes.

        Raises: SdvaeError if another process has ended.
        """
        if not self.is_main:
            self.gather(None)
        yield
        if self.is_main:
            self.gather(None)

    def gather(self, result: Result) -> list[Result]:
        """Wait for the results of all processes. Returns: all of them, in the order of the ranks, to every process.

        Raises: SdvaeError if another process ended without its result.
        """
        if self.count == 1:
            return [result]
        import torch.distributed

        results: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(results, result, group=self.group)
            torch.distributed.barrier(group=self.group)  # a launcher ends all as soon as one ends with an error
        except RuntimeError as error:
            raise SdvaeError(
                f"another of the {self.count} processes ended early. Finished files are complete; rerun the same "
                f"command to resume ({error})"
            ) from error
        return results


def count_processes() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process speaks for all, before they meet."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(device: str = "auto") -> Processes:
    """Meet the other processes that the same launcher started; alone if none did.

    device: auto, cuda, ...: with several CUDA devices, each process of a machine gets its own as the current one.
    Raises: ConfigError if the launcher does not say where to meet.
    """
    count, rank = count_processes(), int(os.environ.get("RANK", "0"))
    if count == 1:
        return Processes()
    import torch.distributed

    if device in ("auto", "cuda") and torch.cuda.is_available():  # a launcher may show each process its own one
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"WORLD_SIZE is {count}, but the processes do not find each other: {error}") from error
        atexit.register(_leave)
    return Processes(rank, count, torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
