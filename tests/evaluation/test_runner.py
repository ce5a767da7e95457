"""A whole evaluation: one set of images through real small autoencoders, whole, interrupted, shared and repeated."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork_launched
from jobs import evaluate_in_small_blocks
from PIL import Image

from sdvae import files
from sdvae.checkpoints.opened import open_any_vae
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import decode_folder, encode_folder
from sdvae.data.images import read_image
from sdvae.data.sources.find import find_images
from sdvae.errors import ConfigError, ImageError, MissingWeightsError, OutputExistsError
from sdvae.evaluation import blocks, compare, conclude, images, measure, runner
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import PRESETS, Protocol
from sdvae.evaluation.runner import evaluate
from sdvae.evaluation.stress import run as stress
from sdvae.metrics import bootstrap
from sdvae.metrics.fid import load_statistics
from sdvae.metrics.table import IMAGE_METRICS, psnr
from sdvae.processes import Processes
from sdvae.report import write
from sdvae.report.result import EvaluationResult, load_result

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
    encode_folder(photos, tmp_path / "latents", vae=mine, options=EncodeOptions(latent_dtype="float32"))
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
    monkeypatch.setattr(images, "BLOCK_IMAGES", 2)


def interrupt_after(num_blocks: int, monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any]) -> list[int]:
    """Interrupt a run when it wants to save the block after so many. Returns: the numbers of the saved ones."""
    save, saved = blocks.BlockStore.save, []

    def stop(store: blocks.BlockStore, number: int, block: blocks.Block) -> None:
        if len(saved) == num_blocks:
            raise KeyboardInterrupt
        save(store, number, block)
        saved.append(number)

    with monkeypatch.context() as context:
        context.setattr(blocks.BlockStore, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            start()
    return saved


def test_an_interrupted_run_goes_on_and_gives_the_same_bits(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(photos, tmp_path / "whole", mine, reference=mine)
    out = tmp_path / "out"
    saved = interrupt_after(2, monkeypatch, lambda: run(photos, out, mine, reference=mine))
    assert saved == [0, 1] and not (out / "result.json").exists()

    told: list[tuple[int, int]] = []
    options, listen = EvaluateOptions(gallery_images=2), lambda done, total: told.append((done, total))
    result = evaluate(photos, out, [mine], options, reference=mine, protocol=PLAIN, on_progress=listen)
    assert result is not None
    assert told[0] == (4, 5), "the four images of two blocks are not measured again"
    assert numbers(result) == numbers(whole)


def test_an_interrupted_run_of_other_settings_is_not_mixed_in(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path
) -> None:
    blocks.BlockStore(tmp_path / "out" / ".evaluation", {"protocol": "another"}).open(overwrite=False)
    with pytest.raises(ConfigError, match="interrupted evaluation that differs in"):
        run(photos, tmp_path / "out", mine)
    run(photos, tmp_path / "out", mine, overwrite=True)


def test_run_again_nothing_is_measured_but_gates_are_checked(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(photos, tmp_path / "out", mine)
    monkeypatch.setattr(runner, "measure_blocks", None)  # calling it would fail
    again = run(photos, tmp_path / "out", mine, gates=("psnr<99",))
    assert again.created == first.created
    assert again.exit_code == 1 and "below 99" in again.gates[0]["reason"]
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
    nowhere: dict[str, Any] = {"protocol": protocol, "weights_path": tmp_path / "nowhere"}
    with pytest.raises(MissingWeightsError, match="--skip-unavailable"):
        run(photos, tmp_path / "out", mine, **nowhere)
    assert not (tmp_path / "out").exists()
    (tmp_path / "stats.npz").write_bytes(b"never read")
    nowhere["fid_statistics"] = tmp_path / "stats.npz"
    result = run(photos, tmp_path / "out", mine, **nowhere, skip_unavailable=True)
    assert [row["name"] for row in result.metrics] == ["psnr"] == result.protocol["metrics"]
    assert result.skipped_metrics[0]["name"] == "rfid" and "no weights" in result.skipped_metrics[0]["reason"]


def test_reconstructions_that_are_not_finite_are_counted(
    small_blocks: None, photos: Path, tmp_path: Path, make_vae: Callable[..., Path]
) -> None:
    broken = make_vae("broken", damage=lambda vae: vae.decoder.conv_out.weight.fill_(3e38))
    result = run(photos, tmp_path / "out", broken)
    assert result.warnings[0].startswith("broken: 5 of 5 reconstructions hold values that are not finite")


def test_stress_tests_see_what_was_measured_and_those_of_size_the_whole_images(
    tmp_path: Path, mine: Path, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stress, "_MAX_PX", 96)
    sizes = {"a.png": (140, 132), "b.png": (60, 50), "c.png": (150, 200), "d.png": (80, 80)}
    folder = make_images(tmp_path / "photos", sizes)
    protocol = replace(PLAIN, size_px=32, crop="center", seed=5)
    tests: dict[str, Any] = {"stress": ("cycles", "resolution", "seams", "sampling"), "stress_images": 2}
    found = run(folder, tmp_path / "out", mine, protocol=protocol, **tests).vaes[0]["stress"]

    subject = open_any_vae(mine, torch.device("cpu"), torch.float32)
    chosen = [file for file in find_images(folder) if file.key in ("a.png", "c.png")]  # evenly spaced
    small, whole = (
        [(file.key, images.prepare(0, file, each).pixels) for file in chosen] for each in (protocol, PRESETS["native"])
    )
    centres = [("a.png", whole[0][1][18 : 18 + 96, 22 : 22 + 96]), ("c.png", whole[1][1][52 : 52 + 96, 27 : 27 + 96])]
    metrics: Any = {name: IMAGE_METRICS[name].compute for name in ("psnr", "ssim")}
    inputs: dict[str, Any] = {"cycles": small, "resolution": whole, "seams": centres, "sampling": small}
    for name, expected in inputs.items():
        assert found[name] == stress.run_stress([name], subject, expected, expected, metrics, 5)[name], name
    assert [row["num_images"] for row in found["resolution"]] == [2, 0, 0, 0, 0], "128 px fit the whole images alone"
    assert found["cycles"]["cycles"] == [1, 2, 5, 10] and len(found["cycles"]["metrics"]["psnr"]) == 4
    assert any("Seams" in note for note in found["notes"]) and any("Resolution" in note for note in found["notes"])


def test_without_stress_tests_there_is_no_trace_of_them(photos: Path, tmp_path: Path, mine: Path) -> None:
    assert run(photos, tmp_path / "out", mine).vaes[0]["stress"] == {}


def test_blended_tiles_are_those_of_the_vae_and_part_of_the_protocol(
    tmp_path: Path, make_vae: Callable[..., Path], make_images: MakeImages
) -> None:
    folder = make_images(tmp_path / "photos", {"a.png": (96, 96), "b.png": (24, 24)})
    vae = make_vae("tiled", sample_size=32)  # which is also the size of its tiles
    whole = run(folder, tmp_path / "whole", vae)
    tiled = run(folder, tmp_path / "tiled", vae, protocol=replace(PLAIN, tiling="blended"))
    values = [result.per_image["values"]["tiled"]["psnr"] for result in (whole, tiled)]
    assert values[0][1] == values[1][1], "an image that fits into one tile"
    subject = open_any_vae(vae, torch.device("cpu"), torch.float32)
    x = torch.from_numpy(read_image(folder / "a.png").pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with subject.tiled("blended"):
        recon = subject.decode(subject.encode(x).z, 96, 96)
    levels = ((recon + 1) * 127.5).clamp(0, 255).round().byte()[0].permute(1, 2, 0).numpy()
    assert values[1][0] == pytest.approx(psnr(read_image(folder / "a.png").pixels, levels), abs=1e-6)
    assert values[0][0] != pytest.approx(values[1][0], abs=1e-6)


def test_tiles_that_a_vae_lacks_are_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, tiny_16: Path
) -> None:
    with pytest.raises(ConfigError, match="no tiled mode"):
        run(photos, tmp_path / "out", tiny_16, protocol=replace(PLAIN, tiling="blended"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tiny_16(tmp_path: Path) -> Path:
    """A small random AutoencoderTiny with 16 latent channels, as those of Flux have."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.AutoencoderTiny(
            latent_channels=16,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    model.save_pretrained(tmp_path / "vaes" / "tiny")
    return tmp_path / "vaes" / "tiny"


