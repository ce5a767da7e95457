"""Strips give what the network's own `forward` gives, whatever their number, the memory, the threads and the batch."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_strips import TINY_STRIPS, tiny_streamed
from torch import Tensor, nn

from sdvae.model.layers import Decoder, Encoder
from sdvae.model.strips import maps as rows
from sdvae.model.strips import passes as streaming
from sdvae.model.strips.maps import Layer, Memory, Moments
from sdvae.model.strips.passes import streamed
from sdvae.model.strips.plan import plan_pass

WIDE = {"widths": (64, 64, 128, 128), "groups": 8}  # takes Winograd's way, in all layers but the first and the last
CONFIGS: dict[str, dict[str, Any]] = {
    "wide": WIDE,
    "narrow": {"widths": (8, 16, 16, 16)},
    "one level": {"widths": (64,), "groups": 8},
    "three levels, partly wide": {"widths": (16, 64, 128), "groups": 8},
    "without attention": {"widths": (8, 64, 64), "groups": 8, "mid_block_add_attention": False},
    "gelu": {"widths": (8, 64), "act_fn": "gelu"},
    "relu": {"widths": (8, 64), "act_fn": "relu"},
    "mish": {"widths": (8, 64), "act_fn": "mish"},
    "no change of width": {"widths": (16, 16, 16)},
    "two blocks, 16 latent channels": {"widths": (8, 64, 64), "layers_per_block": 2, "latent_channels": 16},
}
LEAST = 1  # bytes: nothing fits, so everything that can be computed again is


@pytest.fixture
def build(make_pair: Any, levels: Any) -> Callable[..., Any]:
    def build(widths: tuple[int, ...], **fields: Any) -> Any:
        return make_pair(**levels(*widths, **fields)).ours

    return build


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each strip that a layer computes."""
    seen: list[int] = []
    compute = Layer._compute

    def counted(self: Layer, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        seen.append(stop - start)
        return compute(self, start, stop, out)

    monkeypatch.setattr(Layer, "_compute", counted)
    return seen


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)  # type: ignore[no-any-return]


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the range of what was expected."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual.double() - expected.double()).abs().max() / (expected.max() - expected.min()).double())


def latent(vae: Any, height: int, width: int, **options: Any) -> Tensor:
    return noise(1, vae.config.latent_channels, height, width, **options)


