"""A run that a launcher (accelerate launch, torchrun) started as several processes: each takes a part of it.

Processes share no more than the output folder while they work. At the end the main one collects what the others have
to report; for this alone they form a group, over the CPU and with patience, since one part may take hours longer than
another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from sdvae.codec.options import EncodeOptions, RunOptions
from sdvae.errors import ConfigError, SdvaeError
from sdvae.latents.parts import Part

__all__ = ["Launched", "join_launched"]

Options = TypeVar("Options", bound=RunOptions)
Result = TypeVar("Result")

_PATIENCE = timedelta(days=30)  # of the main process, for the slowest part


@dataclass(frozen=True)
class Launched:
    """This process among those of a run."""

    rank: int
    count: int
    group: Any  # torch.distributed's; None for a process alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, result: Result) -> list[Result]:
        """Wait for the results of all processes.

        Returns: those of all, in their order, to the main process, and nothing to the others.
        Raises: SdvaeError where another process ended without its result.
        """
        if self.count == 1:
            return [result]
        import torch.distributed

        results: list[Any] | None = [None] * self.count if self.is_main else None
        try:
            torch.distributed.gather_object(result, results, dst=0, group=self.group)
            torch.distributed.barrier(group=self.group)  # a launcher ends all as soon as one ends with an error
            torch.distributed.destroy_process_group()
        except RuntimeError as error:
            raise SdvaeError(
                f"another of the {self.count} processes ended early; what is written is whole, and the same command "
                f"continues ({error})"
            ) from error
        return results or []


def join_launched(options: Options) -> tuple[Launched, Options]:
    """Meet the other processes that the same launcher started, each with its part and its CUDA device.

    Returns: this process, and the options for it.
    Raises: ConfigError where the options divide the work already, or the launcher does not say where to meet.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count == 1:
        return Launched(0, 1, None), options
    if options.shard is not None:
        raise ConfigError(
            f"shard is '{options.shard}', but a launcher started {count} processes (WORLD_SIZE), which divide the "
            "images among themselves: leave out --shard, or start one process"
        )
    if isinstance(options, EncodeOptions) and options.engine != "local":
        raise ConfigError(f"engine is {options.engine}, which starts its workers itself: run it without a launcher")
    import torch.distributed

    if options.device in ("auto", "cuda") and torch.cuda.is_available():  # a launcher may show each process its own one
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        torch.distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"WORLD_SIZE is {count}, but the processes do not find each other: {error}") from error
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return Launched(rank, count, group), replace(options, shard=str(Part(rank + 1, count)))
