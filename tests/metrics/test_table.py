"""Every metric against an independent implementation on photographs, and what all metrics have in common."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import ConfigError, MissingWeightsError
from sdvae.features.lpips import LPIPS
from sdvae.metrics.table import IMAGE_METRICS, psnr

NETWORKS = {"lpips_alex": "lpips", "lpips_vgg": "lpips", "dists": "DISTS_pytorch"}
PIXEL_METRICS = [name for name in IMAGE_METRICS if name not in NETWORKS]
Arrays = NDArray[np.uint8]


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1.2))


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(with_noise(np.asarray(image), 8, rng))


def with_noise(levels: Arrays, sigma: float, rng: np.random.Generator) -> Arrays:
    return (levels + rng.normal(0, sigma, levels.shape)).clip(0, 255).round().astype(np.uint8)


def tensor(images: Any) -> Tensor:
    """(B, H, W, 3) or images -> (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float().div(255)


@pytest.fixture(scope="module", params=["bundled", "external"])
def photographs(request: pytest.FixtureRequest) -> tuple[Arrays, Arrays]:
    """Crops and degraded versions of them: (B, 177, 192, 3) each."""
    if request.param == "bundled":
        paths = sorted(Path(str(files("sdvae") / "assets" / "photos")).glob("*.jpg"))
    else:
        folder = request.getfixturevalue("assets") / "images"
        paths = [*sorted((folder / "val").iterdir())[:4], folder / "hard" / "synth_text_sizes.png"]
    rng = np.random.default_rng(0)
    crops = [Image.open(path).convert("RGB").crop((60, 70, 252, 247)) for path in paths]
    pairs = [(crop, degrade(crop, rng)) for crop in crops for degrade in (jpeg, blur, noise)]
    x, recon = (np.stack([np.asarray(image) for image in images]) for images in zip(*pairs, strict=True))
    return recon, x


def sharp_energy(image: Arrays) -> float:
    luma = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    rows, columns = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side) for side in luma.shape)
    spectrum = np.fft.fft2((luma - luma.mean()) * np.outer(rows, columns))
    fy, fx = np.meshgrid(*(np.fft.fftfreq(side) for side in luma.shape), indexing="ij")
    return float((np.abs(spectrum) ** 2)[fx**2 + fy**2 > 0.25**2].sum())


def skimage_ssim(recon: Arrays, x: Arrays, **options: Any) -> float:
    function = pytest.importorskip("skimage.metrics").structural_similarity
    return float(function(x, recon, channel_axis=2, data_range=255, **options))


def skimage_ciede2000(recon: Arrays, x: Arrays) -> float:
    colour = pytest.importorskip("skimage.color")
    return float(colour.deltaE_ciede2000(colour.rgb2lab(x), colour.rgb2lab(recon)).mean())


def pytorch_ms_ssim(recon: Arrays, x: Arrays) -> float:
    function = pytest.importorskip("pytorch_msssim").ms_ssim
    return float(function(tensor([recon]).double(), tensor([x]).double(), data_range=1.0))


def bias(channel: int) -> Callable[[Arrays, Arrays], float]:
    return lambda recon, x: float((recon.astype(int) - x)[..., channel].mean())


# Function of one pair of images, and the tolerance.
REFERENCES: dict[str, tuple[Callable[[Arrays, Arrays], float], float]] = {
    "psnr": (lambda recon, x: psnr(x, recon), 1e-9),
    "ssim": (
        lambda recon, x: skimage_ssim(recon, x, gaussian_weights=True, sigma=1.5, use_sample_covariance=False),
        2e-6,
    ),
    "ssim_uniform7": (skimage_ssim, 2e-6),
    "ms_ssim": (pytorch_ms_ssim, 5e-6),
    "l1": (lambda recon, x: float(np.abs(recon.astype(int) - x).mean()), 1e-9),
    "bias_r": (bias(0), 1e-9),
    "bias_g": (bias(1), 1e-9),
    "bias_b": (bias(2), 1e-9),
    "ciede2000": (skimage_ciede2000, 3e-3),  # scikit-image has a white and a matrix with other last digits
    "sharpness": (lambda recon, x: sharp_energy(recon) / sharp_energy(x), 1e-4),
}


