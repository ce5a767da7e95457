"""LPIPS against the package lpips, on real backbones where the external assets are there, else on random ones."""

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
from torch import Tensor, nn

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError
from sdvae.features import lpips as lpips_module
from sdvae.features.lpips import LPIPS, build_lpips, find_lpips_weights

FILES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
NETS = sorted(FILES)
MIN_PX = {"vgg": 16, "alex": 31, "squeeze": 17}


def stock(net: str) -> Any:
    """lpips' own module, with a random backbone and the package's heads."""
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)


def stock_key(name: str) -> str:
    return "features." + name.split(".", 1)[1]


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones with random weights, as torchvision names the tensors."""
    folder = tmp_path_factory.mktemp("weights")
    for net, name in FILES.items():
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            shapes = {stock_key(key): tensor.shape for key, tensor in stock(net).net.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.randn(shape, generator=generator) * (2 / max(1, shape[1:].numel())) ** 0.5
            if len(shape) == 4
            else torch.zeros(shape)
            for key, shape in shapes.items()
        }
        save_file(weights, folder / f"{name}_features.safetensors")
    return folder


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(net: str, random_weights: Path) -> LPIPS:
    return build_lpips(net, random_weights)  # type: ignore[arg-type]


def photographs(px: int, num: int = 2) -> tuple[Tensor, Tensor]:
    """Pictures and noisy versions of them, (num, 3, px, px), in [-1, 1]."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(each).resize((px, px), Image.Resampling.BICUBIC)) for each in levels]
    x = torch.from_numpy(np.stack(smooth)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.from_numpy(rng.normal(0, 0.1, tuple(x.shape))).float()
    return x.contiguous(), (x + noise).clamp(-1, 1)


def assert_equal_to_stock(ours: LPIPS, reference: Any, px: int) -> None:
    x, recon = photographs(px)
    results = []
    for module in (ours, reference):
        leaf = recon.clone().requires_grad_()
        distance = module(leaf, x).view(-1)
        (distance * torch.tensor([1.0, 3.0])).sum().backward()
        results.append((distance.detach(), leaf.grad))
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    # Where two values of a pooling window differ by rounding alone, a gradient may take the other way.
    assert (gradient - expected_gradient).norm() < 2e-3 * expected_gradient.norm()


@pytest.mark.parametrize("px", [32, 72])
def test_value_and_gradient_are_those_of_the_package(net: str, ours: LPIPS, random_weights: Path, px: int) -> None:
    reference = stock(net)
    weights = load_file(random_weights / f"{FILES[net]}_features.safetensors")
    reference.net.load_state_dict({key: weights[stock_key(key)] for key in reference.net.state_dict()})
    assert_equal_to_stock(ours, reference, px)


@pytest.mark.parametrize("real", ["vgg", "alex"])
def test_value_and_gradient_are_those_of_the_package_on_real_weights(real: str, assets: Path) -> None:
    reference = stock(real)
    weights = load_file(assets / "weights" / f"{FILES[real]}_features_fp16.safetensors")
    reference.net.load_state_dict({key: weights[stock_key(key)].float() for key in reference.net.state_dict()})
    assert_equal_to_stock(build_lpips(real, assets / "weights"), reference, 96)  # type: ignore[arg-type]


@pytest.mark.parametrize("real", ["vgg", "alex"])
def test_a_photograph_that_is_blurred_more_is_further_away(real: str, assets: Path) -> None:
    with Image.open(sorted((assets / "images" / "val").glob("*.jpg"))[0]) as image:
        image = image.convert("RGB").crop((100, 100, 228, 228))
    blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 0.5, 1, 2, 4)]
    x = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in blurred])
    network = build_lpips(real, assets / "weights")  # type: ignore[arg-type]
    distance = network(x, x[:1].expand_as(x))
    assert distance[0] == 0
    assert (distance.diff() > 0.01).all(), distance


