"""`enable_tiling` and the fast path: strips where they are asked for and possible, else `forward`, or an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from PIL import Image
from tiny_strips import TINY_STRIPS
from torch import Tensor, nn

from sdvae.checkpoints.store import load_autoencoder, to_diffusers
from sdvae.errors import ConfigError
from sdvae.evaluation.stress.seam_score import seam_score
from sdvae.model import execution
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.device import compile_settings
from sdvae.model.execution import run
from sdvae.model.layers import Decoder, Encoder
from sdvae.model.optimize import optimize
from sdvae.model.strips.passes import Network
from sdvae.model.strips.plan import plan_pass

MINI = Path(str(resources.files("sdvae.assets") / "sdvae-mini"))
PHOTO = Path(str(resources.files("sdvae.assets") / "photos" / "colosseum.jpg"))


@pytest.fixture
def vae(make_pair: Any, levels: Any) -> AutoencoderKL:
    return make_pair(**levels(8, 64, groups=8, sample_size=32)).ours  # type: ignore[no-any-return]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran: forward of a network, or strips, limited or not."""
    seen: list[str] = []
    real = execution.streamed

    def noted(network: Network, x: Tensor, max_bytes: int | None = None, **options: Any) -> Tensor:
        seen.append("strips" if max_bytes is None else "limited strips")
        return real(network, x, max_bytes, **options)

    monkeypatch.setattr(execution, "streamed", noted)
    for kind in (Encoder, Decoder):
        monkeypatch.setattr(kind, "forward", _noting(kind.forward, seen))
    return seen


def _noting(forward: Callable[[Any, Tensor], Tensor], seen: list[str]) -> Callable[[Any, Tensor], Tensor]:
    def noted(self: Any, x: Tensor) -> Tensor:
        seen.append("forward")
        return forward(self, x)

    return noted


@pytest.fixture
def two_threads(with_threads: Callable[[int], None]) -> None:
    with_threads(2)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_fast(vae: AutoencoderKL) -> None:
    vae.execution = replace(vae.execution, fast=True, fast_from=0)


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min()))


# Modes


@torch.no_grad()
def test_each_mode_runs_what_it_says(vae: AutoencoderKL, ways: list[str]) -> None:
    z, x = noise(1, 4, 24, 12), noise(1, 3, 48, 24)
    expected = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    assert ways == ["forward"] * 2
    for mode, way in (("exact", "strips"), ("auto", "forward")):
        ways.clear()
        vae.enable_tiling(mode)
        results = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        assert ways == [way] * 2
        assert all(near(*pair) for pair in zip(results, expected, strict=True))
    vae.enable_tiling()
    ways.clear()
    assert not near(vae.decode(z).sample, expected[0])
    assert ways == ["forward"] * len(ways) and len(ways) > 1
    vae.enable_tiling("exact")
    vae.disable_tiling()
    ways.clear()
    assert torch.equal(vae.decode(z).sample, expected[0]) and ways == ["forward"]


