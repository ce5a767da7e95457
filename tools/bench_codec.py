#!/usr/bin/env python3
"""Is encoding and decoding with sdvae slower than with diffusers, and does it take more memory? On this machine's CPU.

    python tools/bench_codec.py                            # SD 1.x at 512 px: some minutes
    python tools/bench_codec.py --size 64 --config mini    # does it run at all: seconds

Compares, with the same random weights in float32 and on the same random images,
- ours: `sdvae encode` and `sdvae decode` between reading and writing, that is sdvae's AutoencoderKL after
  `sdvae.optimize`, or with --plain without it, in channels_last under inference_mode, the batch stacked and laid out
  inside the time that is taken;
- diffusers: the loop that one writes first, diffusers' AutoencoderKL in the default layout, or with --channels-last in that
  one, under no_grad.

How to read the table: seconds are per batch, the median of all repeats with the fastest and the slowest behind it. Both
run in one process by turns, and each goes first in every other repeat, so that a machine that warms up or is shared
slows both. `ratio` is diffusers' median by ours: above 1, ours is faster. Where the two ranges overlap, no ratio near 1
means anything. Memory is the largest resident size of a fresh process that does one thing once, with Python, torch and
weights (SD 1.x: 335 MB) in it; there a ratio above 1 says that ours needs less. `difference` is the largest one between
the two results, as a part of the largest value.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.optimize import optimize
from sdvae.model.autoencoder import AutoencoderKL

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "mini": {"block_out_channels": (16, 32, 96, 128), "layers_per_block": 1, "norm_num_groups": 8},
}
OPERATIONS = ("encode", "decode")
SIDES = ("ours", "diffusers")


def build(side: str, config: str, plain: bool = False, channels_last: bool = False) -> Any:
    """An autoencoder with seeded weights that keep the scale of what passes through, the same on both sides."""
    from diffusers import AutoencoderKL as StockAutoencoderKL

    fields = CONFIGS[config]
    levels = len(fields["block_out_channels"])
    with torch.device("meta"):
        vae = (AutoencoderKL if side == "ours" else StockAutoencoderKL)(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **fields
        )
    vae.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(vae.state_dict().items()):
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    vae.eval()
    if side == "ours" and not plain:
        optimize(vae)
    return vae.to(memory_format=torch.channels_last) if side == "ours" or channels_last else vae


def make_inputs(operation: str, size: int, batch: int) -> list[Tensor]:
    """Images in [-1, 1] or z, one tensor each, as they come from a file."""
    generator = torch.Generator().manual_seed(1)
    if operation == "encode":
        return list(torch.rand(batch, 3, size, size, generator=generator) * 2 - 1)
    return list(torch.randn(batch, 4, size // 8, size // 8, generator=generator))


def run(side: str, vae: Any, operation: str, inputs: list[Tensor]) -> Tensor:
    """One batch. Returns: moments or recon."""
    x = torch.stack(inputs)
    with torch.inference_mode() if side == "ours" else torch.no_grad():
        if side == "ours":
            x = x.to(memory_format=torch.channels_last)
        output = vae.encode(x).latent_dist.parameters if operation == "encode" else vae.decode(x).sample
    return output  # type: ignore[no-any-return]


def compare_speed(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of each operation on each side, by turns; the first repeat warms up and is not counted."""
    vaes = {side: build(side, arguments.config, arguments.plain, arguments.channels_last) for side in SIDES}
    size, batch, repeats = arguments.size, arguments.batch, arguments.repeats
    result: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        inputs = make_inputs(operation, size, batch)
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        outputs: dict[str, Tensor] = {}
        for repeat in range(repeats + 1):
            for side in SIDES if repeat % 2 else reversed(SIDES):
                start = time.perf_counter()
                outputs[side] = run(side, vaes[side], operation, inputs)
                if repeat:
                    times[side].append(time.perf_counter() - start)
        difference = (outputs["ours"] - outputs["diffusers"]).abs().max() / outputs["diffusers"].abs().max()
        result[operation] = {
            "seconds": times,
            "ratio": median(times["diffusers"]) / median(times["ours"]),
            "difference": float(difference),
        }
    return result


def compare_peaks() -> dict[str, dict[str, int]]:
    """Bytes of each operation on each side, measured by this script with the same arguments in processes of their own.

    To be called while this process is small: on Linux, the largest size of a child begins with that of its parent.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-peak"]

    def measure(operation: str, side: str) -> int:
        child = subprocess.run([*command, operation, side], check=True, stdout=subprocess.PIPE, text=True)
        return int(child.stdout)

    return {operation: {side: measure(operation, side) for side in SIDES} for operation in OPERATIONS}


def measure_peak(operation: str, side: str, arguments: argparse.Namespace) -> int:
    """Largest resident size of this process, bytes, after it built a model and ran one batch."""
    import resource  # not on Windows

    vae = build(side, arguments.config, arguments.plain, arguments.channels_last)
    run(side, vae, operation, make_inputs(operation, arguments.size, arguments.batch))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def as_table(report: dict[str, Any]) -> str:
    lines = [
        "{config}, {size_px} px, batch {batch}, {threads} threads, {repeats} repeats, torch {torch}, "
        "diffusers {diffusers}, {cpu}".format(**report["setting"]),
        "",
        f"{'':18}{'ours':>26}{'diffusers':>26}{'ratio':>9}{'difference':>13}",
    ]
    for operation in OPERATIONS:
        speed = report["speed"][operation]
        cells = [f"{median(t):.3f} ({min(t):.3f} .. {max(t):.3f})" for t in (speed["seconds"][s] for s in SIDES)]
        lines.append(
            f"{operation + ', s':18}{cells[0]:>26}{cells[1]:>26}{speed['ratio']:>9.2f}{speed['difference']:>13.1e}"
        )
    for operation in OPERATIONS if report["peak_bytes"] else ():
        peak = report["peak_bytes"][operation]
        cells = [f"{peak[side] / 1e6:.0f}" for side in SIDES]
        ratio = peak["diffusers"] / peak["ours"]
        lines.append(f"{operation + ' peak, MB':18}{cells[0]:>26}{cells[1]:>26}{ratio:>9.2f}")
    return "\n".join(lines)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="sd1", help="architecture (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of the square images, px (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="ours: the plain network, without the fast path")
    parser.add_argument("--channels-last", action="store_true", help="diffusers: laid out in channels_last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--measure-peak", nargs=2, metavar=("OPERATION", "SIDE"), help=argparse.SUPPRESS
    )  # how the script calls itself
    arguments = parser.parse_args(words)
    if arguments.size < 16 or arguments.size % 8:
        parser.error("--size must be a multiple of 8, at least 16")
    if min(arguments.batch, arguments.repeats, arguments.threads) < 1:
        parser.error("--batch, --repeats and --threads must be at least 1")
    return arguments


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    from diffusers import __version__ as diffusers_version

    return {
        "config": arguments.config,
        "size_px": arguments.size,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "plain": arguments.plain,
        "channels_last": arguments.channels_last,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "cpu": cpu_name(),
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_peak:
        operation, side = arguments.measure_peak
        print(measure_peak(operation, side, arguments))
        return
    peaks = None if sys.platform == "win32" else compare_peaks()
    speed = compare_speed(arguments)
    report = {"setting": setting(arguments), "speed": speed, "peak_bytes": peaks}
    print(as_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
