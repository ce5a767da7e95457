#!/usr/bin/env python3
"""Folders of photographs: `sdvae encode` and `sdvae decode` against a loop around diffusers, whole processes.

    python tools/bench/folder.py --images photos --json folder.json                    # SD 1.x layout: long
    python tools/bench/folder.py --images photos --config mini                         # a quick look
    python tools/bench/folder.py --images photos --num-images 24 --channels-last --io-share --memory

From the photographs in a folder it makes a mixed one: JPEG and PNG, short sides of 512 to 3000 px (see MIX), smaller
photographs enlarged, and repeated under other names where there are too few. Then both sides encode it and decode what
they have encoded, by turns, each time in a fresh process, with the same batch size, number of workers and threads:
`sdvae` as a user calls it, and diffusers_folder.py beside this script.

How to read the table: `images/s` is over the whole process, from its start to its end; `within` without imports and
loading the VAE, as each side says; `first image` is the time from the start of the process until the first output file
is there, and `peak` the largest resident size. Medians with the range of all repeats. `ratio`: the median of the
ratios within the rounds, with their range; above 1, sdvae is better. Where the range reaches across 1, nothing is
claimed. `difference`: the largest one of any mean between the two sides' latents, and its root mean square, in standard
deviations of the latents: sdvae decodes JPEGs at reduced scale where a resize follows.

--io-share: what reading and writing cost over the network alone: the command's own function in one process, then its
batches again, from memory, by turns; in percent of the latter.
--memory: peak with 200 and with 2000 small images (links to the same files), with the bundled VAE at 64 px.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import (
    ChildFailed,
    by_turns,
    call_child,
    cpu_name,
    num_cores,
    versions,
    with_range,
    write_json,
)

SIDES = ("sdvae", "diffusers")
OPERATIONS = ("encode", "decode")
# Short side in px and format, image by image in this order: what lies in a downloads folder and on a camera's card.
MIX = ((512, "jpg"), (1080, "jpg"), (512, "png"), (2160, "jpg"), (768, "jpg"), (768, "png"), (3000, "jpg"))
SUFFIXES = (".jpg", ".jpeg", ".png")
MEMORY_COUNTS = (200, 2000)
MEMORY_SIZE_PX = 64
HERE = Path(__file__).parent


# ----------------------------------------------- in processes of their own, so that this one is small


def build_images(source: Path, out: Path, count: int) -> int:
    """Write the mixed folder. Returns: its bytes."""
    from PIL import Image, ImageOps

    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{source}: no {', '.join(SUFFIXES)} in it")
    out.mkdir(parents=True)
    for index in range(count):
        short_px, kind = MIX[index % len(MIX)]
        with Image.open(paths[index * max(1, len(paths) // count) % len(paths)]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        factor = short_px / min(image.size)
        size = (max(short_px, round(image.width * factor)), max(short_px, round(image.height * factor)))
        image.resize(size, Image.Resampling.LANCZOS).save(out / f"{index:05}.{kind}", quality=90)
    return sum(path.stat().st_size for path in out.iterdir())


def build_model(config: str, out: Path) -> str:
    """Write the VAE as a diffusers folder: seeded random weights, but for mini the bundled ones."""
    from sdvae.checkpoints.read import bundled_path

    if config == "mini":
        shutil.copytree(bundled_path(), out, ignore=shutil.ignore_patterns("*.png", "*.md"))
        return str(out)
    from common import build_vae
    from sdvae._torchvision import ensure_torchvision_importable

    ensure_torchvision_importable()
    from diffusers import AutoencoderKL

    build_vae(AutoencoderKL, config).save_pretrained(out)
    return str(out)


def compare_latents(ours: Path, theirs: Path) -> dict[str, float]:
    """Of the means of both sides' latents, in standard deviations."""
    import numpy as np
    from safetensors.numpy import load_file

    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    pairs = [[load_file(folder / name)["mean"].astype(np.float64) for folder in (ours, theirs)] for name in names]
    std = float(np.concatenate([other.ravel() for _, other in pairs]).std())
    errors = np.concatenate([(one - other).ravel() for one, other in pairs]) / std
    return {"largest": float(np.abs(errors).max()), "rms": float(np.sqrt(np.square(errors).mean()))}


