#!/usr/bin/env python3
"""How much memory do large images take, and how much time does less memory cost?

    python tools/bench/memory.py --json memory.json --sizes 1024 2048 --limits 2.5GB 4.5GB
    python tools/bench/memory.py --json memory.json --sizes 4096 --limits 12GB --rounds 1      # half an hour
    python tools/bench/memory.py --json memory.json --table                                    # what is in the file

Subjects, each in a process of its own in every round, with the same seeded random weights of the SD VAE and one image:
- diffusers: its AutoencoderKL, eager, in one pass
- diffusers-tiled: the same after `enable_tiling`, which is approximate, with its tiles of 512 px
- sdvae: `sdvae.optimize`, without a limit
- sdvae LIMIT: the same after `enable_tiling("exact", max_memory_bytes=LIMIT)`, for each of the limits

`peak` is the largest resident size of the whole process, with Python, torch and the weights. What would take more than
the machine has, or `--machine`, fails to get it, and its error stands in the table. `difference` is the largest one of
any value to the first subject that came to its end, as a share of that one's range (largest less smallest value).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from common import (
    CONFIGS,
    OPERATIONS,
    RATIO,
    ChildFailed,
    be_killed_first,
    build_vae,
    by_turns,
    call_child,
    cpu_name,
    limit_memory,
    make_input,
    num_cores,
    peak_bytes,
    reset_peak,
    run_vae,
    says_out_of_memory,
    timed,
    versions,
    with_range,
    write_json,
)
from sdvae._torchvision import ensure_torchvision_importable
from sdvae.codec.options import parse_bytes
from sdvae.model.optimize import optimize

STOCK = ("diffusers", "diffusers-tiled")


def measure_here(name: str, config: str, operation: str, size: int, machine: int, output: Path) -> dict[str, Any]:
    """Run one subject in this process, once. Writes the result to `output`."""
    ensure_torchvision_importable()
    from diffusers import AutoencoderKL as StockAutoencoderKL

    be_killed_first()
    limit_memory(machine)
    vae = build_vae(StockAutoencoderKL, config)
    if name == "diffusers-tiled":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 512 // RATIO
    if name not in STOCK:
        vae = optimize(vae)
        if limit := name.removeprefix("sdvae").strip():
            vae.enable_tiling("exact", max_memory_bytes=parse_bytes(limit))
    x = make_input(operation, size, 1)
    reset_peak()
    with torch.inference_mode():
        seconds, result = timed(lambda: run_vae(vae, operation, x))
    found = {"seconds": seconds, "peak_bytes": peak_bytes()}
    torch.save(result, output)
    return found


def measure(arguments: argparse.Namespace) -> None:
    names = [*arguments.subjects, *(f"sdvae {limit}" for limit in arguments.limits)]
    machine = {"cpu": cpu_name(), "cores": num_cores(), "threads": torch.get_num_threads()}
    result = {"benchmark": "memory", "cells": []}
    if arguments.json.exists():
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    for size in arguments.sizes:
        for operation in arguments.operations:
            key = {"config": arguments.config, "operation": operation, "size_px": size, "memory": arguments.machine}
            key |= {"machine": machine | {"versions": versions("torch", "diffusers", "sdvae")}}
            others = [cell for cell in result["cells"] if not key.items() <= cell.items()]
            for subjects in measure_cell(arguments, names, operation, size):
                result["cells"] = [*others, key | {"subjects": subjects}]
                write_json(arguments.json, result)


def measure_cell(
    arguments: argparse.Namespace, names: Sequence[str], operation: str, size: int
) -> Iterator[dict[str, Any]]:
    """Yields: what was found for each subject, after every run."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": []} for name in names}
    with tempfile.TemporaryDirectory(prefix="sdvae-bench-") as folder:
        expected, reference = None, ""  # values of the first subject that came to its end, and its name
        for number in range(1, arguments.rounds + 1):
            for name in by_turns(number, names):
                if "error" in found[name]:
                    continue
                output = Path(folder) / "output.pt"
                words = ["--here", name, "--config", arguments.config, "--operations", operation]
                words += ["--sizes", str(size), "--machine", str(arguments.machine), "--output", str(output)]
                try:
                    one = call_child([__file__, *words, "--threads", str(arguments.threads)])
                except ChildFailed as error:
                    found[name]["error"] = "out of memory" if says_out_of_memory(error) else str(error)
                else:
                    for key, value in one.items():
                        found[name][key].append(value)
                    values = torch.load(output)
                    if expected is None:
                        expected, reference = values, name
                    if name != reference:
                        span = float(expected.max() - expected.min())
                        found[name]["difference"] = float((values - expected).abs().max()) / span
                print(f"{operation} {size} px, {name}: {found[name]}", file=sys.stderr)
                yield found


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        "| | | peak, GB | seconds | against diffusers | largest difference |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        stock = cell["subjects"].get("diffusers", {}).get("seconds")
        for name, found in cell["subjects"].items():
            head = f"| {cell['operation']} {cell['size_px']} px | {name} | "
            if not found["seconds"]:
                lines.append(f"{head}{found['error']} (of {cell['memory'] / 1e9:.0f} GB) | | | |")
                continue
            peak, seconds = max(found["peak_bytes"]) / 1e9, found["seconds"]
            ratio = f"{median(stock) / median(seconds):.2f}" if stock else ""
            difference = f"{found['difference']:.0e}" if "difference" in found else ""
            lines.append(f"{head}{peak:.2f} | {with_range(seconds, '.0f')} | {ratio} | {difference} |")
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes; other cells stay there")
    parser.add_argument("--table", action="store_true", help="only show what FILE has, as Markdown")
    parser.add_argument("--config", choices=CONFIGS, default="sd1", help="architecture (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="px (default: %(default)s)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="(default: both)")
    parser.add_argument("--subjects", nargs="*", choices=(*STOCK, "sdvae"), default=["diffusers", "sdvae"])
    parser.add_argument("--limits", nargs="*", default=["4GB"], metavar="SIZE", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--machine", type=int, default=psutil.virtual_memory().total, help="bytes that it has")
    # how the script calls itself
    parser.add_argument("--here", metavar="SUBJECT", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.json is None and arguments.here is None:
        parser.error("--json FILE is needed: the result goes there")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    if arguments.here:
        (size,), (operation,) = arguments.sizes, arguments.operations
        found = measure_here(arguments.here, arguments.config, operation, size, arguments.machine, arguments.output)
        print(json.dumps(found))
        return
    if not arguments.table:
        measure(arguments)
    print(as_markdown(json.loads(arguments.json.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
