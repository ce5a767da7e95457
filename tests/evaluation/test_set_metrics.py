"""rFID and KID of blocks are those of all features at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg

from sdvae.evaluation import set_metrics
from sdvae.evaluation.plan import ORIGINALS
from sdvae.evaluation.protocol import PRESETS
from sdvae.evaluation.set_metrics import KID_SUBSET, SET_METRIC_ROWS, SetFeatures, measure_sets
from sdvae.metrics.fid import frechet_distance, kernel_distance, load_statistics, statistics_bytes
from sdvae.metrics.moments import Moments

WIDTH = 6
PROTOCOL = replace(PRESETS["native"], metrics=("psnr", "rfid", "kid"), seed=3)
Features = dict[str, NDArray[np.float32]]


def features(count: int) -> Features:
    """Of the originals, and of two autoencoders that are off by different amounts."""
    rng = np.random.default_rng(count)
    originals = rng.normal(2, 1, (count, WIDTH)).astype(np.float32)
    noise = rng.normal(0, 1, (2, count, WIDTH)).astype(np.float32)
    return {ORIGINALS: originals, "mine": originals + 0.1 * noise[0], "theirs": originals * 1.2 + 0.5 * noise[1]}


def fill(folder: Path | None, all_features: Features, *ends: int) -> dict[str, SetFeatures]:
    """The features in batches that end before these images. folder: for files of all of them; None: without."""
    most, found = max(ends) + 3, {}
    if folder is not None:
        folder.mkdir(exist_ok=True)
    for owner, rows in all_features.items():
        found[owner] = SetFeatures(WIDTH, most, folder and folder / f"features-{owner}.npy")
        for start, end in zip((0, *ends), ends, strict=False):
            if end > start:
                found[owner].add(rows[start:end])
    return found


def frechet(a: NDArray[Any], b: NDArray[Any]) -> float:
    """By the formula, with scipy's root of a matrix."""
    covariances = [np.cov(each.astype(np.float64), rowvar=False) for each in (a, b)]
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def squared_mmd(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Over all pairs, one by one."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def mean(x: NDArray[Any], y: NDArray[Any], same: bool) -> float:
        kernel = [(x[i] @ y[j] / WIDTH + 1) ** 3 for i in range(len(x)) for j in range(len(y)) if not same or i != j]
        return float(np.mean(kernel))

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def test_both_are_those_of_the_joined_features(tmp_path: Path) -> None:
    all_features = features(60)
    found = measure_sets(fill(tmp_path, all_features, 32, 60), PROTOCOL)
    for id_ in ("mine", "theirs"):
        rows, originals = all_features[id_], all_features[ORIGINALS]
        assert found[id_]["rfid"]["value"] == pytest.approx(frechet(rows, originals), rel=1e-9)
        assert found[id_]["kid"]["value"] == pytest.approx(squared_mmd(rows, originals), rel=1e-9, abs=1e-12)
        assert found[id_]["rfid"]["count"] == found[id_]["kid"]["count"] == 60
        assert found[id_]["rfid"]["std"] is found[id_]["kid"]["std"] is None
    assert found["mine"]["rfid"]["value"] < found["theirs"]["rfid"]["value"] / 10


@pytest.mark.parametrize("ends", [(60,), (1, 60), (10, 20, 59, 60), (0, 30, 30, 60)], ids=str)
def test_where_blocks_end_does_not_matter(ends: tuple[int, ...], tmp_path: Path) -> None:
    all_features = features(60)
    expected = measure_sets(fill(tmp_path / "plain", all_features, 32, 60), PROTOCOL)
    found = measure_sets(fill(tmp_path / "other", all_features, *ends), PROTOCOL)
    for id_, metrics in expected.items():
        for name, entry in metrics.items():
            assert found[id_][name]["value"] == pytest.approx(entry["value"], rel=1e-9, abs=1e-12)
            assert found[id_][name]["count"] == entry["count"] == 60


def test_a_reconstruction_that_is_the_original_has_distance_0(tmp_path: Path) -> None:
    originals = features(40)[ORIGINALS]
    found = measure_sets(fill(tmp_path, {ORIGINALS: originals, "mine": originals, "theirs": originals}, 40), PROTOCOL)
    assert found["mine"]["rfid"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["mine"]["kid"]["value"] < 0  # unbiased: below 0 for equal sets


@pytest.mark.parametrize("count", [KID_SUBSET, KID_SUBSET + 100])
def test_kid_of_many_images_is_a_mean_over_subsets_drawn_by_the_seed(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_metrics, "_KID_SUBSETS", 3)
    all_features = features(count)
    filled = fill(tmp_path, all_features, 300, 900, count)
    found = measure_sets(filled, PROTOCOL)["mine"]["kid"]
    subsets = 3 if count > KID_SUBSET else 1
    expected = kernel_distance(
        all_features["mine"], all_features[ORIGINALS], subsets=subsets, subset_size=KID_SUBSET, seed=3
    )
    assert found == {"value": expected[0], "std": expected[1] if subsets > 1 else None, "count": count}
    other = measure_sets(filled, replace(PROTOCOL, seed=4))["mine"]["kid"]
    assert (other["value"] != found["value"]) == (subsets > 1)


def test_features_for_kid_lie_in_files_in_the_order_of_the_images(tmp_path: Path) -> None:
    all_features = features(50)
    found = fill(tmp_path, all_features, 20, 50)
    for owner, rows in all_features.items():
        assert np.array_equal(found[owner].rows, rows)
        assert np.array_equal(np.load(tmp_path / f"features-{owner}.npy")[:50], rows)


def test_only_what_the_protocol_names_is_measured(tmp_path: Path) -> None:
    found = measure_sets(fill(None, features(20), 20), replace(PROTOCOL, metrics=("psnr", "rfid")))
    assert {name for metrics in found.values() for name in metrics} == {"rfid"}, "only KID needs all features at once"
    found = measure_sets(fill(tmp_path, features(20), 20), replace(PROTOCOL, metrics=("kid",)))
    assert {name for metrics in found.values() for name in metrics} == {"kid"}


def test_statistics_that_were_written_stand_for_the_originals(tmp_path: Path) -> None:
    filled = fill(None, features(30), 16, 30)
    path, identity = tmp_path / "stats.npz", {"images": "sha256:1"}
    path.write_bytes(statistics_bytes(filled[ORIGINALS].moments, identity))
    statistics = load_statistics(path)
    assert (statistics.count, statistics.identity) == (30, identity)
    protocol = replace(PROTOCOL, metrics=("rfid",))
    found = measure_sets(filled, protocol, statistics)
    assert found == measure_sets(filled, protocol)
    assert measure_sets(filled | {ORIGINALS: SetFeatures(WIDTH, 30)}, protocol, statistics) == found


def test_moments_are_those_of_one_owner() -> None:
    all_features = features(25)
    filled = fill(None, all_features, 12, 25)
    whole = Moments.of(all_features["theirs"].T.astype(np.float64))
    found = filled["theirs"].moments
    assert found.count == 25
    assert np.allclose(found.mean, whole.mean, rtol=1e-12) and np.allclose(found.covariance, whole.covariance)
    assert frechet_distance(found, filled["mine"].moments) > 0.1


def test_features_that_are_not_finite_are_an_error_and_change_nothing(tmp_path: Path) -> None:
    filled = fill(tmp_path, features(20), 20)["mine"]
    before = filled.rows.copy()
    broken = np.full((1, WIDTH), np.nan, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        filled.add(broken)
    assert filled.count == 20 and np.array_equal(filled.rows, before)


def test_every_set_metric_of_a_protocol_has_a_row() -> None:
    assert [*SET_METRIC_ROWS] == ["rfid", "kid"]
    assert all(row["kind"] == "set" and row["name"] == name for name, row in SET_METRIC_ROWS.items())
