"""What comes with the package is there, small, and as good as its card says."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.checkpoints.read import bundled_path
from sdvae.checkpoints.store import load_autoencoder
from sdvae.config import read_config
from sdvae.data.images import EncodedImage
from sdvae.features.lpips import LPIPS, build_lpips
from sdvae.training.build import build_autoencoder
from sdvae.training.config import TrainConfig
from sdvae.training.monitoring.validation import ValidationResult, Validator

ROOT = Path(__file__).parents[1]
PHOTOS = bundled_path().parent / "photos"

# Measured once, photograph by photograph; the means are those of the card.
QUALITY = json.loads((ROOT / "tests" / "bundled_quality.json").read_text(encoding="utf-8"))


def card_number(pattern: str) -> float:
    match = re.search(pattern, (bundled_path() / "README.md").read_text(encoding="utf-8"))
    assert match, f"the card has no line like {pattern}"
    return float(match[1])


def measured(photos: list[Path], perceptual: LPIPS | None = None) -> ValidationResult:
    items = [EncodedImage(path.name, path) for path in photos]
    return Validator(items, crop_px=None).run(load_autoencoder(), nullcontext, perceptual=perceptual)


def test_it_is_small_and_has_the_architecture_of_its_recipe() -> None:
    assert sum(path.stat().st_size for path in bundled_path().iterdir()) < 16e6
    recipe = read_config(TrainConfig, ROOT / "configs" / "sdvae-mini.yaml")
    built, bundled = build_autoencoder(recipe.model, seed=0), load_autoencoder()
    shapes = {name: weight.shape for name, weight in built.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in bundled.state_dict().items()}


def test_the_sample_photographs_come_back_as_well_as_the_card_says() -> None:
    known = QUALITY["sample photographs: PSNR"]
    assert sorted(known) == sorted(path.name for path in PHOTOS.glob("*.jpg"))
    assert np.mean(list(known.values())) == pytest.approx(
        card_number(r"six sample photographs.*?\| ([\d.]+) dB"), abs=0.01
    )
    for name in ("cat.jpg", "coffee.jpg"):  # each of the six takes seconds
        assert measured([PHOTOS / name]).psnr == pytest.approx(known[name], abs=0.01)


def test_held_out_photographs_come_back_as_well_as_the_card_says(assets: Path) -> None:
    known = QUALITY["held-out photographs: PSNR, LPIPS alex"]
    psnr, lpips = np.mean(list(known.values()), axis=0)
    row = r"BSDS500 test set.*?\| sdvae-mini \| "
    assert psnr == pytest.approx(card_number(row + r"([\d.]+) dB"), abs=0.01)
    assert lpips == pytest.approx(card_number(row + r"[\d.]+ dB \| ([\d.]+)"), abs=0.001)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"\| sdvae-mini \| ([\d.]+) dB \[[^]]+\] \| [^|]+ \| ([\d.]+) \["
    match = re.search(row, readme)
    assert match and match.groups() == (f"{psnr:.1f}", f"{lpips:.2f}")

    photos = sorted(path for path in (assets / "images" / "val").iterdir() if path.suffix in {".jpg", ".png"})
    assert [path.name for path in photos] == list(known)
    perceptual = build_lpips("alex", assets / "weights")
    for photo in photos[::13]:  # all of them take two minutes
        result = measured([photo], perceptual)
        assert [result.psnr, result.lpips] == pytest.approx(known[photo.name], abs=0.01)


def test_latents_of_photographs_have_about_unit_variance() -> None:
    vae = load_autoencoder()
    assert vae.config.scaling_factor == card_number(r"`scaling_factor` ([\d.]+)")
    values = []
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as image:
            pixels = np.asarray(image.resize((256, 256)))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            values.append(vae.encode(x).latent_dist.mode().flatten())
    assert 0.6 < float(torch.cat(values).std()) * vae.config.scaling_factor < 1.5


def test_every_training_photograph_is_credited_and_no_sample_photograph_is_among_them() -> None:
    rows = (bundled_path() / "CREDITS.tsv").read_text(encoding="utf-8").splitlines()
    assert rows[0].split("\t") == ["file", "licence", "source", "change"]
    assert len(rows) == 1 + 644
    assert all(len(row.split("\t")) == 4 and row.split("\t")[1] for row in rows[1:])
    names = " ".join(rows)
    for held_out in ("chelsea", "charminar", "coffee", "roman-colosseum", "rocket", "spices-of-life"):
        assert held_out not in names
