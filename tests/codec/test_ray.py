"""The engine ray gives what the local one gives, also where a worker is killed.

One real Ray, with two workers, started by the command. What workers do with each format is tested in this process.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import select
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec import ray as ray_engine
from sdvae.codec.options import EncodeOptions
from sdvae.codec.ray import BlockWorker, divide
from sdvae.codec.run import EncodeRun, encode_folder, vae_record
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError, SdvaeError
from sdvae.latents.formats import CACHE_FORMATS
from sdvae.latents.manifest import read_manifest
from sdvae.latents.registry import FORMATS
from sdvae.model.autoencoder import AutoencoderKL

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
ROOT = Path(__file__).parents[2]

# Python imports it in every process that finds it on its path. Only workers put shards in place; the first that has
# done so ends there and then.
DIE_ONCE = """
import os, signal
replace = os.replace
def replace_and_die(source, target):
    replace(source, target)
    if str(target).endswith(".tar"):
        try:
            os.close(os.open(os.environ["KILLED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
"""


def latents(out: Path, format: str) -> dict[str, bytes]:
    """Each key with header and tensors, as bytes; a key may be in the folder once."""
    items = [item for path in FORMATS[format].find_files(out) for item in FORMATS[format].read_items(path)]
    times = Counter(header.source.key for header, _ in items)
    assert [key for key, count in times.items() if count > 1] == []
    arrays = [(header, {name: tensor.numpy() for name, tensor in tensors.items()}) for header, tensors in items]
    return {item[0].source.key: FORMATS["webdataset"].to_bytes([item]) for item in arrays}


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """Those that inherited a variable of the environment, also where their parent is gone."""
    return [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(name) == value]


def run_in_a_terminal(command: list[str], **options: Any) -> tuple[int, str, str]:
    """A command that takes its stderr for a terminal. Returns: exit code, stdout and stderr."""
    import termios

    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))  # tqdm shows nothing in a terminal of no width
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, **options) as process:
        os.close(stderr)
        shown, open_ends = b"", True
        while open_ends and (process.poll() is None or select.select([terminal], [], [], 0)[0]):
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 65536)
                except OSError:  # Linux: nobody can write any more
                    open_ends = False
        stdout, _ = process.communicate()
    os.close(terminal)
    return process.returncode, stdout, shown.decode()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")
def test_the_command_loses_nothing_and_doubles_nothing_by_a_killed_worker_and_leaves_no_process(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    images = make_images(tmp_path / "images", {f"{i:02}.png": (32 + 8 * (i % 3), 32) for i in range(26)})
    (images / "bad.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, ".")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(DIE_ONCE)
    words = ["--format", "webdataset", "--shard-size", "4", "--batch-size", "1", "--workers", "1"]  # file after file
    command = [sys.executable, "-m", "sdvae", "encode", "images.tar", "out", "--vae", str(vae_path), "--json", *words]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "hook")]),
        "KILLED": str(tmp_path / "killed"),
        "TQDM_MININTERVAL": "0",  # the bar shows each step
    }
    code, stdout, stderr = run_in_a_terminal(
        [*command, "--engine", "ray", "--ray-workers", "2"],
        cwd=tmp_path,  # its relative paths are to be found by workers that run elsewhere
        env=environment,
    )
    assert psutil.wait_procs(processes_with("KILLED", environment["KILLED"]), timeout=10)[1] == []
    assert (tmp_path / "killed").exists(), "no worker was killed: this tests nothing"
    assert code == 3, stderr
    report = json.loads(stdout)
    assert (report["done"], report["failed"], report["failures"][0]["key"]) == (26, 1, "images.tar/bad.png")
    assert (report["manifest"], report["device"]) == ("out/manifest.jsonl", "cpu")

    of_ray = r"(\x1b\[33m)?\(raylet\)[^\r\n]*|[^\r\n]*RAY_BACKEND_LOG_LEVEL[^\r\n]*"  # it tells of the killed worker
    lines = [line for line in re.split(r"[\r\n]+", re.sub(of_ray, "", stderr)) if line.strip()]
    steps = [re.search(r"^encode: .* (\d+)/27 \[", line) for line in lines]
    assert all(steps), lines
    seen = [int(step[1]) for step in steps if step]
    assert seen == sorted(seen) and seen[-1] == 27 and len(set(seen)) > 4

    monkeypatch.chdir(tmp_path)
    out, local = Path("out"), Path("local")
    options = EncodeOptions(format="webdataset", shard_size=4, batch_size=1, workers=1)
    encode_folder("images.tar", local, vae=vae_path, options=options)
    assert latents(out, "webdataset") == latents(local, "webdataset") and len(latents(out, "webdataset")) == 26
    names = [[path.name for path in FORMATS["webdataset"].find_files(folder)] for folder in (out, local)]
    assert names[0] == names[1] and read_manifest(out).num_items == 26
    assert [each.vae.name for each in read_manifest(out).settings.values()] == [str(vae_path)]
    assert verify_cache(out, images="images.tar", vae=vae_path).problems == ()
    assert not list(out.glob(".*")), "what the killed worker was about to write is still there"


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_blocks_done_apart_and_one_of_them_twice_are_what_one_run_writes(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str
) -> None:
    """A worker in this process, fed as Ray does; of a worker that was killed another one repeats the block."""
    images = make_images(tmp_path / "images", {f"{i}.png": (24, 16) for i in range(9)})
    (images / "bad.png").write_bytes(b"no image")
    options = EncodeOptions(format=format, shard_size=2 if FORMATS[format].is_sharded else None, batch_size=1)
    out, local = tmp_path / "out", tmp_path / "local"
    plan = EncodeRun(images, out, opened_vae, options).plan
    blocks = divide(plan.jobs, options, workers=2)
    assert len(blocks) > 4 and [job for block in blocks for job in block] == list(plan.jobs)
    worker = BlockWorker(out, options, opened_vae, vae_record(opened_vae))
    results = worker({"block": [pickle.dumps(block) for block in (blocks[0], *blocks)]})["result"][1:]
    tallies = [pickle.loads(result).tally for result in results]
    assert sum(tally.done for tally in tallies) == 9
    failures = [*plan.failures, *(failure for tally in tallies for failure in tally.failures)]
    assert [failure.key for failure in failures] == ["bad.png"]
    encode_folder(images, local, vae=opened_vae, options=options)
    assert latents(out, format) == latents(local, format)


def test_a_worker_that_finds_another_vae_says_so_with_each_block(opened_vae: OpenedVae, tmp_path: Path) -> None:
    expected = replace(vae_record(opened_vae), digest="sha256:0")
    worker = BlockWorker(tmp_path, EncodeOptions(), opened_vae, expected)
    [result] = worker({"block": [pickle.dumps(())]})["result"]
    error = pickle.loads(result)
    assert isinstance(error, SdvaeError) and "a worker finds another VAE there" in str(error)


def test_without_ray_the_command_to_install_it_is_named(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package ray.*pip install -c constraints.txt '\.\[ray\]'"):
        encode_folder(images, tmp_path / "out", vae=vae_path, options=EncodeOptions(engine="ray"))


def test_options_that_contradict_the_engine_are_refused(
    tmp_path: Path, make_images: MakeImages, tiny_vae: AutoencoderKL
) -> None:
    with pytest.raises(ConfigError, match="ray_workers is given, but the engine is local"):
        EncodeOptions(ray_workers=2)
    with pytest.raises(ConfigError, match="divides the images itself"):
        EncodeOptions(engine="ray", shard="1/2")
    with pytest.raises(ConfigError, match="engine is 'spark'; expected one of local, ray"):
        EncodeOptions(engine="spark")
    pytest.importorskip("ray", reason="ray is not installed")
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    with pytest.raises(ConfigError, match="give its folder, file or hub id"):
        encode_folder(images, tmp_path / "out", vae=tiny_vae, options=EncodeOptions(engine="ray"))