@torch.no_grad()
def test_a_compiled_network_runs_as_it_is_and_each_shape_is_told_once(
    vae: AutoencoderKL, ways: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae.execution = replace(vae.execution, fast_from=0)
    z = noise(1, 4, 16, 12)
    expected = vae.decode(z).sample
    compiled: list[dict[str, object]] = []
    module_compile = nn.Module.compile

    def eager(module: nn.Module, **options: object) -> None:
        compiled.append(options)
        module_compile(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", eager)
    assert optimize(vae, compile=True) is vae and compiled == [{"dynamic": False, "mode": None}] * 2
    ways.clear()
    with caplog.at_level(logging.WARNING, "sdvae"):
        for height in (16, 16, 8, 16):
            actual = vae.decode(z[:, :, :height]).sample
    assert near(actual, expected) and "strips" not in ways
    assert [record.getMessage()[:39] for record in caplog.records] == [
        "compiled the decoder for 1 x 4 x 16 x 1",
        "compiled the decoder for 1 x 4 x 8 x 12",
    ]
    vae.enable_tiling("exact")
    with pytest.raises(ConfigError, match="exact tiling is not possible with a network that is compiled"):
        vae.decode(z)


@torch.no_grad()
def test_what_a_compiled_network_gave_is_not_written_over_by_its_next_pass(vae: AutoencoderKL) -> None:
    """As CUDA graphs do: each replay writes to the memory of the one before."""
    memory: list[tuple[Tensor, ...]] = []

    def graph(module: Any, inputs: Any) -> Any:
        def replay(*arguments: Any) -> tuple[Tensor, ...]:
            results = module(*arguments)
            memory[:] = memory or [results]
            for kept, result in zip(memory[0], results, strict=True):
                kept.copy_(result)
            return memory[0]

        return replay

    z = noise(2, 4, 8, 8)
    expected = [vae.decode(z[:1]).sample, vae.decode(z[1:]).sample]
    vae.decoder.compile(dynamic=False, backend=graph)
    first = vae.decode(z[:1]).sample
    second = vae.decode(z[1:]).sample
    assert near(first, expected[0]) and near(second, expected[1]) and not near(first, second)


def test_compiling_suits_the_device() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype in (torch.float16, torch.bfloat16):
        assert compile_settings(cuda, dtype) == ("reduce-overhead", torch.channels_last)
    assert compile_settings(cuda, torch.float32) == ("reduce-overhead", torch.contiguous_format)
    assert compile_settings(cpu, torch.float32) == (None, torch.channels_last)


@torch.no_grad()
def test_a_blended_tile_is_one_pass_of_its_own(vae: AutoencoderKL, ways: list[str]) -> None:
    vae.enable_tiling()
    vae.decode(noise(1, 4, 24, 24))
    assert ways == ["forward"] * 4


@torch.no_grad()
def test_the_fast_path_is_taken_from_so_many_multiplications_on(vae: AutoencoderKL, ways: list[str]) -> None:
    fast_from = multiplications(vae.decoder, noise(1, 4, 32, 24))
    ways.clear()
    vae.execution = replace(vae.execution, fast=True, fast_from=fast_from)
    small, large = noise(1, 4, 31, 24), noise(1, 4, 32, 24)
    assert near(vae.decode(large).sample, vae.decoder.forward(vae.post_quant_conv(large)))  # type: ignore[misc]
    assert ways == ["strips", "forward"]
    ways.clear()
    vae.decode(small)
    vae.to(torch.bfloat16).decode(large.to(torch.bfloat16))
    assert ways == ["forward"] * 2


def multiplications(network: nn.Module, x: Tensor) -> int:
    """Of the convolutions that strips compute in tiles, as they run."""
    total = 0

    def count(conv: nn.Conv2d, inputs: object, output: Tensor) -> None:
        nonlocal total
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and min(conv.in_channels, conv.out_channels) >= 64:
            total += conv.in_channels * 9 * output[0].numel()

    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d)]
    network(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("widths", "size", "faster"),  # as measured: encode, decode
    [
        ((128, 256, 512, 512), 64, (False, False)),
        ((128, 256, 512, 512), 128, (True, True)),
        ((64, 128, 256, 256), 128, (False, False)),
        ((64, 128, 256, 256), 256, (True, True)),
        ((16, 32, 96, 128), 256, (False, False)),
        ((16, 32, 96, 128), 1024, (True, True)),
        ((32, 32, 32, 32), 4096, (False, False)),
    ],
)
def test_strips_are_taken_where_they_were_faster(widths: tuple[int, ...], size: int, faster: tuple[bool, bool]) -> None:
    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, norm_num_groups=16, **blocks)
    x, z = torch.empty(1, 3, size, size), torch.empty(1, 4, size // 8, size // 8)
    for network, given, expected in zip((vae.encoder, vae.decoder), (x, z), faster, strict=True):
        plan = plan_pass(network, given)
        assert plan.tiled_multiplications == multiplications(network, given.to("meta"))
        assert execution._is_faster(plan, given, vae.execution) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "exakt"}, "tiling is 'exakt'; expected blended, exact or auto"),
        ({"mode": "off"}, "tiling is 'off'"),
        ({"max_memory_bytes": 10}, "blended tiling is given max_memory_bytes"),
        ({"mode": "exact", "tile_size_px": 64}, "exact tiling is given a tile size or overlap"),
        ({"mode": "auto", "overlap": 0.5}, "auto tiling is given a tile size or overlap"),
        ({"tile_size_px": 33}, "tile_size_px is 33; expected a multiple of 2"),
        ({"tile_size_px": 0}, "tile_size_px is 0"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"overlap": 0.99}, "overlap is 0.99"),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_change_nothing(
    vae: AutoencoderKL, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        vae.enable_tiling(**arguments)
    assert not vae.use_tiling and vae.tile_sample_min_size == 32 and vae.tile_overlap_factor == 0.25


# What strips cannot honour


def _hooked(vae: AutoencoderKL) -> None:
    vae.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: None)