# Equality with forward


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_give_what_forward_gives_for_every_configuration(
    build: Any, computed: list[int], name: str, max_bytes: int | None
) -> None:
    vae = build(**CONFIGS[name])
    ratio = vae.spatial_compression_ratio
    z = latent(vae, 40 // ratio, 72 // ratio)
    assert difference(tiny_streamed(vae.decoder, z, max_bytes), whole(vae.decoder, z)) < 1e-5
    assert max(computed) <= 20 and computed.count(8) >= 20  # up to 20 where strips are computed for others

    x = noise(1, 3, 40, 72)
    assert difference(tiny_streamed(vae.encoder, x, max_bytes), whole(vae.encoder, x)) < 1e-5


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("size", [(1, 1), (1, 25), (5, 17), (33, 9), (25, 1), (4, 4)])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_strips_give_what_forward_gives_at_every_size(
    build: Any, name: str, size: tuple[int, int], max_bytes: int | None
) -> None:
    vae = build(**CONFIGS[name])
    z = latent(vae, *size)
    assert difference(tiny_streamed(vae.decoder, z, max_bytes), whole(vae.decoder, z)) < 1e-5
    x = noise(1, 3, 8 * size[0], 8 * size[1])
    assert difference(tiny_streamed(vae.encoder, x, max_bytes), whole(vae.encoder, x)) < 1e-5


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("size", [(61, 83), (9, 15), (15, 8), (47, 33), (130, 11)])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_the_encoder_loses_the_rest_of_sides_that_are_no_multiple_as_forward_does(
    build: Any, name: str, size: tuple[int, int], max_bytes: int | None
) -> None:
    encoder, x = build(**CONFIGS[name]).encoder, noise(1, 3, *size)
    expected = whole(encoder, x)
    assert expected.shape[2:] == (size[0] // 8, size[1] // 8)
    assert difference(tiny_streamed(encoder, x, max_bytes), expected) < 1e-5


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("name", ["wide", "three levels, partly wide"])
def test_strips_of_the_usual_size_give_what_forward_gives(build: Any, name: str, max_bytes: int | None) -> None:
    vae = build(**CONFIGS[name])
    z = latent(vae, 25, 21)
    assert difference(streamed(vae.decoder, z, max_bytes), whole(vae.decoder, z)) < 1e-5


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("name", ["wide", "without attention", "two blocks, 16 latent channels"])
def test_in_float64_strips_are_forward_to_the_last_digits(build: Any, name: str, max_bytes: int | None) -> None:
    vae = build(**CONFIGS[name]).double()
    z, x = latent(vae, 5, 9).double(), noise(1, 3, 43, 72).double()
    # what is left: scale and shift of a normalisation are float32
    assert difference(tiny_streamed(vae.decoder, z, max_bytes), whole(vae.decoder, z)) < 1e-10
    assert difference(tiny_streamed(vae.encoder, x, max_bytes), whole(vae.encoder, x)) < 1e-10


@pytest.mark.parametrize("max_bytes", [None, LEAST])
def test_in_bfloat16_strips_are_as_near_to_float32_as_forward_is(build: Any, max_bytes: int | None) -> None:
    vae = build(**WIDE)
    z = latent(vae, 5, 9)
    exact = whole(vae.decoder, z)
    vae, z = vae.to(torch.bfloat16), z.to(torch.bfloat16)
    strips, forward = (
        difference(y.float(), exact) for y in (tiny_streamed(vae.decoder, z, max_bytes), whole(vae.decoder, z))
    )
    assert 1e-4 < forward and strips < 1.5 * forward < 0.1


def test_less_memory_computes_rows_again_and_more_memory_does_not(build: Any, computed: list[int]) -> None:
    vae = build(**WIDE)
    z = latent(vae, 6, 5)
    totals = []
    for max_bytes in (None, LEAST):
        computed.clear()
        tiny_streamed(vae.decoder, z, max_bytes)
        totals.append(sum(computed))
    heights = [6] + [6 << level for level in range(4) for _ in range(4)] + [12, 24, 48, 48]
    # conv_in, 2 convolutions of each of 2 blocks of a level and of the middle, 3 upsamplings, conv_out
    assert totals[0] == sum(heights) + 4 * 6
    assert totals[1] > 1.5 * totals[0]


def test_of_what_is_computed_twice_only_what_does_not_fit_is(
    build: Any, computed: list[int], with_threads: Callable[[int], None]
) -> None:
    sizes = replace(TINY_STRIPS, scratch_bytes=0, weight_bytes=0, strip_copies=1)
    with_threads(1)
    decoder = build(widths=(8, 32), groups=4).decoder
    height, width = 64, 48  # of the image

    def rows_of(max_bytes: int | None) -> int:
        computed.clear()
        streamed(decoder, noise(1, 4, height // 2, width // 2), max_bytes, sizes=sizes)
        return sum(computed)

    small = 4 * 32 * height // 2 * width // 2  # bytes of the map before upsampling, and of those of 8 channels after it
    strip = 4 * 32 * 8 * width
    totals = [rows_of(None), *(rows_of(maps * small + strip) for maps in (5, 4, 2, 1))]
    # 5: all fits. 4: not the inside of the first large block, beside the upsampled map that it is computed from: its
    # rows are computed for their moments, and again in 2 strips of 32 that each look at a row more. 2: not the
    # upsampled map, but that inside: rows of the map for their moments, for the inside, in 8 strips that look at 2 more
    # but for the borders, and for the shortcut. 1: neither, nor the insides of small blocks.
    once = 4 * 32 + 5 * 32 + 6 * 64
    assert totals[:4] == [once, once, once + 64 + 2, once + 64 + (8 * 2 - 2) + 64]
    assert totals[4] > once + 3 * 64


def test_the_input_is_not_changed(build: Any) -> None:
    vae = build(**CONFIGS["narrow"])
    z = latent(vae, 5, 9)
    before = z.clone()
    for max_bytes in (None, LEAST):
        streamed(vae.decoder, z, max_bytes)
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_inputs_in_any_layout_give_the_same(build: Any, name: str) -> None:
    vae = build(**CONFIGS[name])
    z = latent(vae, 6, 9)
    expected = streamed(vae.decoder, z)
    last = z.contiguous(memory_format=torch.channels_last)
    part = torch.cat([z, z], dim=3)[:, :, :, :9]
    flipped = z.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (last, part, flipped):
        assert torch.equal(streamed(vae.decoder, other), expected)
    vae.to(memory_format=torch.channels_last)
    assert difference(streamed(vae.decoder, z), expected) < 1e-5


# Threads and batches


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_two_threads_give_the_bits_of_one_and_more_the_same_to_rounding(
    build: Any, with_threads: Callable[[int], None], name: str, max_bytes: int | None
) -> None:
    vae = build(**CONFIGS[name])
    z, x = latent(vae, 9, 7), noise(1, 3, 72, 61)
    results = []
    for count in (1, 2, 3, 4):
        with_threads(count)
        results.append((tiny_streamed(vae.decoder, z, max_bytes), tiny_streamed(vae.encoder, x, max_bytes)))
        assert torch.get_num_threads() == count
    assert all(torch.equal(*pair) for pair in zip(*results[:2], strict=True))
    for other in results[2:]:  # MKL divides the sums of a product among the threads that a strip has
        assert all(difference(*pair) < 1e-5 for pair in zip(other, results[0], strict=True))


def test_two_threads_give_the_bits_of_one_with_strips_of_the_usual_size(
    build: Any, with_threads: Callable[[int], None]
) -> None:
    vae = build(**WIDE)
    z = latent(vae, 24, 17)
    results = []
    for count in (1, 2):
        with_threads(count)
        results.append(streamed(vae.decoder, z))
    assert torch.equal(*results)


@pytest.mark.parametrize("max_bytes", [None, LEAST])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_a_batch_changes_no_bit_of_any_of_its_images(build: Any, name: str, max_bytes: int | None) -> None:
    vae = build(**CONFIGS[name])
    for network, batch in ((vae.decoder, noise(3, 4, 4, 5)), (vae.encoder, noise(3, 3, 32, 43))):
        together = tiny_streamed(network, batch, max_bytes)
        alone = torch.cat([tiny_streamed(network, image, max_bytes) for image in batch.split(1)])
        assert torch.equal(together, alone)


def test_calls_from_several_threads_at_once_give_what_they_give_one_by_one(
    build: Any, with_threads: Callable[[int], None]
) -> None:
    with_threads(2)
    vaes = [build(**WIDE, seed=0), build(**CONFIGS["narrow"], seed=1)]
    inputs = [latent(vae, 4, 5 + index) for index, vae in enumerate(vaes)]
    expected = [tiny_streamed(vae.decoder, z) for vae, z in zip(vaes, inputs, strict=True)]
    results: dict[tuple[int, int], Tensor] = {}

    def work(index: int) -> None:
        for turn in range(3):
            results[index, turn] = tiny_streamed(vaes[index % 2].decoder, inputs[index % 2])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(torch.equal(result, expected[index % 2]) for (index, _), result in results.items())


def test_one_pass_runs_at_a_time_as_the_number_of_threads_is_one_for_the_process(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = build(**CONFIGS["narrow"])
    z, image = latent(vae, 4, 5), streaming._Pass.image
    running = most = 0

    def counted(*inputs: Any) -> Tensor:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        result = image(*inputs)
        running -= 1
        return result

    monkeypatch.setattr(streaming._Pass, "image", counted)
    threads = [threading.Thread(target=streamed, args=(vae.decoder, z)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


class Stop(BaseException):
    """Stands for an interruption: no Exception."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, Stop])
@pytest.mark.parametrize("count", [1, 3])
def test_an_exception_in_a_strip_comes_through_and_leaves_no_threads_and_the_next_pass_is_right(
    build: Any,
    with_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    error: type[BaseException],
) -> None:
    with_threads(count)
    vae = build(**CONFIGS["narrow"])
    z = latent(vae, 9, 7)
    expected = tiny_streamed(vae.decoder, z)
    compute, calls = Layer.compute, 0

    def failing(self: Layer, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 23:
            raise error("planted")
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "compute", failing)
        with pytest.raises(error, match="planted"):
            tiny_streamed(vae.decoder, z)
    assert torch.get_num_threads() == count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdvae-strips")]
    assert torch.equal(tiny_streamed(vae.decoder, z), expected)


def test_a_pass_in_inference_mode_leaves_nothing_that_the_next_one_outside_it_cannot_write_to(
    build: Any, with_threads: Callable[[int], None]
) -> None:
    with_threads(1)  # strips are computed in the thread that asks
    vae = build(**CONFIGS["narrow"])
    z, results = latent(vae, 9, 7), []

    def work() -> None:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                results.append(streamed(vae.decoder, z))

    thread = threading.Thread(target=work)  # a new one: nothing is kept in it from other tests
    thread.start()
    thread.join()
    assert len(results) == 2 and torch.equal(*results)


def test_the_result_of_no_grad_is_an_ordinary_tensor_and_that_of_inference_mode_is_not(
    build: Any, with_threads: Callable[[int], None]
) -> None:
    vae = build(**CONFIGS["narrow"])
    z = latent(vae, 9, 7)
    for count in (1, 2):
        with_threads(count)
        with torch.no_grad():
            plain = streamed(vae.decoder, z)
        with torch.inference_mode():
            inference = streamed(vae.decoder, z)
        assert not plain.is_inference() and not plain.requires_grad and inference.is_inference()
        assert torch.equal(plain, inference)
        assert torch.is_grad_enabled()


# Moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (8, 7, 8), (16, 64, 16), (3, 200, 64)])
def test_moments_are_those_of_each_group(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = (3 + 2 * noise(*shape)).to(dtype)
    moments = Moments.of(x)
    mean, var = moments.of_groups(4)
    grouped = x.double().view(-1, 4, shape[2] // 4).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, grouped.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, grouped.var(1, correction=0), rtol=1e-5, atol=0)
    assert moments.count == shape[0] * shape[1]


def test_merged_moments_are_those_of_the_whole_also_where_parts_differ_in_mean_and_size() -> None:
    x = noise(24, 10, 8)
    x[8:13] += 5  # a bright band: what a mean of variances would miss
    x[13:] *= 4
    merged = Moments.merged([Moments.of(x[start:stop]) for start, stop in ((0, 8), (8, 13), (13, 24))])
    at_once = Moments.of(x)
    assert merged.count == at_once.count
    torch.testing.assert_close(merged.mean, at_once.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.var, at_once.var, rtol=1e-6, atol=0)


# Memory


class Ledger:
    """Bytes of the chunks that are out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = self.peak = 0
        self._known: set[int] = set()
        take, give_back = Memory.take, Memory.give_back

        def counted_take(memory: Memory, *shape: int) -> Tensor:
            chunk = take(memory, *shape)
            self._known.add(chunk.data_ptr())
            self.out += chunk.nbytes
            self.peak = max(self.peak, self.out)
            return chunk

        def counted_give_back(memory: Memory, chunk: Tensor) -> None:
            if chunk.data_ptr() in self._known:  # not what attention has made
                self.out -= chunk.nbytes
            give_back(memory, chunk)

        monkeypatch.setattr(Memory, "take", counted_take)
        monkeypatch.setattr(Memory, "give_back", counted_give_back)

    def peak_of(self, function: Callable[[], object]) -> int:
        self.out = self.peak = 0
        function()
        return self.peak


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_rows_that_are_used_up_are_given_back(build: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    vae = build(**CONFIGS["narrow"])
    network = getattr(vae, part)
    x = latent(vae, 32, 8) if part == "decoder" else noise(1, 3, 256, 64)
    ledger = Ledger(monkeypatch)
    limited = ledger.peak_of(lambda: tiny_streamed(network, x, LEAST))
    unlimited = ledger.peak_of(lambda: tiny_streamed(network, x))
    # decoder: the largest map is that of the last block but one, of 16 channels, 256 x 64; encoder: of 8
    largest = 4 * 256 * 64 * (16 if part == "decoder" else 8)
    strip = 4 * 8 * 64 * 16
    assert limited <= largest + 4 * strip
    assert unlimited >= 1.4 * limited


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_what_is_stored_is_within_the_stated_bounds(build: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    sizes = replace(TINY_STRIPS, scratch_bytes=0, weight_bytes=0)
    vae = build(**CONFIGS["narrow"])
    network = getattr(vae, part)
    ledger = Ledger(monkeypatch)
    for height, width in ((256, 64), (64, 256), (400, 8), (512, 40)):
        x = latent(vae, height // 8, width // 8) if part == "decoder" else noise(1, 3, height, width)
        plan = plan_pass(network, x, sizes=sizes)
        limited = ledger.peak_of(partial(streamed, network, x, plan.least_bytes, sizes=sizes))
        assert limited <= plan.least_bytes <= plan.most_bytes
        assert ledger.peak_of(partial(streamed, network, x, sizes=sizes)) <= plan.most_bytes


PEAK = """
import psutil, sys, torch
from pathlib import Path
from sdvae.model.autoencoder import AutoencoderKL
from dataclasses import replace
from sdvae.model.strips.passes import StripSizes, _return_freed_memory
from sdvae.model.strips.plan import plan_pass

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(2)
vae = AutoencoderKL(
    block_out_channels=(64,) * 3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False,
    norm_num_groups=8,
).eval().requires_grad_(False)
z = torch.randn(1, 4, 240, 256)
sizes = StripSizes(scratch_bytes=60 * 2**20, weight_bytes=50 * 2**20)  # of a network as narrow as this
vae.execution = replace(vae.execution, fast=True, fast_from=0, sizes=sizes)
vae.decode(z[..., :16])  # what starts with the first pass: threads, libraries
_return_freed_memory()
before = psutil.Process().memory_info().rss
limit = before + int(1.05 * plan_pass(vae.decoder, z, sizes=sizes).least_bytes)
vae.enable_tiling("exact", max_memory_bytes=limit)
vae.decode(z)
limited = peak()
vae.enable_tiling("exact")
vae.decode(z)
print(before, limit, limited, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is read from /proc")
def test_a_process_keeps_to_its_limit() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, limit, limited, unlimited = map(int, done.stdout.split())
    assert before + 4 * 64 * 960 * 1024 < limited <= limit < unlimited, done.stdout  # the largest map is in it


def test_only_on_a_cpu_do_the_bounds_count_a_strip_for_each_thread(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build(**CONFIGS["narrow"])

    z = latent(vae, 32, 8)

    def bounds(threads: int) -> list[int]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        plan = plan_pass(vae.decoder, z)
        return [plan.least_bytes, plan.most_bytes]

    assert all(more > few for few, more in zip(bounds(1), bounds(32), strict=True))
    z = z.to("meta")
    assert bounds(1) == bounds(32)


# Weights that change


def _wide_decoder(build: Any, seed: int = 0) -> Decoder:
    return build(widths=(64, 64), groups=8, seed=seed).decoder  # type: ignore[no-any-return]


def _in_place(decoder: Decoder, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(values[name])


def _through_data(decoder: Decoder, values: dict[str, Tensor]) -> None:
    for name, parameter in decoder.named_parameters():  # as diffusers' EMAModel.copy_to does: torch counts no change
        parameter.data.copy_(values[name])


def _as_data(decoder: Decoder, values: dict[str, Tensor]) -> None:
    for name, parameter in decoder.named_parameters():
        parameter.data = values[name].clone()


def _new_parameters(decoder: Decoder, values: dict[str, Tensor]) -> None:
    for name, _ in list(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(values[name].clone()))


CHANGES: dict[str, Callable[[Decoder, dict[str, Tensor]], object]] = {
    "in place": _in_place,
    "through data": _through_data,
    "as data": _as_data,
    "new parameters": _new_parameters,
    "load_state_dict": lambda decoder, values: decoder.load_state_dict(values),
    "assign": lambda decoder, values: decoder.load_state_dict(values, assign=True),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_after_a_change_of_the_weights_uses_the_new_ones(build: Any, name: str, mode: Any) -> None:
    decoder, other = _wide_decoder(build), _wide_decoder(build, seed=5)
    z = noise(1, 4, 9, 9)
    with mode():
        before = streamed(decoder, z)
    CHANGES[name](decoder, dict(other.state_dict()))
    with mode():
        after = streamed(decoder, z)
    assert difference(after, before) > 0.1
    assert difference(after, whole(other, z)) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (5, 7, 1, 2), (63, 63, 2, 2)])
def test_one_weight_that_was_changed_through_data_is_seen(
    build: Any, place: tuple[int, ...], layout: torch.memory_format
) -> None:
    decoder, z = _wide_decoder(build).to(memory_format=layout), noise(1, 4, 9, 9)
    before = streamed(decoder, z)
    decoder.mid_block.resnets[0].conv1.weight.data[place] += 10  # torch counts no change
    after = streamed(decoder, z)
    assert difference(after, before) > 1e-3 and difference(after, whole(decoder, z)) < 1e-5


@pytest.mark.parametrize("start", [1, 2])
def test_weights_that_lie_anywhere_in_the_memory_of_others_are_looked_at(build: Any, start: int) -> None:
    decoder, z = _wide_decoder(build), noise(1, 4, 9, 9)
    conv = decoder.mid_block.resnets[0].conv1
    flat = torch.zeros(conv.weight.numel() + start)
    flat[start:] = conv.weight.detach().flatten()
    conv.weight = nn.Parameter(flat[start:].view_as(conv.weight))
    streamed(decoder, z)
    flat[start + 11] += 10
    assert difference(streamed(decoder, z), whole(decoder, z)) < 1e-5


def test_weights_that_were_in_another_dtype_for_a_while_are_seen_as_changed(build: Any) -> None:
    decoder = _wide_decoder(build)
    z = noise(1, 4, 9, 9)
    for _ in range(4):  # the new memory may be at the place of the old
        streamed(decoder, z)
        with torch.no_grad():
            decoder.conv_in.weight.mul_(1.01)  # else the second round changes nothing
            for parameter in decoder.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape))
        streamed(decoder, z)
        decoder.to(torch.bfloat16).to(torch.float32)
        assert difference(streamed(decoder, z), whole(decoder, z)) < 1e-5


def test_a_model_is_copied_and_pickled_after_a_pass_and_copies_do_not_share_their_weights(build: Any) -> None:
    decoder = _wide_decoder(build)
    z = noise(1, 4, 9, 9)
    expected = streamed(decoder, z)
    copies = [copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(streamed(decoder, z), expected)
    assert all(torch.equal(streamed(other, z), expected) for other in copies)


def test_transformed_weights_are_made_once_and_go_with_their_module(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    of_weight = rows.TileTransform.of_weight

    def counted(*args: Any) -> Tensor:
        nonlocal made
        made += 1
        return of_weight(*args)

    monkeypatch.setattr(rows.TileTransform, "of_weight", counted)
    gc.collect()
    kept_before = len(streaming._transformed)
    decoder = _wide_decoder(build)
    z = noise(1, 4, 9, 9)
    streamed(decoder, z)
    layers = 4 + 8 + 1  # of the middle, of two levels with two blocks each, and an upsampling
    assert made == layers and len(streaming._transformed) == kept_before + layers
    streamed(decoder, z)
    assert made == layers
    other = _wide_decoder(build, seed=1)
    streamed(other, z, LEAST)  # keeps nothing
    assert made == 2 * layers and len(streaming._transformed) == kept_before + layers
    kept = weakref.ref(streaming._transformed[decoder.up_blocks[0].resnets[0].conv1].weights)
    del decoder
    gc.collect()
    assert len(streaming._transformed) == kept_before and kept() is None


def test_weights_made_in_inference_mode_are_transformed_once_too_and_a_change_of_one_is_seen(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    of_weight = rows.TileTransform.of_weight
    monkeypatch.setattr(rows.TileTransform, "of_weight", lambda *args: made.append(of_weight(*args)) or made[-1])
    z = noise(1, 4, 9, 9)
    with torch.inference_mode():
        decoder = copy.deepcopy(_wide_decoder(build))
        weight = decoder.conv_in.weight, decoder.mid_block.resnets[0].conv1.weight
        assert all(each.is_inference() for each in weight)
        before = streamed(decoder, z)
        layers = len(made)
        assert torch.equal(streamed(decoder, z), before) and len(made) == layers > 0
        weight[1][0, 0, 0, 1] += 10
        after = streamed(decoder, z)
        assert len(made) == layers + 1
        assert difference(after, before) > 1e-3 and difference(after, whole(decoder, z)) < 1e-5


def test_encoder_and_decoder_are_told_apart(build: Any) -> None:
    vae = build(**CONFIGS["narrow"])
    assert isinstance(vae.encoder, Encoder) and streamed(vae.encoder, noise(1, 3, 16, 16)).shape == (1, 8, 2, 2)
    assert isinstance(vae.decoder, Decoder) and streamed(vae.decoder, latent(vae, 2, 2)).shape == (1, 3, 16, 16)
