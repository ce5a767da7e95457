"""FID and KID against torch-fidelity and pytorch-fid, and the moments that FID is computed from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import ConfigError
from sdvae.features.inception import build_inception
from sdvae.metrics.fid import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    load_statistics,
    statistics_bytes,
)
from sdvae.metrics.moments import Moments

D = 64


def package(name: str) -> Any:
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
        return pytest.importorskip(name)


def random_features(num: int, seed: int = 0, width: int = D) -> NDArray[np.float64]:
    """Correlated, not negative, of very different spread, around a mean that is not zero: like Inception's."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.logspace(0, -2, width)
    return np.maximum(rng.normal(size=(num, width)) @ mixing / 4 + 1, 0)


def moments_of(features: NDArray[Any], *ends: int) -> Moments:
    """Moments of features that come in the batches that end there."""
    moments = Moments.zeros(features.shape[1])
    for batch in np.split(features, ends):
        moments.update(batch.T)
    return moments


def torch_fidelity_fid(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    metric = package("torch_fidelity.metric_fid")
    statistics = [metric.fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    return float(metric.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"])


@pytest.fixture(scope="module")
def inception_features(assets: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (20, 2048) of photographs, and of the same after they were made smaller and large again."""
    network = build_inception(assets / "weights")
    paths = sorted(path for path in (assets / "images" / "val").iterdir() if path.suffix in {".jpg", ".png"})
    images = [Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC) for path in paths[:20]]
    blurred = [image.resize((32, 32)).resize((96, 96)) for image in images]
    sets = [torch.from_numpy(np.stack([np.asarray(each) for each in some])) for some in (images, blurred)]
    first, second = (network(some.permute(0, 3, 1, 2).contiguous()).double().numpy() for some in sets)
    return first, second


@pytest.mark.parametrize("num", [500, 40])  # 40: fewer images than features
def test_fid_is_that_of_torch_fidelity_and_pytorch_fid(num: int) -> None:
    a, b = random_features(num), random_features(num + 7, seed=1) * 1.1
    value = frechet_distance(moments_of(a), moments_of(b))
    assert value == pytest.approx(torch_fidelity_fid(a, b), rel=1e-6)
    if num > D:  # pytorch-fid's matrix root loses digits where the matrices are singular
        pytorch_fid = package("pytorch_fid.fid_score")
        arguments = [each for set_ in (a, b) for each in (set_.mean(axis=0), np.cov(set_, rowvar=False))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # scipy's, on how its matrix root is called
            assert value == pytest.approx(pytorch_fid.calculate_frechet_distance(*arguments), rel=1e-6)


def exact_fid(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """From the features themselves, by a matrix of their numbers, in which rounding has no directions to fill."""
    centred = [(features - features.mean(axis=0)) / (len(features) - 1) ** 0.5 for features in (a, b)]
    root_trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root_trace)


@pytest.mark.parametrize("nums", [(10, 500), (500, 10), (20, 30), (3, 2)])
def test_fid_is_exact_where_covariances_are_singular(nums: tuple[int, int]) -> None:
    a, b = random_features(nums[0]), random_features(nums[1], seed=1)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(exact_fid(a, b), rel=1e-11)


def test_fid_of_inception_features_is_exact_and_that_of_torch_fidelity(
    inception_features: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    a, b = inception_features
    value = frechet_distance(moments_of(a), moments_of(b))
    assert value > 1 and value == pytest.approx(exact_fid(a, b), rel=1e-10)
    # torch-fidelity takes roots of the 2028 eigenvalues that only rounding makes differ from zero; measured: 5e-7
    assert value == pytest.approx(torch_fidelity_fid(a, b), rel=2e-6)


def test_fid_of_known_distributions_is_the_closed_form() -> None:
    mean, spread = np.arange(4.0), np.array([1.0, 4.0, 0.0, 9.0])
    a = FeatureStatistics(mean=mean, covariance=np.diag(spread), count=None)
    b = FeatureStatistics(mean=mean + 2, covariance=np.diag(spread * 4), count=None)
    assert frechet_distance(a, b) == pytest.approx(4 * 2**2 + spread.sum(), rel=1e-12)  # (2 s - s)^2 each
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("num", [2, 30, 300])
def test_a_set_has_no_distance_to_itself_and_one_that_grows_with_noise(num: int) -> None:
    features = random_features(num)
    noise = np.random.default_rng(5).normal(size=features.shape)
    values = [frechet_distance(moments_of(features), moments_of(features + s * noise)) for s in (0, 0.05, 0.2, 1)]
    assert 0 <= values[0] < 1e-9
    assert values == sorted(values) and values[1] > 1e-3
    assert frechet_distance(moments_of(features + noise), moments_of(features)) == pytest.approx(values[3], rel=1e-9)


def test_one_image_more_changes_fid_as_a_recomputation_does() -> None:
    a, b = random_features(50), random_features(50, seed=1)
    reference, streamed = moments_of(b), moments_of(a[:-1], 7, 20)
    without = frechet_distance(streamed, reference)
    streamed.update(a[-1:].T)
    value = frechet_distance(streamed, reference)
    assert value == pytest.approx(frechet_distance(moments_of(a), reference), rel=1e-9)
    assert abs(value - without) > 1e-4 * value


def test_too_few_images_or_other_features_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2 vectors; got 1"):
        frechet_distance(moments_of(random_features(1)), moments_of(random_features(9)))
    with pytest.raises(ValueError, match=f"{D} and 3 features"):
        frechet_distance(moments_of(random_features(9)), moments_of(random_features(4, width=3)))


@pytest.mark.parametrize(("subsets", "subset_size"), [(10, 50), (1, 200)])
def test_kid_is_that_of_torch_fidelity(subsets: int, subset_size: int) -> None:
    metric = package("torch_fidelity.metric_kid")
    a, b = random_features(200), random_features(230, seed=1) * 1.05
    expected = metric.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=subsets, kid_subset_size=subset_size, verbose=False
    )
    mean, std = kernel_distance(a, b, subsets=subsets, subset_size=subset_size)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-12)
    other, _ = kernel_distance(a, b, subsets=subsets, subset_size=subset_size, seed=1)
    assert other != pytest.approx(mean, rel=1e-6)


def test_kid_of_inception_features_is_that_of_torch_fidelity(
    inception_features: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    metric = package("torch_fidelity.metric_kid")
    a, b = inception_features
    value = kernel_distance(a.astype(np.float32), b.astype(np.float32), subsets=5, subset_size=15)
    tensors = [torch.from_numpy(features).float() for features in inception_features]
    expected = metric.kid_features_to_metric(*tensors, kid_subsets=5, kid_subset_size=15, verbose=False)
    names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
    # theirs is in float32, where the sums that are subtracted have 6 digits
    assert value == pytest.approx(tuple(expected[name] for name in names), rel=1e-3, abs=1e-6)


def test_kid_of_memory_mapped_features_is_that_of_the_arrays_and_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    a, b = random_features(120).astype(np.float32), random_features(150, seed=1).astype(np.float32)
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert kernel_distance(mapped, b, subsets=3, subset_size=40) == kernel_distance(a, b, subsets=3, subset_size=40)


def test_kid_of_sets_of_one_distribution_is_zero_on_average_and_grows_with_noise() -> None:
    values = [
        kernel_distance(random_features(60, seed=2 * s), random_features(60, seed=2 * s + 1), subsets=1, subset_size=60)
        for s in range(40)
    ]
    means = np.array([mean for mean, _ in values])
    assert means.min() < 0 < means.max()  # unbiased, so below zero as well
    assert abs(means.mean()) < 3 * means.std() / 40**0.5
    a = random_features(100)
    noise = np.random.default_rng(5).normal(size=a.shape)
    noisy = [kernel_distance(a, a + s * noise, subsets=4, subset_size=50)[0] for s in (0.05, 0.3, 1)]
    assert noisy == sorted(noisy) and noisy[-1] > 0


@pytest.mark.parametrize(("subsets", "subset_size"), [(10, 31), (10, 1), (0, 10)])
def test_kid_subsets_that_cannot_be_drawn_are_an_error(subsets: int, subset_size: int) -> None:
    a, b = random_features(40), random_features(30)
    with pytest.raises(ValueError, match=rf"{subsets} subsets of {subset_size} images.*40 and 30.*smaller subset_size"):
        kernel_distance(a, b, subsets=subsets, subset_size=subset_size)
    with pytest.raises(ValueError, match="expected features"):
        kernel_distance(a, b[:, 1:], subsets=2, subset_size=10)


def test_statistics_come_back_from_a_file_with_their_identity(tmp_path: Path) -> None:
    moments = moments_of(random_features(20))
    identity = {"images": "sha256:ab", "protocol": {"resize": 256}}
    path = tmp_path / "statistics.npz"
    path.write_bytes(statistics_bytes(moments, identity))
    statistics = load_statistics(path)
    assert statistics.count == 20 and statistics.identity == identity
    assert np.array_equal(statistics.mean, moments.mean) and np.array_equal(statistics.covariance, moments.covariance)
    other = moments_of(random_features(20, seed=1))
    assert frechet_distance(statistics, other) == frechet_distance(moments, other)
    assert statistics_bytes(moments, identity) == path.read_bytes()


def test_statistics_of_pytorch_fid_are_read_and_ours_by_it(tmp_path: Path) -> None:
    a, b = moments_of(random_features(200)), moments_of(random_features(200, seed=1))
    np.savez_compressed(tmp_path / "theirs.npz", mu=a.mean, sigma=a.covariance)
    statistics = load_statistics(tmp_path / "theirs.npz")
    assert statistics.count is None and statistics.identity is None
    assert frechet_distance(statistics, b) == frechet_distance(a, b)
    (tmp_path / "ours.npz").write_bytes(statistics_bytes(a, {}))
    mean, covariance = package("pytorch_fid.fid_score").compute_statistics_of_path(
        str(tmp_path / "ours.npz"), None, 1, 2048, "cpu"
    )
    assert np.array_equal(mean, a.mean) and np.array_equal(covariance, a.covariance)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "lacks sigma; it holds mu"),
        ({"mean": np.zeros(3)}, "lacks mu and sigma; it holds mean"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, r"mu \(3,\) and sigma \(3, 4\); expected \(D,\) and \(D, D\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "identity": np.array("{")}, "no .npz with feature statistics"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "no .npz with feature statistics"),
    ],
)
def test_a_file_of_other_content_is_a_config_error_that_names_it(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], message: str
) -> None:
    np.savez(tmp_path / "statistics.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"statistics.npz: .*{message}"):
        load_statistics(tmp_path / "statistics.npz")


def test_an_unreadable_file_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    whole = statistics_bytes(moments_of(random_features(20)), {})
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = {"cut.npz": whole[: len(whole) // 2], "text.npz": b"mu sigma", "empty.npz": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "array.npy", "absent.npz"):
        with pytest.raises(ConfigError, match=name):
            load_statistics(tmp_path / name)
