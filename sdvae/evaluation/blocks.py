"""What was measured on one block of images, and the folder where blocks wait until all of them are there.

Each process writes its blocks as whole files and forgets them, so memory does not grow with the set and a killed run
loses one block. They are read once, in their order, whoever wrote them, and become one `Measured`.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ConfigError
from sdvae.evaluation.images import blocks_of
from sdvae.evaluation.plan import ORIGINALS
from sdvae.evaluation.set_metrics import SetFeatures
from sdvae.evaluation.setup import Setup
from sdvae.evaluation.swap import SwapTest
from sdvae.features.inception import NUM_FEATURES
from sdvae.files import remove_leftovers, write_atomic
from sdvae.metrics.latent_health import LatentHealth

__all__ = ["Block", "BlockStore", "Measured"]

_NAME = "measured-{:06d}.npz"  # another one when the arrays change, so that older files are not read as these
_JSON_FIELDS = ("images", "unreadable", "values", "pixels", "seconds", "nonfinite")
_ARRAY_FIELDS = ("features", "latents", "swaps")

Arrays = dict[str, NDArray[Any]]


@dataclass(kw_only=True)
class Block:
    """Measurements of one block, images in the order of their keys."""

    images: list[dict[str, Any]] = field(default_factory=list)  # index, key, digest, width, height
    unreadable: list[dict[str, Any]] = field(default_factory=list)  # key, reason
    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)  # VAE -> metric -> one per image
    pixels: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # VAE -> encode, decode
    nonfinite: dict[str, int] = field(default_factory=dict)  # VAE -> reconstructions with values that are not finite
    features: dict[str, Arrays] = field(default_factory=dict)  # VAE or ORIGINALS -> "rows": (n, D) float32
    latents: dict[str, Arrays] = field(default_factory=dict)  # VAE -> state of its LatentHealth
    swaps: dict[str, Arrays] = field(default_factory=dict)  # VAE -> state of its SwapTest


@dataclass(kw_only=True)
class Measured:
    """All blocks together. Of an image it keeps one row of numbers; memory does not grow by anything else."""

    values: dict[str, dict[str, list[float | None]]]  # VAE -> metric -> one per image
    latents: dict[str, LatentHealth]
    swaps: dict[str, SwapTest]  # candidate -> its test against the reference
    features: dict[str, SetFeatures]  # VAE or ORIGINALS
    images: list[dict[str, Any]] = field(default_factory=list)  # as in a block
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    pixels: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)

    @classmethod
    def nothing(cls, setup: Setup, folder: Path) -> Measured:
        """What there is before the first block. folder: for files of what does not go into memory."""
        owners = (ORIGINALS, *setup.subjects) if setup.networks.set_metrics else ()
        files = {owner: folder / f"features-{owner}.npy" for owner in owners if "kid" in setup.networks.set_metrics}
        return cls(
            values={id_: {name: [] for name in setup.networks.metrics} for id_ in setup.subjects},
            latents={id_: LatentHealth(subject.latent_channels) for id_, subject in setup.subjects.items()},
            swaps={id_: SwapTest(*pair) for id_, pair in setup.swap_pairs.items()},
            features={owner: SetFeatures(NUM_FEATURES, len(setup.plan.files), files.get(owner)) for owner in owners},
        )

    def add(self, block: Block) -> None:
        """Take in the next block."""
        self.images += block.images
        self.unreadable += block.unreadable
        self.pixels += block.pixels
        for id_, columns in self.values.items():
            for name, column in columns.items():
                column += block.values[id_][name]
            self.nonfinite[id_] = self.nonfinite.get(id_, 0) + block.nonfinite[id_]
            seconds = self.seconds.setdefault(id_, {})
            for step, taken in block.seconds[id_].items():
                seconds[step] = seconds.get(step, 0.0) + taken
        for id_, state in block.latents.items():
            self.latents[id_].merge(state)
        for id_, state in block.swaps.items():
            self.swaps[id_].merge(state)
        for owner, arrays in block.features.items():
            self.features[owner].add(arrays["rows"])


class BlockStore:
    """The folder of a run in progress.

    One folder belongs to one run: the same images, protocol and autoencoders. Several processes may write into it.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        """run: what identifies the run; plain values."""
        self.folder = folder
        self._run = run
        self._found = _read_run(folder / "run.json")

    def open(self, *, overwrite: bool) -> None:
        """Make the folder, or go on with the one that is there; by one process.

        Raises: ConfigError where another run was interrupted here.
        """
        run, found, path = self._run, self._found, self.folder / "run.json"
        if found == run:
            remove_leftovers([self.folder])
            return
        if path.is_file() and not overwrite:
            differing = sorted(key for key in run.keys() | found.keys() if run.get(key) != found.get(key))
            raise ConfigError(
                f"{self.folder.parent} holds an interrupted evaluation that differs in {', '.join(differing)}: "
                "repeat its command to finish it, choose another --out, or give it up with --overwrite"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        write_atomic(json.dumps(run, indent=1).encode(), path)
        self._found = run

    def close(self) -> None:
        """Remove the folder of a run that is finished; that of another run, which may go on, is left."""
        if self._found == self._run:
            shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of these blocks that are yet to be measured."""
        return [number for number in numbers if not (self.folder / _NAME.format(number)).is_file()]

    def save(self, number: int, block: Block) -> None:
        """Raises: OSError."""
        arrays = {
            f"{name}/{owner}/{key}": array
            for name in _ARRAY_FIELDS
            for owner, state in getattr(block, name).items()
            for key, array in state.items()
        }
        text = json.dumps({name: getattr(block, name) for name in _JSON_FIELDS})
        buffer = io.BytesIO()
        np.savez(buffer, json=np.frombuffer(text.encode(), np.uint8), **arrays)
        write_atomic(buffer.getvalue(), self.folder / _NAME.format(number))

    def load(self, number: int) -> Block:
        block = Block()
        with np.load(self.folder / _NAME.format(number), allow_pickle=False) as file:
            for name, value in json.loads(bytes(file["json"])).items():
                setattr(block, name, value)
            for path in file.files:
                if path == "json":
                    continue
                name, owner, key = path.split("/", 2)  # keys may hold more of them
                getattr(block, name).setdefault(owner, {})[key] = file[path]
        return block

    def load_all(self, setup: Setup) -> Measured:
        """All blocks in their order; one of them is in memory at a time."""
        measured = Measured.nothing(setup, self.folder)
        for number in range(len(blocks_of(len(setup.plan.files)))):
            measured.add(self.load(number))
        return measured


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}
