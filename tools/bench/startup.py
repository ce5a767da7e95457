#!/usr/bin/env python3
"""What does each command cost before its real work? CPU seconds of whole processes, against `python -c "import torch"`.

    python tools/bench/startup.py                                   # all cells: some minutes
    python tools/bench/startup.py --cells encode decode --repeats 3
    python tools/bench/startup.py --json startup.json

Each command does a tiny real job with the bundled VAE: one image of 64 x 64 px (calibrate and evaluate: two), so that
nearly all of its time is the start of Python, imports and loading the VAE. One thread of torch, no GPU, no network.

How to read the table: `cpu_s` is user and system time of a fresh process and its children. Each run of a cell has a run
of `import torch` beside it, in the other order in every other round. `ratio` is the median of the ratios within these
pairs, with their range; that of `import torch` itself shows how much is noise. `imports` are those of PACKAGES that the
process imports; a run of its own, which also warms up the file cache, finds them with `-X importtime`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from common import ChildFailed, by_turns, cpu_name, num_cores, shorten, versions, with_range, write_json

PACKAGES = ("torch", "torch._dynamo", "diffusers", "transformers", "accelerate")
BASELINE = "import torch"
SIZE_PX = 64
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

# {out} is a new path in each run. PREPARED says how other places are made, once, if a cell needs them.
COMMANDS = {
    "sdvae --help": "--help",
    "reconstruct": "reconstruct {photo} {out}",
    "encode": "encode {photo} {out}",
    "decode": "decode {latents} {out}",
    "inspect": "inspect sdvae-mini",
    "check": "check sdvae-mini {photo} --size 64",
    "calibrate": "calibrate sdvae-mini {photos}",
    "verify": "verify {latents} --images {photo}",
    "convert to ldm": "convert sdvae-mini {out}.safetensors --to ldm",
    "convert to diffusers": "convert {ldm} {out} --to diffusers",
    "evaluate": "evaluate {photos} --out {out} --metrics psnr,ssim --stress none",
    "train": "train {config} --set run_dir={out}",
}
CELLS = (BASELINE, "sdvae.AutoencoderKL", *COMMANDS)
PREPARED = {"{latents}": "encode {photo} {latents}", "{ldm}": "convert sdvae-mini {ldm} --to ldm"}

CONFIG = """\
data: {{path: {photos}, num_val_images: 1, crop_px: 32, num_workers: 0}}
model: {{block_out_channels: [8, 16, 16], norm_num_groups: 2, layers_per_block: 1}}
training: {{steps: 1, batch_size: 1, num_calibration_images: 1, cpu: true, trackers: []}}
"""


class Jobs:
    """The words of each cell, and a folder with what they need."""

    def __init__(self, cells: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._num_outs = 0
        self._places = {
            "photos": folder / "photos",
            "photo": folder / "photos" / "0.png",
            "latents": folder / "latents",
            "ldm": folder / "ldm.safetensors",
            "config": folder / "config.yaml",
        }
        self._places["photos"].mkdir()
        random = np.random.default_rng(0)
        for number in range(2):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image = small.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
            image.save(self._places["photos"] / f"{number}.png")
        self._places["config"].write_text(CONFIG.format(**self._places), encoding="utf-8")
        for place, command in PREPARED.items():
            if any(place in COMMANDS.get(cell, "") for cell in cells):
                cpu_seconds(self._command(command))

    def words(self, cell: str) -> list[str]:
        if cell == BASELINE:
            return ["-c", "import torch"]
        if cell == "sdvae.AutoencoderKL":
            return ["-c", "import sdvae; sdvae.AutoencoderKL"]
        return self._command(COMMANDS[cell])

    def _command(self, command: str) -> list[str]:
        self._num_outs += 1
        out = self._folder / f"out-{self._num_outs}"
        return ["-m", "sdvae", *(word.format(**self._places, out=out) for word in command.split())]


def run_python(words: Sequence[str]) -> tuple[float, str]:
    """Returns: CPU seconds, user and system, and what the process wrote to stderr.

    Raises: ChildFailed if it ends with an error.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        environment = {**os.environ, **ENVIRONMENT}
        child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        text = stderr.read()
    if child.returncode:
        last = next(reversed(text.strip().splitlines()), "")
        raise ChildFailed(f"{' '.join(words)}: ended with {child.returncode}: {shorten(last)}")
    return usage.ru_utime + usage.ru_stime, text


def cpu_seconds(words: Sequence[str]) -> float:
    return run_python(words)[0]


def find_imports(words: Sequence[str]) -> list[str]:
    """Those of PACKAGES that the process imports."""
    _, text = run_python(["-X", "importtime", *words])
    modules = {line.rpartition("|")[2].strip() for line in text.splitlines() if line.startswith("import time:")}
    return [name for name in PACKAGES if name in modules]


def measure(cells: Sequence[str], repeats: int, folder: Path) -> dict[str, Any]:
    jobs = Jobs(cells, folder)
    result: dict[str, Any] = {cell: {"imports": find_imports(jobs.words(cell)), "pairs": []} for cell in cells}
    for number in range(repeats):
        for cell in by_turns(number, cells):
            in_turn = [cpu_seconds(jobs.words(name)) for name in by_turns(number, (BASELINE, cell))]
            torch_s, cell_s = in_turn if number % 2 else reversed(in_turn)
            result[cell]["pairs"].append([torch_s, cell_s])
            print(f"{cell}: {cell_s:.2f} s, torch {torch_s:.2f} s", file=sys.stderr)
    for values in result.values():
        values["cpu_s"] = median(cell_s for _, cell_s in values["pairs"])
        values["ratio"] = median(cell_s / torch_s for torch_s, cell_s in values["pairs"])
    return result


def as_table(report: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{report['repeats']} rounds, 1 torch thread, {report['cores']} cores, {report['cpu']}; {names}",
        "",
        f"{'':24}{'cpu_s':>24}{'ratio':>24}  imports",
    ]
    for cell, values in report["cells"].items():
        seconds = with_range([cell_s for _, cell_s in values["pairs"]])
        ratio = with_range([cell_s / torch_s for torch_s, cell_s in values["pairs"]])
        lines.append(f"{cell:24}{seconds:>24}{ratio:>24}  {', '.join(values['imports']) or '-'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("numbers must be at least 1")
    with tempfile.TemporaryDirectory(prefix="sdvae-startup-") as folder:
        cells = measure(arguments.cells, arguments.repeats, Path(folder))
    report = {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "repeats": arguments.repeats,
        "versions": versions("torch", "diffusers", "transformers", "accelerate"),
        "cells": cells,
    }
    print(as_table(report))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