def _pre_hooked(vae: AutoencoderKL) -> None:
    vae.decoder.register_forward_pre_hook(lambda *_: None)


def _offloaded(vae: AutoencoderKL) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(vae.decoder.conv_in, ModelHook())


def _replaced(vae: AutoencoderKL) -> None:
    class Doubled(nn.Conv2d):
        pass

    old = vae.decoder.conv_out
    vae.decoder.conv_out = Doubled(old.in_channels, old.out_channels, 3, padding=1)


def _patched_forward(vae: AutoencoderKL) -> None:
    conv = vae.decoder.conv_in
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign]


def _circular(vae: AutoencoderKL) -> None:
    for module in vae.modules():  # as done for textures that can be laid side by side
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def _circular_by_function(vae: AutoencoderKL) -> None:
    def wrapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    vae.decoder.conv_in._conv_forward = wrapped  # type: ignore[method-assign]


def _weight_norm(vae: AutoencoderKL) -> None:
    nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)


def _other_dtype(vae: AutoencoderKL) -> None:
    vae.decoder.requires_grad_(False)
    vae.decoder.conv_in.double()


CHANGES: dict[str, tuple[Callable[[AutoencoderKL], None], str]] = {
    "hook": (_hooked, "while hooks watch the layer up_blocks.0.resnets.0.conv1"),
    "hook before": (_pre_hooked, "while hooks watch the layer at the top"),
    "offloaded": (_offloaded, "conv_in"),
    "replaced": (_replaced, "with Doubled in the place of a layer, at conv_out"),
    "patched forward": (_patched_forward, "conv_in"),
    "circular padding": (_circular, "padding_mode=circular"),
    "circular by function": (_circular_by_function, "conv_in"),
    "weight norm": (_weight_norm, "ParametrizedConv2d"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_network_that_was_changed_is_run_as_it_is_and_exact_says_why_it_cannot(
    vae: AutoencoderKL, ways: list[str], name: str
) -> None:
    change, reason = CHANGES[name]
    change(vae)
    z = noise(1, 4, 16, 16)
    expected = vae.decode(z).sample
    vae.enable_tiling("exact")
    with pytest.raises(ConfigError, match=f"exact tiling is not possible .*{reason}"):
        vae.decode(z)
    vae.enable_tiling("auto")
    make_fast(vae)
    ways.clear()
    assert torch.equal(vae.decode(z).sample, expected) and ways == ["forward"]


def test_hooks_see_every_pass_of_the_fast_path(vae: AutoencoderKL) -> None:
    make_fast(vae)
    seen: list[int] = []
    handle = vae.decoder.up_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    z = noise(1, 4, 16, 16)
    with torch.no_grad():
        vae.decode(z)
        handle.remove()
        vae.decode(z)
        assert seen == [1]
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2))
        try:
            vae.decode(z)
        finally:
            handle.remove()
    assert seen.count(2) > 20


def test_gradients_flow_as_before_and_exact_says_that_it_has_none(vae: AutoencoderKL, ways: list[str]) -> None:
    z = noise(1, 4, 16, 16)
    gradients = []
    for fast in (False, True):
        vae.execution = replace(vae.execution, fast=fast, fast_from=0)
        vae.zero_grad()
        vae.decode(z).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in vae.decoder.named_parameters() if p.grad is not None})
    assert ways == ["forward"] * 2 and len(gradients[0]) == len(list(vae.decoder.parameters()))
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    vae.requires_grad_(False)
    latents = z.clone().requires_grad_()  # guidance by a gradient with respect to the latents
    vae.decode(latents).sample.sum().backward()
    assert latents.grad is not None and float(latents.grad.abs().max()) > 0
    vae.enable_tiling("exact")
    with pytest.raises(ConfigError, match="with gradients; use torch.no_grad"):
        vae.decode(latents)
    ways.clear()
    vae.decode(z)  # frozen weights and a plain input: nothing needs a gradient
    assert ways == ["strips"]


