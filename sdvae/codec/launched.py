"""A run that a launcher started as several processes: each takes a part of it, and the main one reports for all."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from sdvae.codec.options import EncodeOptions, RunOptions
from sdvae.errors import ConfigError
from sdvae.latents.parts import Part
from sdvae.processes import Processes, count_processes, join_processes

__all__ = ["join_launched"]

Options = TypeVar("Options", bound=RunOptions)


def join_launched(options: Options) -> tuple[Processes, Options]:
    """Meet the other processes that the same launcher started, each with its part and its CUDA device.

    Returns: this process among them, and the options for it.
    Raises: ConfigError if the options divide the work already, or the launcher does not say where to meet.
    """
    count = count_processes()
    if count > 1 and options.shard is not None:
        raise ConfigError(
            f"shard is '{options.shard}', but a launcher started {count} processes (WORLD_SIZE), which divide the "
            "images among themselves: leave out --shard, or start one process"
        )
    if count > 1 and isinstance(options, EncodeOptions) and options.engine != "local":
        raise ConfigError(f"engine is {options.engine}, which starts its workers itself: run it without a launcher")
    processes = join_processes(options.device)
    if count > 1:
        options = replace(options, shard=str(Part(processes.rank + 1, count)))
    return processes, options
