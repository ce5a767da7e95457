"""Networks are at hand before the work starts, or what they measure is left out where that was asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import METRIC_NAMES, PRESETS
from sdvae.evaluation.setup import Networks, build_networks
from sdvae.features import dists

CPU = torch.device("cpu")


def build(*metrics: str, weights: Path | None = None, skip: bool = False) -> Networks:
    options = EvaluateOptions(weights_path=weights, skip_unavailable=skip)
    return build_networks(replace(PRESETS["native"], metrics=metrics), options, CPU)


def test_plain_metrics_need_no_weights(tmp_path: Path) -> None:
    found = build("psnr", "ssim", "sharpness", weights=tmp_path)
    assert [*found.metrics] == ["psnr", "ssim", "sharpness"]
    assert (found.inception, found.set_metrics, found.skipped) == (None, (), ())


@pytest.mark.parametrize("name", ["lpips_alex", "lpips_vgg", "dists", "rfid", "kid"])
def test_without_weights_the_error_names_the_metric_and_the_ways_out(name: str, tmp_path: Path) -> None:
    if name not in ("rfid", "kid"):
        pytest.importorskip("lpips" if name != "dists" else "DISTS_pytorch")
    with pytest.raises(MissingWeightsError) as caught:
        build("psnr", name, weights=tmp_path)
    message = str(caught.value)
    assert f"--weights = {tmp_path}" in message
    assert f"choose --metrics without {name} (" in message and "--skip-unavailable" in message


def test_what_has_no_weights_is_left_out_with_the_reason_and_the_rest_is_built(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    found = build("psnr", "lpips_alex", "l1", "rfid", "kid", weights=tmp_path, skip=True)
    assert [*found.metrics] == ["psnr", "l1"]
    assert (found.inception, found.set_metrics) == (None, ())
    assert [name for name, _ in found.skipped] == ["lpips_alex", "rfid", "kid"]
    assert "no weights of alexnet" in found.skipped[0][1] and "no weights of inception" in found.skipped[1][1]
    assert all("\n" not in reason for _, reason in found.skipped)


def test_set_metrics_share_one_error(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="without rfid and kid"):
        build("rfid", "kid", weights=tmp_path)


def test_a_package_that_is_missing_is_named_or_its_metric_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import of it fails now
    monkeypatch.setattr(dists, "find_spec", lambda name: None)
    for name, package in (("lpips_vgg", "lpips"), ("dists", "dists-pytorch")):
        with pytest.raises(ConfigError, match=f"needs the package {package}"):
            build(name, weights=tmp_path)
        found = build("psnr", name, weights=tmp_path, skip=True)
        assert [*found.metrics] == ["psnr"]
        assert found.skipped[0][0] == name and package in found.skipped[0][1]


def test_damaged_weights_are_an_error_even_where_metrics_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "fid_inception_2015-12-05.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError) as caught:
        build("psnr", "rfid", weights=tmp_path, skip=True)
    assert not isinstance(caught.value, MissingWeightsError)


@pytest.mark.slow
def test_with_all_weights_every_metric_of_the_protocol_is_built(assets: Path) -> None:
    pytest.importorskip("lpips")
    pytest.importorskip("DISTS_pytorch")
    if not [*(assets / "weights").glob("vgg16_features*")]:
        pytest.skip("no weights of VGG16 among the assets")
    found = build(*METRIC_NAMES, weights=assets / "weights")
    assert [*found.metrics, *found.set_metrics] == [*METRIC_NAMES] and found.skipped == ()
    image = torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    for name, function in found.metrics.items():
        values = function(image.flip(3), image)
        assert values.shape == (2,) and bool(values.isfinite().all()), name
    assert found.inception is not None
    assert found.inception((image * 255).round().byte()).shape == (2, 2048)
