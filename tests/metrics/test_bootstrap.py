"""Bootstrap intervals: their coverage on simulated data, and the same intervals by scipy."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from sdvae.metrics import bootstrap
from sdvae.metrics.bootstrap import Floats, mean_intervals, slice_summaries, summarise

TRIALS = 2000  # the share of misses then has a standard error of 0.5 %


def simulate(shape: str, n: int, seed: int = 1) -> tuple[Floats, float]:
    """Each column one experiment of n values. Returns: (n, TRIALS), and the true mean."""
    generator = np.random.default_rng(seed)
    if shape == "normal":
        return generator.normal(size=(n, TRIALS)), 0.0
    sigma = {"skewed": 0.5, "very skewed": 1.0}[shape]  # of the logarithm: skewness 1.75 and 6.2
    return generator.lognormal(0, sigma, (n, TRIALS)), float(np.exp(sigma**2 / 2))


def misses(intervals: tuple[Floats, Floats], mean: float) -> tuple[float, float]:
    """Shares of intervals that lie above the mean, and below it."""
    low, high = intervals
    return float(np.mean(low > mean)), float(np.mean(high < mean))


def percentile_intervals(values: Floats) -> tuple[Floats, Floats]:
    counts = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=1999)
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975], axis=0)
    return low, high


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_intervals_of_95_percent_hold_the_true_mean_in_95_percent_of_experiments(shape: str, n: int) -> None:
    values, mean = simulate(shape, n)
    coverage = 1 - sum(misses(mean_intervals(values, resamples=1999), mean))
    assert 0.925 <= coverage <= 0.965


def test_few_images_get_wider_intervals_than_the_percentile_bootstrap_gives() -> None:
    """At n = 10 the percentiles hold the mean of normal values in 90 % of experiments."""
    values, mean = simulate("normal", 10)
    assert 1 - sum(misses(percentile_intervals(values), mean)) < 0.92
    assert 1 - sum(misses(mean_intervals(values, resamples=1999), mean)) == pytest.approx(0.945, abs=0.015)


def test_the_misses_of_skewed_data_are_more_even_than_those_of_the_percentile_bootstrap() -> None:
    """A wrong sign of acceleration or bias would make them less even."""
    values, mean = simulate("very skewed", 100)
    above, below = misses(mean_intervals(values, resamples=1999), mean)
    plain_above, plain_below = misses(percentile_intervals(values), mean)
    assert abs(above - below) < 0.6 * abs(plain_above - plain_below)
    assert above + below < plain_above + plain_below


@pytest.mark.parametrize("n", [12, 40])
def test_the_intervals_are_those_of_scipy(n: int) -> None:
    """To Monte-Carlo error: 0.02 standard errors of the mean each. Without bias or acceleration: 0.13 and more."""
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).lognormal(0, 0.8, n)
    limit = np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)  # the expanded level, from scipy's own t
    expected = stats.bootstrap(
        (values,),
        np.mean,
        method="BCa",
        confidence_level=2 * stats.norm.cdf(limit) - 1,
        n_resamples=99_999,
        vectorized=True,
        batch=10_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    low, high = mean_intervals(values[:, None], resamples=99_999)
    error = values.std(ddof=1) / np.sqrt(n)
    assert low[0] == pytest.approx(expected.low, abs=0.08 * error)
    assert high[0] == pytest.approx(expected.high, abs=0.08 * error)


def test_intervals_shrink_with_the_root_of_the_number_of_images() -> None:
    values, _ = simulate("normal", 400)
    widths = []
    for n in (100, 400):
        low, high = mean_intervals(values[:n], resamples=999)
        widths.append(float((high - low).mean()))
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.05)


def test_a_seed_gives_the_same_intervals_again_and_another_seed_others() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    first, again, other = (np.stack(mean_intervals(values, resamples=500, seed=seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-4)


def test_missing_numbers_leave_out_their_row_in_that_column_only() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    holes = values.copy()
    holes[[3, 17, 39], 1] = np.nan
    low, high = mean_intervals(holes, resamples=500)
    whole = mean_intervals(values[:, [0, 2]], resamples=500)
    shorter = mean_intervals(np.delete(values[:, [1]], [3, 17, 39], axis=0), resamples=500)
    assert (low[[0, 2]], high[[0, 2]]) == (pytest.approx(whole[0]), pytest.approx(whole[1]))
    assert (low[1], high[1]) == (pytest.approx(shorter[0][0]), pytest.approx(shorter[1][0]))


def test_one_number_or_none_has_no_interval() -> None:
    values = np.array([[np.nan, 7.0], [3.0, np.nan], [np.nan, np.nan]])
    assert np.isnan(mean_intervals(values, resamples=200)).all()
    assert np.isnan(mean_intervals(np.empty((0, 2)))).all()


def test_equal_numbers_have_an_interval_without_width() -> None:
    """Means of equal numbers round, at some of these lengths; the interval holds the number itself."""
    for n in range(2, 30):
        low, high = mean_intervals(np.full((n, 2), 0.1), resamples=50)
        assert (low == 0.1).all() and (high == 0.1).all()


def test_resampled_means_equal_to_the_mean_count_half() -> None:
    """A quarter of them are here; counted whole, they would shift a symmetric interval."""
    low, high = mean_intervals(np.array([[-1.0], [1.0]] * 5), resamples=9999)
    assert low[0] == pytest.approx(-high[0], abs=0.01)


def test_numbers_far_from_zero_lose_no_digits() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    near, far = (np.stack(mean_intervals(values + offset, resamples=500)) - offset for offset in (0.0, 1e9))
    assert far == pytest.approx(near, abs=1e-6)


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(31, 2))
    whole = np.stack(mean_intervals(values, resamples=500))
    monkeypatch.setattr(bootstrap, "_CHUNK_NUMBERS", 7 * 31)
    assert np.stack(mean_intervals(values, resamples=500)) == pytest.approx(whole, rel=1e-12)


def test_memory_stays_flat_in_the_number_of_images() -> None:
    """All counts at once would be 160 MB here."""
    values = np.random.default_rng(0).normal(size=(20_000, 2))
    tracemalloc.start()
    try:
        mean_intervals(values, resamples=999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6


def test_a_summary_is_that_of_the_images_that_have_a_number() -> None:
    numbers = [*np.random.default_rng(0).normal(size=30).tolist(), None, float("nan")]
    known = np.array(numbers[:30])
    entry = summarise({"psnr": numbers}, resamples=500)["psnr"]
    assert entry["count"] == 30
    assert entry["mean"] == pytest.approx(known.mean())
    assert entry["std"] == pytest.approx(known.std(ddof=1))
    assert [entry[name] for name in ("p5", "median", "p95")] == pytest.approx(
        np.percentile(known, [5, 50, 95]).tolist()
    )
    assert [entry["low"], entry["high"]] == pytest.approx(
        np.ravel(mean_intervals(known[:, None], resamples=500)).tolist()
    )
    json.dumps(entry, allow_nan=False)


def test_one_image_has_a_mean_without_an_interval_and_none_has_nothing() -> None:
    summary = summarise({"psnr": [24.0, None], "ssim": [None, None]})
    assert summary["psnr"] == {
        **dict.fromkeys(("mean", "median", "p5", "p95"), 24.0),
        **dict.fromkeys(("low", "high", "std"), None),
        "count": 1,
    }
    assert summary["ssim"] == {**dict.fromkeys(summary["psnr"], None), "count": 0}
    assert summarise({}) == {}


def test_slices_hold_their_own_images_and_images_without_one_are_in_none() -> None:
    values = {"psnr": [1.0, 2.0, 3.0, 10.0, 99.0]}
    slices = slice_summaries(values, ["text", "faces", "text", "faces", None], resamples=100)
    assert list(slices) == ["faces", "text"]
    assert (slices["text"]["psnr"]["mean"], slices["faces"]["psnr"]["mean"]) == (2.0, 6.0)
    assert slices["text"]["psnr"].keys() == {"mean", "low", "high", "count"}
    assert slice_summaries(values, [None] * 5) == {}
