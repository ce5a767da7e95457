from __future__ import annotations

import io
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdvae.errors import ConfigError
from sdvae.evaluation.stress.seam_score import SEAM_THRESHOLD, SEARCH_THRESHOLD, colour_step, seam_score

BUNDLED = sorted(Path(str(resources.files("sdvae.assets") / "photos")).glob("*.jpg"))


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _degraded(photo: np.ndarray) -> np.ndarray:
    """A stand-in for a reconstruction, but quick: blurred, and with the 8 px blocks of JPEG."""
    file = io.BytesIO()
    Image.fromarray(photo).filter(ImageFilter.GaussianBlur(0.7)).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def _nearly(photo: np.ndarray) -> np.ndarray:
    """As another dtype or another device would give: some pixels rounded the other way."""
    noise = np.random.default_rng(0).normal(0.0, 0.3, photo.shape)
    return np.rint(photo + noise).clip(0, 255).astype(np.uint8)


def _with_step(image: np.ndarray, column: int, levels: float) -> np.ndarray:
    stepped = image.astype(np.float64)
    stepped[:, column:] += levels
    return np.rint(stepped).clip(0, 255).astype(np.uint8)


def _thirds(length: int) -> list[int]:
    return [length * part // 4 // 8 * 8 for part in (1, 2, 3)]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [_read(path) for path in BUNDLED]


@pytest.fixture(scope="module")
def val_photos(assets: Path) -> list[np.ndarray]:
    paths = sorted((assets / "images" / "val").glob("*.jpg"))
    return [_read(path)[:256, :320] for path in paths]  # half of each, for time


@pytest.mark.parametrize("levels", [1, 2, 4, -1])
def test_a_step_against_the_pass_without_tiles_is_found_where_it_is_in_any_photograph(
    photos: list[np.ndarray], levels: int
) -> None:
    for photo in photos:
        # away from the ends of the range, where clipping would take the step away
        photo = (photo * 0.9 + 12).astype(np.uint8)
        columns = _thirds(photo.shape[1])
        found = seam_score(_with_step(_nearly(photo), columns[1], levels), photo, columns=columns, rows=[])
        assert found.found and found.threshold == SEAM_THRESHOLD
        assert (found.position, found.axis) == (columns[1], "vertical")
        assert found.step == pytest.approx(abs(levels), abs=0.1)

        searched = seam_score(_with_step(_nearly(photo), columns[1], levels), photo)
        assert searched.found and searched.threshold == SEARCH_THRESHOLD
        assert abs(searched.position - columns[1]) <= 1 and searched.axis == "vertical"


def test_a_horizontal_seam_is_a_vertical_one_of_the_transposed_image(photos: list[np.ndarray]) -> None:
    photo = photos[0]
    stepped = _with_step(_nearly(photo), 96, 2)
    upright = seam_score(stepped, photo, columns=[96, 160])
    lying = seam_score(stepped.transpose(1, 0, 2), photo.transpose(1, 0, 2), rows=[96, 160])
    assert (lying.axis, lying.position, lying.step) == ("horizontal", 96, upright.step)
    assert lying.score == pytest.approx(upright.score)


@pytest.mark.parametrize("alone", [False, True])
def test_photographs_and_degraded_ones_have_no_seam(photos: list[np.ndarray], alone: bool) -> None:
    for photo in photos:
        places = {"columns": _thirds(photo.shape[1]), "rows": _thirds(photo.shape[0])}
        assert not seam_score(_degraded(photo), None if alone else photo, **places).found
        assert not seam_score(_degraded(photo), None if alone else photo).found
        assert not seam_score(_nearly(photo), photo, **places).found
        assert seam_score(photo, photo).score == pytest.approx(0.0)


@pytest.mark.parametrize(("alone", "reliable"), [(False, {2: 0.9, 4: 1.0}), (True, {4: 0.5})])
def test_validation_photographs_have_no_false_alarm_and_planted_seams_are_found_in_most(
    val_photos: list[np.ndarray], alone: bool, reliable: dict[int, float]
) -> None:
    assert len(val_photos) >= 50
    alarms = 0
    found = dict.fromkeys(reliable, 0)
    for photo in val_photos:
        degraded, reference = _degraded(photo), None if alone else photo
        columns, rows = _thirds(photo.shape[1]), _thirds(photo.shape[0])
        alarms += seam_score(degraded, reference, columns=columns, rows=rows).found
        alarms += seam_score(photo, columns=columns, rows=rows).found
        alarms += seam_score(degraded, reference).found
        for levels in reliable:
            seam = seam_score(_with_step(degraded, columns[1], levels), reference, columns=columns, rows=rows)
            found[levels] += seam.found and (seam.position, seam.axis) == (columns[1], "vertical")
    assert alarms == 0
    for levels, share in reliable.items():
        assert found[levels] >= share * len(val_photos), found


def test_an_edge_of_the_scene_fires_without_a_reference_but_not_against_one(photos: list[np.ndarray]) -> None:
    photo = (photos[0] * 0.5).astype(np.uint8)
    building = _with_step(photo, 160, 80)
    assert seam_score(building, columns=[160]).found  # the control: alone, nobody can tell it from a seam
    assert not seam_score(_nearly(building), building, columns=[160]).found
    assert not seam_score(_degraded(building), building, columns=[160]).found


def test_a_ramp_as_blending_leaves_it_is_found_as_well(photos: list[np.ndarray]) -> None:
    photo = (photos[0] * 0.9 + 12).astype(np.uint8)
    ramp = np.clip((np.arange(photo.shape[1]) - 160) / 16, 0, 1)[None, :, None] * 3
    seam = seam_score(np.rint(_nearly(photo) + ramp), photo, columns=[160, 168, 176])
    assert seam.found and seam.position == 168


def test_a_seam_whose_sign_changes_along_the_line_is_found(photos: list[np.ndarray]) -> None:
    photo = (photos[0] * 0.9 + 12).astype(np.uint8)
    stepped = _nearly(photo).astype(np.float64)
    half = photo.shape[0] // 2
    stepped[:half, 160:] += 2
    stepped[half:, 160:] -= 2
    assert seam_score(stepped, photo, columns=[160]).found


def test_a_pattern_of_8_px_is_no_seam_but_one_line_of_it_that_is_stronger_is(photos: list[np.ndarray]) -> None:
    photo = (photos[0] * 0.9 + 12).astype(np.uint8)
    stripes = np.zeros(photo.shape[1])
    stripes[::8] = 1.5
    striped = _nearly(photo) + stripes[None, :, None]
    assert not seam_score(striped, photo, columns=[160]).found
    assert seam_score(_with_step(striped, 160, 2), photo, columns=[160]).found


def test_colour_step_is_the_largest_difference_of_shift_between_neighbours(photos: list[np.ndarray]) -> None:
    photo = photos[0].astype(np.float64)
    shifted = photo.copy()
    shifted[:96, 160:] += np.array([1.5, 0.0, -0.5])
    assert colour_step(shifted, photo, columns=[160], rows=[96]) == pytest.approx(1.5)
    assert colour_step(shifted, photo, columns=[160]) == pytest.approx(1.5 * 96 / photo.shape[0])
    assert colour_step(photo + 3.0, photo, columns=[160], rows=[96]) == pytest.approx(0.0)  # one shift for all
    assert colour_step(shifted, photo) == 0.0
    opposite = photo.copy()  # tiles that touch at a corner only are no neighbours, but both differ from the others
    opposite[:96, :160] += 2.0
    opposite[96:, 160:] += 2.0
    assert colour_step(opposite, photo, columns=[160], rows=[96]) == pytest.approx(2.0)


def test_what_cannot_be_measured_is_refused() -> None:
    small = np.zeros((24, 24, 3), np.uint8)
    with pytest.raises(ConfigError, match="24 x 24 px is too small"):
        seam_score(small)
    with pytest.raises(ConfigError, match="columns \\[2\\]"):
        seam_score(np.zeros((64, 64, 3), np.uint8), columns=[2])  # too near the border
    with pytest.raises(ConfigError, match="differ in size"):
        seam_score(small, np.zeros((24, 25, 3), np.uint8))
