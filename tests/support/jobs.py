"""Functions for processes of their own, which must be importable there."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdvae.codec.run import decode_folder, encode_folder
from sdvae.evaluation import images, runner
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import PRESETS
from sdvae.processes import join_processes

__all__ = ["encode_and_decode", "evaluate_in_small_blocks", "meet_twice", "run_script"]


def run_script(path: Path, words: Sequence[str]) -> None:
    """As `python path words...`."""
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def meet_twice() -> None:
    for _ in range(2):
        processes = join_processes("cpu")
        processes.gather(None)
        print(processes.rank, processes.count, processes.gather(f"from {processes.rank}"))


def evaluate_in_small_blocks(photos: Path, out: Path, vae: Path) -> None:
    images.BLOCK_IMAGES = 2
    protocol = replace(PRESETS["native"], metrics=("psnr", "ssim"), resamples=199)
    options = EvaluateOptions(gallery_images=2, device="cpu")
    runner.evaluate(photos, out, [vae], options, reference=vae, protocol=protocol)


def encode_and_decode(photos: Path, out: Path, decoded: Path, vae: Path) -> None:
    """One after the other, as a script does; prints a line of JSON for each report."""
    print(json.dumps(encode_folder(photos, out, vae).to_json()))
    print(json.dumps(decode_folder(out, decoded, vae).to_json()))