def measure_io_share(operation: str, source: Path, out: Path, arguments: argparse.Namespace) -> list[list[float]]:
    """Seconds of (the whole function, its batches again from memory), one pair for each repeat."""
    import torch
    from torch import Tensor

    from sdvae.checkpoints.opened import open_vae
    from sdvae.codec.options import DecodeOptions, EncodeOptions
    from sdvae.codec.run import DecodeRun, EncodeRun

    common: dict[str, Any] = {"batch_size": arguments.batch_size, "workers": arguments.workers, "overwrite": True}
    loaded = open_vae(str(arguments.vae), **EncodeOptions(**common).opening)
    network = getattr(loaded.model, operation)
    batches: list[Tensor] = []

    def recording(x: Tensor) -> Any:
        batches.append(x)
        return network(x)

    def whole() -> None:
        if operation == "encode":
            run: Any = EncodeRun(source, out, loaded, EncodeOptions(size=arguments.size, crop=arguments.crop, **common))
        else:
            run = DecodeRun(source, out, loaded, DecodeOptions(**common))
        assert run.run().failed == 0

    def alone() -> None:
        with torch.inference_mode():
            for x in batches:
                network(x)

    setattr(loaded.model, operation, recording)
    whole()  # records, and warms up
    setattr(loaded.model, operation, network)
    pairs = []
    for number in range(arguments.repeats):
        seconds = {}
        for function in (whole, alone) if number % 2 else (alone, whole):
            start = time.perf_counter()
            function()
            seconds[function.__name__] = time.perf_counter() - start
        pairs.append([seconds["whole"], seconds["alone"]])
    return pairs


CHILDREN: dict[str, Callable[..., Any]] = {
    "build-images": lambda a, source, out, count: build_images(Path(source), Path(out), int(count)),
    "build-model": lambda a, config, out: build_model(config, Path(out)),
    "compare": lambda a, ours, theirs: compare_latents(Path(ours), Path(theirs)),
    "io-share": lambda a, operation, source, out: measure_io_share(operation, Path(source), Path(out), a),
}


# ---------------------------------------------------------------------------------------------------- whole processes


