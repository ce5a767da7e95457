"""What an evaluation refuses before it loads anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdvae.errors import ConfigError
from sdvae.evaluation.options import EvaluateOptions, stress_names
from sdvae.evaluation.plan import EvaluationPlan, plan_evaluation
from sdvae.evaluation.protocol import PRESETS

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
Plan = Callable[..., EvaluationPlan]


@pytest.fixture
def plan(tmp_path: Path, make_images: MakeImages) -> Plan:
    photos = make_images(tmp_path / "photos", {"a.png": (40, 40), "b.png": (40, 40)})

    def make(
        vaes: tuple[Any, ...] = (), reference: str | None = None, metrics: tuple[str, ...] = ("psnr",), **options: Any
    ) -> EvaluationPlan:
        protocol = replace(PRESETS["native"], metrics=metrics)
        return plan_evaluation(photos, vaes, reference, tmp_path / "out", protocol, EvaluateOptions(**options))

    return make


def test_without_a_vae_the_bundled_one_is_measured(plan: Plan) -> None:
    (entrant,) = plan().entrants
    assert (entrant.id, entrant.ref, entrant.role) == ("sdvae-mini", None, "candidate")


def test_ids_are_short_unique_and_free_of_separators(plan: Plan) -> None:
    refs = ("runs/mine/vae", "org/mine", "other folder/x y.safetensors", "a/mine")
    entrants = plan(refs, "stabilityai/sd-vae-ft-mse").entrants
    assert [entrant.id for entrant in entrants] == ["mine", "mine-2", "x-y", "mine-3", "sd-vae-ft-mse"]
    assert [entrant.role for entrant in entrants] == ["candidate"] * 4 + ["reference"]


def test_an_id_never_is_that_of_the_originals(plan: Plan) -> None:
    assert plan(("runs/originals",)).entrants[0].id != "originals"


def test_gates_that_cannot_be_checked_are_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="needs ssim, which is not measured"):
        plan(gates=("ssim<0.5",))
    with pytest.raises(ConfigError, match="name one with --reference"):
        plan(gates=("delta.psnr<0",))
    with pytest.raises(ConfigError, match="psnr"):
        plan(gates=("pnsr<24",))


def test_a_gate_for_a_vae_that_does_not_take_part_is_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="'theirs' does not take part; there are sdvae-mini"):
        plan(gates=("theirs:psnr<24",))


def test_a_file_in_the_place_of_the_folder_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        plan()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image found"):
        plan_evaluation(tmp_path, (), None, tmp_path / "out", PRESETS["native"], EvaluateOptions())


def test_one_image_has_no_fid_and_the_plan_says_so(tmp_path: Path, make_images: MakeImages) -> None:
    photos = make_images(tmp_path, {"a.png": (40, 40)})
    protocol = replace(PRESETS["native"], metrics=("psnr", "rfid", "kid"))
    found = plan_evaluation(photos, (), None, tmp_path / "out", protocol, EvaluateOptions())
    assert found.protocol.metrics == ("psnr",)
    assert [name for name, _ in found.skipped_metrics] == ["rfid", "kid"]
    assert "there is one" in found.skipped_metrics[0][1]


def test_kid_needs_the_originals_themselves(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_bytes(b"")
    found = plan(metrics=("rfid", "kid"), fid_statistics=tmp_path / "stats.npz")
    assert found.protocol.metrics == ("rfid",)
    with pytest.raises(ConfigError, match="no such file"):
        plan(metrics=("rfid",), fid_statistics=tmp_path / "none.npz")


def test_stress_tests_are_named() -> None:
    assert stress_names("seams, cycles") == ("cycles", "seams")
    assert stress_names("none") == ()
    assert len(stress_names("all")) == 5
    with pytest.raises(ConfigError, match="'speed' is no stress test; expected all, none or of cycles"):
        stress_names("speed")


def test_a_place_for_statistics_that_cannot_be_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="come with rfid"):
        plan(metrics=("psnr",), save_fid_statistics=tmp_path / "stats.npz")
    with pytest.raises(ConfigError, match="is a folder"):
        plan(metrics=("rfid",), save_fid_statistics=tmp_path)
    assert plan(metrics=("rfid",), save_fid_statistics=tmp_path / "new" / "stats.npz").protocol.metrics == ("rfid",)


def test_a_plan_says_how_many_images_were_found_and_which_are_taken(tmp_path: Path, make_images: MakeImages) -> None:
    photos = make_images(tmp_path, {f"{number}.png": (9, 9) for number in range(6)})
    protocol = replace(PRESETS["native"], metrics=("psnr",), max_images=3)
    plan = plan_evaluation(photos, (), None, tmp_path / "out", protocol, EvaluateOptions(gates=("psnr<1",)))
    assert [file.key for file in plan.files] == ["0.png", "2.png", "4.png"]
    data = plan.to_json()
    assert (data["num_found"], data["num_images"], data["gates"], data["stress"]) == (6, 3, ["psnr<1"], [])
    assert data["vaes"] == [{"id": "sdvae-mini", "ref": None, "role": "candidate"}]
