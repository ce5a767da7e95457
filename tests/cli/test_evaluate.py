"""`sdvae evaluate` and `sdvae report` as a shell calls them: output, gates, exit codes, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sdvae.cli.main import cli

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
Sdvae = Callable[..., Result]


@pytest.fixture
def sdvae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sdvae:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def photos(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "photos", {f"{name}.png": (40, 32) for name in "abc"})


@pytest.fixture
def mine(vae_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(vae_path, tmp_path / "mine")


@pytest.fixture
def theirs(other_vae_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(other_vae_path, tmp_path / "theirs")


PLAIN = ("--metrics", "psnr,l1", "--stress", "none", "--gallery", "1")


def test_the_table_and_the_comparison_are_printed(sdvae: Sdvae, photos: Path, mine: Path, theirs: Path) -> None:
    result = sdvae("evaluate", photos, "--vae", mine, "--reference", theirs, "--out", "out", *PLAIN)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["3", "images", "mine", "theirs", "(reference)"]
    assert lines[1].startswith("PSNR dB") and lines[1].endswith("higher is better")
    assert "mine against theirs:" in lines
    assert any(line.startswith("  swap: ") for line in lines)
    assert lines[-1] == "Report: out/report.html"


def test_json_is_one_object_without_pictures(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    result = sdvae("evaluate", photos, "--vae", mine, "--out", "out", "--json", *PLAIN)
    data = json.loads(result.stdout)
    assert data["command"] == "evaluate" and data["schema"] == "sdvae.evaluation/1"
    assert data["vaes"][0]["summary"]["psnr"]["count"] == 3
    assert "gallery" not in data and "per_image" not in data
    assert json.loads(Path("out/result.json").read_text())["gallery"]


def test_a_gate_that_fails_gives_1_and_the_reason_and_one_that_holds_0(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    arguments = ("evaluate", photos, "--vae", mine, "--out", "out", *PLAIN)
    failed = sdvae(*arguments, "--fail-if", "psnr<99", "--fail-if", "l1>1e6")
    assert failed.exit_code == 1
    assert "FAILED: psnr<99: mine: psnr is" in failed.stdout and "passed: l1>1e6" in failed.stdout
    assert sdvae(*arguments, "--fail-if", "psnr<1").exit_code == 0


def test_a_gate_on_the_difference(sdvae: Sdvae, photos: Path, mine: Path, theirs: Path) -> None:
    arguments = ("evaluate", photos, "--vae", mine, "--reference", theirs, "--out", "out", *PLAIN)
    assert sdvae(*arguments, "--fail-if", "delta.psnr<-90").exit_code == 0
    assert sdvae(*arguments, "--fail-if", "delta.psnr>-90").exit_code == 1


def test_an_unreadable_image_gives_3(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    result = sdvae("evaluate", photos, "--vae", mine, "--out", "out", *PLAIN)
    assert result.exit_code == 3
    assert "not read: bad.png: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", "--metrics", "pnsr"), "'pnsr' is no metric"),
        (("photos", "--crop", "center"), "a centre crop needs a size"),
        (("photos", "--fail-if", "psnr!24"), "psnr!24"),
        (("photos", "--fail-if", "delta.psnr<0"), "--reference"),
        (("photos", "--stress", "speed"), "no stress test"),
        (("empty",), "no image found"),
        (("photos", "--fid-stats", "none.npz"), "no such file"),
    ],
    ids=str,
)
def test_wrong_usage_gives_2_and_writes_nothing(
    arguments: tuple[str, ...], message: str, sdvae: Sdvae, photos: Path
) -> None:
    (photos.parent / "empty").mkdir()
    result = sdvae("evaluate", *arguments, "--out", "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("out").exists()


def test_a_dry_run_shows_the_protocol_and_writes_nothing(sdvae: Sdvae, photos: Path) -> None:
    text = sdvae("evaluate", photos, "--preset", "coco256", "--out", "out", "--weights", "nowhere", "--dry-run")
    assert text.exit_code == 0, text.output
    assert "size_px: 256" in text.stdout and "weights for rfid: not at hand: no weights of inception" in text.stdout
    data = json.loads(sdvae("evaluate", photos, "--out", "out", "--metrics", "plain", "--dry-run", "--json").stdout)
    assert data["num_images"] == 3 and data["protocol"]["digest"].startswith("sha256:")
    assert not Path("out").exists()


def test_a_dry_run_says_where_weights_are(sdvae: Sdvae, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "fid_inception_2015-12-05.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"looked for, not opened")
    arguments = ("--metrics", "psnr,rfid", "--weights", path.parent, "--dry-run")
    assert f"weights for rfid: {path}" in sdvae("evaluate", photos, "--out", "out", *arguments).stdout
    data = json.loads(sdvae("evaluate", photos, "--out", "out", *arguments, "--json").stdout)
    assert data["weights"] == {"rfid": str(path)}


def test_an_option_that_differs_from_the_preset_is_visible(sdvae: Sdvae, photos: Path) -> None:
    def preset(*arguments: str) -> str:
        output = sdvae("evaluate", photos, "--out", "out", "--dry-run", "--json", "--weights", "nowhere", *arguments)
        found: str = json.loads(output.stdout)["protocol"]["preset"]
        return found

    assert preset("--preset", "quick") == "quick"
    assert preset("--preset", "quick", "--size", "256") == "quick"
    assert preset("--preset", "quick", "--size", "128") == "quick changed"


def test_every_option_of_the_protocol_arrives(sdvae: Sdvae, photos: Path) -> None:
    given = {
        "--size": 48,
        "--crop": "center",
        "--max-images": 2,
        "--metrics": "psnr,l1",
        "--posterior": "sample",
        "--seed": 9,
        "--dtype": "bfloat16",
        "--tiling": "blended",
        "--background": "#102030",
    }
    names = ("size_px", "crop", "max_images", "metrics", "posterior", "seed", "dtype", "tiling", "background")
    arguments = [str(part) for pair in given.items() for part in pair]
    output = sdvae("evaluate", photos, "--out", "out", "--dry-run", "--json", *arguments).stdout
    protocol = json.loads(output)["protocol"]
    assert [protocol[name] for name in names] == [48, "center", 2, ["psnr", "l1"], *[*given.values()][4:]]


def test_a_few_stress_tests_are_made_unless_asked_for_otherwise(sdvae: Sdvae, photos: Path) -> None:
    def stress(*arguments: str) -> list[str]:
        output = sdvae("evaluate", photos, "--out", "out", "--dry-run", "--json", "--metrics", "psnr", *arguments)
        found: list[str] = json.loads(output.stdout)["stress"]
        return found

    assert stress() == ["cycles", "sampling"]
    assert stress("--preset", "quick") == [] == stress("--stress", "none")
    assert stress("--preset", "quick", "--stress", "seams") == ["seams"]


def test_what_was_left_out_and_what_to_be_wary_of_is_told(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    Image.new("RGB", (8, 8)).save(photos / "small.png")
    metrics = ("--metrics", "psnr,ssim,rfid", "--weights", "nowhere", "--skip-unavailable", "--stress", "none")
    result = sdvae("evaluate", photos, "--vae", mine, "--out", "out", *metrics)
    assert result.exit_code == 0, result.output
    assert "left out: rfid: no weights of inception" in result.stderr
    assert "Warning: SSIM leaves out 1 of 4 images" in result.stderr


def test_differences_are_printed_with_their_interval_and_the_share_won(
    sdvae: Sdvae, photos: Path, mine: Path, theirs: Path
) -> None:
    arguments = ("evaluate", photos, "--vae", mine, "--reference", theirs, "--out", "out", *PLAIN)
    lines = sdvae(*arguments).stdout.splitlines()
    for name, found in json.loads(Path("out/result.json").read_text())["comparisons"][0]["metrics"].items():
        title, digits = {"psnr": ("PSNR", 2), "l1": ("L1", 3)}[name]
        numbers = f"{found['delta']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
        assert f"  {title}: {numbers}, undecided, better on {found['won']:.0%} of the images" in lines


def test_the_report_renders_again_from_the_json_alone(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    sdvae("evaluate", photos, "--vae", mine, "--out", "out", *PLAIN)
    first = Path("out/report.html").read_bytes()
    Path("out/report.html").unlink()
    result = sdvae("report", "out/result.json")
    assert (result.exit_code, result.stdout.strip()) == (0, "out/report.html")
    assert Path("out/report.html").read_bytes() == first


def test_results_of_different_protocols_are_shown_together_with_a_warning(
    sdvae: Sdvae, photos: Path, mine: Path, theirs: Path
) -> None:
    sdvae("evaluate", photos, "--vae", mine, "--out", "one", *PLAIN)
    sdvae("evaluate", photos, "--vae", theirs, "--out", "two", "--size", "24", *PLAIN)
    result = sdvae("report", "one", "two", "--out", "both.html")
    assert result.exit_code == 0
    assert "Warning: " in result.stderr and "size_px" in result.stderr
    page = Path("both.html").read_text(encoding="utf-8")
    assert "mine" in page and "theirs" in page and "size_px" in page
    again = sdvae("report", "one", "two", "--out", "both.html")
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert sdvae("report", "one", "two", "--out", "both.html", "--overwrite").exit_code == 0


def test_a_page_of_several_results_does_not_take_the_place_of_one(sdvae: Sdvae, photos: Path, mine: Path) -> None:
    for out in ("one", "two"):
        sdvae("evaluate", photos, "--vae", mine, "--out", out, *PLAIN)
    before = Path("one/report.html").read_bytes()
    refused = sdvae("report", "one", "two")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert Path("one/report.html").read_bytes() == before


def test_a_file_that_is_no_result_is_refused(sdvae: Sdvae, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    result = sdvae("report", "a.json")
    assert result.exit_code == 2 and "a.json: its schema is None" in result.stderr
