"""The precision audit against plain computations of the same numbers, and its verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.checkpoints.store import load_autoencoder, to_diffusers
from sdvae.data.images import image_to_x
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.precision.activations import LayerPeak, NormInput
from sdvae.precision.audit import Audit, audit
from sdvae.precision.probe import Probe

FP32, CPU = torch.float32, torch.device("cpu")
Pixels = NDArray[np.uint8]


def picture(seed: int, side: int = 32) -> Pixels:
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)).float()
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255)
    return smooth[0].permute(1, 2, 0).to(torch.uint8).numpy()


IMAGES = [picture(seed) for seed in range(2)]


def outputs_of(vae: nn.Module, name: str, images: list[Pixels]) -> list[Tensor]:
    """What a layer gives for each image, by a hook of its own."""
    found: list[Tensor] = []
    handle = vae.get_submodule(name).register_forward_hook(lambda module, inputs, out: found.append(out.clone()))
    with torch.inference_mode():
        for pixels in images:
            vae(image_to_x(pixels)[None])
    handle.remove()
    return found


@pytest.fixture(scope="module")
def model(vae_path: Path) -> AutoencoderKL:
    return load_autoencoder(vae_path)


@pytest.fixture(scope="module")
def subject(model: AutoencoderKL) -> OpenedVae:
    return open_any_vae(model, CPU, FP32)


@pytest.fixture(scope="module")
def found(subject: OpenedVae) -> Audit:
    return audit(subject, IMAGES, probe_size_px=32)


def layer_of(found: Audit, name: str) -> LayerPeak:
    return next(layer for layer in found.layers if layer.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in",
        "encoder.down_blocks.1.resnets.0.norm2",
        "encoder.down_blocks.1.resnets.0.conv_shortcut",
        "encoder.down_blocks.1.resnets.0",
        "encoder.mid_block.attentions.0.to_v",
        "encoder.mid_block.attentions.0",
        "quant_conv",
        "decoder.up_blocks.0.upsamplers.0.conv",
        "decoder.conv_out",
    ],
)
def test_peak_and_percentile_are_those_of_the_outputs_over_all_images(
    model: AutoencoderKL, found: Audit, name: str
) -> None:
    values = torch.cat([out.flatten() for out in outputs_of(model, name, IMAGES)]).abs().sort().values
    layer = layer_of(found, name)
    assert layer.peak == pytest.approx(float(values[-1]), rel=1e-5)  # kernels may differ by memory layout
    exact = float(values[math.ceil(0.9999 * len(values)) - 1])
    assert exact * (1 - 1e-5) <= layer.percentile <= min(exact * (1 + 1 / 32), float(values[-1])) * (1 + 1e-5)


def test_the_percentile_of_a_long_tail_is_not_its_peak(tiny_vae: AutoencoderKL) -> None:
    pixels = np.full((160, 160, 3), 120, dtype=np.uint8)
    pixels[80, 80] = 255  # 9 of 25,600 positions of the first convolution see it
    values = outputs_of(tiny_vae, "encoder.conv_in", [pixels])[0].abs().flatten().sort().values
    layer = layer_of(audit(open_any_vae(tiny_vae, CPU, FP32), [pixels], dtypes=()), "encoder.conv_in")
    exact = float(values[math.ceil(0.9999 * len(values)) - 1])
    assert exact * (1 - 1e-5) <= layer.percentile <= exact * (1 + 1 / 32) and layer.percentile < 0.9 * layer.peak


def test_every_layer_is_listed_once_and_in_order_of_execution(model: AutoencoderKL, found: Audit) -> None:
    names = [layer.name for layer in found.layers]
    assert len(set(names)) == len(names)
    leaves = {name for name, module in model.named_modules() if name and not any(module.children())}
    blocks = {name for name, _ in model.named_modules() if name.split(".")[-2:-1] in (["resnets"], ["attentions"])}
    empty = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert set(names) == (leaves | blocks) - empty  # and so no container whose output was counted inside it
    assert names[:4] == ["encoder.conv_in", *(f"encoder.down_blocks.0.resnets.0.{part}" for part in PARTS)]
    assert names[-1] == "decoder.conv_out" and names.index("quant_conv") < names.index("post_quant_conv")
    block = "encoder.mid_block.attentions.0"
    assert names.index(f"{block}.to_q") < names.index(f"{block}.to_out.0") < names.index(block)
    kinds = {layer_of(found, name).kind for name in names}
    assert kinds == {"conv", "norm", "linear", "sum"} and layer_of(found, block).kind == "sum"


PARTS = ("norm1", "conv1", "norm2")


def test_diffusers_own_class_gives_the_same_peaks(model: AutoencoderKL, found: Audit) -> None:
    theirs = audit(open_any_vae(to_diffusers(model), CPU, FP32), IMAGES, dtypes=())
    peaks = {layer.name: layer.peak for layer in theirs.layers}
    for layer in found.layers:
        assert peaks[layer.name] == pytest.approx(layer.peak, rel=1e-4)
    assert theirs.logits == pytest.approx(found.logits, rel=1e-4)


def test_logits_are_the_largest_scaled_product_of_a_query_and_a_key(model: AutoencoderKL, found: Audit) -> None:
    name = "decoder.mid_block.attentions.0"
    queries, keys = (outputs_of(model, f"{name}.{part}", IMAGES) for part in ("to_q", "to_k"))
    exact = max(
        float((q.squeeze() @ k.squeeze().T).abs().max()) / math.sqrt(q.shape[-1])
        for q, k in zip(queries, keys, strict=True)
    )
    assert found.logits[name] == pytest.approx(exact, rel=1e-4) and len(found.logits) == 2


def test_the_smallest_variance_is_that_of_the_flattest_group_of_any_image(model: AutoencoderKL, found: Audit) -> None:
    name = "decoder.up_blocks.0.resnets.0.norm1"
    norm = next(norm for norm in found.norms if norm.name == name)
    stream = outputs_of(model, "decoder.mid_block.resnets.1", IMAGES)
    exact = min(float(x.reshape(4, -1).var(dim=1, correction=0).min()) for x in stream)
    assert norm.min_variance == pytest.approx(exact, rel=1e-4) and norm.eps == 1e-6
    assert len(found.norms) == sum(isinstance(module, nn.GroupNorm) for module in model.modules())


def test_images_may_come_one_by_one_and_hooks_are_gone_afterwards(
    subject: OpenedVae, model: AutoencoderKL, found: Audit
) -> None:
    def stream() -> Iterator[Pixels]:
        yield from reversed(IMAGES)

    again = audit(subject, stream(), dtypes=())
    assert {layer.name: layer for layer in again.layers} == {layer.name: layer for layer in found.layers}
    assert again.num_images == 2
    assert not any(module._forward_hooks for module in model.modules())


def damaged(vae: AutoencoderKL, name: str, factor: float) -> OpenedVae:
    with torch.no_grad():
        for parameter in vae.get_submodule(name).parameters():
            parameter.mul_(factor)
    return open_any_vae(vae, CPU, FP32)


def test_an_overflow_is_foretold_from_float32_and_then_seen_at_the_same_layer(tiny_vae: AutoencoderKL) -> None:
    name = "decoder.up_blocks.1.resnets.0.conv2"
    found = audit(damaged(tiny_vae, name, 2.0**20), IMAGES, probe_size_px=32)
    verdict = found.verdict("float16")
    assert (verdict.level, verdict.layer) == ("overflows", name) and verdict.headroom_bits < 0
    assert f"overflows at {name} (peak " in verdict.sentence and "`sdvae fix-fp16` can repair" in verdict.sentence
    half, brain = (next(probe for probe in found.probes if probe.dtype == dtype) for dtype in ("float16", "bfloat16"))
    assert half.not_finite == (name,) and not half.finite and half.max_difference is None
    assert half.z_error is not None and half.z_error < 1e-2  # the encoder is well
    assert brain.finite and found.verdict("bfloat16").level != "overflows"
    assert found.verdict("float32").level == "safe"


def test_encoder_and_decoder_are_both_probed_though_the_encoder_overflows(tiny_vae: AutoencoderKL) -> None:
    damaged(tiny_vae, "decoder.conv_in", 2.0**20)
    found = audit(damaged(tiny_vae, "encoder.conv_in", 2.0**20), IMAGES, dtypes=("float16",), probe_size_px=32)
    assert found.probes[0].not_finite == ("encoder.conv_in", "decoder.conv_in")
    assert found.probes[0].z_error is None and found.verdict("float16").layer == "encoder.conv_in"


def test_the_probe_measures_the_error_of_each_type(model: AutoencoderKL, found: Audit) -> None:
    probes = {probe.dtype: probe for probe in found.probes}
    for dtype in ("float16", "bfloat16"):
        cast = open_any_vae(model, CPU, FP32).in_dtype(getattr(torch, dtype))
        x = [image_to_x(pixels)[None] for pixels in IMAGES]
        exact = [open_any_vae(model, CPU, FP32).encode(each).z for each in x]
        z = [cast.encode(each).z for each in x]
        error = torch.cat(z).sub(torch.cat(exact)).norm() / torch.cat(exact).norm()
        assert probes[dtype].z_error == pytest.approx(float(error), rel=1e-3)
    half, brain = probes["float16"], probes["bfloat16"]
    assert half.z_error is not None and brain.z_error is not None and half.z_error < brain.z_error / 3
    assert half.psnr_against_fp32 is not None and brain.psnr_against_fp32 is not None
    assert half.psnr_against_fp32 > brain.psnr_against_fp32 > 30
    for probe in (half, brain):
        assert f"{probe.psnr_against_fp32:.1f} dB against float32" in found.verdict(probe.dtype).sentence


def test_float32_that_is_not_finite_is_an_error_that_names_the_first_layer(tiny_vae: AutoencoderKL) -> None:
    subject = damaged(tiny_vae, "encoder.mid_block.resnets.0.conv2", 1e38)  # its square is what float32 cannot hold
    with pytest.raises(
        CheckpointError, match=r"float32, encoder\.mid_block\.attentions\.0\.group_norm gives .*image 1\)"
    ):
        audit(subject, IMAGES)


def test_an_audit_needs_an_image_and_float32(subject: OpenedVae) -> None:
    with pytest.raises(ConfigError, match="needs an image"):
        audit(subject, [])
    with pytest.raises(ConfigError, match="computes in torch.float16"):
        audit(subject.in_dtype(torch.float16), IMAGES)


def test_other_classes_of_diffusers_are_measured_and_not_promised_a_repair() -> None:
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    with torch.no_grad():
        tiny.decoder.layers[0].weight.mul_(1e8)
    found = audit(open_any_vae(tiny, CPU, FP32), IMAGES, probe_size_px=32)
    verdict = found.verdict("float16")
    assert verdict.level == "overflows" and "fix-fp16" not in verdict.sentence
    assert found.force_upcast in (None, False) and found.norms == () and found.logits == {}


# ---------------------------------------------------------------------------------------- what follows from it


def made(peaks: dict[str, float], probe: Probe | None = None, upcast: bool | None = None, **more: Any) -> Audit:
    return Audit(
        vae="mine",
        class_name="AutoencoderKL",
        digest="sha256:0",
        device="cpu",
        num_images=1,
        layers=tuple(LayerPeak(name=n, kind="conv", peak=peak, percentile=peak) for n, peak in peaks.items()),
        norms=(NormInput(name="norm", eps=1e-6, min_variance=1.0),),
        logits=more.get("logits", {}),
        probes=() if probe is None else (probe,),
        force_upcast=upcast,
    )


GOOD = Probe(dtype="float16", size_px=64, num_images=1, z_error=1e-3, max_difference=1e-2, psnr_against_fp32=60.0)


@pytest.mark.parametrize(
    ("peak", "upcast", "words"),
    [
        (1.0, True, "fp16 is safe: pipelines spend"),
        (1.0, False, None),
        (7e4, True, None),
        (7e4, False, "fp16 overflows"),
        (4e4, False, "fp16 at risk"),
        (7e4, None, None),
    ],
)
def test_force_upcast_is_held_against_the_verdict(peak: float, upcast: bool | None, words: str | None) -> None:
    sentence = made({"decoder.conv_in": peak}, GOOD, upcast).upcast
    assert sentence is None if words is None else sentence is not None and words in sentence


def test_logits_beyond_the_limit_are_a_hazard() -> None:
    assert made({"decoder.conv_in": 1.0}, logits={"a": 6e4}).hazards == []
    assert "a: attention logits reach 7e+04" in made({"decoder.conv_in": 1.0}, logits={"a": 7e4}).hazards[0]


def test_the_json_holds_all_and_no_infinity(found: Audit, tiny_vae: AutoencoderKL) -> None:
    import json

    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [verdict["dtype"] for verdict in data["verdicts"]] == ["float32", "bfloat16", "float16"]
    assert data["layers"][0].keys() == {"name", "kind", "peak", "p99_99", "headroom_bits"}
    silent: Callable[[AutoencoderKL], None] = lambda vae: nn.init.zeros_(vae.decoder.conv_out.weight)  # noqa: E731
    silent(tiny_vae)
    nn.init.zeros_(tiny_vae.decoder.conv_out.bias)
    json.dumps(audit(open_any_vae(tiny_vae, CPU, FP32), IMAGES, probe_size_px=32).to_json(), allow_nan=False)
