"""The protocol: what its digest covers, presets, names of metrics."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sdvae.errors import ConfigError
from sdvae.evaluation.protocol import METRIC_NAMES, NETWORK_METRICS, PRESETS, Protocol, metric_names

BASE = Protocol(preset="native", size_px=256)
OTHER: dict[str, Any] = {
    "size_px": 512,
    "crop": "center",
    "max_images": 10,
    "posterior": "sample",
    "seed": 1,
    "dtype": "bfloat16",
    "background": "black",
    "tiling": "blended",
    "metrics": ("psnr",),
    "fid_statistics": "sha256:1",
    "resamples": 99,
}


def test_every_field_but_the_name_of_the_preset_is_tried_below() -> None:
    assert {field.name for field in dataclasses.fields(Protocol)} == {*OTHER, "preset"}


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_changes_with_each_choice(name: str) -> None:
    changed = dataclasses.replace(BASE, **{name: OTHER[name]})
    assert changed.to_json()["digest"] != BASE.to_json()["digest"]


def test_the_digest_does_not_change_with_the_name_of_the_preset() -> None:
    renamed = dataclasses.replace(BASE, preset="mine").to_json()
    assert renamed["digest"] == BASE.to_json()["digest"]
    assert renamed["preset"] == "mine"


def test_the_digest_is_the_same_on_every_machine() -> None:
    assert BASE.to_json()["digest"] == Protocol(preset="native", size_px=256).to_json()["digest"]
    assert BASE.to_json()["digest"].startswith("sha256:")


def test_the_protocol_is_plain_json_and_says_what_is_fixed_for_all() -> None:
    data = PRESETS["coco256"].to_json()
    assert json.loads(json.dumps(data)) == data
    assert (data["size_px"], data["crop"], data["resample"]) == (256, "center", "lanczos")
    assert data["fid"]["reference"] == "originals"
    assert Protocol(preset="native", fid_statistics="sha256:1").to_json()["fid"]["reference"] == "sha256:1"
    assert PRESETS["native"].to_json()["resample"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_bears_its_name_and_names_known_metrics(name: str) -> None:
    assert PRESETS[name].preset == name
    assert set(PRESETS[name].metrics) <= set(METRIC_NAMES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size_px": 4}, "size is 4 px; expected 8 or more"),
        ({"crop": "center"}, "needs a size"),
        ({"max_images": 0}, "number of images is 0"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Protocol(preset="mine", **fields)


def test_names_and_groups_of_metrics_come_in_the_order_of_display_and_once() -> None:
    assert metric_names("rfid, lpips,psnr,lpips_alex") == ("psnr", "lpips_alex", "rfid")
    assert metric_names("all") == METRIC_NAMES
    assert not set(metric_names("plain")) & set(NETWORK_METRICS)
    assert set(metric_names("plain")) | set(NETWORK_METRICS) == set(METRIC_NAMES)


@pytest.mark.parametrize("spec", ["psnrr", "", "psnr,,ssim"])
def test_an_unknown_metric_is_refused_with_the_known_ones_and_the_groups(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"is no metric; metrics: psnr, .*groups: .*standard"):
        metric_names(spec)
