#!/usr/bin/env python3
"""How fast are encoding and decoding, against diffusers, and in how much memory?

    python tools/bench/network.py --json result.json                                  # SD 1.x on the CPU: hours
    python tools/bench/network.py --json result.json --resume --budget-minutes 60     # an hour of what is missing
    python tools/bench/network.py --json result.json --device cuda --dtype bfloat16   # into the same file
    python tools/bench/network.py --json try.json --config tiny --sizes 64 --batches 1 --subjects diffusers sdvae
    python tools/bench/show.py result.json --table --plot speed.svg                   # what came out

Subjects, all with the same seeded random weights (times do not depend on them) and the same input:
- diffusers: its AutoencoderKL as pipelines run it, eager, in the default layout; the one that all are compared with
- diffusers-channels-last: the same, with weights and input in that layout
- diffusers-compile: its encode or decode through torch.compile, for exactly this shape
- sdvae-plain: our AutoencoderKL in channels_last under inference_mode
- sdvae: `sdvae.optimize` of diffusers' VAE, under inference_mode
- onnxruntime, openvino: our ONNX export, on CPUs, where the packages are installed

A cell is an operation at one size and batch. First each subject runs in a process of its own, twice: the first call's
seconds contain all that is done once (laying out, optimizing, compiling with empty caches, opening a session; loading
weights and exporting to ONNX are not in it), and the largest resident size of the second is its memory. Then all run in
one process by turns, in the other direction in every other round, after one call each that is not counted. `ratio` is
diffusers' median by the subject's: above 1, the subject is faster. Beside it stand the smallest and the largest of the
ratios within single rounds: where they reach across 1, nothing is claimed. `difference` is the largest one of any value
to diffusers' result in the same dtype (`difference_to_float32`: to its result in float32), to be read against
`output_scale`, the largest value there. `direct_s` is the least that computing each convolution directly would take
here (see roofline.py); `share_of_direct` is that by the median.

The file is written after every round. `--resume` leaves out cells that it has with this setting; without it they are
measured anew, and other cells stay. A subject that cannot run is left out, with the reason in the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import (
    CONFIGS,
    DTYPES,
    OPERATIONS,
    RATIO,
    ChildFailed,
    be_killed_first,
    by_turns,
    call_child,
    cpu_name,
    make_input,
    num_cores,
    peak_bytes,
    reset_peak,
    resident_bytes,
    shorten,
    timed,
    versions,
    write_json,
)
from roofline import Peaks, layers_of, measure_peaks, work
from subjects import EXPORTED, SUBJECTS, Run, Task, Unavailable, export, why_not

BASELINE = "diffusers"
LEFT_OUT_ERRORS = (Unavailable, ChildFailed, RuntimeError, MemoryError, ImportError)  # torch's are RuntimeErrors


class OutOfTime(Exception):
    """The budget is used up."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured together, as it stands in the file."""

    config: str
    device: str
    dtype: str
    operation: str
    size_px: int
    batch: int

    def task(self, scratch: Path) -> Task:
        return Task(operation=self.operation, config=self.config, dtype=self.dtype, device=self.device, scratch=scratch)

    def input(self, dtype: str | None = None) -> Tensor:
        return make_input(
            self.operation, self.size_px, self.batch, dtype=DTYPES[dtype or self.dtype], device=self.device
        )

    def __str__(self) -> str:
        return f"{self.operation} {self.size_px} px, batch {self.batch}, {self.dtype} on {self.device}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    repeats: int
    cell_s: float  # no new round of a cell begins after so long
    deadline: float  # of time.monotonic()

    def check(self, needed_s: float = 0.0) -> None:
        if time.monotonic() + needed_s > self.deadline:
            raise OutOfTime