def test_autoencoders_of_other_classes_take_part_side_by_side(
    photos: Path, tmp_path: Path, mine: Path, tiny_16: Path, make_vae: Callable[..., Path]
) -> None:
    wide = make_vae("wide", latent_channels=16)
    result = run(photos, tmp_path / "out", mine, tiny_16, reference=wide, stress=("sampling",), stress_images=1)
    assert [vae["class_name"] for vae in result.vaes] == ["AutoencoderKL", "AutoencoderTiny", "AutoencoderKL"]
    assert [vae["latent_channels"] for vae in result.vaes] == [4, 16, 16]
    assert [vae["role"] for vae in result.vaes] == ["candidate", "candidate", "reference"]
    assert [len(vae["latents"]["channels"]) for vae in result.vaes] == [4, 16, 16]
    assert result.vaes[1]["latents"]["kl_nats"] is None and result.vaes[1]["stress"]["sampling"] is None
    skipped, compared = (comparison["swap"] for comparison in result.comparisons)
    assert "4 latent channels against 16" in skipped["skipped"]
    assert compared["num_images"] == 5 and compared["drift"]["kl_nats"] is None
    # each alone gives the same numbers: none is mistaken for another
    for place, path in enumerate((mine, tiny_16, wide)):
        alone = run(photos, tmp_path / f"alone{place}", path)
        id_ = result.vaes[place]["id"]
        for name, values in alone.per_image["values"][alone.vaes[0]["id"]].items():
            assert result.per_image["values"][id_][name] == pytest.approx(values, abs=1e-5), (id_, name)
        assert result.vaes[place]["summary"]["psnr"] == pytest.approx(alone.vaes[0]["summary"]["psnr"])


