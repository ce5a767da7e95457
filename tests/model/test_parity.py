"""Same weights, same input: moments, images and gradients equal those of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.model import layers

# Largest difference, as a part of the largest absolute value of the stock output. What is promised is 1e-5; the layers
# call the same kernels in the same memory layouts, so no difference was ever measured, and a step that merely rounds in
# another order comes to 1e-6 .. 1e-5.
FLOAT32 = 1e-6
FLOAT64 = 1e-13
BFLOAT16 = 2.0**-7  # one step of its 8-bit significand
FLOAT16 = 2.0**-9  # four steps

SD1: dict[str, Any] = {"layers_per_block": 2, "sample_size": 512}
NO_QUANT: dict[str, Any] = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "SD 1.x": ((), SD1),
    "SDXL": ((), SD1 | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}),
    "SD3": ((), SD1 | NO_QUANT | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "FLUX": ((8, 16, 24, 32), SD1 | NO_QUANT | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "quant_conv alone": ((), {"use_post_quant_conv": False}),
    "post_quant_conv alone": ((), {"use_quant_conv": False}),
    "no attention": ((), {"mid_block_add_attention": False}),
    "1 level": ((8,), {}),
    "2 levels": ((8, 16), {"layers_per_block": 2}),
    "3 levels": ((8, 8, 16), {}),
    "5 levels": ((8, 8, 16, 16, 24), {}),
    "1 layer": ((), {"layers_per_block": 1}),
    "3 layers": ((8, 16), {"layers_per_block": 3}),
    "widths that fall": ((16, 8, 24), {}),
    "1 group": ((6, 10), {"groups": 1}),
    "gray to RGBA": ((8, 16), {"in_channels": 1, "out_channels": 4}),
    "mish": ((8, 16), {"act_fn": "mish"}),
    "gelu": ((8, 16), {"act_fn": "gelu"}),
    "relu": ((8, 16), {"act_fn": "relu"}),
    "swish": ((8, 16), {"act_fn": "swish"}),
}
SHAPES = [(1, 64, 64), (2, 104, 72), (3, 67, 101)]  # batch, height, width; the last loses pixels at every level


@pytest.fixture
def make(make_pair: Any, levels: Any) -> Callable[..., Any]:
    """Builds both autoencoders of one entry of LAYOUTS."""

    def build(layout: str = "SD 1.x", **changes: Any) -> Any:
        widths, fields = LAYOUTS[layout]
        return make_pair(**levels(*widths, **fields | changes))

    return build


def images(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def difference(ours: Tensor, stock: Tensor) -> float:
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    assert stock.abs().max() > 0.1  # a comparison of nothing with nothing would hold too
    return float((ours.double() - stock.double()).abs().max() / stock.double().abs().max())


def check_parity(
    pair: Any, batch: int, height: int, width: int, tolerance: float = FLOAT32, **to: Any
) -> tuple[Tensor, Tensor]:
    """Encode, and decode what was encoded. `to` goes to `Module.to` and the input alike. Returns: our two results."""
    for model in (pair.ours, pair.stock):
        nn.Module.to(model, **to)
    x = images(batch, height, width, pair.ours.config.in_channels).to(**to)
    with torch.inference_mode():
        moments, stock_moments = pair.encode(x)
        assert moments.shape[0] == batch
        assert difference(moments, stock_moments) <= tolerance
        recon, stock_recon = pair.decode(stock_moments.chunk(2, dim=1)[0].to(**to))
        assert difference(recon, stock_recon) <= tolerance
    return moments, recon


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_sd1_autoencoder_at_full_width_equals_the_stock_one(
    make_pair: Any, levels: Any, memory_format: torch.memory_format
) -> None:
    pair = make_pair(**levels(128, 256, 512, 512, groups=32, **SD1))
    moments, recon = check_parity(pair, 2, 64, 64, memory_format=memory_format)
    assert moments.shape == (2, 8, 8, 8)
    assert recon.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("batch, height, width", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_stock_one(make: Any, layout: str, batch: int, height: int, width: int) -> None:
    pair = make(layout)
    moments, recon = check_parity(pair, batch, height, width)
    ratio = pair.ours.spatial_compression_ratio
    assert moments.shape == (batch, 2 * pair.ours.config.latent_channels, height // ratio, width // ratio)
    assert recon.shape[2:] == (height // ratio * ratio, width // ratio * ratio)


@pytest.mark.parametrize("layout", ["SD 1.x", "SD3", "no attention"])
def test_every_layout_is_the_same_function_and_not_only_close(make: Any, layout: str) -> None:
    check_parity(make(layout), 2, 67, 101, tolerance=FLOAT64, dtype=torch.float64)


@pytest.mark.parametrize("batch, height, width", SHAPES)
@pytest.mark.parametrize("layout", ["SD 1.x", "SD3", "no attention"])
def test_channels_last_equals_the_stock_one(make: Any, layout: str, batch: int, height: int, width: int) -> None:
    moments, recon = check_parity(make(layout), batch, height, width, memory_format=torch.channels_last)
    if batch > 1:  # with one image, strides do not tell
        assert recon.is_contiguous(memory_format=torch.channels_last)


def test_large_images_in_channels_last_equal_the_stock_ones_in_the_default_layout(make: Any) -> None:
    """As the codec runs on a CPU, against what a plain program does. torch's own GroupNorm is off by 3e-5 here."""
    pair = make("2 levels", mid_block_add_attention=False)
    x = images(1, 512, 384) * 0.2 + 0.7  # bright and of low contrast, as a sky
    with torch.inference_mode():
        stock_moments = pair.stock.encode(x).latent_dist.parameters
        z = stock_moments[:, :4]
        stock_recon = pair.stock.decode(z).sample
        pair.ours.to(memory_format=torch.channels_last)
        moments = pair.ours.encode(x.to(memory_format=torch.channels_last)).latent_dist.parameters
        recon = pair.ours.decode(z.to(memory_format=torch.channels_last)).sample
    assert difference(moments, stock_moments) <= 1e-5
    assert difference(recon, stock_recon) <= 1e-5