def test_the_gradient_matches_finite_differences(ours: LPIPS) -> None:
    x, recon = photographs(40, num=1)
    recon = recon.requires_grad_()
    distance = ours(recon, x)
    (gradient,) = torch.autograd.grad(distance.sum(), recon)
    step = 0.01 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (ours(recon + step, x) - ours(recon - step, x)) / 0.02
    torch.testing.assert_close(slope[0], gradient.norm(), rtol=0.03, atol=0)


def test_the_gradient_reaches_the_reconstruction_and_nothing_else(ours: LPIPS) -> None:
    x, recon = photographs(32)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    x.requires_grad_()
    factor = torch.ones((), requires_grad=True)  # stands for a decoder before it
    ours(recon * factor, x).mean().backward()
    assert factor.grad is not None and factor.grad.abs() > 0
    assert x.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in ours.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_target_features_are_computed_once_for_any_number_of_distances(ours: LPIPS) -> None:
    x, recon = photographs(32)
    passes = []
    handle = ours.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    try:
        targets = ours.features(x)
        assert passes == [False] and not any(target.requires_grad for target in targets)
        recon.requires_grad_()
        first, second = ours.distance(recon, targets), ours.distance(recon, targets)
        assert passes == [False, True, True]
        ours.distance(recon.detach(), targets)
        assert passes == [False, True, True, False]
    finally:
        handle.remove()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_features_have_unit_length_and_the_shapes_of_the_layers(net: str, ours: LPIPS) -> None:
    x, _ = photographs(64)
    features = ours.features(x)
    sides = {"vgg": (64, 32, 16, 8, 4), "alex": (15, 7, 3, 3, 3), "squeeze": (31, 15, 7, 3, 3, 3, 3)}[net]
    assert [tuple(feature.shape[2:]) for feature in features] == [(side, side) for side in sides]
    for feature in features:
        length = feature.norm(dim=1)
        assert ((length - 1).abs().lt(1e-4) | length.eq(0)).all()


def test_a_batch_in_several_passes_gives_the_same(ours: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    x, recon = photographs(32, num=5)
    weights = torch.arange(1.0, 6.0)
    results = []
    for pass_px in (1, 2 * 32 * 32, 100 * 32 * 32):
        monkeypatch.setattr(lpips_module, "_PASS_PX", pass_px)
        leaf = recon.clone().requires_grad_()
        distance = ours(leaf, x)
        assert distance.shape == (5,)
        results.append((distance.detach(), torch.autograd.grad((distance * weights).sum(), leaf)[0]))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-5, atol=1e-6)
        assert (gradient - results[0][1]).norm() < 2e-3 * results[0][1].norm()


