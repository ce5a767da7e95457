#!/usr/bin/env python3
"""A folder of photographs through diffusers' AutoencoderKL, as one writes it with care: the other side of folder.py.

    python tools/bench/diffusers_folder.py encode photos latents --vae my-vae --size 256 --crop center
    python tools/bench/diffusers_folder.py decode latents images --vae my-vae

Threads read ahead and write behind the network, both by a bounded number of files; images of one shape go through it
together, under inference_mode. Images are decoded by Pillow, turned upright, resized once (Lanczos), and padded to a
multiple of 8 by repeating their edge; moments are stored in float16, decoded images as PNG of level 1. What sdvae does
beside this is left out, as one would: digests, a manifest, atomic files, colour profiles, and going on after bad files.
Prints one JSON line: images, and seconds without loading.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdvae._torchvision import ensure_torchvision_importable  # standard library alone: an environment's repair

ensure_torchvision_importable()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

RATIO = 8
SUFFIXES = (".jpg", ".jpeg", ".png")


def read_image(path: Path, size: int | None, crop: bool) -> tuple[Tensor, tuple[int, int]]:
    """x (3, H, W) in [-1, 1], padded, and the height and width before padding."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    if size is not None:
        width, height = image.size
        short = min(width, height)
        if crop:
            left, top = (width - short) // 2, (height - short) // 2
            box = (left, top, left + short, top + short)
            image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        else:
            scaled = (max(size, round(width * size / short)), max(size, round(height * size / short)))
            image = image.resize(scaled, Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
    height, width = x.shape[1:]
    if height % RATIO or width % RATIO:
        x = F.pad(x, (0, -width % RATIO, 0, -height % RATIO), mode="replicate")
    return x, (height, width)


def write_moments(path: Path, moments: Tensor, size: tuple[int, int]) -> None:
    mean, logvar = moments.chunk(2)
    tensors = {"mean": mean.half().contiguous(), "logvar": logvar.clamp(-30.0, 20.0).half().contiguous()}
    save_file(tensors, path, metadata={"height": str(size[0]), "width": str(size[1])})


def read_z(path: Path) -> tuple[Tensor, tuple[int, int]]:
    """The mean (C, h, w), and the height and width of the image."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        return file.get_tensor("mean").float(), (int(metadata["height"]), int(metadata["width"]))


def write_image(path: Path, recon: Tensor, size: tuple[int, int]) -> None:
    levels = recon[:, : size[0], : size[1]].add(1.0).mul_(127.5).round_().clamp_(0.0, 255.0)
    Image.fromarray(levels.byte().permute(1, 2, 0).contiguous().numpy()).save(path, compress_level=1)


Member = tuple[Path, Tensor, tuple[int, int]]


def read_ahead(
    pool: ThreadPoolExecutor, paths: Iterable[Path], read: Callable[[Path], tuple[Tensor, tuple[int, int]]], ahead: int
) -> Iterator[Member]:
    pending: deque[tuple[Path, Future[tuple[Tensor, tuple[int, int]]]]] = deque()
    for path in paths:
        pending.append((path, pool.submit(read, path)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, *future.result()
    for first, future in pending:
        yield first, *future.result()


def batches(members: Iterable[Member], batch_size: int) -> Iterator[list[Member]]:
    """Members of one shape together."""
    waiting: dict[torch.Size, list[Member]] = {}
    for member in members:
        batch = waiting.setdefault(member[1].shape, [])
        batch.append(member)
        if len(batch) == batch_size:
            yield waiting.pop(member[1].shape)
        elif len(waiting) > 16:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def run(arguments: argparse.Namespace, vae: Any) -> int:
    """Returns: the number of images."""
    encodes = arguments.operation == "encode"
    source, out = Path(arguments.source), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if encodes:
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        suffix, write = ".safetensors", write_moments
    else:
        paths = sorted(source.glob("*.safetensors"))
        suffix, write = ".png", write_image
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format

    def read(path: Path) -> tuple[Tensor, tuple[int, int]]:
        return read_image(path, arguments.size, arguments.crop == "center") if encodes else read_z(path)

    workers = arguments.workers
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as writers, torch.inference_mode():
        writing: deque[Future[None]] = deque()
        for batch in batches(read_ahead(readers, paths, read, 2 * workers), arguments.batch_size):
            x = torch.stack([tensor for _, tensor, _ in batch]).to(memory_format=layout)
            results = vae.encode(x).latent_dist.parameters if encodes else vae.decode(x).sample
            for (path, _, size), result in zip(batch, results, strict=True):
                writing.append(
                    writers.submit(write, out / (path.name.removesuffix(".safetensors") + suffix), result, size)
                )
                while len(writing) > 2 * workers:
                    writing.popleft().result()
        for future in writing:
            future.result()
    return len(paths)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=("encode", "decode"))
    parser.add_argument("source", help="folder of .jpg and .png, or for decode of what encode wrote")
    parser.add_argument("out")
    parser.add_argument("--vae", required=True, help="a diffusers folder")
    parser.add_argument("--size", type=int, help="short side after resizing, px (default: as it is)")
    parser.add_argument("--crop", choices=("none", "center"), default="none", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="threads that read, and as many that write (%(default)s)"
    )
    parser.add_argument("--channels-last", action="store_true", help="weights and batches in this layout")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval()
    if arguments.channels_last:
        vae.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    count = run(arguments, vae)
    print(json.dumps({"images": count, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