def measure_cell(
    cell: Cell, names: Sequence[str], peaks: Peaks, limits: Limits, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yields: the cell's entry, after every round. The last one is complete, unless time runs out before."""
    layers = layers_of(cell.config, cell.operation, cell.size_px, cell.batch, cell.dtype)
    entry = asdict(cell) | {"complete": False, "work": work(layers, peaks)}
    fresh, left_out = measure_all_fresh(cell, names, limits, scratch)
    runs, facts = open_runs(cell, [name for name in names if name not in left_out], left_out, scratch)
    x = cell.input()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began, last_round_s = time.monotonic(), 0.0
    for number in range(1, limits.repeats + 1):
        limits.check(needed_s=last_round_s)
        started = time.monotonic()
        for name in by_turns(number, list(runs)):
            seconds[name].append(timed(lambda name=name: runs[name](x), cell.device)[0])  # type: ignore[misc]
        last_round_s = time.monotonic() - started
        found = {name: summary(seconds[name], seconds[BASELINE], entry["work"]["direct_s"]) for name in runs}
        entry |= {
            "output_scale": facts["scale"],
            "subjects": {name: found[name] | facts[name] | {"fresh": fresh.get(name)} for name in runs},
            "left_out": left_out,
            "complete": number == limits.repeats or time.monotonic() - began > limits.cell_s,
        }
        report_round(cell, number, found)
        yield entry
        if entry["complete"]:
            return


def summary(seconds: Sequence[float], baseline: Sequence[float], direct_s: float) -> dict[str, Any]:
    """Of one subject, over all rounds so far."""
    ratios = [theirs / own for own, theirs in zip(seconds, baseline, strict=True)]
    return {
        "seconds": list(seconds),
        "median_s": median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "ratio": median(baseline) / median(seconds),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "share_of_direct": direct_s / median(seconds),
    }


def open_runs(
    cell: Cell, names: Sequence[str], left_out: dict[str, str], scratch: Path
) -> tuple[dict[str, Run], dict[str, Any]]:
    """The subjects, each called once, and how far their results are from diffusers'. Adds to `left_out`."""
    x, runs = cell.input(), {}
    facts: dict[str, Any] = {}
    exact = float32_output(cell) if cell.dtype != "float32" else None
    expected: Tensor | None = None
    for name in names:
        try:
            runs[name] = SUBJECTS[name](cell.task(scratch))
            output = runs[name](x)
        except LEFT_OUT_ERRORS as error:
            runs.pop(name, None)
            left_out[name] = shorten(error)
            continue
        if expected is None:
            expected = output
            facts["scale"] = float(output.abs().max())
        facts[name] = {"difference": largest_difference(output, expected)}
        if exact is not None:
            facts[name]["difference_to_float32"] = largest_difference(output, exact)
    if BASELINE not in runs:
        sys.exit(f"{cell}: {BASELINE} itself does not run: {left_out[BASELINE]}")
    return runs, facts


def largest_difference(output: Tensor, expected: Tensor) -> float:
    return float((output.float() - expected.float()).abs().max())


def float32_output(cell: Cell) -> Tensor:
    """Diffusers' result for the same input, whose values the narrower dtype holds exactly."""
    task = Task(**(asdict(cell.task(Path())) | {"dtype": "float32"}))
    return SUBJECTS[BASELINE](task)(cell.input().float())


def measure_all_fresh(
    cell: Cell, names: Sequence[str], limits: Limits, scratch: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `measure_fresh` found in a process of its own for each subject, and why others are left out."""
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        limits.check()
        if reason := why_not(name, device=cell.device, dtype=cell.dtype):
            left_out[name] = reason
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as caches:
            environment = {"TORCHINDUCTOR_CACHE_DIR": caches, "XDG_CACHE_HOME": caches}
            words = ["--measure-fresh", name, json.dumps(asdict(cell)), "--scratch", str(scratch)]
            try:
                found[name] = call_child(
                    [__file__, *words, "--threads", str(torch.get_num_threads())], environment=environment
                )
            except ChildFailed as error:
                left_out[name] = str(error)
    return found, left_out


def measure_fresh(name: str, cell: Cell, scratch: Path) -> dict[str, float]:
    """Seconds and memory of the first two calls of a subject in this process."""
    be_killed_first()
    run, x = SUBJECTS[name](cell.task(scratch)), cell.input()
    reset_peak()
    resident = resident_bytes()
    first_s, _ = timed(lambda: run(x), cell.device)
    first_peak = peak_bytes()
    reset_peak()
    if cell.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    second_s, _ = timed(lambda: run(x), cell.device)
    found = {"first_call_s": first_s, "second_call_s": second_s, "resident_bytes": resident}
    found |= {"first_peak_bytes": first_peak, "peak_bytes": peak_bytes()}
    return found | ({"cuda_peak_bytes": torch.cuda.max_memory_allocated()} if cell.device == "cuda" else {})


def report_round(cell: Cell, number: int, found: dict[str, dict[str, Any]]) -> None:
    medians = ", ".join(f"{name} {each['median_s']:.3f} s (x {each['ratio']:.2f})" for name, each in found.items())
    print(f"{cell}, round {number}: {medians}", file=sys.stderr)


class ResultFile:
    """The JSON: machines, and cells that name theirs by its position."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"benchmark": "network", "machines": [], "cells": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
        same = [index for index, known in enumerate(self.data["machines"]) if known | {"peaks": None} == machine]
        self.machine = same[0] if same else len(self.data["machines"])
        if not same:
            self.data["machines"].append(machine | {"peaks": {}})

    def keep_peaks(self, key: str, found: Peaks) -> Peaks:
        """Returns: the best of what was found now and before."""
        peaks = self.data["machines"][self.machine]["peaks"]
        best = {name: max(value, peaks.get(key, {}).get(name, 0.0)) for name, value in found.to_json().items()}
        peaks[key] = best
        return Peaks(**best)

    def has(self, cell: Cell, names: Sequence[str], repeats: int) -> bool:
        return any(
            known["complete"] and set(names) <= set(known["asked"]["subjects"]) and repeats <= known["asked"]["repeats"]
            for known in self.data["cells"]
            if self._is(known, cell)
        )

    def put(self, cell: Cell, entry: dict[str, Any]) -> None:
        """In the place of the same cell."""
        others = [known for known in self.data["cells"] if not self._is(known, cell)]
        self.data["cells"] = [*others, {"machine": self.machine} | entry]
        write_json(self.path, self.data)

    def _is(self, known: dict[str, Any], cell: Cell) -> bool:
        return known["machine"] == self.machine and asdict(cell).items() <= known.items()


def describe_machine(device: str) -> dict[str, Any]:
    """What cells must share to be compared. `peaks` is filled in later."""
    packages = ["torch", "diffusers", "sdvae", *(name for name in EXPORTED if find_spec(name))]
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions(*packages),
        "peaks": None,
    }


def prepare_exports(names: Sequence[str], arguments: argparse.Namespace, scratch: Path) -> None:
    wanted = [name for name in names if name in EXPORTED]
    if any(not why_not(name, device=arguments.device, dtype=arguments.dtype) for name in wanted):
        print("exporting to ONNX", file=sys.stderr)
        export(arguments.config, arguments.dtype, scratch)


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    file = ResultFile(arguments.json, describe_machine(arguments.device))
    names = arguments.subjects
    limits = Limits(
        repeats=arguments.repeats,
        cell_s=60 * arguments.cell_minutes,
        deadline=time.monotonic() + 60 * arguments.budget_minutes,
    )
    cells = [
        Cell(
            config=arguments.config,
            device=arguments.device,
            dtype=arguments.dtype,
            operation=operation,
            size_px=size,
            batch=batch,
        )
        for batch, size, operation in itertools.product(arguments.batches, arguments.sizes, arguments.operations)
    ]
    cells = [cell for cell in cells if not (arguments.resume and file.has(cell, names, arguments.repeats))]
    if not cells:
        print(f"{arguments.json} has all of it", file=sys.stderr)
        return
    peaks = file.keep_peaks(f"{arguments.device} {arguments.dtype}", measure_peaks(arguments.device, arguments.dtype))
    prepare_exports(names, arguments, scratch)
    asked = {"subjects": list(names), "repeats": arguments.repeats}
    try:
        for cell in cells:
            for entry in measure_cell(cell, names, peaks, limits, scratch):
                file.put(cell, entry | {"asked": asked})
    except OutOfTime:
        print("the budget is used up; the same command with --resume goes on", file=sys.stderr)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """For exported models and the caches of compilers, whose files of an earlier run would be found again."""
    with tempfile.TemporaryDirectory(prefix="sdvae-bench-") as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            os.environ |= {} if before is None else {"TORCHINDUCTOR_CACHE_DIR": before}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes; what is there stays there")
    parser.add_argument("--config", choices=CONFIGS, default="sd1", help="architecture (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768, 1024], help="px (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images at a time (%(default)s)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="(default: both)")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="(default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument(
        "--cell-minutes", type=float, default=float("inf"), help="no new round of a cell after so long (default: none)"
    )
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=float("inf"),
        help="begin no round beyond it (default: none)",
    )
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    # how the script calls itself
    parser.add_argument("--measure-fresh", nargs=2, metavar=("SUBJECT", "CELL"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.json is None and arguments.measure_fresh is None:
        parser.error("--json FILE is needed: the result goes there")
    if any(size < 2 * RATIO or size % RATIO for size in arguments.sizes):
        parser.error(f"--sizes must be multiples of {RATIO}, at least {2 * RATIO}")
    if min(*arguments.batches, arguments.repeats, arguments.threads) < 1:
        parser.error("--batches, --repeats and --threads must be at least 1")
    if BASELINE not in arguments.subjects:
        parser.error(f"--subjects must contain {BASELINE}, with which the others are compared")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds none")
    arguments.subjects.sort(key=list(SUBJECTS).index)  # the baseline is the first
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and exporters, on how they will change
        if arguments.measure_fresh:
            name, cell = arguments.measure_fresh
            print(json.dumps(measure_fresh(name, Cell(**json.loads(cell)), arguments.scratch)))
            return
        with scratch_folder() as scratch:
            measure(arguments, scratch)


if __name__ == "__main__":
    main()
