"""DISTS against the authors' module, on real VGG16 weights where the external assets are there, and on random ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError
from sdvae.features.dists import DISTS, build_dists, find_dists_weights

CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256} | dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
FILE = "vgg16_features.safetensors"

ensure_torchvision_importable()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
    pytest.importorskip("DISTS_pytorch")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random VGG16, whose features keep their size from layer to layer."""
    folder, generator, before = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0), 3
    weights = {}
    for number, after in CONVOLUTIONS.items():
        weight = torch.randn((after, before, 3, 3), generator=generator) * (2 / (9 * before)) ** 0.5
        weights |= {f"features.{number}.weight": weight, f"features.{number}.bias": torch.zeros(after)}
        before = after
    save_file(weights, folder / FILE)
    return folder


@pytest.fixture(scope="module")
def ours(random_weights: Path) -> DISTS:
    return build_dists(random_weights)


def stock(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The authors' module, with VGG16 from the file instead of from a download."""
    import torchvision
    from DISTS_pytorch import DISTS_pt

    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    features = {key.removeprefix("features."): tensor.float() for key, tensor in load_file(file).items()}
    network.features.load_state_dict(features, strict=True, assign=True)
    monkeypatch.setattr(DISTS_pt.models, "vgg16", lambda pretrained: network)
    reference = DISTS_pt.DISTS(load_weights=False)
    learned = torch.load(Path(str(DISTS_pt.__file__)).with_name("weights.pt"), weights_only=True)
    reference.load_state_dict(learned, strict=False)
    return reference


def pictures(px: int = 64) -> tuple[Tensor, Tensor]:
    """Smooth pictures and, first, noisy versions of them, in [-1, 1]."""
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(each).resize((px, px), 3) for each in rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)]
    x = torch.from_numpy(np.stack([np.asarray(each) for each in smooth])).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.from_numpy(rng.normal(0, 0.3, tuple(x.shape))).float()
    return (x + noise).clamp(-1, 1), x.contiguous()


def test_it_equals_the_authors_module_on_random_weights(
    ours: DISTS, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recon, x = pictures()
    expected = stock(random_weights / FILE, monkeypatch)((recon + 1) / 2, (x + 1) / 2)
    assert (expected > 0.005).all()
    torch.testing.assert_close(ours(recon, x), expected, rtol=1e-4, atol=2e-6)


def test_it_equals_the_authors_module_on_real_weights_and_photographs(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = assets / "weights" / "vgg16_features_fp16.safetensors"
    photos = [Image.open(path).convert("RGB") for path in sorted((assets / "images" / "val").iterdir())[:3]]
    crops = [photo.crop((100, 50, 227, 178)) for photo in photos]
    blurred = [crop.filter(ImageFilter.GaussianBlur(radius)) for radius, crop in enumerate(crops)]
    x, recon = (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
        for images in (crops, blurred)
    )
    expected = stock(file, monkeypatch)((recon + 1) / 2, (x + 1) / 2)
    distance = build_dists(file.parent)(recon, x)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=2e-6)
    assert distance[0] == 0 and (distance[1:] > 0.05).all()


def test_equal_images_give_exactly_zero_and_worse_ones_more(ours: DISTS) -> None:
    recon, x = pictures()
    targets = ours.features(x)
    none, half, whole = (ours.distance(x + part * (recon - x), targets) for part in (0, 0.5, 1))
    assert (none == 0).all() and (none < half).all() and (half < whole).all()


def test_an_image_alone_has_the_value_it_has_in_a_batch(ours: DISTS) -> None:
    recon, x = pictures()
    alone = torch.cat([ours(recon[n : n + 1], x[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(ours(recon, x), alone, rtol=0, atol=1e-6)


def test_nothing_takes_a_gradient(ours: DISTS) -> None:
    recon, x = pictures(32)
    assert not ours(recon.requires_grad_(), x).requires_grad
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_the_smallest_size_passes_and_one_pixel_less_is_a_config_error(ours: DISTS) -> None:
    recon, x = pictures(16)
    assert ours(recon, x).isfinite().all()
    with pytest.raises(ConfigError, match="at least 16 px; got 16 x 15"):
        ours.features(x[:, :, 1:])


def test_targets_of_another_batch_are_an_error(ours: DISTS) -> None:
    recon, x = pictures(32)
    with pytest.raises(ValueError, match="target features have the shapes"):
        ours.distance(recon, ours.features(x[:1]))


def test_building_draws_no_random_numbers_and_runs_nothing_of_the_package(random_weights: Path) -> None:
    code = (
        "import sys, torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "from sdvae.features.dists import build_dists\n"
        "before = torch.get_rng_state()\n"
        f"build_dists({str(random_weights)!r})\n"
        "assert torch.equal(torch.get_rng_state(), before)\n"
        "assert not {'DISTS_pytorch', 'torchvision', 'lpips'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_without_the_package_the_extra_is_named(random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "DISTS_pytorch", None)
    for function in (build_dists, find_dists_weights):
        with pytest.raises(ConfigError, match=r"pip install 'sdvae\[eval\]'"):
            function(random_weights)


def test_a_check_finds_the_file_that_is_read_and_fetches_nothing(
    tmp_path: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_dists_weights(random_weights) == random_weights / FILE
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("SDVAE_WEIGHTS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(MissingWeightsError, match="not allowed here(.|\n)*`--without dists` does without"):
        find_dists_weights(without="`--without dists` does without")


def test_weights_of_another_network_are_a_checkpoint_error(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="missing.*wrongly shaped"):
        build_dists(tmp_path)
