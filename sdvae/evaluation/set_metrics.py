"""Metrics of whole sets, from the features that the blocks keep: rFID and KID."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.evaluation.plan import ORIGINALS
from sdvae.evaluation.protocol import Protocol
from sdvae.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance
from sdvae.metrics.moments import Moments

__all__ = ["KID_SUBSET", "SET_METRIC_ROWS", "SetFeatures", "measure_sets"]

KID_SUBSET = 1000  # images of a subset, as torch-fidelity draws them; of a smaller set all, once
_KID_SUBSETS = 100

_FEATURES = (
    "2048 pool features of the Inception network of 2015-12-05, with TensorFlow 1's bilinear resize to 299 x 299, of "
    "8-bit images, as torch-fidelity computes them"
)

# As rows of `metrics` in a result. rFID depends on the number of images: values of different numbers do not compare.
SET_METRIC_ROWS: dict[str, dict[str, Any]] = {
    "rfid": {
        "name": "rfid",
        "title": "rFID",
        "unit": "",
        "better": "lower",
        "target": None,
        "decimals": 3,
        "kind": "set",
        "definition": "Frechet distance between Gaussians fitted to the features of the reconstructions and of the "
        f"originals; covariances with divisor n - 1; {_FEATURES}. Biased upwards for few images: compare values of the "
        "same number of images alone.",
        "source": "Heusel et al. 2017, GANs trained by a two time-scale update rule",
    },
    "kid": {
        "name": "kid",
        "title": "KID",
        "unit": "",
        "better": "lower",
        "target": None,
        "decimals": 5,
        "kind": "set",
        "definition": "unbiased squared maximum mean discrepancy with the kernel (x.y / 2048 + 1)^3 between "
        f"reconstructions and originals, mean over {_KID_SUBSETS} random subsets of {KID_SUBSET} images (of a smaller "
        f"set all images, once); {_FEATURES}. Its std is over subsets.",
        "source": "Binkowski et al. 2018, Demystifying MMD GANs",
    },
}


class SetFeatures:
    """The features of one owner over all images: their moments, and all of them where KID needs them."""

    def __init__(self, width: int, most_images: int, file: Path | None = None) -> None:
        """width: features of an image. most_images: so many are added, or fewer.

        file: where all features are kept as one array, of which only what is used comes into memory; None: nowhere.
        """
        self.moments = Moments.zeros(width)
        self._rows: NDArray[np.float32] | None = None
        if file is not None:
            self._rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(most_images, width))

    @property
    def count(self) -> int:
        return int(self.moments.count)

    def add(self, rows: NDArray[np.float32]) -> None:
        """rows: (B, D), in the order of the images. Raises: ValueError for values that are not finite."""
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite")
        if self._rows is not None:
            self._rows[self.count : self.count + len(rows)] = rows
        self.moments.update(rows.T.astype(np.float64))

    @property
    def rows(self) -> NDArray[np.float32]:
        """(N, D), of all images."""
        assert self._rows is not None  # there is a file for them
        return self._rows[: self.count]


def measure_sets(
    features: Mapping[str, SetFeatures], protocol: Protocol, statistics: FeatureStatistics | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """VAE -> set metric -> `value`, `std`, `count`.

    features: of the originals and of each VAE. statistics: stand for the originals of rFID.
    """
    names = [name for name in SET_METRIC_ROWS if name in protocol.metrics]
    originals = features[ORIGINALS]
    results: dict[str, dict[str, dict[str, Any]]] = {id_: {} for id_ in features if id_ != ORIGINALS}
    for id_, found in results.items():
        recons = features[id_]
        count = recons.count
        if "rfid" in names:
            value = frechet_distance(recons.moments, statistics or originals.moments)
            found["rfid"] = {"value": value, "std": None, "count": count}
        if "kid" in names:
            size, subsets = (KID_SUBSET, _KID_SUBSETS) if count > KID_SUBSET else (count, 1)
            mean, std = kernel_distance(
                recons.rows, originals.rows, subsets=subsets, subset_size=size, seed=protocol.seed
            )
            found["kid"] = {"value": mean, "std": std if subsets > 1 else None, "count": count}
    return results
