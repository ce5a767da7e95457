"""A run that is killed or interrupted, as a real process: only whole files, and the next run finishes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forked, fork_sdvae

from sdvae.codec.run import encode_folder
from sdvae.files import _host
from sdvae.latents.safetensors import LatentFile

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

COUNT = 40
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@contextmanager
def encoding(images: Path, out: Path, vae_path: Path) -> Iterator[Forked]:
    """A process in the middle of encoding: some files are written, most are not."""
    words = ("encode", images, out, "--vae", vae_path, "--batch-size", 1)
    process = fork_sdvae(*words, folder=out.parent, seconds_per_file=0.2)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.safetensors"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        yield process
    finally:
        process.kill()


def whole_files(out: Path) -> int:
    """How many latent files there are; all of them have to be whole."""
    paths = list(out.glob("*.safetensors"))
    for path in paths:
        LatentFile.read(path)
    return len(paths)


def test_a_killed_run_leaves_only_whole_files_and_the_next_one_finishes(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {f"{i:02}.png": (16, 16) for i in range(COUNT)})
    out = tmp_path / "out"
    with encoding(images, out, vae_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    begun = whole_files(out)
    assert 3 <= begun < COUNT
    # the kill may have hit between two writes: this is what it leaves when it hits one
    (out / f".{'0' * 16}-{_host()}-{process.pid}-00000000.sdvae-tmp").write_bytes(b"half")
    report = encode_folder(images, out, vae=vae_path)
    assert (report.done, report.skipped, report.failed) == (COUNT - begun, begun, 0)
    assert whole_files(out) == COUNT == len(os.listdir(out)) - 1  # the manifest


def test_an_interrupted_run_ends_with_130_and_whole_files(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {f"{i:02}.png": (16, 16) for i in range(COUNT)})
    out = tmp_path / "out"
    with encoding(images, out, vae_path) as process:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stdout == "" and stderr.strip().splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in stderr
    assert 3 <= whole_files(out) == len(os.listdir(out)) - 1 < COUNT  # and the manifest
