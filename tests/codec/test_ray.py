"""The engine ray gives what the local one gives, also where a worker is killed; a real Ray with two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdvae.codec import ray as ray_engine
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.errors import ConfigError
from sdvae.latents.manifest import read_manifest
from sdvae.latents.registry import FORMATS
from sdvae.model.autoencoder import AutoencoderKL

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
ROOT = Path(__file__).parents[2]


def latents(out: Path, format: str) -> dict[str, bytes]:
    """Each key with header and tensors, as bytes; a key may be in the folder once."""
    items = [item for path in FORMATS[format].find_files(out) for item in FORMATS[format].read_items(path)]
    times = Counter(header.source.key for header, _ in items)
    assert [key for key, count in times.items() if count > 1] == []
    return {header.source.key: FORMATS["webdataset"].encode([(header, tensors)]) for header, tensors in items}


def ray_processes() -> list[psutil.Process]:
    """Those below this process that Ray started."""
    return [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline()[:4])]


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """Those that inherited a variable of the environment, also where their parent is gone."""
    return [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(name) == value]


@pytest.fixture(scope="module")
def two_workers_of_which_one_is_killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local Ray; the first worker that is about to put its third file in place, and the first that has put a shard
    in place, ends there and then. Yields: the folder with a note of each.
    """
    ray = pytest.importorskip("ray", reason="ray is not installed")
    marks = tmp_path_factory.mktemp("killed")
    folder = str(marks)

    def in_each_worker() -> None:  # Ray copies it into the workers, so that it can use nothing from out here
        import os
        import signal

        replace, count = os.replace, 0

        def die_once(name: str) -> None:
            try:
                os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        def replace_and_die(source: Any, target: Any) -> None:
            nonlocal count
            if str(target).endswith(".safetensors"):
                count += 1
                if count == 3:
                    die_once("file")
            replace(source, target)
            if str(target).endswith(".tar"):
                die_once("shard")

        os.replace = replace_and_die

    environment = {"worker_process_setup_hook": in_each_worker}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=environment,
    )
    try:
        yield marks
    finally:
        ray.shutdown()
        assert psutil.wait_procs(ray_processes(), timeout=20)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("format", "shard_size", "mark"), [("safetensors", None, "file"), ("webdataset", 4, "shard")])
def test_a_killed_worker_loses_nothing_and_doubles_nothing(
    tmp_path: Path,
    make_images: MakeImages,
    vae_path: Path,
    two_workers_of_which_one_is_killed: Path,
    format: str,
    shard_size: int | None,
    mark: str,
) -> None:
    images = make_images(tmp_path / "images", {f"{i:02}.png": (32 + 8 * (i % 3), 32) for i in range(26)})
    options: dict[str, Any] = {"format": format, "shard_size": shard_size, "batch_size": 1}
    options["workers"] = 1  # one file after the other
    out, local = tmp_path / "out", tmp_path / "local"
    seen: list[tuple[int, int]] = []
    report = encode_folder(
        images,
        out,
        vae=vae_path,
        on_progress=lambda *n: seen.append(n),
        options=EncodeOptions(engine="ray", ray_workers=2, **options),
    )
    assert (two_workers_of_which_one_is_killed / mark).exists(), "no worker was killed: this tests nothing"
    assert (report.done, report.failed, report.device) == (26, 0, "cpu")
    assert seen == sorted(seen) and seen[-1] == (26, 26) and len(seen) > 4
    encode_folder(images, local, vae=vae_path, options=EncodeOptions(**options))
    assert latents(out, format) == latents(local, format) and len(latents(out, format)) == 26
    names = [[path.name for path in FORMATS[format].find_files(folder)] for folder in (out, local)]
    assert names[0] == names[1] and read_manifest(out).num_items == 26
    assert verify_cache(out, images=images, vae=vae_path).problems == ()
    assert not list(out.glob(".*")), "what the killed worker was about to write is still there"


@pytest.mark.slow
def test_the_command_reports_all_workers_and_leaves_no_process(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    images = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(10)})
    (images / "bad.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, ".")
    command = [sys.executable, "-m", "sdvae", "encode", "images.tar", "out", "--vae", str(vae_path), "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    result = subprocess.run(
        [*command, "--engine", "ray", "--ray-workers", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # its relative paths are to be found by workers that run elsewhere
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STARTED_BY": str(tmp_path)},
    )
    assert psutil.wait_procs(processes_with("STARTED_BY", str(tmp_path)), timeout=10)[1] == []
    assert result.returncode == 3, result.stderr
    report = json.loads(result.stdout)
    assert (report["done"], report["failed"], report["failures"][0]["key"]) == (10, 1, "images.tar/bad.png")
    assert report["manifest"] == "out/manifest.jsonl"
    assert [line for line in result.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line] == []
    assert read_manifest(tmp_path / "out").num_items == 10
    assert [each.vae.name for each in read_manifest(tmp_path / "out").settings.values()] == [str(vae_path)]


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
