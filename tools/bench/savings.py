#!/usr/bin/env python3
"""What does each part of the fast path on CPUs give?

    python tools/bench/savings.py                           # SD 1.x at 512 px: some minutes
    python tools/bench/savings.py --config mini --sizes 512 1024

Steps, each with what those before it have, by turns in one process, in the other direction in every other round, with
the same seeded random weights and input:
- diffusers: its AutoencoderKL, eager
- channels_last: our AutoencoderKL as plain torch modules, in that layout
- strips: rows at a time, normalisation, activation and shortcut in the cache; convolutions are torch's
- upsampling: with its convolution in one, in tiles
- winograd: all 3x3 convolutions of stride 1 between wide layers in tiles, which is what `sdvae.optimize` gives

Medians in seconds with the range of all rounds, and how many times as fast as the step before and as the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from common import CONFIGS, OPERATIONS, build_vae, by_turns, make_input, run_vae, timed, with_range
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.strips import maps as rows
from sdvae.model.strips import passes as streaming

Run = Callable[[Tensor], Tensor]


@contextmanager
def in_tiles(*, convolutions: bool, upsampling: bool) -> Iterator[None]:
    """Strips, with these layers in tiles and the others as torch's convolutions."""
    build = streaming.build_kernel

    def chosen(conv: nn.Conv2d, resampling: rows.Resampling, *others: Any) -> rows.Kernel:
        if upsampling if resampling == "up" else convolutions:
            return build(conv, resampling, *others)
        with mock.patch.object(rows, "WINOGRAD_CHANNELS", 2**62):
            return build(conv, resampling, *others)

    with mock.patch.object(streaming, "build_kernel", chosen):
        yield


def steps(config: str, operation: str) -> dict[str, Run]:
    from diffusers import AutoencoderKL as StockAutoencoderKL

    stock, plain = build_vae(StockAutoencoderKL, config), build_vae(AutoencoderKL, config)
    plain.to(memory_format=torch.channels_last)
    fast = build_vae(AutoencoderKL, config).to(memory_format=torch.channels_last)
    fast.execution = replace(fast.execution, fast=True, fast_from=0)

    def strips(**choice: bool) -> Run:
        def run(x: Tensor) -> Tensor:
            with in_tiles(**choice):
                return run_vae(fast, operation, x)

        return run

    return {
        "diffusers": lambda x: run_vae(stock, operation, x),
        "channels_last": lambda x: run_vae(plain, operation, x.to(memory_format=torch.channels_last)),
        "strips": strips(convolutions=False, upsampling=False),
        "upsampling": strips(convolutions=False, upsampling=True),
        "winograd": strips(convolutions=True, upsampling=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="sd1", help="architecture (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="px (default: %(default)s)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="(default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| | px | step | seconds | of the step before | of the first |\n|---|---:|---|---:|---:|---:|")
    for operation in arguments.operations:
        runs = steps(arguments.config, operation)
        for size in arguments.sizes:
            x = make_input(operation, size, 1)
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            with torch.inference_mode():
                for number in range(arguments.rounds + 1):
                    for name in by_turns(number, list(runs)):
                        taken, _ = timed(partial(runs[name], x))
                        seconds[name] += [taken] if number else []  # the first round warms up
            before = first = median(seconds["diffusers"])
            for name, taken in seconds.items():
                now = median(taken)
                print(
                    f"| {operation} | {size} | {name} | {with_range(taken)} | {before / now:.2f} | {first / now:.2f} |",
                    flush=True,
                )
                before = now


if __name__ == "__main__":
    main()
