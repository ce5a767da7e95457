"""A verdict on a number format: its level, the layer and the reason, and what a repair can reach."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdvae.precision.activations import LayerPeak
from sdvae.precision.number_formats import LIMITS
from sdvae.precision.probe import Probe
from sdvae.precision.verdict import repair_of, verdict_of

GOOD = Probe(dtype="float16", size_px=64, num_images=1, z_error=1e-3, max_difference=1e-2, psnr_against_fp32=60.0)
LIMIT = LIMITS["float16"]


@pytest.mark.parametrize(
    ("peaks", "probe", "level", "words"),
    [
        ({"encoder.conv_in": LIMIT / 8}, GOOD, "safe", "fp16: safe, 3.0 bits of headroom at encoder.conv_in (peak"),
        ({"encoder.conv_in": LIMIT / 2.01}, GOOD, "safe", "60.0 dB against float32"),
        ({"encoder.conv_in": LIMIT / 1.99}, GOOD, "at risk", "another image may overflow; `sdvae fix-fp16` can"),
        ({"encoder.conv_in": LIMIT}, GOOD, "at risk", "0.0 bits"),
        ({"encoder.conv_in": 7e4, "encoder.mid_block.resnets.0": 9e4}, GOOD, "overflows", "at encoder.conv_in (peak"),
        ({"decoder.conv_in": 7e4, "decoder.conv_out": 7e4}, GOOD, "overflows", "cannot repair decoder.conv_out"),
        ({"decoder.conv_in": 1.0}, replace(GOOD, not_finite=("x.y",)), "overflows", "gives infinity or NaN at x.y"),
        ({"decoder.conv_in": 1.0}, replace(GOOD, psnr_against_fp32=30.0), "imprecise", "30.0 dB"),
        ({"decoder.conv_in": 1.0}, replace(GOOD, error="no kernel"), "safe", "not tried: no kernel"),
    ],
)
def test_the_verdict_says_how_much_room_there_is(peaks: dict[str, float], probe: Probe, level: str, words: str) -> None:
    layers = [LayerPeak(name=name, kind="conv", peak=peak, percentile=peak) for name, peak in peaks.items()]
    verdict = verdict_of(layers, "float16", probe, "AutoencoderKL")
    assert verdict.level == level and words in verdict.sentence


def test_a_format_of_which_no_probe_was_made_is_called_not_tried_and_float32_needs_none() -> None:
    layers = [LayerPeak(name="decoder.conv_in", kind="conv", peak=7e4, percentile=7e4)]
    sentence = verdict_of(layers, "bfloat16", None, "AutoencoderKL").sentence
    assert sentence.startswith("bf16: safe, ") and sentence.endswith("; not tried: no probe")
    assert "not tried" not in verdict_of(layers, "float32", None, "AutoencoderKL").sentence
    for class_name, words in (("AutoencoderKL", "fix-fp16"), ("AutoencoderTiny", "come out black; not tried")):
        assert words in verdict_of(layers, "float16", None, class_name).sentence


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        ("encoder.conv_in", "stream"),
        ("encoder.down_blocks.0.downsamplers.0.conv", "stream"),
        ("decoder.up_blocks.2.resnets.1", "stream"),
        ("decoder.up_blocks.2.resnets.1.conv2", "stream"),
        ("decoder.up_blocks.2.resnets.1.conv_shortcut", "stream"),
        ("decoder.mid_block.attentions.0", "stream"),
        ("decoder.mid_block.attentions.0.to_out.0", "stream"),
        ("decoder.up_blocks.2.resnets.1.conv1", "block"),
        ("decoder.mid_block.attentions.0.to_v", "block"),
        ("decoder.mid_block.attentions.0.to_q", "block"),
        ("decoder.up_blocks.2.resnets.1.norm1", None),
        ("decoder.mid_block.attentions.0.group_norm", None),
        ("decoder.conv_norm_out", None),
        ("decoder.conv_out", None),
        ("quant_conv", None),
    ],
)
def test_what_a_power_of_two_makes_smaller(name: str, repair: str | None) -> None:
    assert repair_of(name) == repair
