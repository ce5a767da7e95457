"""A whole evaluation: one set of images through real small autoencoders, whole, interrupted, shared and repeated."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdvae.codec.run import decode_folder, encode_folder
from sdvae.data.images import read_image
from sdvae.errors import ConfigError, ImageError, MissingWeightsError, OutputExistsError
from sdvae.evaluation import blocks, images, runner
from sdvae.evaluation.metrics import psnr
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import PRESETS, Protocol
from sdvae.evaluation.result import EvaluationResult, load_result
from sdvae.evaluation.runner import evaluate

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

PLAIN = replace(PRESETS["native"], metrics=("psnr", "ssim", "l1", "bias_r"), resamples=199)
SIZES = {
    "a/one.png": (40, 40),
    "a/two.png": (67, 51),
    "b/three.png": (40, 40),
    "b/four.png": (33, 90),
    "five.png": (40, 40),
}


@pytest.fixture
def mine(vae_path: Path, tmp_path: Path) -> Path:
    """The small autoencoder under a name of its own, which becomes its id."""
    return shutil.copytree(vae_path, tmp_path / "vaes" / "mine")


@pytest.fixture
def other(other_vae_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(other_vae_path, tmp_path / "vaes" / "other")


@pytest.fixture
def photos(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "photos", SIZES)


def run(photos: Path, out: Path, *vaes: Path, protocol: Protocol = PLAIN, **options: Any) -> EvaluationResult:
    reference = options.pop("reference", None)
    settings = EvaluateOptions(gallery_images=options.pop("gallery_images", 2), **options)
    result = evaluate(photos, out, vaes, reference=reference, protocol=protocol, options=settings)
    assert result is not None
    return result


def numbers(result: EvaluationResult) -> dict[str, Any]:
    """All of a result that must not depend on when and where it was made."""
    data = result.to_json()
    del data["created"], data["environment"]
    for vae in data["vaes"]:
        del vae["seconds_per_megapixel"]
    return data


def test_psnr_is_that_of_the_reconstructed_files(photos: Path, tmp_path: Path, mine: Path) -> None:
    result = run(photos, tmp_path / "out", mine)
    encode_folder(photos, tmp_path / "latents", vae=mine, latent_dtype="float32")
    decode_folder(tmp_path / "latents", tmp_path / "decoded", vae=mine)
    expected = [
        psnr(read_image(photos / key).pixels, read_image(tmp_path / "decoded" / key).pixels)
        for key in result.per_image["keys"]
    ]
    assert result.per_image["keys"] == sorted(SIZES)
    assert result.per_image["values"]["mine"]["psnr"] == pytest.approx(expected, abs=1e-6)
    assert result.vaes[0]["summary"]["psnr"]["mean"] == pytest.approx(np.mean(expected))


def test_the_files_hold_what_the_result_says(photos: Path, tmp_path: Path, mine: Path, other: Path) -> None:
    out = tmp_path / "out"
    result = run(photos, out, mine, reference=other)
    assert {path.name for path in out.iterdir()} >= {"result.json", "report.html", "per_image.csv"}
    assert not (out / ".evaluation").exists()
    assert load_result(out / "result.json").to_json() == json.loads(json.dumps(result.to_json()))
    rows = list(csv.DictReader((out / "per_image.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["vae"], row["key"]) for row in rows] == [
        (id_, key) for id_ in ("mine", "other") for key in sorted(SIZES)
    ]
    assert float(rows[7]["psnr"]) == result.per_image["values"]["other"]["psnr"][2]
    assert (rows[0]["slice"], rows[0]["width"], rows[0]["height"]) == ("a", "40", "40")


def test_parquet_has_the_table_of_the_csv(photos: Path, tmp_path: Path, mine: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    run(photos, tmp_path / "out", mine)
    frames = (
        pandas.read_csv(tmp_path / "out" / "per_image.csv"),
        pandas.read_parquet(tmp_path / "out/per_image.parquet"),
    )
    frames[0]["slice"] = frames[0]["slice"].fillna("")
    pandas.testing.assert_frame_equal(*frames, check_dtype=False, rtol=1e-12)


def test_slices_come_from_folders(photos: Path, tmp_path: Path, mine: Path) -> None:
    result = run(photos, tmp_path / "out", mine)
    assert result.dataset["slices"] == {"": 1, "a": 2, "b": 2}
    values = dict(zip(result.per_image["keys"], result.per_image["values"]["mine"]["psnr"], strict=True))
    expected = np.mean([values["a/one.png"], values["a/two.png"]])
    assert result.vaes[0]["slices"]["a"]["psnr"]["mean"] == pytest.approx(expected)


def test_a_vae_against_itself_is_undecided_and_a_drop_in(photos: Path, tmp_path: Path, mine: Path) -> None:
    result = run(photos, tmp_path / "out", mine, reference=mine)
    (comparison,) = result.comparisons
    assert (comparison["vae"], comparison["reference"]) == ("mine", "mine-2")
    assert {entry["delta"] for entry in comparison["metrics"].values()} == {0.0}
    assert {entry["verdict"] for entry in comparison["metrics"].values()} == {"undecided"}
    assert comparison["swap"]["verdict"] == "drop-in"


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"workers": 1}, {"workers": 5}], ids=str)
def test_batches_and_threads_change_nothing_beyond_rounding(
    options: dict[str, int], photos: Path, tmp_path: Path, mine: Path, other: Path
) -> None:
    plain = run(photos, tmp_path / "plain", mine, reference=other)
    changed = run(photos, tmp_path / "other", mine, reference=other, **options)
    for id_, metrics in plain.per_image["values"].items():
        for name, values in metrics.items():
            assert changed.per_image["values"][id_][name] == pytest.approx(values, rel=1e-4, abs=1e-4), name
    drifts = [result.comparisons[0]["swap"]["drift"]["latents_rms"] for result in (plain, changed)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)
    channels = [result.vaes[0]["latents"]["channels"] for result in (plain, changed)]
    assert [each["std"] for each in channels[0]] == pytest.approx([each["std"] for each in channels[1]], rel=1e-5)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two images, so that five make three of them."""
    for module in (images, runner):
        monkeypatch.setattr(module, "BLOCK_IMAGES", 2)


