"""Gates: what an expression means, and that nothing passes by being absent."""

from __future__ import annotations

from typing import Any

import pytest

from sdvae.errors import ConfigError
from sdvae.evaluation.gates import check_gates, gate_needs, parse_gate
from sdvae.report.result import EvaluationResult

METRICS = [
    {"name": "psnr", "kind": "image", "unit": "dB", "better": "higher", "target": None},
    {"name": "lpips_alex", "kind": "image", "unit": "", "better": "lower", "target": None},
    {"name": "bias_r", "kind": "image", "unit": "levels", "better": "target", "target": 0.0},
    {"name": "rfid", "kind": "set", "unit": "", "better": "lower", "target": None},
]


def summary(psnr: float, lpips: float) -> dict[str, Any]:
    spread = {"std": 2.0, "median": 24.1, "p5": 20.0, "p95": 28.0, "count": 3}
    return {
        "psnr": {"mean": psnr, "low": psnr - 1, "high": psnr + 1} | spread,
        "lpips_alex": {"mean": lpips, "low": None, "high": None} | spread,
        "bias_r": {"mean": -0.5, "low": -1.0, "high": 0.0} | spread,
        "rfid": {"value": 4.7, "std": None, "count": 3},
    }


def difference(delta: float) -> dict[str, Any]:
    entry = {"delta": delta, "low": delta - 0.3, "high": delta + 0.3, "won": 0.75, "lost": 0.25, "tied": 0.0}
    return {"psnr": entry, "lpips_alex": entry, "rfid": {"delta": -0.2, "verdict": "undecided"}}


@pytest.fixture
def result() -> EvaluationResult:
    """Two candidates, of 25 and 24 dB, and a reference of 23 dB."""
    columns = {"psnr": [20.0, None, 30.0], "lpips_alex": [0.1, 0.4, 0.2], "bias_r": [-3.0, 1.0, 2.0]}
    return EvaluationResult(
        created="2030-01-01T00:00:00+00:00",
        sdvae_version="0.1",
        protocol={},
        dataset={"unreadable": [{"key": "a.png", "reason": "cut off"}]},
        environment={},
        metrics=METRICS,
        skipped_metrics=[{"name": "dists", "reason": "its weights are not on this machine"}],
        vaes=[
            {"id": "good", "role": "candidate", "summary": summary(25.0, 0.1)},
            {"id": "poor", "role": "candidate", "summary": summary(24.0, 0.3)},
            {"id": "sd", "role": "reference", "summary": summary(23.0, 0.2)},
        ],
        comparisons=[
            {"vae": "good", "reference": "sd", "metrics": difference(0.5)},
            {"vae": "poor", "reference": "sd", "metrics": difference(0.1)},
        ],
        per_image={"keys": ["a", "b", "c"], "values": dict.fromkeys(("good", "poor", "sd"), columns)},
    )


def check(text: str, result: EvaluationResult) -> dict[str, Any]:
    return check_gates([parse_gate(text)], result)[0]


@pytest.mark.parametrize(
    ("text", "passed", "value"),
    [
        ("psnr<24.5", False, 24.0),  # of the poorer one
        ("psnr<23.5", True, 24.0),  # the reference, at 23, is not asked
        ("psnr<24", True, 24.0),
        ("psnr<=24", False, 24.0),
        ("psnr>24.5", False, 25.0),
        ("psnr>=25", False, 25.0),
        ("psnr>25", True, 25.0),
        (" psnr < 2.45e1 ", False, 24.0),
        ("good:psnr<24.5", True, 25.0),
        ("poor: psnr<24.5", False, 24.0),
        ("sd:psnr<24.5", False, 23.0),
        ("psnr.low<23.5", False, 23.0),
        ("psnr.high<23.5", True, 25.0),
        ("psnr.p5<21", False, 20.0),
        ("psnr.median<21", True, 24.1),
        ("psnr.std>1", False, 2.0),
        ("psnr.mean<24.5", False, 24.0),
        ("lpips>0.2", False, 0.3),
        ("lpips_alex>0.2", False, 0.3),
        ("fid>4.7", True, 4.7),
        ("rfid>=4.7", False, 4.7),
        ("bias_r<-0.4", False, -0.5),
        ("delta.psnr<0", True, 0.1),
        ("delta.psnr.low<0", False, -0.2),
        ("good:delta.psnr.low<0", True, 0.2),
        ("delta.psnr.high>0.7", False, 0.8),
        ("delta.lpips>0.2", False, 0.5),
        ("delta.psnr.won<0.5", True, 0.75),
        ("delta.rfid>0", True, -0.2),
        ("worst.psnr<21", False, 20.0),
        ("worst.lpips>0.5", True, 0.4),
        ("worst.bias_r>2.5", False, 3.0),  # -3: its distance from 0
        ("failed>0", False, 1.0),
        ("failed>1", True, 1.0),
    ],
)
def test_a_gate_fails_where_its_condition_holds_for_any_candidate(
    result: EvaluationResult, text: str, passed: bool, value: float
) -> None:
    gate = check(text, result)
    assert gate["expression"] == text.strip()
    assert gate["passed"] is passed
    assert gate["value"] == pytest.approx(value)