def test_the_value_is_the_same_with_and_without_gradient_and_in_any_layout(ours: LPIPS) -> None:
    x, recon = photographs(48)
    with_gradient = ours(recon.clone().requires_grad_(), x).detach()
    channels_last = ours(recon.to(memory_format=torch.channels_last), x)
    for value in (ours(recon, x), channels_last, ours(recon, x.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(value, with_gradient, rtol=1e-5, atol=1e-6)


def test_equal_images_have_distance_and_gradient_zero(ours: LPIPS) -> None:
    x, _ = photographs(32)
    recon = x.clone().requires_grad_()
    distance = ours(recon, x)
    assert distance.abs().max() < 1e-10
    assert torch.autograd.grad(distance.sum(), recon)[0].abs().max() < 1e-6


def test_positions_without_any_active_feature_give_finite_gradients(random_weights: Path, tmp_path: Path) -> None:
    weights = load_file(random_weights / "alexnet_features.safetensors")
    weights["features.0.bias"] -= 1e4  # every feature of the first layer is zero, and all after it
    save_file(weights, tmp_path / "dead.safetensors")
    network = build_lpips("alex", tmp_path / "dead.safetensors")
    x, recon = photographs(32)
    recon.requires_grad_()
    distance = network(recon, x)
    (gradient,) = torch.autograd.grad(distance.sum(), recon)
    assert (distance == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_distance_is_float32_and_near(ours: LPIPS, dtype: torch.dtype) -> None:
    x, recon = photographs(64)
    results = []
    for enabled in (False, True):
        leaf = recon.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            distance = ours(leaf, x)
        assert distance.dtype == torch.float32
        results.append((distance.detach(), torch.autograd.grad(distance.sum(), leaf)[0]))
    (expected, expected_gradient), (value, gradient) = results
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.01)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0)
    assert cosine > 0.9
    assert gradient.norm() == pytest.approx(float(expected_gradient.norm()), rel=0.1)


def test_small_gradients_survive_half_precision(random_weights: Path) -> None:
    network = build_lpips("alex", random_weights)
    x, recon = photographs(128, num=1)
    recon.requires_grad_()
    (expected,) = torch.autograd.grad(network(recon, x).sum(), recon)
    with torch.autocast("cpu", dtype=torch.float16):
        distance = network(recon, x)
    (gradient,) = torch.autograd.grad(distance.sum(), recon)
    vanished = ((gradient == 0) & (expected != 0)).float().mean()
    assert vanished < 1e-3  # some CPUs round a few sums to exactly 0, 1e-4 of them; without scaling it is 5e-3


def test_a_half_precision_reconstruction_gets_a_gradient_of_its_own_type(ours: LPIPS) -> None:
    x, recon = photographs(32)
    recon = recon.bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(ours(recon, x).sum(), recon)
    assert gradient.dtype == torch.bfloat16 and gradient.abs().sum() > 0


def test_train_leaves_it_in_eval_mode_also_within_another_module(ours: LPIPS) -> None:
    nn.ModuleList([ours]).train()
    ours.train()
    assert not any(module.training for module in ours.modules())


def test_the_smallest_size_passes_and_one_pixel_less_is_a_config_error(net: str, ours: LPIPS) -> None:
    assert ours.min_px == MIN_PX[net]
    x, recon = photographs(ours.min_px)
    assert ours(recon, x).isfinite().all()
    with pytest.raises(ConfigError, match=f"at least {ours.min_px} px; got {ours.min_px} x {ours.min_px - 1}"):
        ours.features(x[:, :, 1:])


def test_targets_of_another_batch_are_an_error(ours: LPIPS) -> None:
    x, recon = photographs(32)
    targets = ours.features(x[:1])
    for images in (recon, recon.clone().requires_grad_()):
        with pytest.raises(ValueError):
            ours.distance(images, targets)


def test_building_draws_no_random_numbers(random_weights: Path) -> None:
    before = torch.get_rng_state()
    build_lpips("alex", random_weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_asks_for_no_network_prints_nothing_and_warns_of_nothing(random_weights: Path) -> None:
    code = (
        "import socket, sys, warnings\n"
        "from sdvae.features.lpips import build_lpips\n"
        "assert 'lpips' not in sys.modules and 'torchvision' not in sys.modules\n"
        "def refuse(*_): raise AssertionError('asks for a network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "warnings.simplefilter('error')\n"
        f"for net in {NETS}: build_lpips(net, {str(random_weights)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_without_the_package_the_extra_is_named(random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    for function in (build_lpips, find_lpips_weights):
        with pytest.raises(ConfigError, match=r"pip install 'sdvae\[train\]'"):
            function("alex", random_weights)


def test_a_check_finds_the_file_that_is_read_and_fetches_nothing(
    tmp_path: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_lpips_weights("alex", random_weights) == random_weights / "alexnet_features.safetensors"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("SDVAE_WEIGHTS", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(MissingWeightsError, match="not allowed here(.|\n)*`a=0` trains without"):
        find_lpips_weights("alex", option="an.option", without="`a=0` trains without")


def test_weights_of_another_network_are_a_checkpoint_error(random_weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"alexnet_features.safetensors.*missing.*wrongly shaped"):
        build_lpips("vgg", random_weights / "alexnet_features.safetensors")
