#!/usr/bin/env python3
"""How straight is the way of one job through the code? Follows each command, and counts the files on the way.

    python tools/path.py                   # a table of all commands
    python tools/path.py encode --show     # the stops of one command, in order

Each command does a tiny real job (generated images, the bundled VAE) in a fresh process, with one reader thread.
Recording starts when click calls the command's function, so parsing of options is not part of the path.

- The path is the series of functions of the package in the order in which the run enters them first. Later calls do not
  count, so neither the number of images nor the number of layers changes the path.
- Functions that call no other function of the package are left out: they are details that a reader of the path need not
  open. --all counts them as well.
- A stop is an unbroken series of functions of one file.
- files: different files among the stops.
- returns: stops in a file that an earlier stop has left. Always stops = files + returns.
- functions: all functions that the run enters, the left out details included.

A straight path has few returns: a reader opens each file once. Work that a thread does counts at the place where it was
handed to the thread, so that the path is the same in every run.

Not part of the path: the network (the folder `model`), libraries, all that runs during an import, lambdas,
comprehensions, methods that dataclasses generate, and other processes. Work that the same functions do twice does not
show in these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from threading import Thread
from types import CodeType, FrameType
from typing import Any, NamedTuple

NUM_IMAGES, SIZE_PX = 2, 64
MODEL = "model"  # the network's folder in the package

# The last command of each is followed, and those before it prepare its input.
JOBS: dict[str, tuple[str, ...]] = {
    "encode": ("encode {photos} {out} --workers 1",),
    "decode": ("encode {photos} {latents}", "decode {latents} {out} --workers 1"),
    "reconstruct": ("reconstruct {photos} {out} --workers 1",),
    "convert": ("convert sdvae-mini {out}/vae.safetensors --to ldm",),
    "evaluate": ("evaluate {photos} --out {out} --metrics psnr,ssim --workers 1",),
    "train": ("train {config}",),
    "calibrate": ("calibrate sdvae-mini {photos} --workers 1",),
    "verify": ("encode {photos} {latents}", "verify {latents} --images {photos}"),
    "check": ("check sdvae-mini {photos} --size 64",),
    "inspect": ("inspect sdvae-mini",),
}

CONFIG = """\
run_dir: {out}
data: {{path: {photos}, num_val_images: 1, crop_px: 32, num_workers: 0}}
model: {{block_out_channels: [8, 16, 16], norm_num_groups: 2, layers_per_block: 1}}
training: {{steps: 2, batch_size: 1, num_calibration_images: 1, cpu: true, trackers: []}}
"""


class Function(NamedTuple):
    """A function and its place; the file is relative to the package."""

    file: str
    name: str
    line: int


class Call(NamedTuple):
    caller: Function | None  # None: from outside of the package
    function: Function


class Stop(NamedTuple):
    file: str
    functions: tuple[str, ...]
    is_return: bool


class Counts(NamedTuple):
    stops: int
    files: int
    returns: int
    functions: int


# ----------------------------------------------------------------------------------------------------------- counting


def find_stops(calls: Sequence[Call], with_details: bool = False) -> list[Stop]:
    """The path of a run, from its calls in order."""
    callers = {call.caller for call in calls if call.caller != call.function}
    path = [function for function in _entered(calls) if with_details or function in callers]
    stops: list[Stop] = []
    for file, functions in groupby(path, key=lambda function: function.file):
        is_return = any(stop.file == file for stop in stops)
        stops.append(Stop(file, tuple(function.name for function in functions), is_return))
    return stops


def count(calls: Sequence[Call], with_details: bool = False) -> Counts:
    stops = find_stops(calls, with_details)
    returns = sum(stop.is_return for stop in stops)
    return Counts(len(stops), len(stops) - returns, returns, len(_entered(calls)))


def _entered(calls: Iterable[Call]) -> dict[Function, None]:
    """Each function once, in the order of first calls."""
    return dict.fromkeys(call.function for call in calls)


# ---------------------------------------------------------------------------------------------------------- recording

Record = list[Any]  # of Call, and of lists like this one: what a thread did, at the place where it was asked


def flatten(record: Record) -> Iterator[Call]:
    """The calls of all threads in one order."""
    for item in record:
        if isinstance(item, Call):
            yield item
        else:
            yield from flatten(item)


class Hook:
    """What `sys.setprofile` calls in one thread."""

    def __init__(self, recorder: Recorder, record: Record, caller: Function | None) -> None:
        self.record = record
        self.stack = [caller]
        self._recorder = recorder
        self._seen: set[Call] = set()
        self._imports = 0  # modules whose import has begun and not ended

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        if frame.f_code.co_name == "<module>":
            self._imports += 1 if event == "call" else -1
            return
        function = None if self._imports else self._recorder.find_function(frame.f_code)
        if function is None:
            return
        if event == "return":
            self.stack.pop()
            return
        call = Call(self.stack[-1], function)
        self.stack.append(function)
        if call not in self._seen:
            self._seen.add(call)
            self.record.append(call)


class Recorder:
    """Notes calls of the functions of a package, in this thread and in threads that are started from it."""

    def __init__(self, package: Path) -> None:
        self.record: Record = []
        self._package = package
        self._functions: dict[CodeType, Function | None] = {}

    def follow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls noted."""
        return self._follow(function, self.record, None)

    def follow_threads(self) -> None:
        """From now on, what threads and tasks of a pool do is noted too, at the place where they are started."""
        submit, start = ThreadPoolExecutor.submit, Thread.start

        def submit_followed(pool: ThreadPoolExecutor, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return submit(pool, self._branch(task), *args, **kwargs)

        def start_followed(thread: Thread) -> None:
            thread.run = self._branch(thread.run)  # type: ignore[method-assign]
            start(thread)

        ThreadPoolExecutor.submit = submit_followed  # type: ignore[method-assign, assignment]
        Thread.start = start_followed  # type: ignore[method-assign, assignment]

    def find_function(self, code: CodeType) -> Function | None:
        """None: not part of a path."""
        if code not in self._functions:
            self._functions[code] = self._find_function(code)
        return self._functions[code]

    def _find_function(self, code: CodeType) -> Function | None:
        path = Path(code.co_filename)
        if not path.is_relative_to(self._package) or path.suffix != ".py" or code.co_name.startswith("<"):
            return None
        inner = path.relative_to(self._package)
        if inner.parts[0] == MODEL or code.co_qualname == "__getattr__":  # the latter is a module's: it imports
            return None
        return Function(inner.as_posix(), code.co_qualname, code.co_firstlineno)

    def _follow(self, function: Callable[..., Any], record: Record, caller: Function | None) -> Callable[..., Any]:
        @wraps(function)
        def followed(*args: Any, **kwargs: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(Hook(self, record, caller))
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(before)

        return followed

    def _branch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        hook = sys.getprofile()
        if not isinstance(hook, Hook):
            return function
        record: Record = []
        hook.record.append(record)
        return self._follow(function, record, hook.stack[-1])


def record_command(words: Sequence[str]) -> list[Call]:
    """Run a command of the package in this process. Returns: its calls, each kind once.

    Raises: SystemExit if the command fails.
    """
    from sdvae.cli.main import cli

    command = cli.get_command(None, words[0])  # type: ignore[arg-type]
    if command is None or command.callback is None:
        raise SystemExit(f"{words[0]}: no such command")
    recorder = Recorder(find_package())
    recorder.follow_threads()
    command.callback = recorder.follow(command.callback)
    exit_code = cli.main(list(words), prog_name="sdvae", standalone_mode=False)
    if exit_code:
        raise SystemExit(f"{' '.join(words)}: exit code {exit_code}")
    return list(flatten(recorder.record))


# ----------------------------------------------------------------------------------------------------------- commands


def find_package() -> Path:
    spec = find_spec("sdvae")
    if spec is None or spec.origin is None:
        raise SystemExit("cannot find the package sdvae. Install it, or set PYTHONPATH to the repository.")
    return Path(spec.origin).parent


def write_photos(folder: Path) -> None:
    """Smooth images with some noise, the same in every run."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def trace(name: str) -> list[Call]:
    """Do the job of a command in processes of its own. Returns: the calls of its last step."""
    with tempfile.TemporaryDirectory(prefix="sdvae-path-") as temporary:
        scratch = Path(temporary)
        places = {place: scratch / place for place in ("photos", "latents", "out")}
        write_photos(places["photos"])
        config = scratch / "config.yaml"
        config.write_text(CONFIG.format(**places), encoding="utf-8")
        *before, followed = ([word.format(**places, config=config) for word in job.split()] for job in JOBS[name])
        for words in before:
            run_python("-m", "sdvae", *words)
        result = scratch / "calls.json"
        run_python(__file__, "--child", str(result), *followed)
        calls = json.loads(result.read_text(encoding="utf-8"))
        return [Call(Function(*caller) if caller else None, Function(*function)) for caller, function in calls]


def run_python(*words: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **os.environ}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def show(stops: Sequence[Stop]) -> Iterator[str]:
    for number, stop in enumerate(stops, 1):
        mark = "<" if stop.is_return else " "
        yield f"{number:4} {mark} {stop.file}: {', '.join(stop.functions)}"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:  # how the script calls itself: a file for the result, and the words of a command
        Path(sys.argv[2]).write_text(json.dumps(record_command(sys.argv[3:])), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"{', '.join(JOBS)} (default: all)")
    parser.add_argument("--show", action="store_true", help="also list the stops; < marks a return")
    parser.add_argument("--all", action="store_true", help="count functions that call no other of the package as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.commands) - set(JOBS):
        parser.error(f"no job for {', '.join(sorted(unknown))}; choose from {', '.join(JOBS)}")
    print(find_package())
    print(f"{'':12}" + "".join(f"{field:>10}" for field in Counts._fields))
    for name in arguments.commands or JOBS:
        calls = trace(name)
        print(f"{name:12}" + "".join(f"{value:10}" for value in count(calls, arguments.all)), flush=True)
        if arguments.show:
            print(*show(find_stops(calls, arguments.all)), sep="\n")


if __name__ == "__main__":
    main()
