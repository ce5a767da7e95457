"""Distances between two sets of images in the features of a frozen network: FID and KID.

FID is the Frechet distance between the two normal distributions that have the mean and covariance of either set's
features (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule..."). KID is the squared maximum mean
discrepancy under a cubic kernel (Binkowski et al. 2018, "Demystifying MMD GANs"). Both have no unit, and lower is
better. With Inception's features both equal torch-fidelity's `frechet_inception_distance` and
`kernel_inception_distance_*` on the same images.

FID falls as the number of images grows, by whole points among a few thousand, because the covariances are estimated:
compare only values of sets of one size. KID has no such bias; an unbiased estimate can be slightly below zero.

Left out: the network (`features/inception.py`), and where files are kept.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.errors import ConfigError
from sdvae.metrics.moments import Moments

__all__ = [
    "FeatureStatistics",
    "Normal",
    "frechet_distance",
    "kernel_distance",
    "load_statistics",
    "statistics_bytes",
]

_Array = NDArray[np.float64]
_SEED = 2020  # torch-fidelity's rng_seed


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """What FID needs to know of a set of images."""

    mean: _Array  # (D,)
    covariance: _Array  # (D, D), normalised by count - 1
    count: int | None  # of images; None where the file does not say
    identity: Mapping[str, Any] | None = None  # what was measured and how; None where the file does not say


class Normal(Protocol):
    """What FID compares: Moments, which grow, or FeatureStatistics, which were read."""

    @property
    def mean(self) -> _Array: ...
    @property
    def covariance(self) -> _Array: ...


def _factor(covariance: _Array) -> Tensor:
    """(rank, D): rows whose outer products sum to the covariance.

    Directions without variance are left out, as numpy.linalg.matrix_rank finds them: rounding gives them variances of
    1e-16 of the largest, whose square roots, 1e-8 each, would add up in a distance.
    """
    variances, directions = torch.linalg.eigh(torch.from_numpy(covariance))
    present = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps
    factor: Tensor = (directions[:, present] * variances[present].sqrt()).T
    return factor


def frechet_distance(a: Normal, b: Normal) -> float:
    """Squared Frechet distance of two normal distributions, |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of singular values of R S^T, where A = R^T R and B = S^T S. Unlike the eigenvalues
    of A B, whose root is taken afterwards, these keep all digits where the covariances are singular, as they are for
    fewer images than features.

    Returns: at least 0, lower is better; symmetric but for rounding. 2048 features take 5 s on one core.
    Raises: ValueError for different numbers of features, or fewer than 2 images.
    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the two sets have {len(a.mean)} and {len(b.mean)} features")
    difference = a.mean - b.mean
    covariances = a.covariance, b.covariance
    traces = sum(float(np.trace(covariance)) for covariance in covariances)
    first, second = (_factor(covariance) for covariance in covariances)
    root_trace = float(torch.linalg.svdvals(first @ second.T).sum())
    return max(0.0, float(difference @ difference) + traces - 2 * root_trace)


def _kernel_sum(a: _Array, b: _Array, *, with_diagonal: bool) -> float:
    """Sum of (<a_i, b_j> / D + 1)^3 over all pairs, or over those with i != j."""
    kernel = a @ b.T
    kernel /= a.shape[1]
    kernel += 1
    kernel *= kernel * kernel  # a power function takes many times as long
    return float(kernel.sum()) - (0.0 if with_diagonal else float(np.trace(kernel)))


def _squared_mmd(a: _Array, b: _Array) -> float:
    """Unbiased estimate from sets of one size (Gretton et al. 2012, equation 3)."""
    num = len(a)
    within = _kernel_sum(a, a, with_diagonal=False) + _kernel_sum(b, b, with_diagonal=False)
    return within / (num * (num - 1)) - 2 * _kernel_sum(a, b, with_diagonal=True) / num**2


def kernel_distance(
    a: NDArray[Any], b: NDArray[Any], *, subsets: int = 100, subset_size: int = 1000, seed: int = _SEED
) -> tuple[float, float]:
    """KID: squared maximum mean discrepancy with the kernel (<x, y> / D + 1)^3, unbiased, mean over random subsets.

    a, b: (N, D) and (M, D); also memory-mapped, for only the rows of one subset are read at a time.
    seed: draws the subsets that torch-fidelity draws with this `rng_seed`.
    Returns: mean over the subsets, which can be below 0; and their standard deviation, which is no confidence
        interval, for the subsets overlap. Lower is better.
    Raises: ValueError for sets smaller than `subset_size`, or other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D), got {a.shape} and {b.shape}")
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"{subsets} subsets of {subset_size} images: there must be one at least, of at least 2 images and of no "
            f"more than there are, {len(a)} and {len(b)}; set a smaller subset_size, or do without KID"
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        # sorted, a memory-mapped file is read in one direction; the distance does not depend on the order
        rows = [np.sort(random.choice(len(features), subset_size, replace=False)) for features in (a, b)]
        first, second = (np.asarray(features[row], np.float64) for features, row in zip((a, b), rows, strict=True))
        distances.append(_squared_mmd(first, second))
    return float(np.mean(distances)), float(np.std(distances))


def statistics_bytes(moments: Moments, identity: Mapping[str, Any]) -> bytes:
    """Content of an .npz with mu and sigma, as pytorch-fid names them, and the count and identity beside them.

    identity: JSON values that say what was measured and how.
    Raises: ValueError for fewer than 2 images.
    """
    file = io.BytesIO()
    np.savez(
        file,
        mu=moments.mean,
        sigma=moments.covariance,
        count=np.array(moments.count, dtype=np.int64),
        identity=np.array(json.dumps(dict(identity))),
    )
    return file.getvalue()


def load_statistics(path: Path) -> FeatureStatistics:
    """Read what `statistics_bytes` gave, or pytorch-fid's and its kin's .npz of mu and sigma alone.

    Raises: ConfigError for a file that cannot be read, or lacks an array, or holds one that does not fit.
    """
    try:
        with path.open("rb") as file:  # opened here, for numpy leaves a damaged file open
            content = np.load(file, allow_pickle=False)
            arrays = dict(content) if isinstance(content, np.lib.npyio.NpzFile) else {}
        identity = json.loads(str(arrays["identity"])) if "identity" in arrays else None
    except (
        OSError,
        ValueError,
        EOFError,
        BadZipFile,
        zlib.error,
    ) as error:  # ValueError: a pickle, or what is no numpy file
        raise ConfigError(f"{path}: no .npz with feature statistics: {error}") from error
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        raise ConfigError(f"{path}: lacks {' and '.join(missing)}; it holds {', '.join(arrays) or 'no named array'}")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(f"{path}: mu {mean.shape} and sigma {covariance.shape}; expected (D,) and (D, D)")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ConfigError(f"{path}: mu or sigma has values that are not finite")
    if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-6 * np.abs(covariance).max()):
        raise ConfigError(f"{path}: sigma is no covariance, for it is not symmetric")
    count = int(arrays["count"]) if "count" in arrays else None
    return FeatureStatistics(mean=mean, covariance=covariance, count=count, identity=identity)
