"""Metrics of whole sets, from the features that the blocks keep: rFID and KID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.evaluation.blocks import ORIGINALS, BlockStore
from sdvae.evaluation.protocol import Protocol
from sdvae.files import write_atomic
from sdvae.metrics.fid import FeatureMoments, FeatureStatistics, frechet_distance, kernel_distance, statistics_bytes

__all__ = ["KID_SUBSET", "SET_METRIC_ROWS", "measure_sets", "moments_of", "write_statistics"]

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


def moments_of(store: BlockStore, num_blocks: int, owner: str) -> FeatureMoments:
    """Moments of one owner's features over all blocks, in their order; one block in memory at a time."""
    moments = FeatureMoments()
    for block in store.load_all(num_blocks):
        if owner in block.features:
            moments.update(block.features[owner]["rows"])
    return moments


def write_statistics(path: Path, moments: FeatureMoments, identity: Mapping[str, Any]) -> None:
    """A file that `--fid-stats` takes, whole or not at all. Raises: OSError."""
    write_atomic(statistics_bytes(moments, identity), path)


def measure_sets(
    store: BlockStore,
    num_blocks: int,
    ids: Sequence[str],
    protocol: Protocol,
    originals: FeatureMoments | FeatureStatistics,
) -> dict[str, dict[str, dict[str, Any]]]:
    """VAE -> set metric -> `value`, `std`, `count`.

    originals: of the original images, or of the statistics that stand for them.
    """
    names = [name for name in SET_METRIC_ROWS if name in protocol.metrics]
    results: dict[str, dict[str, dict[str, Any]]] = {id_: {} for id_ in ids}
    rows_of_originals = _all_rows(store, num_blocks, ORIGINALS) if "kid" in names else None
    for id_ in ids:
        moments = moments_of(store, num_blocks, id_)
        if "rfid" in names:
            value = frechet_distance(moments, originals)
            results[id_]["rfid"] = {"value": value, "std": None, "count": moments.count}
        if rows_of_originals is not None:
            rows = _all_rows(store, num_blocks, id_)
            size, subsets = (KID_SUBSET, _KID_SUBSETS) if len(rows) > KID_SUBSET else (len(rows), 1)
            mean, std = kernel_distance(rows, rows_of_originals, subsets=subsets, subset_size=size, seed=protocol.seed)
            results[id_]["kid"] = {"value": mean, "std": std if subsets > 1 else None, "count": len(rows)}
    return results


def _all_rows(store: BlockStore, num_blocks: int, owner: str) -> NDArray[np.float32]:
    """The features of all images as one array on disk, of which only what is used comes into memory."""
    path = Path(store.folder) / f"features-{owner}.npy"
    count, width = 0, 0
    for block in store.load_all(num_blocks):
        if owner in block.features:
            count += len(block.features[owner]["rows"])
            width = block.features[owner]["rows"].shape[1]
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    at = 0
    for block in store.load_all(num_blocks):
        if owner in block.features:
            part = block.features[owner]["rows"]
            rows[at : at + len(part)] = part
            at += len(part)
    return rows