@pytest.mark.parametrize("batch, height, width", [(1, 256, 256), (3, 131, 137), (2, 1, 20000)])
@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-6), (30.0, 1e-5)])
def test_the_norm_of_a_large_map_is_exact_in_either_layout(
    offset: float, tolerance: float, batch: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    norm = layers.GroupNorm(4, 8, eps=1e-6)
    norm.weight.data, norm.bias.data = torch.randn(2, 8, generator=generator)
    x = torch.randn(batch, 8, height, width, generator=generator)
    x = x * torch.rand(batch, 8, 1, 1, generator=generator) + offset
    x[0, :, height // 2 :] += 2  # the rows differ
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6).detach().float()
    with torch.inference_mode():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = norm(x.to(memory_format=memory_format))
            assert y.is_contiguous(memory_format=memory_format)
            assert difference(y, exact) <= tolerance


def test_gradients_of_the_norm_of_a_large_map_are_those_of_torch() -> None:
    norm = layers.GroupNorm(4, 8, eps=1e-6)
    x = images(2, 131, 137, channels=8).to(memory_format=torch.channels_last).requires_grad_()
    target = images(2, 131, 137, channels=8).flip(1)
    (ours,) = torch.autograd.grad((norm(x) - target).pow(3).sum(), x)
    (exact,) = torch.autograd.grad((F.group_norm(x.double(), 4, eps=1e-6) - target).pow(3).sum(), x)
    assert difference(ours, exact) <= 1e-4


@pytest.mark.parametrize("layout", ["SD 1.x", "SD3"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)], ids=str)
def test_half_precision_equals_the_stock_one(make: Any, layout: str, dtype: torch.dtype, tolerance: float) -> None:
    moments, recon = check_parity(make(layout), 2, 104, 72, tolerance, dtype=dtype)
    assert moments.dtype == recon.dtype == dtype
    exact_moments, exact_recon = check_parity(make(layout), 2, 104, 72)
    assert difference(moments, exact_moments.to(dtype)) < 0.1
    assert 0 < difference(recon, exact_recon.to(dtype)) < 0.3  # z was rounded too


def test_a_latent_of_one_position_decodes_as_with_the_stock_one(make: Any) -> None:
    pair = make()
    for height, width in ((1, 1), (1, 5), (7, 2)):
        with torch.inference_mode():
            ours, stock = pair.decode(torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2)))
        assert difference(ours, stock) <= FLOAT32