def test_comparisons_subtract_the_reference(photos: Path, tmp_path: Path, mine: Path, other: Path) -> None:
    result = run(photos, tmp_path / "out", mine, reference=other)
    ours, theirs = (np.array(result.per_image["values"][id_]["psnr"]) for id_ in ("mine", "other"))
    found = result.comparisons[0]["metrics"]["psnr"]
    assert found["delta"] == pytest.approx(np.mean(ours - theirs))
    assert (found["won"], found["count"]) == (np.mean(ours > theirs), 5)


def test_the_swap_test_uses_as_many_images_as_asked_for(photos: Path, tmp_path: Path, mine: Path, other: Path) -> None:
    result = run(photos, tmp_path / "out", mine, reference=other, swap_images=2)
    assert result.comparisons[0]["swap"]["num_images"] == 2
    options = EvaluateOptions(swap_images=2)
    plan = runner.plan_evaluation(photos, [mine], other, tmp_path / "out", PLAIN, options)
    assert runner.set_up(plan, Processes()).swap_images == {0, 2}, "evenly spaced"


@pytest.mark.slow
def test_statistics_of_the_originals_can_be_kept_and_stand_for_them(
    photos: Path, tmp_path: Path, mine: Path, other: Path, assets: Path
) -> None:
    stats = tmp_path / "stats.npz"
    fid: dict[str, Any] = {"weights_path": assets / "weights", "reference": other}
    both, rfid = (replace(PLAIN, metrics=("psnr", *names), size_px=64) for names in (("rfid", "kid"), ("rfid",)))
    plain = run(photos, tmp_path / "plain", mine, protocol=both, save_fid_statistics=stats, **fid)
    assert load_statistics(stats).count == 5
    assert any("rFID over 5 images" in warning for warning in plain.warnings)
    kept = run(photos, tmp_path / "kept", mine, protocol=both, fid_statistics=stats, **fid)
    assert kept.protocol["metrics"] == ["psnr", "rfid"] and kept.skipped_metrics[0]["name"] == "kid"
    for one, two in zip(plain.vaes, kept.vaes, strict=True):
        assert one["summary"]["rfid"] == two["summary"]["rfid"] and one["summary"]["rfid"]["value"] > 1
    assert kept.protocol["fid"]["reference"].startswith("sha256:") and plain.protocol["fid"]["reference"] == "originals"
    values = [vae["summary"]["rfid"]["value"] for vae in plain.vaes]
    assert plain.comparisons[0]["metrics"]["rfid"]["delta"] == values[0] - values[1] != 0

    # whoever asks for the file finds it, or learns why not
    again = run(photos, tmp_path / "plain", mine, protocol=both, save_fid_statistics=stats, **fid)
    assert again.created == plain.created
    with pytest.raises(OutputExistsError, match=r"new\.npz are gone: .*--overwrite"):
        run(photos, tmp_path / "plain", mine, protocol=both, save_fid_statistics=tmp_path / "new.npz", **fid)
    with pytest.raises(OutputExistsError, match=r"stats\.npz is there already"):
        run(photos, tmp_path / "third", mine, protocol=rfid, save_fid_statistics=stats, **fid)
    assert not (tmp_path / "third").exists()
    np.savez(tmp_path / "far.npz", mu=np.full(2048, 10.0), sigma=np.eye(2048))  # of another set than is kept
    del fid["reference"]
    options = {"fid_statistics": tmp_path / "far.npz", "save_fid_statistics": tmp_path / "new.npz", **fid}
    far = run(photos, tmp_path / "fourth", mine, protocol=rfid, **options)
    assert far.vaes[0]["summary"]["rfid"]["value"] > 1e5
    assert np.array_equal(load_statistics(tmp_path / "new.npz").mean, load_statistics(stats).mean)