def test_an_interrupted_run_goes_on_and_gives_the_same_bits(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(photos, tmp_path / "whole", mine, reference=mine)
    save, saved = blocks.BlockStore.save, []

    def stop_after_two(store: blocks.BlockStore, number: int, block: blocks.Block) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(store, number, block)
        saved.append(number)

    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(blocks.BlockStore, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run(photos, out, mine, reference=mine)
    assert saved == [0, 1] and not (out / "result.json").exists()

    told: list[tuple[int, int]] = []
    plan = runner.plan_evaluation(photos, [mine], mine, out, PLAIN, EvaluateOptions(gallery_images=2))
    result = runner.run_evaluation(plan, lambda done, total: told.append((done, total)))
    assert result is not None
    assert told[0] == (4, 5), "the four images of two blocks are not measured again"
    assert numbers(result) == numbers(whole)


def test_an_interrupted_run_of_other_settings_is_not_mixed_in(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path
) -> None:
    store = blocks.BlockStore(tmp_path / "out" / ".evaluation")
    store.open({"protocol": "another"}, overwrite=False)
    with pytest.raises(ConfigError, match="interrupted evaluation that differs in"):
        run(photos, tmp_path / "out", mine)
    run(photos, tmp_path / "out", mine, overwrite=True)


def test_run_again_nothing_is_measured_but_gates_are_checked(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(photos, tmp_path / "out", mine)
    monkeypatch.setattr(runner, "_measure", None)  # calling it would fail
    again = run(photos, tmp_path / "out", mine, gates=("psnr<99",))
    assert again.created == first.created
    assert again.exit_code == 1 and "below 99" in again.failed_gates[0]["reason"]
    assert load_result(tmp_path / "out" / "result.json").gates == again.gates


def test_another_evaluation_is_not_overwritten_unasked(photos: Path, tmp_path: Path, mine: Path) -> None:
    run(photos, tmp_path / "out", mine)
    before = (tmp_path / "out" / "result.json").read_bytes()
    fewer = replace(PLAIN, max_images=2)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run(photos, tmp_path / "out", mine, protocol=fewer)
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    assert run(photos, tmp_path / "out", mine, protocol=fewer, overwrite=True).dataset["num_images"] == 2


def test_overwrite_measures_again(photos: Path, tmp_path: Path, mine: Path) -> None:
    run(photos, tmp_path / "out", mine)
    path = tmp_path / "out" / "result.json"
    path.write_text(path.read_text().replace('"psnr": {"mean": ', '"psnr": {"mean": 1'))  # a sign to know it by
    forged = run(photos, tmp_path / "out", mine).vaes[0]["summary"]["psnr"]["mean"]
    assert run(photos, tmp_path / "out", mine, overwrite=True).vaes[0]["summary"]["psnr"]["mean"] != forged


def test_a_changed_image_is_measured_again(photos: Path, tmp_path: Path, mine: Path) -> None:
    run(photos, tmp_path / "out", mine)
    Image.new("RGB", (40, 40), "red").save(photos / "five.png")
    with pytest.raises(OutputExistsError):
        run(photos, tmp_path / "out", mine)


def test_unreadable_images_are_recorded_and_the_rest_is_measured(photos: Path, tmp_path: Path, mine: Path) -> None:
    (photos / "a" / "broken.png").write_bytes((photos / "a" / "one.png").read_bytes()[:60])
    result = run(photos, tmp_path / "out", mine)
    assert result.dataset["num_images"] == 5 and result.exit_code == 3
    (failed,) = result.dataset["unreadable"]
    assert failed["key"] == "a/broken.png" and str(photos) not in failed["reason"]


def test_without_any_readable_image_there_is_an_error(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"none of the 1 images can be read; the first: a\.png"):
        run(tmp_path / "photos", tmp_path / "out", mine)
    assert not (tmp_path / "out" / "result.json").exists()


def test_grayscale_and_images_below_a_window_are_measured_as_far_as_they_go(
    photos: Path, tmp_path: Path, mine: Path
) -> None:
    Image.new("L", (9, 9), 100).save(photos / "tiny.png")
    Image.fromarray(np.tile(np.arange(48, dtype=np.uint8), (48, 1))).save(photos / "gray.png")
    result = run(photos, tmp_path / "out", mine)
    values = dict(zip(result.per_image["keys"], result.per_image["values"]["mine"]["ssim"], strict=True))
    assert values["tiny.png"] is None and values["gray.png"] is not None
    assert result.vaes[0]["summary"]["ssim"]["count"] == 6 and result.vaes[0]["summary"]["psnr"]["count"] == 7
    assert any("SSIM leaves out 1 of 7 images: 1 are smaller than its 11 px" in warning for warning in result.warnings)


def test_a_reference_with_other_latents_is_compared_without_a_swap_test(
    photos: Path, tmp_path: Path, mine: Path, make_vae: Callable[..., Path]
) -> None:
    result = run(photos, tmp_path / "out", mine, reference=make_vae(latent_channels=16))
    (comparison,) = result.comparisons
    assert "psnr" in comparison["metrics"]
    assert "4 latent channels against 16" in comparison["swap"]["skipped"]


def test_a_sampled_posterior_differs_by_seed_and_not_by_batch(photos: Path, tmp_path: Path, mine: Path) -> None:
    def values(name: str, seed: int, batch_size: int) -> list[float]:
        protocol = replace(PLAIN, posterior="sample", seed=seed)
        result = run(photos, tmp_path / name, mine, protocol=protocol, batch_size=batch_size)
        found: list[float] = result.per_image["values"]["mine"]["psnr"]
        return found

    assert values("a", 0, 1) == pytest.approx(values("b", 0, 3), abs=1e-3)
    assert values("c", 1, 1) != pytest.approx(values("d", 0, 1), abs=1e-3)


def test_a_network_that_cannot_be_had_ends_the_run_before_it_starts_or_is_left_out(
    photos: Path, tmp_path: Path, mine: Path
) -> None:
    protocol = replace(PLAIN, metrics=("psnr", "rfid"))
    nowhere = {"protocol": protocol, "weights_path": tmp_path / "nowhere"}
    with pytest.raises(MissingWeightsError, match="--skip-unavailable"):
        run(photos, tmp_path / "out", mine, **nowhere)
    assert not (tmp_path / "out").exists()
    result = run(photos, tmp_path / "out", mine, **nowhere, skip_unavailable=True)
    assert [row["name"] for row in result.metrics] == ["psnr"] == result.protocol["metrics"]
    assert result.skipped_metrics[0]["name"] == "rfid" and "no weights" in result.skipped_metrics[0]["reason"]


def test_reconstructions_that_are_not_finite_are_counted(
    photos: Path, tmp_path: Path, make_vae: Callable[..., Path]
) -> None:
    broken = make_vae("broken", damage=lambda vae: vae.decoder.conv_out.weight.fill_(3e38))
    result = run(photos, tmp_path / "out", broken)
    assert result.warnings[0].startswith("broken: 5 of 5 reconstructions hold values that are not finite")


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(photos: Path, tmp_path: Path, mine: Path) -> None:
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from sdvae.evaluation import images, runner\n"
        "from sdvae.evaluation.options import EvaluateOptions\n"
        "from sdvae.evaluation.protocol import PRESETS\n"
        "images.BLOCK_IMAGES = runner.BLOCK_IMAGES = 2\n"
        "photos, out, vae = sys.argv[1:]\n"
        "protocol = replace(PRESETS['native'], metrics=('psnr', 'ssim'), resamples=199)\n"
        "options = EvaluateOptions(gallery_images=2, device='cpu')\n"
        "runner.evaluate(photos, out, [vae], reference=vae, protocol=protocol, options=options)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    for count in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launcher, str(script), str(photos), str(tmp_path / f"out{count}"), str(mine)]
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    one, two = (load_result(tmp_path / f"out{count}" / "result.json") for count in (1, 2))
    assert two.environment["num_processes"] == 2
    assert numbers(one) == numbers(two)
