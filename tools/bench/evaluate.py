#!/usr/bin/env python3
"""Is `sdvae evaluate` faster than the same metrics through torchmetrics, and does it give the same numbers? On a CPU.

    python tools/bench/evaluate.py --weights FOLDER                                # some minutes
    taskset -c 0 python tools/bench/evaluate.py --weights FOLDER --threads 1       # on one core
    python tools/bench/evaluate.py --weights FOLDER --images 4 --rounds 1 --size 64 --batches 1    # does it run at all

PSNR, SSIM, LPIPS (alex) and rFID of one VAE over a folder of photographs, in float32:
- ours: `sdvae evaluate` as it runs, without stress tests and gallery. It also measures the latents, keeps numbers per
  image and writes a report with intervals.
- torchmetrics: the loop that a careful engineer would write. A DataLoader with as many workers as ours has threads that
  read; diffusers' AutoencoderKL in eval mode under inference_mode; resize, crop and rounding to 8 bits as ours;
  PeakSignalNoiseRatio per image, StructuralSimilarityIndexMeasure(data_range=1), LearnedPerceptualImagePatchSimilarity
  and FrechetInceptionDistance(antialias=False), whose resize then is that of FID's own network: the default gives other
  numbers. Of several batch sizes the fastest is taken, found by trying before the rounds.
- channels_last: the same with its VAE and the networks inside torchmetrics laid out as ours, which on CPUs is faster.

How to read the table: all run in one process by turns, in the other direction in every other round, and the first round
warms up and is not counted; medians with the range behind them. `images/s` is the whole way from file to metric without
what is done once, which stands below: `set up` (networks loaded; torchmetrics' DataLoader with its first batch) and
`finish` (rFID and means; ours also intervals, report and files). `cpu` is what it costs in processor seconds, those of
loading processes included: where a machine is shared, that says more than the clock. Rows `part` are one step alone, in
memory, with the batch that each takes for it; ours takes photographs one by one, and for Inception four at a time.
`x` is by how much ours is faster, or smaller. `peak` is the largest resident size of a fresh process in one run, its
loading processes left out (Linux only). Numbers that differ by more than `tolerances` end the script with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import by_turns, call_child, cpu_name, num_cores, peak_bytes, reset_peak, versions, with_range
from sdvae._torchvision import ensure_torchvision_importable
from sdvae.checkpoints.opened import open_any_vae
from sdvae.checkpoints.store import bundled_path
from sdvae.data.images import round_to_8_bits
from sdvae.data.sources.find import find_images
from sdvae.evaluation.images import prepare
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.plan import plan_evaluation
from sdvae.evaluation.protocol import Protocol
from sdvae.evaluation.runner import run_evaluation
from sdvae.features.inception import NUM_FEATURES, InceptionFeatures, build_inception
from sdvae.features.weights import find_weights, load_weights
from sdvae.metrics.table import IMAGE_METRICS

ensure_torchvision_importable()  # before diffusers and torchmetrics

PHOTOS = bundled_path().parent / "photos"
LAYOUTS = {"torchmetrics": False, "channels_last": True}
SIDES = ("ours", *LAYOUTS)
METRICS = ("psnr", "ssim", "lpips_alex", "rfid")
NUM_CLASSES = 1008  # of the file that torch-fidelity reads; its classifier is not used here


@dataclass(frozen=True, kw_only=True)
class Setting:
    photos: Path  # exactly the images of a run
    scratch: Path
    weights: Path | None
    vae: Path
    size: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the loop with torchmetrics runs."""

    batch: int
    channels_last: bool


@dataclass(kw_only=True)
class Run:
    num_images: int
    set_up_s: float
    images_s: float
    images_cpu_s: float
    finish_s: float
    numbers: dict[str, float]


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    return sum(os.times()[:4])


def protocol_of(setting: Setting) -> Protocol:
    return Protocol(preset="native", size_px=setting.size, crop="center", metrics=METRICS)


