"""Summaries, paired differences and results side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sdvae.evaluation.compare import (
    MIN_PAIRS,
    merge_results,
    paired_differences,
    set_differences,
)
from sdvae.evaluation.protocol import Protocol
from sdvae.metrics.bootstrap import Floats, summarise
from sdvae.report.result import EvaluationResult

PSNR = {"name": "psnr", "kind": "image", "better": "higher", "target": None}
SSIM = {"name": "ssim", "kind": "image", "better": "higher", "target": None}
LPIPS = {"name": "lpips_alex", "kind": "image", "better": "lower", "target": None}
BIAS = {"name": "bias_r", "kind": "image", "better": "target", "target": 0.0}
SHARPNESS = {"name": "sharpness", "kind": "image", "better": "target", "target": 1.0}
RFID = {"name": "rfid", "kind": "set", "better": "lower", "target": None}


def noise(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=n)


# Against a reference


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "delta", "verdict"),
    [
        (PSNR, 25.0, 24.0, 1.0, "better"),
        (PSNR, 24.0, 25.0, -1.0, "worse"),
        (LPIPS, 0.2, 0.1, 0.1, "worse"),
        (LPIPS, 0.1, 0.2, -0.1, "better"),
        (BIAS, -3.0, 1.0, 2.0, "worse"),
        (BIAS, -1.0, 3.0, -2.0, "better"),
        (SHARPNESS, 1.1, 0.8, -0.1, "better"),
        (SHARPNESS, 0.5, 1.1, 0.4, "worse"),
        (PSNR, 24.0, 24.0, 0.0, "undecided"),
    ],
)
def test_the_verdict_follows_the_direction_of_the_metric(
    metric: dict[str, Any], ours: float, theirs: float, delta: float, verdict: str
) -> None:
    columns = {metric["name"]: np.full(8, ours)}, {metric["name"]: np.full(8, theirs)}
    entry = paired_differences(*columns, [metric], resamples=100)[metric["name"]]
    assert entry["delta"] == pytest.approx(delta)
    assert entry["verdict"] == verdict
    assert (entry["won"], entry["lost"], entry["tied"]) == (verdict == "better", verdict == "worse", delta == 0)


def test_shares_are_of_the_images_that_both_have_and_ties_count_as_such() -> None:
    ours = {"lpips_alex": [0.1, 0.1, 0.3, 0.2 + 1e-12, None, 0.1]}
    theirs = {"lpips_alex": [0.2, 0.2, 0.2, 0.2, 0.2, None]}
    entry = paired_differences(ours, theirs, [LPIPS], resamples=100)["lpips_alex"]
    assert (entry["won"], entry["lost"], entry["tied"], entry["count"]) == (0.5, 0.25, 0.25, 4)


def test_a_difference_that_all_images_share_is_seen_through_their_spread() -> None:
    """Images differ by 4 dB, the VAEs by 0.1: unpaired intervals overlap by far."""
    photos = 24 + 4 * noise(100)
    ours, theirs = {"psnr": photos + 0.1 + 0.05 * noise(100, 1)}, {"psnr": photos + 0.05 * noise(100, 2)}
    entry = paired_differences(ours, theirs, [PSNR])["psnr"]
    alone = summarise(ours)["psnr"]
    assert entry["verdict"] == "better"
    assert entry["high"] - entry["low"] < 0.05 * (alone["high"] - alone["low"])


def test_noise_alone_is_rarely_decided() -> None:
    decided = [
        paired_differences({"psnr": noise(20, 2 * i)}, {"psnr": noise(20, 2 * i + 1)}, [PSNR], resamples=499)["psnr"]
        for i in range(200)
    ]
    assert sum(entry["verdict"] != "undecided" for entry in decided) <= 20  # 5 % of 200 are 10


@pytest.mark.parametrize(("count", "verdict"), [(1, "undecided"), (MIN_PAIRS - 1, "undecided"), (MIN_PAIRS, "better")])
def test_a_handful_of_images_decides_nothing(count: int, verdict: str) -> None:
    ours, theirs = {"psnr": [25.0] * count}, {"psnr": [24.0] * count}
    assert paired_differences(ours, theirs, [PSNR])["psnr"]["verdict"] == verdict


def test_metrics_that_one_lacks_or_that_are_of_the_set_have_no_pairs() -> None:
    values = {"psnr": [1.0, 2.0], "rfid": [1.0, 2.0]}
    assert paired_differences(values, {"rfid": [1.0, 2.0]}, [PSNR, RFID]) == {}
    empty = paired_differences({"psnr": [None]}, {"psnr": [1.0]}, [PSNR])["psnr"]
    assert (empty["delta"], empty["won"], empty["verdict"], empty["count"]) == (None, None, "undecided", 0)


def test_set_metrics_have_a_difference_and_no_verdict() -> None:
    ours = {"rfid": {"value": 4.5, "std": None, "count": 9}, "psnr": {"mean": 1.0}}
    theirs = {"rfid": {"value": 5.0, "std": None, "count": 9}, "psnr": {"mean": 2.0}}
    assert set_differences(ours, theirs, [PSNR, RFID]) == {"rfid": {"delta": -0.5, "verdict": "undecided"}}


# Several results in one

KEYS = [f"{i}.png" for i in range(8)]


def result(
    vaes: Mapping[str, Sequence[float]],
    *,
    reference: str | None = None,
    dataset: str = "one",
    keys: Sequence[str] = tuple(KEYS),
    metrics: Sequence[Mapping[str, Any]] = (PSNR, RFID),
    created: str = "2030-01-01T00:00:00+00:00",
    **protocol: Any,
) -> EvaluationResult:
    """vaes: id -> PSNR of each key, which is also the digest of the weights."""
    rows = []
    for id_, values in vaes.items():
        summary = summarise({"psnr": values}, resamples=99) | {
            "rfid": {"value": 5.0, "std": None, "count": len(values)}
        }
        role = "reference" if id_ == reference else "candidate"
        network = {"digest": str(values), "class_name": "AutoencoderKL", "dtype": "float32"}
        scale = {"scaling_factor": 1.0, "shift_factor": None}
        rows.append({"id": id_, "ref": f"runs/{id_}", "role": role, "summary": summary, "slices": {}} | network | scale)
    comparisons = [
        {
            "vae": id_,
            "reference": reference,
            "metrics": paired_differences({"psnr": vaes[id_]}, {"psnr": vaes[reference]}, [PSNR], resamples=99),
            "swap": {
                "verdict": "drop-in",
                "drift": {
                    "mean": {id_: [0.0], reference: [0.1]},
                    "std": {id_: [1.0], reference: [1.1]},
                    "kl_nats": 2.0,
                },
                "cross_decode": {a: {b: {"psnr": 20.0} for b in (id_, reference)} for a in (id_, reference)},
            },
        }
        for id_ in vaes
        if reference is not None and id_ != reference
    ]
    return EvaluationResult(
        created=created,
        sdvae_version="0.1",
        protocol=Protocol(
            preset="native", resamples=99, metrics=tuple(metric["name"] for metric in metrics), **protocol
        ).to_json(),
        dataset={"source": f"photos/{dataset}", "num_images": len(keys), "digest": dataset, "unreadable": []},
        environment={"device": "cpu"},
        metrics=[dict(metric) for metric in metrics],
        skipped_metrics=[],
        vaes=rows,
        comparisons=comparisons,
        per_image={
            "keys": list(keys),
            "widths": [64] * len(keys),
            "heights": [64] * len(keys),
            "slices": [None] * len(keys),
            "values": {id_: {"psnr": list(values)} for id_, values in vaes.items()},
        },
        gallery=[
            {
                "key": keys[0],
                "width": 64,
                "height": 64,
                "crop": [0, 0, 64, 64],
                "original": "data:o",
                "reconstructions": {id_: f"data:{id_}" for id_ in vaes},
            }
        ],
    )


def level(mean: float) -> list[float]:
    return [mean + 0.1 * i for i in range(8)]


def ids(merged: EvaluationResult) -> list[tuple[str, str]]:
    return [(vae["id"], vae["role"]) for vae in merged.vaes]


def test_vaes_of_all_results_stand_side_by_side_under_names_of_their_own() -> None:
    parts = [result({"mine": level(24)}), result({"mine": level(25)}), result({"mine": level(26), "mine-2": level(1)})]
    untouched = copy.deepcopy(parts)
    merged = merge_results(parts)
    assert ids(merged) == [(name, "candidate") for name in ("mine", "mine-2", "mine-3", "mine-2-2")]
    assert merged.per_image["values"]["mine-3"]["psnr"] == level(26)
    assert merged.gallery[0]["reconstructions"] == {
        id_: f"data:{old}"
        for id_, old in zip(("mine", "mine-2", "mine-3", "mine-2-2"), ("mine", "mine", "mine", "mine-2"), strict=True)
    }
    assert any("mine of result 2" in warning and "called mine-2" in warning for warning in merged.warnings)
    assert merged.comparisons == []
    assert parts == untouched


def test_vaes_evaluated_apart_are_compared_with_the_first_reference_image_by_image() -> None:
    swapped = [*range(1, 8), 0]  # the second result lists the images in another order
    apart = result({"new": [level(25)[i] for i in swapped]}, keys=[KEYS[i] for i in swapped])
    merged = merge_results([apart, result({"mine": level(24.5), "sd": level(24)}, reference="sd")])
    assert ids(merged) == [("new", "candidate"), ("mine", "candidate"), ("sd", "reference")]
    found = {comparison["vae"]: comparison for comparison in merged.comparisons}
    entry = found["new"]["metrics"]["psnr"]
    assert entry["delta"] == pytest.approx(1.0) and entry["verdict"] == "better"
    assert entry["high"] - entry["low"] == pytest.approx(0, abs=1e-9)  # images in the wrong order would differ
    assert found["new"]["metrics"]["rfid"] == {"delta": 0.0, "verdict": "undecided"}
    assert "evaluated apart" in found["new"]["swap"]["skipped"]
    assert found["mine"]["swap"]["verdict"] == "drop-in"
    assert merged.per_image["keys"] == apart.per_image["keys"]
    assert merged.per_image["values"]["sd"]["psnr"] == pytest.approx([level(24)[i] for i in swapped])


def test_one_reference_of_two_results_is_shown_once() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    second = result({"a": level(25), "ft": level(23)}, reference="ft")  # the same weights by another name
    merged = merge_results([first, second])
    assert ids(merged) == [("a", "candidate"), ("sd", "reference"), ("a-2", "candidate")]
    assert [(each["vae"], each["reference"]) for each in merged.comparisons] == [("a", "sd"), ("a-2", "sd")]
    swap = merged.comparisons[1]["swap"]
    assert swap["drift"]["mean"].keys() == swap["drift"]["std"].keys() == {"a-2", "sd"}
    assert swap["drift"]["kl_nats"] == 2.0
    assert swap["cross_decode"] == {a: {b: {"psnr": 20.0} for b in ("a-2", "sd")} for a in ("a-2", "sd")}


def test_another_reference_becomes_a_candidate_and_keeps_its_own_comparisons() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    merged = merge_results([first, result({"b": level(25), "xl": level(26)}, reference="xl")])
    assert ids(merged) == [("a", "candidate"), ("sd", "reference"), ("b", "candidate"), ("xl", "candidate")]
    pairs = [(each["vae"], each["reference"]) for each in merged.comparisons]
    assert pairs == [("a", "sd"), ("b", "xl"), ("b", "sd"), ("xl", "sd")]


def test_other_images_are_shown_but_never_subtracted_and_a_warning_says_so() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    merged = merge_results([first, result({"b": level(25)}, dataset="two")])
    assert [each["vae"] for each in merged.comparisons] == ["a"]
    assert ids(merged)[-1] == ("b", "candidate")
    assert "b" not in merged.per_image["values"] and "b" not in merged.gallery[0]["reconstructions"]
    assert any(
        "b: measured on other images (photos/two, 8 images) than a, sd (photos/one, 8 images)" in warning
        for warning in merged.warnings
    )


def test_another_protocol_is_shown_but_never_subtracted_and_each_field_is_named_with_both_values() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd", dtype="float32")
    merged = merge_results([first, result({"b": level(25)}, dtype="float16", fid_statistics="sha256:7")])
    assert [each["vae"] for each in merged.comparisons] == ["a"]
    warning = next(warning for warning in merged.warnings if "another protocol" in warning)
    assert "dtype: float16, not float32" in warning
    assert "fid.reference: sha256:7, not originals" in warning
    assert "digest" not in warning and "preset" not in warning
    assert merged.per_image["values"].keys() == {"a", "sd", "b"}  # the same images, so side by side


def test_a_reference_measured_by_another_protocol_is_not_taken_for_the_first() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    merged = merge_results([first, result({"b": level(24), "sd": level(23)}, reference="sd", posterior="sample")])
    assert ids(merged) == [("a", "candidate"), ("sd", "reference"), ("b", "candidate"), ("sd-2", "candidate")]
    assert [(each["vae"], each["reference"]) for each in merged.comparisons] == [("a", "sd"), ("b", "sd-2")]


def test_other_lists_of_metrics_do_not_stand_in_the_way() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd", metrics=(PSNR, RFID))
    merged = merge_results([first, result({"b": level(25)}, metrics=(PSNR, SSIM))])
    assert [each["vae"] for each in merged.comparisons] == ["a", "b"]
    assert [metric["name"] for metric in merged.metrics] == ["psnr", "ssim", "rfid"]  # in the order of display
    assert any("only one of them has rfid, ssim" in warning for warning in merged.warnings)
    assert not any("protocol" in warning for warning in merged.warnings)


def test_pictures_of_another_crop_are_not_laid_on_each_other() -> None:
    other = result({"b": level(25)})
    other.gallery[0]["crop"] = [8, 0, 56, 64]
    merged = merge_results([result({"a": level(24)}), other])
    assert merged.gallery[0]["reconstructions"] == {"a": "data:a"}


def test_results_without_numbers_per_image_merge_too() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    short = result({"b": level(25)})
    short.per_image, short.gallery = {}, []
    merged = merge_results([first, short])
    assert merged.comparisons[1]["metrics"] == {"rfid": {"delta": 0.0, "verdict": "undecided"}}
    assert merged.per_image["values"].keys() == {"a", "sd"}
    first.per_image, first.gallery = {}, []
    assert merge_results([first, short]).per_image == {}


def test_gates_published_rows_warnings_and_unreadable_images_of_all_are_kept() -> None:
    parts = [result({"a": level(24)}), result({"b": level(25)}, created="2031-01-01T00:00:00+00:00")]
    for part, passed in zip(parts, (True, False), strict=True):
        part.gates = [{"expression": "psnr<24", "passed": passed}]
        part.published = [{"vae": "sdxl-vae"}]
        part.warnings = ["one slow disk"]
        part.dataset["unreadable"] = [{"key": "z.png", "reason": "cut off"}]
        part.skipped_metrics = [{"name": "dists", "reason": "no weights"}]
    merged = merge_results(parts)
    assert [gate["passed"] for gate in merged.gates] == [True, False]
    assert merged.exit_code == 1
    assert (len(merged.published), len(merged.skipped_metrics), len(merged.dataset["unreadable"])) == (1, 1, 1)
    assert merged.warnings == ["one slow disk"]
    assert merged.created == "2031-01-01T00:00:00+00:00"
    assert merge_results(parts[:1]) == parts[0]


def test_a_merged_result_is_plain_json_and_merges_with_another() -> None:
    first = result({"a": level(24), "sd": level(23)}, reference="sd")
    second = result({"b": level(25)})
    once = merge_results([first, second])
    assert json.loads(json.dumps(once.to_json(), allow_nan=False)) == once.to_json()
    assert ids(merge_results([once, result({"c": level(26)})])) == [*ids(once), ("c", "candidate")]