def command(side: str, operation: str, source: Path, out: Path, vae: Path, arguments: argparse.Namespace) -> list[str]:
    words = [operation, str(source), str(out), "--vae", str(vae)]
    words += ["--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers)]
    if operation == "encode":
        words += ["--size", str(arguments.size), "--crop", arguments.crop]
    if side == "sdvae":
        return [sys.executable, "-m", "sdvae", *words, "--json"]
    layout = ["--channels-last"] if arguments.channels_last else []
    return [sys.executable, str(HERE / "diffusers_folder.py"), *words, *layout]


def measure_process(words: Sequence[str], out: Path, expected: int, errors: Path) -> dict[str, float]:
    """Run a command that writes `expected` files into `out`, which is emptied before.

    Raises: ChildFailed where it fails or does less.
    """
    shutil.rmtree(out, ignore_errors=True)
    with errors.open("w+") as stderr, tempfile.TemporaryFile("w+") as stdout:
        start = time.perf_counter()
        child = subprocess.Popen(words, stdout=stdout, stderr=stderr)
        first_s = None
        while True:
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if first_s is None and _has_output(out):
                first_s = time.perf_counter() - start
            if done:
                break
            time.sleep(0.01 if first_s is None else 0.02)
        total_s = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        if child.returncode:
            raise ChildFailed(f"{' '.join(words)}: ended with {child.returncode}: {stderr.read()[-2000:]}")
        stdout.seek(0)
        report = json.loads(stdout.read())
    count = report.get("done", report.get("images"))
    if count != expected:
        raise ChildFailed(f"{' '.join(words)}: did {count} images of {expected}")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return {
        "total_s": total_s,
        "within_s": report["seconds"],
        "first_image_s": first_s or total_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
    }


def _has_output(out: Path) -> bool:
    """Whether a whole output is there; both sides have others in the folder as they work."""
    if not out.is_dir():
        return False
    with os.scandir(out) as entries:
        return any(entry.name.endswith((".safetensors", ".png")) and entry.name[0] != "." for entry in entries)


def compare(images: Path, vae: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both operations on both sides, by turns."""
    result: dict[str, Any] = {}
    for operation in OPERATIONS:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(arguments.repeats):
            for side in by_turns(number, SIDES):
                source = images if operation == "encode" else scratch / f"encode-{side}"
                out = scratch / f"{operation}-{side}"
                words = command(side, operation, source, out, vae, arguments)
                runs[side].append(measure_process(words, out, arguments.num_images, scratch / "stderr"))
                print(f"{operation} {side}: {runs[side][-1]['total_s']:.1f} s", file=sys.stderr)
        result[operation] = runs
    return result


def compare_memory(images: Path, vae: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of `sdvae` over few and over many images."""
    small = argparse.Namespace(**{**vars(arguments), "size": MEMORY_SIZE_PX})
    sources = sorted(images.iterdir())
    result: dict[str, Any] = {operation: {} for operation in OPERATIONS}
    for count in MEMORY_COUNTS:
        folder = scratch / f"links-{count}"
        folder.mkdir()
        for index in range(count):
            # Only the smaller ones: the largest image would hide what grows with their number.
            source = sources[index % len(sources)]
            source = source if MIX[int(source.stem) % len(MIX)][0] <= 768 else sources[0]
            os.link(source, folder / f"{index:05}{source.suffix}")
        latents = scratch / f"latents-{count}"
        for operation, source, out in (("encode", folder, latents), ("decode", latents, scratch / f"out-{count}")):
            words = command("sdvae", operation, source, out, vae, small)
            result[operation][str(count)] = measure_process(words, out, count, scratch / "stderr")["peak_bytes"]
            print(f"memory, {operation} {count}: {result[operation][str(count)] / 1e6:.0f} MB", file=sys.stderr)
    few, many = MEMORY_COUNTS
    for operation in OPERATIONS:
        grown = result[operation][str(many)] - result[operation][str(few)]
        result[operation]["bytes_per_image"] = grown / (many - few)
    return result


# --------------------------------------------------------------------------------------------------------------- output


def ratios(runs: dict[str, list[dict[str, float]]], field: str) -> list[float]:
    """Diffusers' by ours, round by round: above 1, ours is less."""
    return [theirs[field] / ours[field] for ours, theirs in zip(runs["sdvae"], runs["diffusers"], strict=True)]


def as_table(report: dict[str, Any]) -> str:
    setting = report["setting"]
    count = setting["num_images"]
    lines = [
        "{num_images} images to {size} px ({crop}), {config}, batch {batch_size}, {workers} workers, {threads} torch "
        "threads, {repeats} rounds, {cores} cores, {cpu}; torch {torch}, diffusers {diffusers}{layout}".format(
            **setting, **setting["versions"], layout=" channels_last" if setting["channels_last"] else ""
        ),
        "",
        f"{'':24}{'sdvae':>26}{'diffusers':>26}{'ratio':>24}",
    ]
    rows: tuple[tuple[str, str, Callable[[float], float], str], ...] = (
        ("images/s", "total_s", lambda s: count / s, ".3f"),
        ("images/s within", "within_s", lambda s: count / s, ".3f"),
        ("first image, s", "first_image_s", lambda s: s, ".2f"),
        ("peak, MB", "peak_bytes", lambda b: b / 1e6, ".0f"),
    )
    for operation, runs in report["runs"].items():
        for name, field, shown, spec in rows:
            cells = [with_range([shown(run[field]) for run in runs[side]], spec) for side in SIDES]
            ratio = with_range(ratios(runs, field))
            lines.append(f"{operation + ', ' + name:24}{cells[0]:>26}{cells[1]:>26}{ratio:>24}")
    lines += ["", "latents differ by at most {largest:.3g} std, rms {rms:.2g}".format(**report["difference"])]
    for operation, pairs in report.get("io_share", {}).items():
        percent = [100 * (whole / alone - 1) for whole, alone in pairs]
        lines.append(f"{operation}: reading and writing cost {with_range(percent, '.1f')} % over the network alone")
    for operation, peaks in report.get("memory", {}).items():
        few, many = (f"{peaks[str(count)] / 1e6:.0f} MB with {count}" for count in MEMORY_COUNTS)
        lines.append(f"{operation}: peak {few} images, {many}: {peaks['bytes_per_image']:.0f} bytes for one more")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs to make the mixed folder from")
    parser.add_argument("--num-images", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--config", choices=("sd1", "mini"), default="sd1", help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="short side in the VAE, px (default: %(default)s)")
    parser.add_argument("--crop", choices=("none", "center"), default="center", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="threads that read, as many write (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=num_cores(), help="of torch, on both sides (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="diffusers' side in this layout")
    parser.add_argument("--io-share", action="store_true", help="also what reading and writing cost")
    parser.add_argument("--memory", action="store_true", help="also whether memory grows with the number of images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument("--vae", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # how the script calls itself
    arguments = parser.parse_args()
    if arguments.child is None and (arguments.images is None or not arguments.images.is_dir()):
        parser.error("--images: expected a folder of photographs")
    if min(arguments.num_images, arguments.batch_size, arguments.workers, arguments.threads, arguments.repeats) < 1:
        parser.error("numbers must be at least 1")
    return arguments


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("num_images", "config", "size", "crop", "batch_size", "workers", "threads", "repeats", "channels_last")
    return {name: getattr(arguments, name) for name in names} | {
        "cores": num_cores(),
        "cpu": cpu_name(),
        "versions": versions("torch", "diffusers", "pillow", "safetensors"),
    }


def main() -> None:
    arguments = parse()
    if arguments.child:
        name, *words = arguments.child
        print(json.dumps(CHILDREN[name](arguments, *words)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    own = [__file__, "--size", str(arguments.size), "--crop", arguments.crop, "--repeats", str(arguments.repeats)]
    own += ["--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers)]
    report: dict[str, Any] = {"setting": setting(arguments)}
    with tempfile.TemporaryDirectory(prefix="sdvae-bench-") as name:
        scratch = Path(name)
        images, vae = scratch / "images", scratch / "vae"
        words = [str(arguments.images), str(images), str(arguments.num_images)]
        report["setting"]["image_bytes"] = call_child([*own, "--child", "build-images", *words])
        call_child([*own, "--child", "build-model", arguments.config, str(vae)])
        report["runs"] = compare(images, vae, scratch, arguments)
        latents = [str(scratch / f"encode-{side}") for side in SIDES]
        report["difference"] = call_child([*own, "--child", "compare", *latents])
        if arguments.io_share:
            report["io_share"] = {}
            for operation, source in (("encode", str(images)), ("decode", latents[0])):
                child = ["io-share", operation, source, str(scratch / f"io-{operation}")]
                report["io_share"][operation] = call_child([*own, "--vae", str(vae), "--child", *child])
        if arguments.memory:
            if arguments.config != "mini":
                vae = scratch / "mini"
                call_child([*own, "--child", "build-model", "mini", str(vae)])
            report["memory"] = compare_memory(images, vae, scratch, arguments)
    print(as_table(report))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