def run_ours(setting: Setting) -> Run:
    marks: list[tuple[float, float]] = []
    started = time.perf_counter()
    options = EvaluateOptions(
        device="cpu", workers=setting.workers, weights_path=setting.weights, gallery_images=0, overwrite=True
    )
    plan = plan_evaluation(
        setting.photos, [setting.vae], None, setting.scratch / "report", protocol_of(setting), options
    )
    result = run_evaluation(plan, lambda done, total: marks.append((time.perf_counter(), cpu_seconds())))
    finished = time.perf_counter()
    assert result is not None
    (first, first_cpu), (last, last_cpu) = marks[0], marks[-1]
    summary = result.vaes[0]["summary"]
    return Run(
        num_images=len(plan.files),
        set_up_s=first - started,
        images_s=last - first,
        images_cpu_s=last_cpu - first_cpu,
        finish_s=finished - last,
        numbers={name: summary[name]["value" if name == "rfid" else "mean"] for name in METRICS},
    )


class Photos(Dataset[Tensor]):
    """uint8 (3, size, size)."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(folder.iterdir())
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Torchmetrics:
    """VAE and metrics, with their states at zero."""

    def __init__(self, setting: Setting, way: Way) -> None:
        from diffusers import AutoencoderKL
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.vae = AutoencoderKL.from_pretrained(setting.vae).eval()
        with patch.dict(os.environ, {"TORCH_HOME": str(setting.scratch / "torch")}):
            self.lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        self.fid = FrechetInceptionDistance(
            feature_extractor_weights_path=str(setting.scratch / "inception.pth"), antialias=False
        )
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))  # per image, then the mean
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        if way.channels_last:
            for network in (self.vae, self.lpips.net, self.fid.inception):
                nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.vae.decode(self.vae.encode(x).latent_dist.mode()).sample  # type: ignore[no-any-return]

    def update(self, pixels: Tensor) -> None:
        """pixels: uint8 (B, 3, H, W)."""
        image = pixels.float() / 255
        levels = ((self.reconstruct(image * 2 - 1) + 1) * 127.5).clamp(0, 255).round()
        recon = levels / 255
        self.psnr.update(recon, image)
        self.ssim.update(recon, image)
        self.lpips.update(recon, image)
        self.fid.update(pixels, real=True)
        self.fid.update(levels.to(torch.uint8), real=False)

    def compute(self) -> dict[str, float]:
        metrics = {"psnr": self.psnr, "ssim": self.ssim, "lpips_alex": self.lpips, "rfid": self.fid}
        return {name: float(metric.compute()) for name, metric in metrics.items()}


@torch.inference_mode()
def run_torchmetrics(setting: Setting, way: Way) -> Run:
    started = time.perf_counter()
    metrics = Torchmetrics(setting, way)
    photos = Photos(setting.photos, setting.size)
    batches = iter(DataLoader(photos, batch_size=way.batch, num_workers=setting.workers))
    batch: Tensor | None = next(batches)
    first, first_cpu = time.perf_counter(), cpu_seconds()
    while batch is not None:
        metrics.update(batch)
        batch = next(batches, None)
    last = time.perf_counter()
    del batches  # its processes end
    last_cpu = cpu_seconds()
    finish_started = time.perf_counter()
    numbers = metrics.compute()
    return Run(
        num_images=len(photos),
        set_up_s=first - started,
        images_s=last - first,
        images_cpu_s=last_cpu - first_cpu,
        finish_s=time.perf_counter() - finish_started,
        numbers=numbers,
    )


def run(side: str, setting: Setting, ways: Mapping[str, Way]) -> Run:
    return run_ours(setting) if side == "ours" else run_torchmetrics(setting, ways[side])


def write_their_weights(setting: Setting) -> None:
    """The two backbones as the files that torchvision and torch-fidelity read; classifiers, not used here, as zeros."""
    import torchvision

    state = torchvision.models.alexnet(weights=None).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items() if name.startswith("features")}
    state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    state |= load_weights(find_weights("alexnet", setting.weights, option="--weights"), shapes)
    checkpoints = setting.scratch / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(state, checkpoints / torchvision.models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2])

    with torch.device("meta"):
        network = InceptionFeatures()
    convs = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    shapes = {f"{name}.conv.weight": conv.weight.shape for name, conv in convs.items()}
    for name, conv in convs.items():
        shapes |= {f"{name}.bn.{part}": conv.weight.shape[:1] for part in ("bias", "running_mean", "running_var")}
    scales = {f"{name}.bn.weight": conv.weight.shape[:1] for name, conv in convs.items()}
    file = find_weights("inception", setting.weights, option="--weights")
    weights = {name: torch.ones(shape) for name, shape in scales.items()} | load_weights(file, shapes, optional=scales)
    weights |= {f"{name}.bn.num_batches_tracked": torch.tensor(0) for name in convs}
    weights |= {"fc.weight": torch.zeros(NUM_CLASSES, NUM_FEATURES), "fc.bias": torch.zeros(NUM_CLASSES)}
    torch.save(weights, setting.scratch / "inception.pth")


@torch.inference_mode()
def choose_ways(setting: Setting, batches: Sequence[int]) -> dict[str, Way]:
    """The fastest batch for each layout, by the best of three tries on as many images as the largest has."""
    photos = Photos(setting.photos, setting.size)
    pixels = torch.stack([photos[index % len(photos)] for index in range(max(batches))])
    ways: dict[str, Way] = {}
    for side, channels_last in LAYOUTS.items():
        contender = Torchmetrics(setting, Way(batch=1, channels_last=channels_last))
        contender.update(pixels[:1])  # warms up
        seconds = dict.fromkeys(batches, float("inf"))
        for batch in tuple(batches) * 3:
            started = time.perf_counter()
            for part in torch.split(pixels, batch):
                contender.update(part)
            seconds[batch] = min(seconds[batch], time.perf_counter() - started)
        ways[side] = Way(batch=min(seconds, key=seconds.__getitem__), channels_last=channels_last)
    return ways


def compare_runs(setting: Setting, ways: Mapping[str, Way], rounds: int) -> dict[str, list[Run]]:
    """By turns; the first round warms up and is not kept."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in by_turns(number, SIDES):
            found = run(side, setting, ways)
            if number:
                runs[side].append(found)
            print(f"round {number}, {side}: {found.num_images / found.images_s:.2f} images/s", file=sys.stderr)
    return runs