def test_the_whole_pass_equals_the_stock_one_with_mode_and_with_a_seeded_draw(make: Any) -> None:
    pair, x = make(), images(2, 40, 24)
    with torch.inference_mode():
        mode, stock_mode = pair.ours(x).sample, pair.stock(x).sample
        drawn, stock_drawn = (
            model(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
            for model in (pair.ours, pair.stock)
        )
    assert difference(mode, stock_mode) <= FLOAT32
    assert difference(drawn, stock_drawn) <= FLOAT32
    assert difference(drawn, mode) > 1e-3


# Gradients


def gradients(vae: Any, x: Tensor) -> dict[str, Tensor]:
    """Of a training loss: of each parameter, and of the input under the name 'x'."""
    x = x.clone().requires_grad_()
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(generator=torch.Generator().manual_seed(4))
    loss = F.mse_loss(vae.decode(z).sample, x) + 1e-3 * posterior.kl().mean()
    names = [name for name, _ in vae.named_parameters()]
    return dict(zip([*names, "x"], torch.autograd.grad(loss, [*vae.parameters(), x]), strict=True))


def check_gradients(ours: dict[str, Tensor], stock: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        # The bias of the keys has no effect, because softmax cancels it: its gradient is the rounding of the others'.
        scale = stock[name.replace("to_k.bias", "to_k.weight")].abs().max()
        assert scale > 0, f"no gradient reaches {name}"
        error = (ours[name] - gradient).abs().max() / scale
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["SD 1.x", "SD3", "no attention", "1 level", "widths that fall"])
def test_gradients_equal_the_stock_ones(make: Any, layout: str, training: bool) -> None:
    pair, x = make(layout), images(2, 40, 24)
    for model in (pair.ours, pair.stock):
        model.train(training)
    check_gradients(gradients(pair.ours, x), gradients(pair.stock, x), tolerance=1e-5)


def test_gradients_are_those_of_the_same_function_and_not_only_close(make: Any) -> None:
    pair, x = make(), images(2, 40, 24).double()
    for model in (pair.ours, pair.stock):
        nn.Module.to(model, dtype=torch.float64)
    check_gradients(gradients(pair.ours, x), gradients(pair.stock, x), tolerance=1e-11)


def test_gradients_in_channels_last_equal_the_stock_ones(make: Any) -> None:
    pair, x = make(), images(2, 40, 24).to(memory_format=torch.channels_last)
    for model in (pair.ours, pair.stock):
        model.to(memory_format=torch.channels_last)
    check_gradients(gradients(pair.ours, x), gradients(pair.stock, x), tolerance=1e-5)


# Negative controls: with one step broken, the checks above fail


def pad_on_all_sides(self: Any, x: Tensor) -> Any:
    return self.conv(F.pad(x, (1, 1, 1, 1)))


def pad_top_left(self: Any, x: Tensor) -> Any:
    return self.conv(F.pad(x, (1, 0, 1, 0)))


def upsample_bilinearly(self: Any, x: Tensor) -> Any:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def attend_without_residual(self: Any, x: Tensor) -> Any:
    return attend(self, x) - x


def run_without_shortcut(self: Any, x: Tensor) -> Any:
    h = self.conv1(self.activation(self.norm1(x)))
    return self.conv2(self.activation(self.norm2(h)))


attend = layers.Attention.forward

BROKEN_STEPS = {
    "symmetric padding": (layers.Downsample2D, pad_on_all_sides),
    "padding at the top": (layers.Downsample2D, pad_top_left),
    "bilinear upsampling": (layers.Upsample2D, upsample_bilinearly),
    "attention without residual": (layers.Attention, attend_without_residual),
    "no shortcut": (layers.ResnetBlock2D, run_without_shortcut),
}


@pytest.mark.parametrize("step", BROKEN_STEPS)
def test_a_broken_step_fails_the_parity_check(make: Any, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    broken, forward = BROKEN_STEPS[step]
    pair = make()
    check_parity(pair, 2, 64, 64)
    monkeypatch.setattr(broken, "forward", forward)
    with pytest.raises(AssertionError):
        check_parity(pair, 2, 64, 64, tolerance=1e-3)


@pytest.mark.parametrize("norm", ["encoder.down_blocks.0.resnets.0.norm1", "encoder.down_blocks.3.resnets.1.norm2"])
def test_one_norm_with_another_epsilon_fails_the_parity_check(make: Any, norm: str) -> None:
    pair = make()
    # Features of variance 1 hide an epsilon of 1e-6, so the layers that feed these norms are made quiet.
    for conv in (pair.ours.encoder.conv_in, pair.ours.encoder.down_blocks[3].resnets[1].conv1):
        conv.weight.data.mul_(0.01)  # the stock one shares this memory
        conv.bias.data.mul_(0.01)
    check_parity(pair, 2, 64, 64)
    pair.ours.get_submodule(norm).eps = 1e-5
    with pytest.raises(AssertionError):
        check_parity(pair, 2, 64, 64, tolerance=1e-5)


def test_one_wrong_weight_fails_the_gradient_check(make: Any) -> None:
    pair, x = make(), images(2, 40, 24)
    stock = gradients(pair.stock, x)
    pair.ours.decoder.up_blocks[1].resnets[0].norm2.weight.data = (
        pair.ours.decoder.up_blocks[1].resnets[0].norm2.weight.data * 1.001
    )
    with pytest.raises(AssertionError):
        check_gradients(gradients(pair.ours, x), stock, tolerance=1e-5)