def test_every_metric_of_pixels_has_a_reference() -> None:
    assert set(REFERENCES) == set(PIXEL_METRICS)


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_it_equals_an_independent_implementation(name: str, photographs: tuple[Arrays, Arrays]) -> None:
    recon, x = photographs
    reference, tolerance = REFERENCES[name]
    expected = [reference(*images) for images in zip(recon, x, strict=True)]
    result = IMAGE_METRICS[name].build()(tensor(recon), tensor(x))
    assert result.dtype == torch.float64 and result.device.type == "cpu"
    assert result.tolist() == pytest.approx(expected, abs=tolerance, rel=0 if tolerance < 1e-4 else tolerance)


def test_ssim_equals_torchmetrics_where_its_window_lies_inside(photographs: tuple[Arrays, Arrays]) -> None:
    ensure_torchvision_importable()
    package = pytest.importorskip("torchmetrics.functional.image")
    recon, x = (tensor(images[::5, :90, :100]) for images in photographs)
    _, full = package.structural_similarity_index_measure(
        recon.double(), x.double(), data_range=1.0, return_full_image=True
    )
    inside = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # torchmetrics reflects the image at its border
    torch.testing.assert_close(IMAGE_METRICS["ssim"].build()(recon, x), inside, rtol=0, atol=2e-6)


def test_ms_ssim_is_near_that_of_torchmetrics(photographs: tuple[Arrays, Arrays]) -> None:
    ensure_torchvision_importable()
    package = pytest.importorskip("torchmetrics.functional.image")
    recon, x = (tensor(images[::5, :176, :176]) for images in photographs)  # even sides at every scale
    expected = package.multiscale_structural_similarity_index_measure(
        recon, x, data_range=1.0, reduction="none", normalize="relu"
    ).double()
    # It averages over channels before the product, and reflects the coarsest scale at its border.
    torch.testing.assert_close(IMAGE_METRICS["ms_ssim"].build()(recon, x), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_package(net: str, assets: Path) -> None:
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's on the argument `pretrained`
        stock = pytest.importorskip("lpips").LPIPS(net=net, pnet_rand=True, verbose=False)
    file = (
        assets
        / "weights"
        / {"alex": "alexnet_features_fp16.safetensors", "vgg": "vgg16_features_fp16.safetensors"}[net]
    )
    weights = {key.removeprefix("features."): value.float() for key, value in load_file(file).items()}
    stock.net.load_state_dict({key: weights[key.split(".", 1)[1]] for key in stock.net.state_dict()})
    rng = np.random.default_rng(0)
    paths = sorted((assets / "images" / "val").iterdir())[:2]
    crops = [Image.open(path).convert("RGB").crop((60, 70, 172, 175)) for path in paths]
    x, recon = tensor(crops), tensor([jpeg(crops[0], rng), blur(crops[1], rng)])
    with torch.no_grad():
        expected = stock(recon * 2 - 1, x * 2 - 1).view(-1).double()
    result = IMAGE_METRICS[f"lpips_{net}"].build(file.parent)(recon, x)
    assert (result > 0.01).all()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's and VGG16's features with random weights."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    alex = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    vgg, before = {}, 3
    for number, after in zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6, strict=True
    ):
        vgg[number] = (after, before, 3)
        before = after
    for name, layers in (("alexnet", alex), ("vgg16", vgg)):
        weights = {}
        for number, (after, before, side) in layers.items():
            scale = (2 / (before * side * side)) ** 0.5
            weights[f"features.{number}.weight"] = torch.randn((after, before, side, side), generator=generator) * scale
            weights[f"features.{number}.bias"] = torch.zeros(after)
        save_file(weights, folder / f"{name}_features.safetensors")
    return folder


