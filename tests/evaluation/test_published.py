"""Published numbers: rows as result.json holds them, each with its source and its caveat."""

from __future__ import annotations

import pytest

from sdvae.errors import ConfigError
from sdvae.evaluation.published import published_rows


@pytest.mark.parametrize(
    ("name", "count", "num_images"), [("coco", 4, 5000), ("laion", 3, 10000), ("imagenet", 1, None)]
)
def test_rows_of_a_set_say_how_many_images_and_where_they_come_from(
    name: str, count: int, num_images: int | None
) -> None:
    rows = published_rows(name)
    assert len(rows) == count
    for row in rows:
        assert row.keys() == {"vae", "dataset", "num_images", "metrics", "source", "caveat"}
        assert row["num_images"] == num_images
        assert "https://" in row["source"]
        for word in ("resized", "cropped", "SSIM", "PSIM", "FID"):
            assert word in row["caveat"]
        assert row["metrics"]["rfid"]["std"] is None and row["metrics"]["psnr"]["std"] > 0
        assert "lpips_alex" not in row["metrics"]  # PSIM is another number


def test_all_holds_every_row_once() -> None:
    rows = published_rows("all")
    assert len(rows) == 8
    assert len({(row["vae"], row["dataset"]) for row in rows}) == 8


def test_the_numbers_of_the_cards() -> None:
    psnr = {(row["vae"], row["num_images"]): row["metrics"]["psnr"] for row in published_rows("all")}
    assert psnr["sd-vae-ft-mse", 5000] == {"mean": 24.5, "std": 3.7}
    assert psnr["sd-vae-ft-mse", 10000] == {"mean": 27.3, "std": 4.7}
    assert psnr["sdxl-vae", 5000] == {"mean": 24.7, "std": 3.9}
    assert psnr["SD 1.x original (kl-f8)", None] == {"mean": 24.19, "std": 4.19}


def test_rows_are_copies() -> None:
    published_rows("coco")[0]["metrics"]["psnr"]["mean"] = 99.0
    assert published_rows("coco")[0]["metrics"]["psnr"]["mean"] == 23.4


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="coco, laion, imagenet, all"):
        published_rows("cocoa")