@pytest.mark.slow
def test_originals_whose_features_an_interrupted_run_left_out_are_not_half_the_statistics(
    small_blocks: None,
    photos: Path,
    tmp_path: Path,
    mine: Path,
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    protocol = replace(PLAIN, metrics=("rfid",), size_px=32)
    options: dict[str, Any] = {"protocol": protocol, "weights_path": assets / "weights"}
    run(photos, tmp_path / "first", mine, save_fid_statistics=tmp_path / "stats.npz", **options)
    stats = {"fid_statistics": tmp_path / "stats.npz"}
    interrupt_after(1, monkeypatch, lambda: run(photos, tmp_path / "out", mine, **stats, **options))
    options |= {**stats, "save_fid_statistics": tmp_path / "new.npz"}
    with pytest.raises(ConfigError, match="differs in originals"):
        run(photos, tmp_path / "out", mine, **options)


@pytest.mark.slow
def test_rfid_needs_two_images_that_can_be_read(photos: Path, tmp_path: Path, mine: Path, assets: Path) -> None:
    for name in SIZES:
        if name != "five.png":
            (photos / name).write_bytes(b"no picture")
    protocol = replace(PLAIN, metrics=("psnr", "rfid"))
    result = run(photos, tmp_path / "out", mine, protocol=protocol, weights_path=assets / "weights")
    assert result.skipped_metrics == [{"name": "rfid", "reason": "only one image could be read"}]
    assert "rfid" not in result.vaes[0]["summary"] and result.exit_code == 3


def test_published_numbers_stand_beside_and_change_nothing_else(photos: Path, tmp_path: Path, mine: Path) -> None:
    plain = run(photos, tmp_path / "out", mine)
    assert plain.published == []
    shown = run(photos, tmp_path / "out", mine, published="coco")
    assert shown.created == plain.created, "nothing is measured for them"
    assert [row["vae"] for row in shown.published][-1] == "sdxl-vae" and len(shown.published) == 4
    assert numbers(shown) | {"published": []} == numbers(plain)
    assert "sdxl-vae" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["gone", "other pixels"])
