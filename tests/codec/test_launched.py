"""One process needs no launcher; of several, each takes a part and the main one speaks for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdvae.codec.launched import join_launched
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.run import encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError
from sdvae.latents.manifest import read_manifest

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("world_size", [None, "1"])
def test_alone_a_process_does_all(world_size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("RANK", "0")
    options = EncodeOptions(shard="2/8")
    launched, same = join_launched(options)
    assert launched.is_main and same == options and launched.gather("mine") == ["mine"]


def test_what_would_divide_the_work_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="shard is '1/2', but a launcher started 2 processes.*leave out --shard"):
        join_launched(DecodeOptions(shard="1/2"))
    with pytest.raises(ConfigError, match="run it without a launcher"):
        join_launched(EncodeOptions(engine="ray"))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but the processes do not find each other.*MASTER_ADDR"):
        join_launched(EncodeOptions())


@pytest.mark.slow
def test_processes_of_a_launcher_divide_the_images_and_give_one_report(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(12)}), tmp_path / "out"
    bad = ["3.png", "5.png", "7.png", "8.png"]  # of both parts
    for name in bad:
        (images / name).write_bytes(b"no image")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sdvae"]

    def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*launcher, *map(str, arguments), "--vae", str(vae_path), "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)

    planned = launch("encode", images, out, "--dry-run")
    assert planned.returncode == 0 and not out.exists(), planned.stderr
    assert json.loads(planned.stdout)["counts"] == {"total": 12, "run": 12, "skip": 0, "fail": 0}
    begun = encode_folder(images, out, vae=vae_path, shard="1/3").done  # some of either process
    failed = launch("encode", images, out)
    report: dict[str, Any] = json.loads(failed.stdout)
    assert 1 <= begun < 8 and (report["done"], report["skipped"]) == (8 - begun, begun)
    assert (report["failed"], report["exit_code"]) == (4, 3)
    assert [failure["key"] for failure in report["failures"]] == bad
    assert failed.returncode != 0, "the launcher passes on that the main process did not end with 0"
    assert report["manifest"] == f"{out}/manifest.jsonl" and read_manifest(out).num_items == 8
    assert verify_cache(out).problems == ()
    assert len(list(out.glob("manifest.part-*-of-2.jsonl"))) == 2
    decoded = launch("decode", out, tmp_path / "decoded")
    assert json.loads(decoded.stdout)["done"] == 8 and len(list((tmp_path / "decoded").iterdir())) == 8
    assert decoded.returncode == 0, decoded.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_main_process_does_not_wait_for_one_that_was_killed(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, slowly_writing_sdvae: list[str]
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i:02}.png": (64, 64) for i in range(40)}), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*slowly_writing_sdvae, "encode", str(images), str(out), "--vae", str(vae_path)]
    processes = [
        subprocess.Popen(command, env={**ENVIRONMENT, **meeting, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("manifest.part-2-of-2.jsonl")):  # it is about to write
            assert time.monotonic() < deadline and processes[1].poll() is None
            time.sleep(0.002)
        processes[1].send_signal(signal.SIGKILL)
        _, stderr = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert "Error: another of the 2 processes ended early; what is written is whole" in stderr
    assert "bug in sdvae" not in stderr
