"""The chart of an audit: well-formed, one mark per layer, at the place of its number."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from sdvae.precision.activations import LayerPeak
from sdvae.precision.audit import Audit
from sdvae.precision.chart import audit_chart

SVG = "{http://www.w3.org/2000/svg}"


def made(peaks: dict[str, float], name: str = "mine") -> Audit:
    return Audit(
        vae=name,
        class_name="AutoencoderKL",
        digest="sha256:0",
        device="cpu",
        num_images=1,
        layers=tuple(LayerPeak(name=n, kind="conv", peak=peak, percentile=peak / 2) for n, peak in peaks.items()),
        norms=(),
        logits={},
        probes=(),
        force_upcast=None,
    )


PEAKS = {
    "encoder.conv_in": 10.0,
    "encoder.down_blocks.0.resnets.0.norm1": 5.0,
    "encoder.down_blocks.0.resnets.0.conv1": 1000.0,
    "encoder.down_blocks.0.resnets.0": 1e5,
    "quant_conv": 3.0,
    "post_quant_conv": 3.0,
    "decoder.mid_block.resnets.0": 2e6,
    "decoder.conv_out": 1.0,
}


def dots(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Layer -> its group of marks."""
    groups = [group for group in root.iter(f"{SVG}g") if (group.find(f"{SVG}title")) is not None]
    return {re.split(r" \(", group.find(f"{SVG}title").text)[0]: group for group in groups}  # type: ignore[union-attr,arg-type]


def place(group: ElementTree.Element) -> tuple[float, float]:
    circle = group.find(f"{SVG}circle")
    assert circle is not None
    return float(circle.get("cx", "")), float(circle.get("cy", ""))


def test_every_layer_has_a_dot_in_its_order_and_at_its_height() -> None:
    root = ElementTree.fromstring(audit_chart(made(PEAKS)))
    found = dots(root)
    assert list(found) == list(PEAKS)
    places = [place(group) for group in found.values()]
    steps = {round(right[0] - left[0], 0) for left, right in zip(places, places[1:], strict=False)}
    assert len(steps) <= 2 and min(steps) > 0  # evenly spaced, but for rounding
    # a logarithmic axis: equal factors are equal distances
    height = {name: place(group)[1] for name, group in found.items()}
    decade = (height["decoder.conv_out"] - height["encoder.down_blocks.0.resnets.0.conv1"]) / 3
    assert height["decoder.conv_out"] - height["encoder.conv_in"] == pytest.approx(decade, abs=0.2)
    limit = next(line for line in root.iter(f"{SVG}line") if line.get("class") == "limit")
    exact = height["decoder.conv_out"] - decade * math.log10(65504)
    assert float(limit.get("y1", "")) == pytest.approx(exact, abs=0.5)


def test_what_is_beyond_fp16_is_ringed_and_the_first_is_named() -> None:
    text = audit_chart(made(PEAKS))
    found = dots(ElementTree.fromstring(text))
    ringed = {name for name, group in found.items() if len(group.findall(f"{SVG}circle")) == 2}
    assert ringed == {"encoder.down_blocks.0.resnets.0", "decoder.mid_block.resnets.0"}
    assert ">encoder.down_blocks.0.resnets.0: 1e+05<" in text and "fp16 ends at 65504" in text


def test_dots_are_coloured_by_what_makes_them_smaller() -> None:
    roles = {name: group.get("class") for name, group in dots(ElementTree.fromstring(audit_chart(made(PEAKS)))).items()}
    assert roles["encoder.conv_in"] == "stream" and roles["encoder.down_blocks.0.resnets.0.conv1"] == "block"
    assert roles["encoder.down_blocks.0.resnets.0.norm1"] == roles["decoder.conv_out"] == "other"


def test_it_stands_alone_in_light_and_in_dark() -> None:
    text = audit_chart(made(PEAKS))
    assert "prefers-color-scheme: dark" in text and "<script" not in text
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("peaks", [{"layer": 0.0}, {"layer": 1e-30}, {"layer": 3e38}, {"a<b>&": 1.0}])
def test_odd_numbers_and_names_still_make_a_picture(peaks: dict[str, float]) -> None:
    root = ElementTree.fromstring(audit_chart(made(peaks, name="<&>" * 40)))
    numbers = [float(circle.get("cy", "")) for circle in root.iter(f"{SVG}circle")]
    assert all(0 <= number <= float(root.get("height", "")) for number in numbers)
