"""Blocks survive being written and read, and a folder belongs to one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdvae.errors import ConfigError
from sdvae.evaluation.blocks import Block, BlockStore, Measured
from sdvae.evaluation.set_metrics import SetFeatures
from sdvae.metrics.latent_health import LatentHealth

RUN = {"protocol": "sha256:1", "images": "sha256:2"}


def block() -> Block:
    return Block(
        images=[{"index": 3, "key": 'a/\udcff".png', "digest": "d", "width": 5, "height": 7}],
        unreadable=[{"key": "b.png", "reason": "cut off"}],
        values={"mine": {"psnr": [24.123456789012345], "ms_ssim": [None]}},
        pixels=35,
        seconds={"mine": {"encode": 0.5, "decode": 0.25}},
        nonfinite={"mine": 0},
        features={"originals": {"rows": np.float32([[1, 2]])}},
        latents={"mine": {"mean": np.arange(4.0), "num_images": np.asarray(2.0)}},
        swaps={"mine": {"sum/psnr": np.eye(2)}},
    )


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, RUN)
    store.open(overwrite=False)
    store.save(4, block())
    found, expected = store.load(4), block()
    for name in ("images", "unreadable", "values", "pixels", "seconds", "nonfinite"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("features", "latents", "swaps"):
        for owner, arrays in getattr(expected, name).items():
            for key, array in arrays.items():
                other = getattr(found, name)[owner][key]
                assert other.dtype == array.dtype and np.array_equal(other, array)


def test_the_same_run_finds_its_blocks_again(tmp_path: Path) -> None:
    BlockStore(tmp_path, RUN).open(overwrite=False)
    BlockStore(tmp_path, RUN).save(0, block())
    again = BlockStore(tmp_path, RUN)
    again.open(overwrite=False)
    assert again.missing(range(2)) == [1]


def test_another_run_is_refused_and_names_what_differs(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, RUN)
    store.open(overwrite=False)
    store.save(0, block())
    with pytest.raises(ConfigError, match=r"differs in protocol: .*--overwrite"):
        BlockStore(tmp_path, RUN | {"protocol": "sha256:9"}).open(overwrite=False)
    assert not store.missing([0]), "a refusal throws nothing away"
    BlockStore(tmp_path, RUN | {"protocol": "sha256:9"}).open(overwrite=True)
    assert store.missing([0])


def test_a_finished_run_removes_its_own_folder_and_no_other(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", RUN)
    store.close()  # nothing there
    store.open(overwrite=False)
    store.save(0, block())
    BlockStore(store.folder, RUN | {"images": "sha256:9"}).close()
    assert not store.missing([0])
    store.close()
    assert not store.folder.exists()


def test_all_blocks_become_one_in_their_order(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, RUN)
    store.open(overwrite=False)
    empty = {"mine": LatentHealth(2).state()}
    for number, value in ((1, 2.0), (0, 1.0)):
        values: dict[str, dict[str, list[float | None]]] = {"mine": {"psnr": [value, None]}}
        rows = np.full((2, 3), value, np.float32)
        part = block()
        part.images, part.values, part.latents, part.swaps = part.images * 2, values, empty, {}
        part.features = {"originals": {"rows": rows}}
        store.save(number, part)
    measured = Measured(
        values={"mine": {"psnr": []}},
        latents={"mine": LatentHealth(2)},
        swaps={},
        features={"originals": SetFeatures(3, 9, tmp_path / "rows.npy")},
    )
    for number in range(2):
        measured.add(store.load(number))
    assert measured.values == {"mine": {"psnr": [1.0, None, 2.0, None]}}
    assert (len(measured.images), len(measured.unreadable), measured.pixels) == (4, 2, 70)
    assert measured.seconds == {"mine": {"encode": 1.0, "decode": 0.5}} and measured.nonfinite == {"mine": 0}
    assert measured.features["originals"].rows[:, 0].tolist() == [1, 1, 2, 2]
