"""Inception features against torch-fidelity's own network, with random weights and, where they are, the real ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import CheckpointError, MissingWeightsError
from sdvae.features import inception
from sdvae.features.inception import NUM_FEATURES, InceptionFeatures, build_inception, find_inception_weights

PUBLISHED_NAME = "weights-inception-2015-12-05-6726825d.pth"
OTHER_NAME = "fid_inception_2015-12-05.safetensors"
REAL_NAME = "fid_inception_2015-12-05_fp16.safetensors"
# Largest difference between features, of their largest value. Measured: 2e-6 with the real weights.
TOLERANCE = 2e-5


def stock(path: Path) -> Any:
    """torch-fidelity's network with a file's weights; it loads strictly."""
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
        package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        return package.FeatureExtractorInceptionV3("stock", ["2048"], str(path))


def with_classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the published file holds besides the tensors that are needed."""
    names = [name.removesuffix("running_var") for name in weights if name.endswith("running_var")]
    counts = {f"{name}num_batches_tracked": torch.tensor(0) for name in names}
    scales = {f"{name}weight": torch.ones_like(weights[f"{name}bias"]) for name in names}
    return {**scales, **weights, **counts, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published file's name and tensors; its batch norms are far from doing nothing."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    with torch.device("meta"):
        network = InceptionFeatures()
    for name, conv in network.named_modules():
        if isinstance(conv, nn.Conv2d):
            shape, num = conv.weight.shape, conv.out_channels
            weights[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
            weights[f"{name}.bn.weight"] = 0.5 + torch.rand(num, generator=generator)
            weights[f"{name}.bn.bias"] = torch.randn(num, generator=generator) / 5
            weights[f"{name}.bn.running_mean"] = torch.randn(num, generator=generator) / 5
            weights[f"{name}.bn.running_var"] = 0.5 + torch.rand(num, generator=generator)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(with_classifier(weights), folder / PUBLISHED_NAME)
    return folder


@pytest.fixture(scope="module")
def ours(random_weights: Path) -> InceptionFeatures:
    return build_inception(random_weights)


@pytest.fixture(scope="module")
def real_stock(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    weights = {name: tensor.float() for name, tensor in load_file(assets / "weights" / REAL_NAME).items()}
    path = tmp_path_factory.mktemp("real") / "full.pth"
    torch.save(with_classifier(weights), path)
    return stock(path)


def pictures(num: int, width: int, height: int) -> Tensor:
    """Smooth noise with sharp noise over it, (num, 3, height, width), uint8."""
    rng = np.random.default_rng(num * width + height)
    levels = rng.integers(0, 256, (num, 6, 6, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC)) for each in levels]
    noisy = np.stack(smooth) + rng.normal(0, 10, (num, height, width, 3))
    return torch.from_numpy(noisy.clip(0, 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def photographs(folder: Path, width: int, height: int, num: int = 2) -> Tensor:
    images = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir()) if path.suffix in {".jpg", ".png"}]
    arrays = [np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) for image in images[:num]]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def relative_difference(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape and value.dtype == expected.dtype
    return float((value - expected).abs().max() / expected.abs().max())


def test_features_are_those_of_torch_fidelity_with_any_weights_of_batch_norms(
    random_weights: Path, ours: InceptionFeatures
) -> None:
    reference = stock(random_weights / PUBLISHED_NAME)
    for images in (pictures(5, 64, 64), pictures(1, 400, 310)):
        (expected,) = reference(images)
        features = ours(images)
        assert features.shape == (len(images), NUM_FEATURES)
        assert expected.std() > 0.01 and relative_difference(features, expected) < TOLERANCE


@pytest.mark.parametrize(("width", "height"), [(256, 256), (64, 48), (299, 299), (298, 300), (481, 321), (700, 1)])
def test_features_are_those_of_torch_fidelity_on_photographs_of_any_size(
    assets: Path, real_stock: Any, width: int, height: int
) -> None:
    images = photographs(assets / "images" / "val", width, height)
    (expected,) = real_stock(images)
    assert relative_difference(build_inception(assets / "weights")(images), expected) < TOLERANCE


def test_the_resize_is_the_one_of_tensorflow_1() -> None:
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
        package = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    for width, height in ((256, 256), (97, 31), (299, 299), (1024, 600), (1, 2)):
        images = pictures(2, width, height)
        expected = package.interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=(299, 299), align_corners=False
        )
        torch.testing.assert_close(inception._resize(images), expected, rtol=0, atol=1e-3)  # of 255


def test_an_image_has_the_same_features_in_any_batch_and_memory_layout(ours: InceptionFeatures) -> None:
    images = pictures(6, 80, 60)
    expected = ours(images)
    for number, image in enumerate(images):
        assert relative_difference(ours(image[None]), expected[number : number + 1]) < TOLERANCE
    assert relative_difference(ours(images.contiguous(memory_format=torch.channels_last)), expected) < TOLERANCE
    assert relative_difference(ours(images.flip(0)).flip(0), expected) < TOLERANCE


def test_under_autocast_and_in_training_mode_the_features_are_the_same(ours: InceptionFeatures) -> None:
    images = pictures(2, 64, 64)
    expected = ours(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(images), expected)
    ours.train()
    assert torch.equal(ours(images), expected)
    ours.eval()
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not expected.requires_grad


def test_the_images_given_are_left_as_they_are(ours: InceptionFeatures) -> None:
    images = pictures(1, 299, 299)
    before = images.clone()
    ours(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_images_of_another_type_or_shape_are_an_error(ours: InceptionFeatures, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 images \(B, 3, H, W\), got torch\.(float32|uint8) \("):
        ours(images)


def test_scales_of_batch_norms_may_be_absent_and_are_then_one(random_weights: Path, tmp_path: Path) -> None:
    weights = torch.load(random_weights / PUBLISHED_NAME, weights_only=True)
    without = {
        name: tensor
        for name, tensor in weights.items()
        if not name.endswith(("bn.weight", "num_batches_tracked")) and not name.startswith("fc.")
    }
    save_file(without, tmp_path / OTHER_NAME)
    ones = {name: torch.ones_like(each) if name.endswith("bn.weight") else each for name, each in weights.items()}
    torch.save(ones, tmp_path / "ones.pth")
    images = pictures(1, 64, 64)
    features = build_inception(tmp_path)(images)
    assert torch.equal(features, build_inception(tmp_path / "ones.pth")(images))


def test_weights_of_another_network_are_a_checkpoint_error(tmp_path: Path, random_weights: Path) -> None:
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors: .*376 tensors missing.*features.0.weight"):
        build_inception(tmp_path / "other.safetensors")
    weights = torch.load(random_weights / PUBLISHED_NAME, weights_only=True)
    weights["Conv2d_1a_3x3.bn.weight"] = torch.ones(31)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"wrongly shaped \(Conv2d_1a_3x3.bn.weight, file \(31,\)"):
        build_inception(tmp_path / "odd.pth")


def test_a_check_finds_the_file_that_is_read_and_fetches_nothing(
    tmp_path: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_inception_weights(random_weights) == random_weights / PUBLISHED_NAME
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("SDVAE_WEIGHTS", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(MissingWeightsError, match="an.option: set it to(.|\n)*do without FID") as caught:
        find_inception_weights(option="an.option", without="do without FID")
    assert "not allowed here" in str(caught.value) and PUBLISHED_NAME in str(caught.value)


def test_building_needs_no_other_package_and_draws_no_random_numbers(random_weights: Path) -> None:
    code = (
        "import sys, torch\n"
        "from sdvae.features.inception import build_inception\n"
        "before = torch.get_rng_state()\n"
        f"build_inception({str(random_weights)!r})\n"
        "assert torch.equal(torch.get_rng_state(), before)\n"
        "assert not {'torchvision', 'torch_fidelity', 'lpips'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