def test_the_reason_names_the_vae_the_value_and_the_limit(result: EvaluationResult) -> None:
    assert check("psnr<24.5", result)["reason"] == "poor: psnr is 24 dB, below 24.5 dB"
    assert check("psnr<=25", result)["reason"] == (
        "good: psnr is 25 dB, at or below 25 dB; poor: psnr is 24 dB, at or below 25 dB"
    )
    assert check("delta.lpips.high>1", result)["reason"] == "good: delta.lpips_alex.high is 0.8, not above 1"
    assert check("failed>0", result)["reason"] == "failed is 1, above 0"
    assert check("delta.psnr.won<0.9", result)["reason"].startswith("good: delta.psnr.won is 0.75, below 0.9;")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ssim<0.7", "good: ssim was not measured: add ssim to --metrics"),
        ("dists>0.1", "good: dists was not measured: its weights are not on this machine"),
        ("lpips.high>0.1", "good: lpips_alex.high has no value: too few images have one"),
        ("rfid.std>1", "good: rfid.std has no value"),
        ("delta.bias_r>1", "good: delta.bias_r has no value"),
        ("sd:delta.psnr<0", "sd: it is the reference itself"),
        ("other:psnr<24", "there is no VAE 'other'; VAEs: good, poor, sd"),
    ],
)
def test_a_number_that_does_not_exist_fails_its_gate_and_says_what_to_do(
    result: EvaluationResult, text: str, reason: str
) -> None:
    gate = check(text, result)
    assert (gate["passed"], gate["value"]) == (False, None)
    assert reason in gate["reason"]


def test_one_candidate_without_the_number_fails_the_gate_of_all(result: EvaluationResult) -> None:
    result.vaes[1]["summary"]["psnr"]["mean"] = None
    gate = check("psnr<20", result)
    assert (gate["passed"], gate["value"]) == (False, 25.0)
    assert gate["reason"] == "poor: psnr has no value: too few images have one"


def test_a_difference_without_a_reference_fails(result: EvaluationResult) -> None:
    result.comparisons = []
    assert "name a reference with --reference" in check("good:delta.psnr<0", result)["reason"]


def test_the_worst_image_without_numbers_per_image_fails(result: EvaluationResult) -> None:
    result.per_image = {}
    assert check("worst.psnr<1", result)["passed"] is False


def test_a_result_of_references_alone_fails_every_gate(result: EvaluationResult) -> None:
    result.vaes = result.vaes[2:]
    assert check("psnr<1", result)["reason"] == "there is no candidate; VAEs: sd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnrr<24", "unknown name 'psnrr'; did you mean 'psnr'"),
        ("delta.lpip>0", "unknown name 'lpip'; did you mean 'lpips'"),
        ("delta>0", "unknown name 'delta'; did you mean 'delta.METRIC'"),
        ("worst<0", "unknown name 'worst'; did you mean 'worst.METRIC'"),
        ("xyz<1", "unknown name 'xyz'; metrics: psnr, "),
        ("failed.psnr<1", "unknown name 'failed'"),
        ("psnr.lo<24", "unknown part '.lo'; expected one of mean, low, high"),
        ("psnr.won<24", "unknown part '.won'"),
        ("delta.psnr.p5<0", "unknown part '.p5'; expected one of delta, low"),
        ("rfid.low>5", "unknown part '.low'; expected one of value, std"),
        ("delta.rfid.low>5", "unknown part '.low'; nothing comes behind the metric"),
        ("worst.psnr.low<5", "unknown part '.low'; nothing comes behind the metric"),
        ("worst.rfid>5", "rfid is one number for the whole set"),
        ("mine:failed>0", "unreadable images are of the whole run: failed>0"),
        ("psnr", "is no condition"),
        ("psnr<", "is no condition"),
        ("<24", "is no condition"),
        ("psnr=24", "is no condition"),
        ("psnr<nan", "is no condition"),
        ("psnr>inf", "is no condition"),
        ("psnr<24<25", "is no condition"),
        ("psnr<high", "is no condition"),
        ("", "is no condition"),
    ],
)
def test_what_is_no_gate_is_refused_before_any_work(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="the gate") as caught:
        parse_gate(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "metrics", "needs_reference"),
    [
        ("psnr<24", ("psnr",), False),
        ("mine:fid>5", ("rfid",), False),
        ("delta.lpips.high>0.005", ("lpips_alex",), True),
        ("worst.ssim<0.5", ("ssim",), False),
        ("failed>0", (), False),
    ],
)
def test_a_gate_says_what_must_be_measured(text: str, metrics: tuple[str, ...], needs_reference: bool) -> None:
    assert gate_needs(parse_gate(text)) == (metrics, needs_reference)