@torch.no_grad()
def test_autocast_is_honoured_by_forward_and_refused_by_exact(vae: AutoencoderKL, ways: list[str]) -> None:
    z = noise(1, 4, 16, 16)
    make_fast(vae)
    with torch.autocast("cpu", torch.bfloat16):
        assert vae.decode(z).sample.dtype == torch.bfloat16 and ways == ["forward"]
        vae.enable_tiling("exact")
        with pytest.raises(ConfigError, match="under autocast"):
            vae.decode(z)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_calls_take_the_plain_path(vae: AutoencoderKL, ways: list[str]) -> None:
    z = noise(1, 4, 16, 16)
    expected = vae.decode(z).sample
    make_fast(vae.requires_grad_(False))
    ways.clear()
    traced = torch.jit.trace(lambda x: vae.decode(x, return_dict=False)[0], z, check_trace=False)
    assert ways == ["forward"] and near(traced(z), expected)


@torch.no_grad()
def test_torch_compile_gives_what_it_gives_without_the_fast_path(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = noise(1, 4, 16, 16)
    expected = vae.decode(z).sample
    make_fast(vae)
    monkeypatch.setattr(execution, "streamed", None)
    try:
        compiled = torch.compile(vae.decode, backend="eager")
        assert near(compiled(z).sample, expected)
    finally:
        torch._dynamo.reset()


# Memory


@torch.no_grad()
def test_too_little_memory_is_refused_before_any_work_and_the_least_that_is_named_is_enough(
    vae: AutoencoderKL, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_process_bytes", lambda: 10**9)
    z = noise(1, 4, 64, 24)
    expected = vae.decode(z).sample
    vae.execution = replace(vae.execution, sizes=TINY_STRIPS)
    least = plan_pass(vae.decoder, z, sizes=TINY_STRIPS).least_bytes
    vae.enable_tiling("exact", max_memory_bytes=10**9 + least - 1)
    ways.clear()
    with pytest.raises(ConfigError, match=r"decoding 48 x 128 px exactly takes .* GB or more") as caught:
        vae.decode(z)
    assert ways == []
    named = float(str(caught.value).split("give a max_memory of ")[1].split(" GB")[0])
    for enough, way in ((10**9 + least, "limited strips"), (int(named * 1e9), "strips")):
        ways.clear()
        vae.enable_tiling("exact", max_memory_bytes=enough)
        assert near(vae.decode(z).sample, expected) and way in ways[0]


@torch.no_grad()
def test_auto_goes_in_strips_where_the_whole_does_not_fit(
    vae: AutoencoderKL, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    z = noise(1, 4, 64, 24)
    expected = vae.decode(z).sample
    for free, way in ((10**12, "forward"), (int(1.5 * plan_pass(vae.decoder, z).most_bytes), "strips")):
        monkeypatch.setattr(execution, "available_bytes", lambda device, free=free: free)
        vae.enable_tiling("auto")
        ways.clear()
        assert near(vae.decode(z).sample, expected) and ways == [way]


@torch.no_grad()
@pytest.mark.usefixtures("two_threads")
def test_out_of_memory_goes_on_in_strips_with_a_warning(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    z = noise(1, 4, 32, 24)
    expected = vae.decode(z).sample
    vae.enable_tiling("auto")

    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Decoder, "forward", lambda self, x: full(x))
    with caplog.at_level(logging.WARNING, "sdvae"):
        assert near(vae.decode(z).sample, expected)
    assert "out of memory at 48 x 64 px: went on in exact tiles" in caplog.text
    vae.disable_tiling()
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(z)
    assert torch.get_num_threads() == 2


@torch.no_grad()
def test_out_of_memory_in_strips_goes_on_in_smaller_ones_until_the_least(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    z = noise(1, 4, 32, 24)
    expected = vae.decode(z).sample
    vae.execution = replace(vae.execution, sizes=TINY_STRIPS)
    plan = plan_pass(vae.decoder, z, sizes=TINY_STRIPS)
    least = plan.least_bytes
    monkeypatch.setattr(execution, "_budget", lambda device, max_bytes: 5 * least)
    monkeypatch.setattr(execution, "plan_pass", lambda *_, **__: replace(plan, most_bytes=10**12))
    budgets: list[int] = []
    real = execution.streamed

    def full(fits: int, network: Any, x: Tensor, budget: int, **options: Any) -> Tensor:
        budgets.append(budget)
        if budget > fits:
            raise torch.OutOfMemoryError("planted")
        return real(network, x, budget, **options)

    vae.enable_tiling("exact")
    monkeypatch.setattr(execution, "streamed", partial(full, 2 * least))
    with caplog.at_level(logging.WARNING, "sdvae"):
        assert near(vae.decode(z).sample, expected)
    assert budgets == [5 * least, 5 * least // 2, 5 * least // 4] and caplog.text.count("smaller tiles") == 2
    monkeypatch.setattr(execution, "streamed", partial(full, 0))
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(z)


@torch.no_grad()
def test_strips_refuse_nothing_that_forward_takes(vae: AutoencoderKL) -> None:
    z = noise(2, 4, 16, 16)
    for choice in ({"fast": True, "fast_from": 0}, {"tiling": "exact"}):
        assert near(run(vae.decoder, z, replace(vae.execution, **choice)), vae.decoder(z))


@torch.no_grad()
@pytest.mark.usefixtures("two_threads")
def test_a_model_serves_several_threads_at_once(vae: AutoencoderKL) -> None:
    make_fast(vae)
    latents = [noise(1, 4, 16, 16, seed=seed) for seed in range(3)]
    expected = [vae.decode(z).sample for z in latents]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            results[index] = vae.decode(latents[index]).sample

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(3))


# Photographs with the bundled weights


@pytest.fixture(scope="module")
def bundled() -> AutoencoderKL:
    return load_autoencoder(MINI).eval()


def photograph(size: int) -> Tensor:
    image = Image.open(PHOTO).convert("RGB")
    values = np.asarray(image)[:size, :size].astype(np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)[None]


def to_levels(recon: Tensor) -> np.ndarray[Any, Any]:
    return (recon[0].permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy()


@torch.no_grad()
def test_a_photograph_has_no_seam_in_exact_strips_and_has_some_in_blended_tiles(
    bundled: AutoencoderKL,
) -> None:
    z = bundled.encode(photograph(256)).latent_dist.mode()
    reference = to_levels(bundled.decode(z).sample)
    places = {"rows": [64, 128, 192], "columns": [64, 128, 192]}  # borders of strips, and of tiles
    before = bundled.execution
    try:
        bundled.execution = replace(before, tiling="exact", sizes=TINY_STRIPS)
        exact = to_levels(bundled.decode(z).sample)
        assert not seam_score(exact, reference, **places).found and not seam_score(exact, reference).found
        assert np.abs(exact.astype(int) - reference).max() <= 1
        bundled.enable_tiling(tile_size_px=64, overlap=0.0)
        assert seam_score(to_levels(bundled.decode(z).sample), reference, **places).found
    finally:
        bundled.execution = before


@torch.no_grad()
def test_an_optimized_stock_vae_takes_strips_and_reconstructs_a_photograph_as_before(
    bundled: AutoencoderKL, ways: list[str]
) -> None:
    stock = to_diffusers(bundled)
    assert type(stock) is StockAutoencoderKL
    x = photograph(256)
    moments = stock.encode(x).latent_dist.parameters
    recon = stock.decode(moments[:, : moments.shape[1] // 2]).sample
    fast = optimize(stock)
    assert fast.execution.fast
    fast.execution = replace(fast.execution, fast_from=10**9)
    ways.clear()
    again = fast.encode(x).latent_dist.parameters
    torch.testing.assert_close(again, moments, rtol=0, atol=2e-4)
    torch.testing.assert_close(fast.decode(moments[:, : moments.shape[1] // 2]).sample, recon, rtol=0, atol=2e-4)
    assert set(ways) == {"strips"}
