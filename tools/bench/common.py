"""What the benchmarks share: seeded autoencoders, order of turns, timing, memory of a process, and the machine's name.

The scripts beside this file run as `python tools/bench/NAME.py`, so that Python finds it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "mini": {"block_out_channels": (16, 32, 96, 128), "layers_per_block": 1, "norm_num_groups": 8},
    "tiny": {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},  # for tests
}
OPERATIONS = ("encode", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LATENT_CHANNELS, RATIO = 4, 8  # of all CONFIGS: channels of z, and pixels per position along one side

T = TypeVar("T")


class ChildFailed(Exception):
    """A process of its own that measured did not come to its end; the message says why."""


def build_vae(cls: Any, config: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """An autoencoder of the given class, in eval mode; weights are the same for all classes and keep the scale of what
    passes through."""
    fields = CONFIGS[config]
    levels = len(fields["block_out_channels"])
    with torch.device("meta"):
        vae = cls(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **fields
        )
    if torch.device(device).type == "meta":
        return vae.eval().to(dtype)
    vae.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(vae.state_dict().items()):
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    torch.nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own warns of layers that these VAEs do not have
    return vae.eval()


def make_input(
    operation: str, size: int, batch: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Tensor:
    """Images in [-1, 1] for encode, z for decode; (B, C, H, W) in the default layout, the same ones every time."""
    if torch.device(device).type == "meta":
        shape = (3, size, size) if operation == "encode" else (LATENT_CHANNELS, size // RATIO, size // RATIO)
        return torch.empty(batch, *shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(1)
    if operation == "encode":
        x = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    else:
        x = torch.randn(batch, LATENT_CHANNELS, size // RATIO, size // RATIO, generator=generator)
    return x.to(device=device, dtype=dtype)


def run_vae(vae: Any, operation: str, x: Tensor) -> Tensor:
    """Moments of images, or images of z: the interface that diffusers' class and ours share."""
    return vae.encode(x).latent_dist.parameters if operation == "encode" else vae.decode(x).sample  # type: ignore[no-any-return]


def by_turns(round_number: int, names: Sequence[str]) -> Sequence[str]:
    """The names, in the other direction in every other round, so that nobody always comes first."""
    return names if round_number % 2 else names[::-1]


def timed(function: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    """Seconds that a call takes, to the end of what it left on the device, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def with_range(values: Sequence[float], format_spec: str = ".2f") -> str:
    """The median, and in brackets the smallest and the largest value."""
    middle, low, high = (format(value, format_spec) for value in (median(values), min(values), max(values)))
    return f"{middle} ({low} .. {high})" if len(values) > 1 else middle


def resident_bytes() -> int:
    """Size of this process in memory, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Let `peak_bytes` begin anew: on Linux the largest size of a child otherwise begins with that of its parent."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_bytes() -> int:
    """Largest size of this process in memory, on Linux since `reset_peak`, elsewhere since its start."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def be_killed_first() -> None:
    """Where memory runs out, Linux ends this process rather than another one."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def limit_memory(limit_bytes: int) -> None:
    """Let requests for memory fail from so many bytes on (Linux: private writable memory, RLIMIT_DATA)."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def call_child(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """The JSON that a Python process prints as its last line, run with these words.

    Raises: ChildFailed where it ends without, with the last line that it had to say.
    """
    command = [sys.executable, *words]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    lines = child.stdout.strip().splitlines()
    if child.returncode == 0 and lines:
        return json.loads(lines[-1])
    if child.returncode == -9:
        raise ChildFailed("killed: the machine's memory is not enough")
    errors = child.stderr.strip().splitlines()
    raise ChildFailed(shorten(errors[-1]) if errors else f"ended with {child.returncode}")


def shorten(message: object, length: int = 240) -> str:
    """The first line of a message, at most so long."""
    line = next(iter(str(message).strip().splitlines()), "") or type(message).__name__
    return line if len(line) <= length else line[: length - 3] + "..."


def says_out_of_memory(message: object) -> bool:
    text = str(message).lower()
    return "allocate memory" in text or "out of memory" in text or "memoryerror" in text or "killed:" in text


def write_json(path: Path, data: Any) -> None:
    """In one step, so that a killed run leaves a whole file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def cpu_name() -> str:
    """Its name, and the vector instructions that torch finds in it: AMD EPYC, AVX512."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        name = platform.processor() or platform.machine()
    else:
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Of the installed packages; torch says by itself how it was built."""
    return {name: torch.__version__ if name == "torch" else version(name) for name in packages}