@pytest.fixture(scope="module", params=list(IMAGE_METRICS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compute(name: str, weights_dir: Path) -> Callable[[Tensor, Tensor], Tensor]:
    if name in NETWORKS:
        ensure_torchvision_importable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
            pytest.importorskip(NETWORKS[name])
    return IMAGE_METRICS[name].build(weights_dir)


def textured(name: str, num: int = 2) -> Arrays:
    """Smooth colours with fine texture, of a size that this metric takes; away from black and white."""
    px = max(48, IMAGE_METRICS[name].min_px)
    rng = np.random.default_rng(1)
    smooth = [
        np.asarray(Image.fromarray(each).resize((px + 3, px), Image.Resampling.BICUBIC))
        for each in rng.integers(60, 196, (num, 6, 6, 3), dtype=np.uint8)
    ]
    return np.stack([with_noise(image, 6, rng) for image in smooth])


Compute = Callable[[Tensor, Tensor], Tensor]


def test_equal_images_have_the_best_value(name: str, compute: Compute) -> None:
    metric, x = IMAGE_METRICS[name], tensor(textured(name))
    best = {"higher": 1.0, "lower": 0.0, "target": metric.target}[metric.better]
    assert compute(x, x.clone()).tolist() == pytest.approx([100.0 if name == "psnr" else best] * 2, abs=1e-6)


def test_more_damage_is_worse(name: str, compute: Compute) -> None:
    """Damage is noise; to metrics of bias, which noise does not have, a shift of all values."""
    x = np.clip(textured(name), 40, 215)
    noise = [with_noise(x, sigma, np.random.default_rng(2)) for sigma in (0, 3, 9, 27)]
    damaged = [x + np.uint8(shift) for shift in (0, 3, 9, 27)] if name.startswith("bias") else noise
    values = [compute(tensor(recon), tensor(x)) for recon in damaged]
    goodness = torch.stack([IMAGE_METRICS[name].goodness(value) for value in values])
    assert (goodness.diff(dim=0) < 0).all(), values


def test_an_image_alone_has_the_value_it_has_in_a_batch(name: str, compute: Compute) -> None:
    x = textured(name, num=3)
    recon = with_noise(x, 10, np.random.default_rng(3))
    alone = [float(compute(tensor(recon[n : n + 1]), tensor(x[n : n + 1]))[0]) for n in range(3)]
    assert compute(tensor(recon), tensor(x)).tolist() == pytest.approx(alone, abs=1e-6)


def test_grey_and_flat_images_have_values(name: str, compute: Compute) -> None:
    grey = np.repeat(textured(name)[..., :1], 3, axis=3)
    grey[1] = 128
    values = compute(tensor(with_noise(grey, 4, np.random.default_rng(4))), tensor(grey))
    assert values[0].isfinite()
    assert bool(values[1].isnan()) == (name == "sharpness")  # a flat image has no sharpness to lose


def test_a_small_image_is_a_config_error_that_names_metric_and_size(name: str, compute: Compute) -> None:
    least = IMAGE_METRICS[name].min_px
    x = torch.rand(1, 3, least, least + 2).mul(255).round() / 255
    assert compute(x, x).shape == (1,)
    if least > 1:
        with pytest.raises(
            ConfigError, match=f"{name} needs images of at least {least} px.*got {least + 2} x {least - 1}"
        ):
            compute(x[:, :, 1:], x[:, :, 1:])


def test_shapes_that_differ_are_an_error(name: str, compute: Compute) -> None:
    x = tensor(textured(name))
    for recon, image in ((x[:1], x), (x[:, :1], x[:, :1]), (x[0], x[0])):
        with pytest.raises(ValueError, match="two tensors"):
            compute(recon, image)


def test_a_shift_of_one_channel_moves_its_bias_alone() -> None:
    x = textured("l1")
    for channel, letter in enumerate("rgb"):
        recon = x.copy()
        recon[..., channel] -= 3
        values = {other: IMAGE_METRICS[f"bias_{other}"].build()(tensor(recon), tensor(x)).tolist() for other in "rgb"}
        assert values == {other: [-3.0, -3.0] if other == letter else [0.0, 0.0] for other in "rgb"}
        assert IMAGE_METRICS["l1"].build()(tensor(recon), tensor(x)).tolist() == pytest.approx([1.0, 1.0])


def test_blur_lowers_sharpness_and_grain_raises_it() -> None:
    x = textured("sharpness")
    soft = tensor([blur(Image.fromarray(image), np.random.default_rng(0)) for image in x])
    grainy = tensor(with_noise(x, 6, np.random.default_rng(5)))
    sharpness = IMAGE_METRICS["sharpness"].build()
    assert (sharpness(soft, tensor(x)) < 0.2).all()
    # Texture of this noise's own strength: about twice the energy.
    assert sharpness(grainy, tensor(x)).tolist() == pytest.approx([2.0, 2.0], rel=0.15)


def test_a_wave_counts_as_sharp_from_a_quarter_cycle_per_px_in_any_direction() -> None:
    y, x = np.mgrid[:96, :96]
    sharpness = IMAGE_METRICS["sharpness"].build()
    fine = tensor(np.repeat((128 + 90 * np.cos(np.pi * 0.9 * x))[None, ..., None].round(), 3, axis=3))
    for fx, fy, counts in ((0.2, 0.0, False), (0, 0.3, True), (0.2, 0.2, True), (0.15, 0.15, False), (-0.2, 0.2, True)):
        wave = 128 + 90 * np.cos(2 * np.pi * (fx * x + fy * y))
        recon = tensor(np.repeat(wave[None, ..., None].round(), 3, axis=3))
        assert (float(sharpness(recon, fine)[0]) > 0.5) == counts, (fx, fy)


def test_a_smooth_gradient_has_no_sharpness_to_compare() -> None:
    y, x = np.mgrid[:128, :128]
    gradient = tensor(np.repeat((30 + 0.37 * x + 0.71 * y).round()[None, ..., None], 3, axis=3))
    assert IMAGE_METRICS["sharpness"].build()(gradient, gradient).isnan().all()


def test_the_table_is_in_the_order_of_display_and_complete() -> None:
    order = "psnr ssim ms_ssim ssim_uniform7 lpips_alex lpips_vgg dists l1 bias_r bias_g bias_b ciede2000 sharpness"
    assert list(IMAGE_METRICS) == order.split()
    for name, metric in IMAGE_METRICS.items():
        assert metric.name == name and metric.title and metric.source
        assert metric.definition.endswith(".") and len(metric.definition) > 60
        assert (metric.target is not None) == (metric.better == "target")
        assert (metric.compute is None) == (metric.network is not None)


def test_more_goodness_is_better_for_every_direction() -> None:
    values = np.array([0.5, 1.0, 1.5])
    assert IMAGE_METRICS["psnr"].goodness(values).tolist() == [0.5, 1.0, 1.5]
    assert IMAGE_METRICS["l1"].goodness(values).tolist() == [-0.5, -1.0, -1.5]
    assert IMAGE_METRICS["sharpness"].goodness(values).tolist() == [-0.5, 0.0, -0.5]
    assert IMAGE_METRICS["bias_r"].goodness(-2.0) == -2.0


def test_features_of_the_image_are_computed_once_for_several_reconstructions(
    weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_torchvision_importable()
    pytest.importorskip("lpips")
    passes = []
    features = LPIPS.features
    monkeypatch.setattr(LPIPS, "features", lambda self, x: passes.append(x) or features(self, x))
    first, second = tensor(textured("lpips_alex")), tensor(textured("lpips_alex")[::-1])
    compute = IMAGE_METRICS["lpips_alex"].build(weights_dir)
    values = [compute(recon, image) for image in (first, second) for recon in (first, second)]
    assert len(passes) == 2
    assert [bool((value == 0).all()) for value in values] == [True, False, False, True]
    torch.testing.assert_close(values[2], values[1].flip(0))  # LPIPS is symmetric


def test_weights_are_found_without_loading_them(
    tmp_path: Path, weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not all(find_spec(package) for package in NETWORKS.values()):
        pytest.skip("not all packages of networks are installed")
    assert IMAGE_METRICS["psnr"].find_weights(weights_dir) is None
    files = {name: IMAGE_METRICS[name].find_weights(weights_dir) for name in NETWORKS}
    alex, vgg = weights_dir / "alexnet_features.safetensors", weights_dir / "vgg16_features.safetensors"
    assert files == {"lpips_alex": alex, "lpips_vgg": vgg, "dists": vgg}
    for name in NETWORKS:
        with pytest.raises(MissingWeightsError, match="--weights = "):
            IMAGE_METRICS[name].find_weights(tmp_path, option="--weights")


def test_psnr_of_a_constant_error_has_its_closed_form() -> None:
    image = np.full((5, 7, 3), 100, dtype=np.uint8)
    assert psnr(image, image + np.uint8(1)) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    assert psnr(image, image - np.uint8(10)) == pytest.approx(20 * math.log10(25.5))


def test_psnr_does_not_wrap_around_where_the_error_is_large() -> None:
    black, white = np.zeros((4, 4, 3), dtype=np.uint8), np.full((4, 4, 3), 255, dtype=np.uint8)
    assert psnr(black, white) == psnr(white, black) == pytest.approx(0.0)


def test_psnr_averages_squares_over_pixels_and_channels_and_falls_with_the_error() -> None:
    generator = np.random.default_rng(0)
    image, other = generator.integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    mse = np.mean((image.astype(float) - other) ** 2)
    assert psnr(image, other) == pytest.approx(10 * math.log10(255**2 / mse))
    closer = ((image.astype(int) + other) // 2).astype(np.uint8)
    assert psnr(image, other) < psnr(image, closer) < psnr(image, image) == math.inf


def test_psnr_refuses_what_it_does_not_mean() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        psnr(image, image[:3])
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        psnr(image, image.astype(np.float32))  # type: ignore[arg-type]
