"""One process needs no launcher; of several, each takes a part and the main one speaks for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from forked import fork_launched, run_sdvae
from jobs import encode_and_decode

from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.run import encode_folder, join_launched
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError
from sdvae.latents.manifest import read_manifest
from sdvae.processes import Processes

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_alone_a_process_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = EncodeOptions(shard="2/8")
    assert join_launched(options) == (Processes(), options)


def test_what_would_divide_the_work_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="shard is '1/2', but a launcher started 2 processes.*leave out --shard"):
        join_launched(DecodeOptions(shard="1/2"))
    with pytest.raises(ConfigError, match="run it without a launcher"):
        join_launched(EncodeOptions(engine="ray"))


@pytest.mark.slow
def test_processes_of_a_launcher_divide_the_images_and_give_one_report(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(12)}), tmp_path / "out"
    bad = ["3.png", "5.png", "7.png", "8.png"]  # of both parts
    for name in bad:
        (images / name).write_bytes(b"no image")
    words = ("--vae", str(vae_path), "--json")

    def launch(*arguments: object) -> tuple[int | None, str]:
        """Exit code and output of the main process. Raises: AssertionError if another one prints or fails."""
        started = fork_launched(run_sdvae, [*map(str, arguments), *words], count=2, folder=tmp_path)
        (output, errors), (nothing, _) = (process.communicate() for process in started)
        assert nothing == "" and started[1].returncode == 0, errors
        return started[0].returncode, output

    code, planned = launch("encode", images, out, "--dry-run")
    assert code == 0 and not out.exists(), planned
    assert json.loads(planned)["counts"] == {"total": 12, "run": 12, "skip": 0, "fail": 0}
    begun = encode_folder(images, out, vae=vae_path, options=EncodeOptions(shard="1/3")).done  # some of either process
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sdvae"]
    failed = subprocess.run(
        [*launcher, "encode", str(images), str(out), *words], capture_output=True, text=True, env=ENVIRONMENT
    )
    report: dict[str, Any] = json.loads(failed.stdout)
    assert 1 <= begun < 8 and (report["done"], report["skipped"]) == (8 - begun, begun)
    assert (report["failed"], report["exit_code"]) == (4, 3)
    assert [failure["key"] for failure in report["failures"]] == bad
    assert failed.returncode != 0, "the launcher passes on that the main process did not end with 0"
    assert report["manifest"] == f"{out}/manifest.jsonl" and read_manifest(out).num_items == 8
    assert verify_cache(out).problems == ()
    assert len(list(out.glob("manifest.part-*-of-2.jsonl"))) == 2
    code, decoded = launch("decode", out, tmp_path / "decoded")
    assert json.loads(decoded)["done"] == 8 and len(list((tmp_path / "decoded").iterdir())) == 8
    assert code == 0


def test_a_script_under_a_launcher_divides_the_images_too(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(6)}), tmp_path / "out"
    started = fork_launched(encode_and_decode, images, out, tmp_path / "decoded", vae_path, count=2, folder=tmp_path)
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0], "each process returns the report of all"
    encoded, decoded = map(json.loads, outputs[0][0].splitlines())
    assert (encoded["done"], decoded["done"]) == (6, 6) and len(list((tmp_path / "decoded").iterdir())) == 6
    assert len(list(out.glob("manifest.part-*-of-2.jsonl"))) == 2 and read_manifest(out).num_items == 6


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_main_process_does_not_wait_for_one_that_was_killed(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", {f"{i:02}.png": (16, 16) for i in range(40)}), tmp_path / "out"
    processes = fork_launched(
        run_sdvae, ["encode", str(images), str(out), "--vae", str(vae_path)], 0.2, count=2, folder=tmp_path
    )
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
    assert processes[0].returncode == 1
    assert "Error: another of the 2 processes ended early. Finished files are complete" in stderr
    assert "bug in sdvae" not in stderr
