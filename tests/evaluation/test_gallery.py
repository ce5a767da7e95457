"""Which pictures a report shows, and that they are the pixels that were measured."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.data.images import round_to_8_bits
from sdvae.evaluation.gallery import MAX_PICTURE_PX, choose_gallery, gallery_entry
from sdvae.evaluation.images import Prepared
from sdvae.evaluation.protocol import PRESETS
from sdvae.model.posterior import image_generator

NUM = 100
GENERATOR = np.random.default_rng(0)


def column(worst: int, value: float, usual: float) -> list[float | None]:
    """`usual` for every image but one."""
    return [value if place == worst else usual for place in range(NUM)]


def test_of_few_images_all_are_shown() -> None:
    values = {"mine": {"psnr": [30.0, None, 20.0]}}
    assert choose_gallery(values, 3, 3) == [0, 1, 2] == choose_gallery(values, 3, 24)


def test_none_wanted_none_shown() -> None:
    assert choose_gallery({"mine": {"psnr": column(7, 10, 30)}}, NUM, 0) == []


def test_the_worst_by_each_metric_of_each_vae_is_shown() -> None:
    values = {
        "mine": {
            "psnr": column(13, 10, 30),  # higher is better
            "lpips_alex": column(27, 0.9, 0.1),  # lower
            "bias_r": column(39, -8, 1),  # nearest to 0, on either side
            "sharpness": column(41, 0.2, 1.1),  # nearest to 1
        },
        "theirs": {"psnr": column(59, 11, 31), "lpips_alex": column(61, 0.8, 0.1)},
    }
    assert {13, 27, 39, 41, 59, 61} <= {*choose_gallery(values, NUM, 24)}


def test_a_value_of_0_is_a_value_and_none_is_not() -> None:
    worst: list[float | None] = [0.0 if place == 77 else None if place % 2 else 5.0 for place in range(NUM)]
    assert 77 in choose_gallery({"mine": {"psnr": worst}}, NUM, 2)
    missing: dict[str, list[float | None]] = {"ms_ssim": [None] * NUM, "psnr": column(77, 10, 30)}
    assert 77 in choose_gallery({"mine": missing}, NUM, 2)
    assert choose_gallery({"mine": {"ms_ssim": [None] * NUM}}, NUM, 6) == [0, 33, 66]


def test_a_metric_that_is_0_everywhere_counts_as_any_other_that_is_equal_everywhere() -> None:
    zeros, ones = ({"mine": {"l1": [value] * NUM}} for value in (0.0, 1.0))
    assert choose_gallery(zeros, NUM, 8) == choose_gallery(ones, NUM, 8)


@pytest.mark.parametrize("wanted", [1, 2, 3, 8, 24, 99])
def test_never_more_than_wanted_half_of_them_evenly_spaced_and_the_same_each_time(wanted: int) -> None:
    values = {
        id_: {name: GENERATOR.random(NUM).tolist() for name in ("psnr", "ssim", "l1", "bias_g")}
        for id_ in ("mine", "theirs", "others")
    }
    chosen = choose_gallery(values, NUM, wanted)
    assert len(chosen) == wanted == len({*chosen}) and chosen == sorted(chosen)
    half = wanted // 2
    assert {place * NUM // half for place in range(half)} <= {*chosen}
    assert choose_gallery(values, NUM, wanted) == chosen


def test_the_second_worst_follows_the_worst_of_all_metrics() -> None:
    psnr, l1 = column(11, 10, 30), column(21, 90, 1)
    psnr[12], l1[22] = 12, 80
    assert choose_gallery({"mine": {"psnr": psnr, "l1": l1}}, NUM, 6) == sorted([0, 33, 66, 11, 21, 12])


@pytest.fixture(scope="module")
def subject(vae_path: Path) -> OpenedVae:
    return open_any_vae(vae_path, torch.device("cpu"), torch.float32)


def prepared(width: int, height: int) -> Prepared:
    pixels = GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Prepared(index=0, key='a/"<b>.png', pixels=pixels, digest="d")


def decoded(uri: str) -> NDArray[np.uint8]:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def reconstruction(subject: OpenedVae, pixels: NDArray[np.uint8]) -> Any:
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    recon = round_to_8_bits(subject.decode(subject.encode(x).z, *pixels.shape[:2]))
    return (recon[0] * 255).round().byte().permute(1, 2, 0).numpy()


def test_pictures_hold_exactly_the_original_and_what_the_vae_makes_of_it(subject: OpenedVae) -> None:
    image = prepared(45, 30)
    entry = gallery_entry(image, {"mine": subject}, PRESETS["native"])
    assert (entry["key"], entry["width"], entry["height"], entry["crop"]) == (image.key, 45, 30, [0, 0, 45, 30])
    assert np.array_equal(decoded(entry["original"]), image.pixels)
    assert [*entry["reconstructions"]] == ["mine"]
    assert np.array_equal(decoded(entry["reconstructions"]["mine"]), reconstruction(subject, image.pixels))


def test_each_vae_shows_its_own_reconstruction(subject: OpenedVae, other_vae_path: Path) -> None:
    image = prepared(32, 24)
    subjects = {"mine": subject, "theirs": open_any_vae(other_vae_path, torch.device("cpu"), torch.float32)}
    pictures = gallery_entry(image, subjects, PRESETS["native"])["reconstructions"]
    for id_, each in subjects.items():
        assert np.array_equal(decoded(pictures[id_]), reconstruction(each, image.pixels))


@pytest.mark.parametrize(
    ("width", "height", "crop"),
    [(600, 40, [44, 0, 512, 40]), (40, 513, [0, 0, 40, 512]), (512, 16, [0, 0, 512, 16])],
    ids=str,
)
def test_of_a_large_image_the_centre_of_the_whole_reconstruction_is_shown(
    width: int, height: int, crop: list[int], subject: OpenedVae
) -> None:
    image = prepared(width, height)
    entry = gallery_entry(image, {"mine": subject}, PRESETS["native"])
    assert entry["crop"] == crop and max(crop[2:]) <= MAX_PICTURE_PX
    left, top, columns, rows = crop
    part = np.s_[top : top + rows, left : left + columns]
    assert np.array_equal(decoded(entry["original"]), image.pixels[part])
    assert np.array_equal(decoded(entry["reconstructions"]["mine"]), reconstruction(subject, image.pixels)[part])


def test_of_a_sampled_posterior_the_draw_that_was_measured_is_shown(subject: OpenedVae) -> None:
    image = prepared(32, 24)
    picture = gallery_entry(image, {"mine": subject}, replace(PRESETS["native"], posterior="sample", seed=5))
    encoding = subject.encode(torch.from_numpy(image.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
    recon = round_to_8_bits(subject.decode(encoding.draw([image_generator(5, image.key)]), 24, 32))[0]
    expected = (recon * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(decoded(picture["reconstructions"]["mine"]), expected)
    assert not np.array_equal(expected, reconstruction(subject, image.pixels))


def test_each_vae_has_its_worst_images_in_before_any_has_more() -> None:
    values = {name: {"psnr": column(place, 1.0, 30.0)} for name, place in (("a", 3), ("b", 57), ("c", 91))}
    chosen = choose_gallery(values, NUM, 4)
    assert {3, 57} <= set(chosen)