def test_an_image_that_goes_after_it_was_measured_is_left_out_of_pictures_and_stress_tests(
    change: str, photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_conclude(*arguments: Any) -> EvaluationResult:
        if change == "gone":
            (photos / "five.png").unlink()
        else:
            Image.new("RGB", (40, 40), "red").save(photos / "five.png")
        return conclude.conclude(*arguments)

    monkeypatch.setattr(runner, "conclude", then_conclude)
    options: dict[str, Any] = {"gallery_images": 5, "stress": ("cycles", "resolution"), "stress_images": 5}
    result = run(photos, tmp_path / "out", mine, **options)
    assert result.dataset["num_images"] == 5 and result.exit_code == 0
    assert [card["key"] for card in result.gallery] == sorted({*SIZES} - {"five.png"})
    assert result.vaes[0]["stress"]["cycles"]["num_images"] == 4
    assert [warning for warning in result.warnings if "leave out 1 images, which have gone or changed" in warning] == [
        f"the {name} leave out 1 images, which have gone or changed since they were measured"
        for name in ("stress tests", "pictures")
    ]


def test_pictures_are_of_the_images_that_they_name(photos: Path, tmp_path: Path, mine: Path) -> None:
    (photos / "a" / "broken.png").write_bytes(b"no picture")  # so places and indices differ
    result = run(photos, tmp_path / "out", mine, gallery_images=5)
    assert [card["key"] for card in result.gallery] == sorted(SIZES)
    for card in result.gallery:
        picture = Image.open(io.BytesIO(base64.b64decode(card["original"].partition(",")[2])))
        assert np.array_equal(np.asarray(picture), read_image(photos / card["key"]).pixels)


def test_a_hub_id_that_cannot_be_reached_ends_the_run_before_anything_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingWeightsError, match="org/name"):
        run(photos, tmp_path / "out", Path("org/name"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "set_up", None)  # calling it would fail
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; expected a folder"):
        run(photos, tmp_path / "file" / "deep" / "out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused_before_anything_is_loaded(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="no permission to write"):
        run(photos, tmp_path / "closed" / "out")


def test_a_block_without_any_readable_image_is_as_good_as_others(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path, other: Path
) -> None:
    expected = run(photos, tmp_path / "whole", mine, reference=other)
    for name in ("a/1.png", "a/2.png", "a/3.png"):  # the first block, and half of the second
        (photos / name).write_bytes(b"no picture")
    result = run(photos, tmp_path / "out", mine, reference=other)
    assert [failed["key"] for failed in result.dataset["unreadable"]] == ["a/1.png", "a/2.png", "a/3.png"]
    for id_, metrics in expected.per_image["values"].items():
        assert result.per_image["values"][id_]["psnr"] == pytest.approx(metrics["psnr"], abs=1e-5)
    assert result.per_image["keys"] == expected.per_image["keys"]


def test_intervals_are_those_of_the_protocols_seed_and_resamples(
    photos: Path, tmp_path: Path, mine: Path, other: Path
) -> None:
    protocol = replace(PLAIN, seed=7, resamples=151)
    result = run(photos, tmp_path / "out", mine, reference=other, protocol=protocol)
    drawn = {"seed": 7, "resamples": 151}
    ours, theirs = (result.per_image["values"][id_] for id_ in ("mine", "other"))
    assert result.vaes[0]["summary"] == bootstrap.summarise(ours, **drawn)
    assert result.vaes[1]["summary"] == bootstrap.summarise(theirs, **drawn)
    assert result.vaes[0]["slices"] == bootstrap.slice_summaries(ours, result.per_image["slices"], **drawn)
    expected = compare.paired_differences(ours, theirs, result.metrics, **drawn)
    assert result.comparisons[0]["metrics"] == expected
    assert expected != compare.paired_differences(ours, theirs, result.metrics, seed=0, resamples=151)


def test_the_size_of_blocks_changes_nothing_beyond_rounding(
    photos: Path, tmp_path: Path, mine: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(photos, tmp_path / "whole", mine, reference=other)
    monkeypatch.setattr(images, "BLOCK_IMAGES", 2)
    parts = run(photos, tmp_path / "parts", mine, reference=other)
    for one, two in zip(whole.vaes, parts.vaes, strict=True):
        assert two["latents"]["num_images"] == one["latents"]["num_images"] == 5
        for key in ("mean", "std", "kurtosis", "kl", "posterior_std"):
            channels = [[channel[key] for channel in vae["latents"]["channels"]] for vae in (one, two)]
            assert channels[0] == pytest.approx(channels[1], rel=1e-4, abs=1e-5), key
        assert two["latents"]["suggested"] == pytest.approx(one["latents"]["suggested"], rel=1e-5)
    for one, two in zip(whole.comparisons, parts.comparisons, strict=True):
        assert two["swap"]["num_images"] == 5
        assert two["swap"]["drift"]["latents_rms"] == pytest.approx(one["swap"]["drift"]["latents_rms"], rel=1e-4)


def test_the_cross_decode_matrix_names_encoders_and_decoders(
    photos: Path, tmp_path: Path, mine: Path, other: Path
) -> None:
    result = run(photos, tmp_path / "out", mine, reference=other)
    crossed = result.comparisons[0]["swap"]["cross_decode"]
    for vae in result.vaes:
        own = crossed[vae["id"]][vae["id"]]["psnr"]
        assert own == pytest.approx(vae["summary"]["psnr"]["mean"], abs=1e-4), vae["id"]
    assert crossed["mine"]["other"]["psnr"] != crossed["other"]["mine"]["psnr"]


def test_processes_share_the_blocks(small_blocks: None, photos: Path, tmp_path: Path, mine: Path) -> None:
    plan = runner.plan_evaluation(photos, [mine], None, tmp_path / "out", PLAIN, EvaluateOptions(device="cpu"))
    setup = runner.set_up(plan, Processes())
    for rank, expected in ((0, {0, 2}), (1, {1})):
        store = blocks.BlockStore(tmp_path / f"rank{rank}", setup.inputs)
        store.open(overwrite=False)
        measure.measure_blocks(replace(setup, processes=Processes(rank, 2)), store)
        assert {*range(3)} - {*store.missing(range(3))} == expected


CHANGES: dict[str, dict[str, Any]] = {
    "a metric less": {"protocol": replace(PLAIN, metrics=("psnr",))},
    "another seed": {"protocol": replace(PLAIN, seed=1)},
    "another stress test": {"stress": ("sampling",)},
    "more stress images": {"stress_images": 2},
    "fewer swap images": {"swap_images": 2},
    "more pictures": {"gallery_images": 3},
}


@pytest.mark.parametrize("change", [*CHANGES, "other weights", "the roles"])
def test_a_result_of_other_settings_is_another_evaluation(
    change: str, photos: Path, tmp_path: Path, mine: Path, other: Path
) -> None:
    settings: dict[str, Any] = {"stress": ("cycles",), "stress_images": 1}
    run(photos, tmp_path / "out", mine, other, **settings)
    if change == "other weights":
        shutil.copytree(other, mine, dirs_exist_ok=True)
    vaes, settings = (mine, other), settings | CHANGES.get(change, {})
    if change == "the roles":
        vaes, settings = (mine,), settings | {"reference": other}
    with pytest.raises(OutputExistsError):
        run(photos, tmp_path / "out", *vaes, **settings)


def test_a_report_that_cannot_be_written_costs_no_measurement(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(result: EvaluationResult) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr(write, "render_report", fail)
        with pytest.raises(OSError, match="disk full"):
            run(photos, tmp_path / "out", mine)
    first = load_result(tmp_path / "out" / "result.json")
    assert not (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(runner, "measure_blocks", None)  # calling it would fail
    assert run(photos, tmp_path / "out", mine).created == first.created
    assert (tmp_path / "out" / "report.html").exists(), "a finished evaluation writes its report again"
    assert not (tmp_path / "out" / ".evaluation").exists()


def test_what_a_killed_run_left_half_written_goes(photos: Path, tmp_path: Path, mine: Path) -> None:
    out = tmp_path / "out"
    plan = runner.plan_evaluation(photos, [mine], None, out, PLAIN, EvaluateOptions(gallery_images=2))
    blocks.BlockStore(out / ".evaluation", runner.set_up(plan, Processes()).inputs).open(overwrite=False)
    left = [out / f".{'0' * 16}-{files._host()}-{os.getpid()}-{'0' * 8}.sdvae-tmp"]  # this number, an earlier start
    left.append(out / ".evaluation" / left[0].name)
    for path in left:
        path.write_bytes(b"half")
    seen: list[bool] = []
    runner.run_evaluation(plan, lambda done, total: seen.append(any(path.exists() for path in left)))
    assert not any(seen) and seen


def test_an_error_that_is_no_damaged_image_ends_the_run(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> images.Prepared:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(measure, "prepare", fail)
    with pytest.raises(ZeroDivisionError):
        run(photos, tmp_path / "out", mine)
    assert not (tmp_path / "out" / "result.json").exists()


def test_float32_is_exact_while_measuring_and_as_before_afterwards(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    plan = runner.plan_evaluation(photos, [mine], None, tmp_path / "out", PLAIN, EvaluateOptions(gallery_images=2))
    seen: list[bool] = []
    runner.run_evaluation(plan, lambda done, total: seen.append(torch.backends.cudnn.allow_tf32))
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def test_autoencoders_compute_in_the_protocols_dtype(photos: Path, tmp_path: Path, mine: Path) -> None:
    exact = run(photos, tmp_path / "exact", mine)
    half = run(photos, tmp_path / "half", mine, protocol=replace(PLAIN, dtype="bfloat16"))
    assert (exact.vaes[0]["dtype"], half.vaes[0]["dtype"]) == ("float32", "bfloat16")
    assert exact.vaes[0]["digest"] == half.vaes[0]["digest"]
    values = [result.per_image["values"]["mine"]["psnr"] for result in (exact, half)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], abs=1)


def test_the_dataset_is_described_as_it_was_measured(photos: Path, tmp_path: Path, mine: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 60)).save(photos / "tall.png")
    first = run(photos, tmp_path / "out", mine).dataset
    assert (first["source"], first["num_found"], first["num_images"]) == (str(photos), 7, 6)
    assert first["sizes"] == {"min_px": 33, "max_px": 90, "distinct": 4}
    fewer = run(photos, tmp_path / "fewer", mine, protocol=replace(PLAIN, max_images=3)).dataset
    assert (fewer["num_found"], fewer["num_images"] + len(fewer["unreadable"])) == (7, 3)
    os.utime(photos / "five.png", (1, 1))
    assert run(photos, tmp_path / "touched", mine).dataset["digest"] == first["digest"]
    Image.new("RGB", (40, 40), "red").save(photos / "five.png")
    assert run(photos, tmp_path / "changed", mine).dataset["digest"] != first["digest"]


def test_times_are_per_megapixel_of_all_blocks(
    small_blocks: None, photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = blocks.BlockStore.save, []

    def keep(store: blocks.BlockStore, number: int, block: blocks.Block) -> None:
        saved.append(block)
        save(store, number, block)

    monkeypatch.setattr(blocks.BlockStore, "save", keep)
    found = run(photos, tmp_path / "out", mine).vaes[0]["seconds_per_megapixel"]
    megapixels = sum(width * height for width, height in SIZES.values()) / 1e6
    for step in ("encode", "decode"):
        seconds = sum(block.seconds["mine"][step] for block in saved)
        assert found[step] == pytest.approx(seconds / megapixels) and seconds > 0


def test_notes_on_the_latents_know_the_configured_scale(
    photos: Path, tmp_path: Path, make_vae: Callable[..., Path]
) -> None:
    def notes(name: str, **fields: Any) -> list[str]:
        result = run(photos, tmp_path / name, make_vae(name, **fields))
        return [note for note in result.vaes[0]["latents"]["notes"] if "scaling_factor" in note]

    (note,) = notes("far", scaling_factor=1234.5)
    assert "1234.5" in note
    # one number for all channels does not say how they are scaled, so it is not judged
    assert notes("each", scaling_factor=1234.5, latents_mean=[0.0] * 4, latents_std=[1.0] * 4) == []


def test_without_stress_tests_and_pictures_no_image_is_read_again(
    photos: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_conclude(*arguments: Any) -> EvaluationResult:
        shutil.rmtree(photos)
        return conclude.conclude(*arguments)

    monkeypatch.setattr(runner, "conclude", then_conclude)
    result = run(photos, tmp_path / "out", mine, gallery_images=0)
    assert result.warnings == [] and result.gallery == []


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(photos: Path, tmp_path: Path, mine: Path) -> None:
    for count in (1, 2):
        for process in fork_launched(
            evaluate_in_small_blocks, photos, tmp_path / f"out{count}", mine, count=count, folder=tmp_path
        ):
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    one, two = (load_result(tmp_path / f"out{count}" / "result.json") for count in (1, 2))
    assert two.environment["num_processes"] == 2
    assert numbers(one) == numbers(two)
