"""train as a user calls it: what it prints, what it writes, and what it says of input that cannot work."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from sdvae.checkpoints.store import load_autoencoder
from sdvae.cli.main import cli
from sdvae.config import config_to_dict, read_config
from sdvae.training.config import TrainConfig
from sdvae.training.monitoring.trackers import TRACKERS

Settings = dict[str, Any]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "json-output.md"


def sdvae_train(config: Path, *options: object) -> Result:
    return CliRunner().invoke(cli, ["train", str(config), *map(str, options)])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def documented(section: str) -> set[str]:
    """Names in the first column of the tables of one section."""
    text = DOCUMENTATION.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.fixture
def photos(tmp_path: Path, make_images: Callable[[Path, Mapping[str, tuple[int, int]]], Path]) -> Path:
    return make_images(tmp_path / "photos", {f"{index}.png": (64, 48) for index in range(5)})


@pytest.fixture
def write(tmp_path: Path, photos: Path) -> Callable[..., Path]:
    """Writes a config that trains in a second; keywords are sections whose values replace those here."""

    def write(**sections: Settings) -> Path:
        settings: Settings = {
            "run_dir": str(tmp_path / "run"),
            "data": {"path": str(photos), "num_val_images": 1, "crop_px": 32},
            "model": {"block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1},
            "training": {"steps": 2, "batch_size": 2, "num_calibration_images": 2, "cpu": True},
        }
        for name, changes in sections.items():
            settings[name] = {**settings.get(name, {}), **changes}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


def test_a_dry_run_prints_what_would_be_trained_and_writes_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(training={"trained": "decoder", "accumulation": 3, "steps": 4})
    before = tree(tmp_path)
    result = sdvae_train(config, "--dry-run", "--set", "training.lr=2e-4", "--set", "training.trackers=[]")
    assert (result.exit_code, result.stderr) == (0, "")
    assert tree(tmp_path) == before

    # the settings are a config that gives the same run, comments and all
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout, encoding="utf-8")
    assert read_config(TrainConfig, printed) == read_config(
        TrainConfig, config, ["training.lr=2e-4", "training.trackers=[]"]
    )

    facts = [line for line in result.stdout.splitlines() if line.startswith("# ")]
    assert facts[0] == "# data: 4 images for training, 1 for validation"
    trained, total = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", facts[1]))
    assert 0 < trained < total
    assert facts[2] == "# steps: 4 of 6 images on 1 device(s), 6 epochs"
    assert facts[3] == "# logs: metrics.jsonl"
    assert facts[4].startswith("# memory per device, estimated: ") and "#   activations: " in result.stdout
    assert facts[-1] == "# Nothing was written."


def test_a_dry_run_in_json_has_the_documented_fields(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(loss={"adversarial": {"weight": 0.5, "channels": 8, "num_layers": 2}})
    before = tree(tmp_path)
    result = sdvae_train(config, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert tree(tmp_path) == before
    data = json.loads(result.stdout)
    assert data.keys() == documented("train --dry-run") - data["memory"].keys()
    assert data["memory"].keys() <= documented("train --dry-run")
    assert (data["command"], data["dry_run"]) == ("train", True)
    assert data["config"] == config_to_dict(read_config(TrainConfig, config))
    assert (data["num_train_images"], data["num_val_images"], data["steps"]) == (4, 1, 2)
    assert (data["num_processes"], data["images_per_step"], data["epochs"]) == (1, 2, 1.0)
    vae_bytes = 4 * data["num_parameters"]
    assert data["num_trained_parameters"] == data["num_parameters"]
    assert (data["memory"]["weights"], data["memory"]["optimizer"]) == (vae_bytes, 2 * vae_bytes)
    assert data["memory"]["discriminator"] > 0 and data["memory"]["perceptual"] == 0
    assert data["memory"]["total"] == sum(size for name, size in data["memory"].items() if name != "total")


def test_a_run_in_json_has_the_documented_fields_and_leaves_what_it_names(write: Callable[..., Path]) -> None:
    result = sdvae_train(write(), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data.keys() == documented("train")
    assert (data["command"], data["steps"], data["best_step"], data["val_lpips"]) == ("train", 2, 2, None)
    assert load_autoencoder(data["vae_dir"]).config.scaling_factor == data["scaling_factor"]
    rows = (Path(data["vae_dir"]).parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[-1])["val/psnr"] == data["val_psnr"]


def test_a_run_in_words_says_where_the_vae_is_and_how_good(write: Callable[..., Path], tmp_path: Path) -> None:
    result = sdvae_train(write())
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'run/vae'))}: 2 steps, [\d.]+ dB on the held-out images, scaling_factor [\d.]+\n",
        result.stdout,
    )


def empty(photos: Path) -> Settings:
    for path in photos.iterdir():
        path.unlink()
    return {}


def damaged(photos: Path) -> Settings:
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    return {}


def not_installed(_: Path) -> Settings:
    absent = [name for name, module in TRACKERS.items() if find_spec(module) is None]
    if not absent:
        pytest.skip("every tracker is installed")
    return {"training": {"trackers": absent[:1]}}


BAD_INPUT: dict[str, tuple[Callable[[Path], Settings], int, str]] = {
    "unknown key": (
        lambda _: {"training": {"learning_rate": 1}, "loss": {"kl_weight": 1e-6}},
        2,
        r"config.yaml: unknown key 'loss.kl_weight'; did you mean 'rec_weight'\?",
    ),
    "unknown key, near one": (
        lambda _: {"loss": {"perceptual": {"wieght": 1}}},
        2,
        r"unknown key 'loss.perceptual.wieght'; did you mean 'weight'\?",
    ),
    "impossible value": (lambda _: {"training": {"lr": -1}}, 2, r"'training.lr' is -1.0; expected above 0"),
    "unknown model parameter": (lambda _: {"model": {"chanels": 3}}, 2, r"unknown key 'model.chanels'; known keys: in"),
    "no such folder": (lambda _: {"data": {"path": "nowhere"}}, 2, r"nowhere: no such file or folder"),
    "empty folder": (empty, 2, r"photos: no image"),
    "damaged images": (damaged, 1, r"photos: none of the 4 images looked at can be read: .*1.png"),
    "images smaller than the crop": (
        lambda _: {"data": {"crop_px": 256}},
        2,
        r"'data.crop_px' is 256, but the 4 images .* are smaller: their short sides are 48 to 48 px. Set data.crop_px",
    ),
    "images smaller than min_px": (
        lambda _: {"data": {"min_px": 100}},
        2,
        r"'data.min_px' is 100, but the 4 images of .* the largest of them 48 px; lower data.min_px",
    ),
    "all images held out": (lambda _: {"data": {"num_val_images": 5}}, 2, r"'data.num_val_images' is 5, but .* 5 im"),
    "unknown tracker": (
        lambda _: {"training": {"trackers": ["tensorbord"]}},
        2,
        r"unknown tracker 'tensorbord'; did you mean 'tensorboard'\?",
    ),
    "tracker that is not installed": (not_installed, 2, r"which is not installed: pip install"),
    "no such VAE to start from": (lambda _: {"model": {}, "training": {"init": "./nowhere"}}, 2, r"nowhere"),
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_its_exit_code_and_message_before_anything_is_written(
    write: Callable[..., Path], photos: Path, tmp_path: Path, name: str, dry_run: bool
) -> None:
    spoil, exit_code, message = BAD_INPUT[name]
    config = write(**spoil(photos))
    before = tree(tmp_path)
    result = sdvae_train(config, *["--dry-run"] * dry_run)
    assert re.search(message, result.stderr), result.stderr
    assert "bug in sdvae" not in result.stderr
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert tree(tmp_path) == before


@pytest.fixture
def no_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without network that has never seen perceptual weights. Returns: torch hub's folder there."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SDVAE_WEIGHTS", raising=False)
    return home / "hub"


def test_missing_perceptual_weights_are_said_with_every_place_and_every_way(
    write: Callable[..., Path], tmp_path: Path, no_weights: Path
) -> None:
    config = write(loss={"perceptual": {"weight": 1.0, "net": "squeeze"}})
    before = tree(tmp_path)
    result = sdvae_train(config)
    assert (result.exit_code, result.stdout) == (1, "")
    for said in (
        "no weights of squeezenet1_1. Looked for",
        "$SDVAE_WEIGHTS: not set",
        f"torch hub's cache, {no_weights}/checkpoints: not there",
        "not asked, HF_HUB_OFFLINE is set",
        "loss.perceptual.weights_path: set it to the file",
        "fetch https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth (5 MB)",
        "Or do without them: loss.perceptual.weight=0 trains without it",
    ):
        assert said in result.stderr
    assert tree(tmp_path) == before

    # a dry run has the rest to tell all the same, unless the place was named
    planned = sdvae_train(config, "--dry-run")
    assert planned.exit_code == 0 and "# the run would first look for perceptual weights elsewhere" in planned.stdout
    named = sdvae_train(config, "--dry-run", "--set", f"loss.perceptual.weights_path={tmp_path}")
    assert named.exit_code == 1 and f"loss.perceptual.weights_path = {tmp_path}: holds none of" in named.stderr


def test_resume_and_overwrite_exclude_each_other(write: Callable[..., Path]) -> None:
    result = sdvae_train(write(), "--resume", "--overwrite")
    assert result.exit_code == 2
    assert "--resume goes on with a run and --overwrite replaces it; give one of them" in result.stderr


def test_a_run_folder_is_resumed_or_replaced_only_as_told(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    nothing = sdvae_train(config, "--resume")
    assert nothing.exit_code == 2 and "nothing to resume: no checkpoint in" in nothing.stderr
    assert not (tmp_path / "run").exists()

    assert sdvae_train(config).exit_code == 0
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    def refused(*options: object) -> Result:
        result = sdvae_train(config, *options)
        assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
        return result

    again = refused()
    assert again.exit_code == 2 and "holds a run already; go on with --resume, start afresh with" in again.stderr
    other_model = refused("--resume", "--set", "model.block_out_channels=[4, 4]")
    assert other_model.exit_code == 2
    assert "'model.block_out_channels' is [4, 4], but the checkpoint" in other_model.stderr
    assert "step-00000002 has [4, 8]" in other_model.stderr
    other_parts = refused("--resume", "--set", "loss.adversarial={weight: 0.5, channels: 8, num_layers: 2}")
    assert other_parts.exit_code == 1 and "step-00000002 does not fit this run" in other_parts.stderr
    assert "Resume with the run's own config.yaml" in other_parts.stderr

    longer = sdvae_train(config, "--resume", "--set", "training.steps=3", "--json")
    assert longer.exit_code == 0 and json.loads(longer.stdout)["steps"] == 3
    assert sdvae_train(config, "--overwrite").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-00000002"]