Step = tuple[int, Callable[[slice], Any]]  # images of a batch, and what is done with those of a batch


@torch.inference_mode()
def compare_parts(setting: Setting, ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per image of each step alone, by turns."""
    prepared = [
        prepare(index, file, protocol_of(setting)) for index, file in enumerate(find_images(setting.photos)[:8])
    ]
    pixels = torch.from_numpy(np.stack([each.pixels for each in prepared])).permute(0, 3, 1, 2)  # (B, 3, H, W), uint8
    image = pixels.float() / 255
    steps = {"ours": our_steps(setting, pixels, image)}
    subject = open_any_vae(setting.vae, torch.device("cpu"), torch.float32)
    recon = round_to_8_bits(subject.decode(subject.encode(image * 2 - 1).z, *image.shape[2:]))
    for side, way in ways.items():
        steps[side] = their_steps(setting, way, pixels.contiguous(), image.contiguous(), recon.contiguous())
    found: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in steps["ours"]}
    for number in range(rounds + 1):
        for name in found:
            for side in by_turns(number, SIDES):
                batch, function = steps[side][name]
                started = time.perf_counter()
                for start in range(0, len(image), batch):
                    function(slice(start, start + batch))
                if number:
                    found[name][side].append((time.perf_counter() - started) / len(image))
    return found


def our_steps(setting: Setting, pixels: Tensor, image: Tensor) -> dict[str, Step]:
    files, protocol = find_images(setting.photos), protocol_of(setting)
    subject = open_any_vae(setting.vae, torch.device("cpu"), torch.float32)
    metrics = {name: IMAGE_METRICS[name].build(setting.weights) for name in METRICS[:3]}
    inception = build_inception(setting.weights)

    def reconstruct(part: slice) -> Tensor:
        return subject.decode(subject.encode(image[part] * 2 - 1).z, *image.shape[2:])

    recon = round_to_8_bits(reconstruct(slice(None)))
    levels = (recon * 255).round().to(torch.uint8)
    return {
        "reading": (1, lambda part: prepare(0, files[part.start], protocol)),
        "VAE": (1, reconstruct),
        **{
            name: (1, lambda part, metric=metric: metric(recon[part], image[part]))  # type: ignore[misc]
            for name, metric in metrics.items()
        },
        "FID features": (2, lambda part: inception(torch.cat([pixels[part], levels[part]]))),
    }


def their_steps(setting: Setting, way: Way, pixels: Tensor, image: Tensor, recon: Tensor) -> dict[str, Step]:
    photos, theirs = Photos(setting.photos, setting.size), Torchmetrics(setting, way)
    levels = (recon * 255).round().to(torch.uint8)

    def update_fid(part: slice) -> None:
        theirs.fid.update(pixels[part], real=True)
        theirs.fid.update(levels[part], real=False)

    return {
        "reading": (1, lambda part: photos[part.start]),
        "VAE": (way.batch, lambda part: theirs.reconstruct(image[part] * 2 - 1)),
        "psnr": (way.batch, lambda part: theirs.psnr.update(recon[part], image[part])),
        "ssim": (way.batch, lambda part: theirs.ssim.update(recon[part], image[part])),
        "lpips_alex": (way.batch, lambda part: theirs.lpips.update(recon[part], image[part])),
        "FID features": (way.batch, update_fid),
    }


def compare_peaks(ways: Mapping[str, Way]) -> dict[str, int]:
    """Bytes, measured by this script with the same arguments in processes of their own."""
    command = [__file__, *sys.argv[1:], "--measure-peak"]

    def measure(side: str) -> int:
        batch = ways[side].batch if side in ways else 1
        return int(call_child([*command, side, str(batch)]))

    return {side: measure(side) for side in SIDES}


def measure_peak(side: str, setting: Setting, ways: Mapping[str, Way]) -> int:
    """Largest resident size of this process in one run, bytes."""
    reset_peak()
    run(side, setting, ways)
    return peak_bytes()


def differences(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Largest one of each metric between ours and the others."""
    ours = runs["ours"][0].numbers
    return {name: max(abs(ours[name] - runs[side][0].numbers[name]) for side in LAYOUTS) for name in METRICS}


def tolerances(size: int) -> dict[str, float]:
    """What may lie between the numbers of two implementations that are both right."""
    # The VAEs differ in the last bits, so here and there a value is rounded to the next 8-bit level. SSIM: torchmetrics
    # also counts positions where the window hangs over the border, and mirrors the image there.
    return {"psnr": 1e-3, "ssim": 1.28 / size, "lpips_alex": 1e-4, "rfid": 0.1}


def as_table(report: dict[str, Any]) -> str:
    head = (
        "{images} images of {size_px} px, {cores} cores, {threads} threads, {workers} readers, {rounds} rounds, "
        "torch {torch}, diffusers {diffusers}, torchmetrics {torchmetrics} in batches of {batches}, {cpu}"
    )
    lines = [head.format(**report["setting"])]
    lines += ["", f"{'':22}{'ours':>24}" + "".join(f"{side:>24}{'x':>6}" for side in LAYOUTS)]
    runs = report["runs"]

    def add(title: str, columns: Mapping[str, Sequence[float]], *, more_is_better: bool = False) -> None:
        line = f"{title:22}{_with_digits(columns['ours']):>24}"
        for side in LAYOUTS:
            factor = median(columns[side]) / median(columns["ours"])
            line += f"{_with_digits(columns[side]):>24}{1 / factor if more_is_better else factor:>6.2f}"
        lines.append(line)

    def add_of_runs(title: str, get: Callable[[dict[str, Any]], float], *, more_is_better: bool = False) -> None:
        add(title, {side: [get(each) for each in runs[side]] for side in SIDES}, more_is_better=more_is_better)

    add_of_runs("images/s", lambda each: each["num_images"] / each["images_s"], more_is_better=True)
    add_of_runs("cpu, ms per image", lambda each: each["images_cpu_s"] / each["num_images"] * 1e3)
    for part, times in report["parts_s"].items():
        add(f"part {part}, ms", {side: [seconds * 1e3 for seconds in times[side]] for side in SIDES})
    add_of_runs("set up, s", lambda each: each["set_up_s"])
    add_of_runs("finish, s", lambda each: each["finish_s"])
    add_of_runs("all of it, s", lambda each: each["set_up_s"] + each["images_s"] + each["finish_s"])
    if report["peak_bytes"]:
        add("peak, MB", {side: [size / 1e6] for side, size in report["peak_bytes"].items()})
    lines += ["", f"{'':22}" + "".join(f"{side:>24}" for side in SIDES) + f"{'difference':>12}"]
    for name in METRICS:
        cells = "".join(f"{runs[side][0]['numbers'][name]:>24.5f}" for side in SIDES)
        lines.append(f"{name:22}{cells}{report['differences'][name]:>12.1e}")
    return "\n".join(lines)


def _with_digits(values: Sequence[float]) -> str:
    return with_range(values, ".2f" if median(values) < 100 else ".0f")


def gather_photos(source: Path, count: int, folder: Path) -> Path:
    """So many images in a fresh folder; the source's are taken again where they do not reach."""
    files = find_images(source)
    folder.mkdir()
    for number in range(count):
        path = files[number % len(files)].path
        shutil.copy(path, folder / f"{number:05d}{path.suffix}")
    return folder


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of AlexNet and Inception")
    parser.add_argument("--photos", type=Path, default=PHOTOS, metavar="FOLDER", help="(default: the bundled ones)")
    parser.add_argument("--images", type=int, default=24, help="photos in use, repeated if need be (%(default)s)")
    parser.add_argument("--vae", type=Path, default=bundled_path(), help="folder of a VAE (default: the bundled one)")
    parser.add_argument("--size", type=int, default=256, help="side that photos get, px (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each (default: %(default)s)")
    parser.add_argument("--batches", default="1,4,8", help="that torchmetrics tries (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="that read (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--measure-peak", nargs=2, metavar=("SIDE", "BATCH"), help=argparse.SUPPRESS
    )  # how the script calls itself
    arguments = parser.parse_args(words)
    try:
        arguments.batches = tuple(int(batch) for batch in arguments.batches.split(","))
    except ValueError:
        parser.error("--batches must be whole numbers with commas between them")
    if min(*arguments.batches, arguments.rounds, arguments.threads, arguments.workers) < 1 or arguments.images < 2:
        parser.error("--batches, --rounds, --threads and --workers must be at least 1, --images 2")
    if arguments.size < 64 or arguments.size % 8:
        parser.error("--size must be a multiple of 8, at least 64")
    return arguments


def description(arguments: argparse.Namespace, ways: Mapping[str, Way]) -> dict[str, Any]:
    return {
        "images": arguments.images,
        "size_px": arguments.size,
        "cores": num_cores(),
        "threads": arguments.threads,
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "batches": " and ".join(str(way.batch) for way in ways.values()),
        **versions("torch", "diffusers", "torchmetrics"),
        "cpu": cpu_name(),
    }


@contextmanager
def prepared_setting(arguments: argparse.Namespace) -> Iterator[Setting]:
    """With folders of photos and weights, for as long as they are in use."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            photos=gather_photos(arguments.photos, arguments.images, Path(folder) / "photos"),
            scratch=Path(folder),
            weights=arguments.weights,
            vae=arguments.vae,
            size=arguments.size,
            workers=arguments.workers,
        )
        write_their_weights(setting)
        yield setting


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of the packages, on how they will change
    with prepared_setting(arguments) as setting:
        if arguments.measure_peak:
            side, batch = arguments.measure_peak
            ways = {name: Way(batch=int(batch), channels_last=layout) for name, layout in LAYOUTS.items()}
            print(measure_peak(side, setting, ways))
            return
        ways = choose_ways(setting, arguments.batches)
        peaks = compare_peaks(ways) if sys.platform == "linux" else None
        runs = compare_runs(setting, ways, arguments.rounds)
        report: dict[str, Any] = {
            "setting": description(arguments, ways),
            "runs": {side: [asdict(each) for each in found] for side, found in runs.items()},
            "parts_s": compare_parts(setting, ways, arguments.rounds),
            "peak_bytes": peaks,
            "differences": differences(runs),
        }
    print(as_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if wrong := [
        name for name, tolerance in tolerances(arguments.size).items() if report["differences"][name] > tolerance
    ]:
        sys.exit(f"the numbers differ by more than they may: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
