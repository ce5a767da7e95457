"""result.json: written, read again, and refused where it is none."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sdvae.errors import ConfigError
from sdvae.report.result import SCHEMA, EvaluationResult, load_result


def result(**fields: Any) -> EvaluationResult:
    plain: dict[str, Any] = {
        "created": "2030-01-02T03:04:05+00:00",
        "sdvae_version": "0.1",
        "protocol": {"preset": "native", "size_px": None},
        "dataset": {"source": "photos", "unreadable": []},
        "environment": {"device": "cpu"},
        "metrics": [{"name": "psnr"}],
        "skipped_metrics": [],
        "vaes": [{"id": "mine", "summary": {"psnr": {"mean": 24.5, "low": None}}}],
        "comparisons": [],
        "per_image": {"keys": ["a/ü.png"], "values": {"mine": {"psnr": [24.5]}}},
        "gallery": [{"key": "a/ü.png", "crop": [0, 0, 8, 8]}],
    }
    return EvaluationResult(**plain | fields)


def test_what_is_written_reads_the_same(tmp_path: Path) -> None:
    written = result(warnings=["one image"], gates=[{"expression": "psnr<24", "passed": True}])
    path = tmp_path / "result.json"
    path.write_text(json.dumps(written.to_json()), encoding="utf-8")
    assert load_result(path) == written


def test_numbers_that_json_lacks_become_null_at_every_depth() -> None:
    values = {"mine": {"psnr": (math.nan, math.inf, 1.5, True)}}
    data = result(per_image={"values": values}).to_json()
    assert data["per_image"]["values"]["mine"]["psnr"] == [None, None, 1.5, True]
    json.dumps(data, allow_nan=False)


def test_the_short_form_lacks_only_what_grows_with_the_images(tmp_path: Path) -> None:
    whole, short = result().to_json(), result().to_json(large=False)
    assert whole.keys() - short.keys() == {"per_image", "gallery"}
    path = tmp_path / "short.json"
    path.write_text(json.dumps(short), encoding="utf-8")
    assert load_result(path) == dataclasses.replace(result(), per_image={}, gallery=[])


def test_fields_of_a_newer_program_with_the_same_schema_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result().to_json() | {"added": 1}), encoding="utf-8")
    assert load_result(path) == result()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not JSON"),
        ("[1]", "its schema is None"),
        ('{"schema": "sdvae.evaluation/2"}', "its schema is 'sdvae.evaluation/2'; this version of sdvae reads"),
        (json.dumps({"schema": SCHEMA, "vaes": []}), "it lacks comparisons, created, dataset"),
    ],
)
def test_what_is_no_result_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "result.json"
    make(path)
    with pytest.raises(ConfigError, match=r"result\.json: (cannot be read|not JSON)"):
        load_result(path)


@pytest.mark.parametrize(
    ("passed", "unreadable", "code"),
    [(None, 0, 0), (True, 0, 0), (False, 0, 1), (None, 1, 3), (True, 1, 3), (False, 1, 1)],
)
def test_a_failed_gate_goes_before_unreadable_images(passed: bool | None, unreadable: int, code: int) -> None:
    gates = [] if passed is None else [{"expression": "psnr<24", "passed": passed}]
    dataset = {"unreadable": [{"key": "a.png", "reason": "cut off"}] * unreadable}
    assert result(gates=gates, dataset=dataset).exit_code == code
