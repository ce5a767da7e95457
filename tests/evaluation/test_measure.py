"""One block: every image gets its own numbers, whatever its batch, and errors of the other thread arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.data.images import round_to_8_bits
from sdvae.data.sources.files import ImageFile
from sdvae.errors import ImageError
from sdvae.evaluation.blocks import Block
from sdvae.evaluation.images import Prepared
from sdvae.evaluation.measure import measure_block
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.plan import ORIGINALS, Entrant, EvaluationPlan
from sdvae.evaluation.protocol import PRESETS
from sdvae.evaluation.setup import Networks, Setup
from sdvae.features.lpips import LPIPS
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.processes import Processes

# Height, width: three shapes that alternate, one of them smaller than a window of SSIM.
SHAPES = ((40, 40), (24, 33), (40, 40), (9, 12), (40, 40), (24, 33), (40, 40))


def channel_means(pixels: Tensor) -> Tensor:
    """Stands for Inception: uint8 (B, 3, H, W) -> (B, 3)."""
    return pixels.float().mean(dim=(2, 3))


def photo(index: int, shape: tuple[int, int]) -> Prepared:
    levels = np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Prepared(index=index, key=f"{index}.png", pixels=levels, digest=f"{index:02d}")


@pytest.fixture
def photos() -> list[Prepared]:
    """With gaps between the indices, where other images could not be read."""
    return [photo(2 * place + 1, shape) for place, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def subject(vae_path: Path) -> OpenedVae:
    return open_any_vae(vae_path, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def other(other_vae_path: Path) -> OpenedVae:
    return open_any_vae(other_vae_path, torch.device("cpu"), torch.float32)


def set_up(*subjects: OpenedVae, batch_size: int | None = None, **fields: Any) -> Setup:
    """The last subject is the reference."""
    ids = [f"vae{number}" for number in range(len(subjects))]
    plan = EvaluationPlan(
        source="photos",
        num_found=1,
        files=(ImageFile("broken.png", Path("broken.png")),),
        entrants=tuple(Entrant(id=id_, ref=None, role="reference" if id_ == ids[-1] else "candidate") for id_ in ids),
        out=Path("out"),
        protocol=PRESETS["native"],
        skipped_metrics=(),
        gates=(),
        options=EvaluateOptions(batch_size=batch_size),
    )
    networks = Networks(metrics=fields.pop("metrics", {}), inception=fields.pop("inception", None))
    rest = {"swap_pairs": {}, "swap_images": frozenset(), "fid_reference": None, "keeps_originals": True} | fields
    return Setup(
        plan=plan,
        processes=Processes(),
        device=torch.device("cpu"),
        subjects=dict(zip(ids, subjects, strict=True)),
        networks=networks,
        inputs={},
        **rest,
    )


def measure(photos: Sequence[Prepared], *subjects: OpenedVae, names: Sequence[str] = ("psnr",), **fields: Any) -> Block:
    setup = set_up(*subjects, **{"metrics": {name: IMAGE_METRICS[name].build() for name in names}} | fields)
    return measure_block(setup, [(each.index, each) for each in photos])


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_every_image_gets_the_numbers_that_it_has_alone(
    batch_size: int | None, photos: list[Prepared], subject: OpenedVae, other: OpenedVae
) -> None:
    names = ("psnr", "ssim", "bias_r")
    shuffled = [photos[place] for place in (3, 0, 6, 1, 5, 2, 4)]
    block = measure(shuffled, subject, other, names=names, inception=channel_means, batch_size=batch_size)
    assert [image["key"] for image in block.images] == [each.key for each in photos]
    assert [(image["height"], image["width"]) for image in block.images] == list(SHAPES)
    alone = [measure([each], subject, other, names=names, inception=channel_means) for each in photos]
    for id_ in ("vae0", "vae1"):
        for name in names:
            expected = np.array([each.values[id_][name][0] for each in alone], dtype=float)  # NaN for none
            measured = np.array(block.values[id_][name], dtype=float)
            np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-3, err_msg=f"{id_}, {name}")
            assert len({*expected.round(4)}) == len(photos), "all differ, so that none can be taken for another"
    for owner in (ORIGINALS, "vae0", "vae1"):
        rows = np.concatenate([each.features[owner]["rows"] for each in alone])
        np.testing.assert_allclose(block.features[owner]["rows"], rows, atol=0.02, err_msg=owner)


def test_what_a_metric_cannot_measure_is_left_empty(photos: list[Prepared], subject: OpenedVae) -> None:
    flat = replace(photos[0], index=99, pixels=np.full((40, 40, 3), 128, np.uint8))
    block = measure([*photos, flat], subject, names=("psnr", "ssim", "sharpness"))
    missing = {name: [value is None for value in values] for name, values in block.values["vae0"].items()}
    small = [min(shape) < 11 for shape in SHAPES]
    assert missing["psnr"] == [False] * 8
    assert missing["ssim"] == [*small, False]
    assert missing["sharpness"] == [*(min(shape) < 16 for shape in SHAPES), True]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_features_stand_in_the_order_of_images(
    batch_size: int | None, photos: list[Prepared], subject: OpenedVae
) -> None:
    rows = measure(photos, subject, inception=channel_means, batch_size=batch_size).features
    expected = [each.pixels.mean(axis=(0, 1)) for each in photos]
    np.testing.assert_allclose(rows[ORIGINALS]["rows"], expected, rtol=1e-5)
    for row, each in zip(rows["vae0"]["rows"], photos, strict=True):
        x = torch.from_numpy(each.pixels).permute(2, 0, 1)[None] / 127.5 - 1
        recon = round_to_8_bits(subject.decode(subject.encode(x).z, *x.shape[2:])) * 255
        np.testing.assert_allclose(row, recon.mean(dim=(0, 2, 3)), atol=0.02)


def test_features_are_taken_of_four_images_at_a_time_and_of_one_shape(
    photos: list[Prepared], subject: OpenedVae
) -> None:
    sizes: list[int] = []

    def counted(pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        sizes.append(len(pixels))
        return channel_means(pixels)

    same = [photo(index, (40, 40)) for index in range(5)]
    measure(same, subject, inception=counted, batch_size=1)
    assert sizes == [4, 4, 2], "each image is there twice: the original and its reconstruction"
    sizes.clear()
    measure(photos, subject, inception=counted, batch_size=1)
    assert sum(sizes) == 2 * len(photos)


def test_features_are_taken_only_of_what_is_asked_for(photos: list[Prepared], subject: OpenedVae) -> None:
    assert measure(photos, subject).features == {}
    assert list(measure(photos, subject, inception=channel_means, keeps_originals=False).features) == ["vae0"]


def test_only_the_chosen_images_take_the_swap_test(
    photos: list[Prepared], subject: OpenedVae, other: OpenedVae
) -> None:
    chosen = [photos[0], photos[4], photos[5]]  # the first two in a batch with an image that is not chosen

    def state_of(photos: Sequence[Prepared]) -> dict[str, Any]:
        block = measure(
            photos,
            subject,
            other,
            swap_pairs={"vae0": (subject, other)},
            swap_images=frozenset(each.index for each in chosen),
            batch_size=3,
        )
        return block.swaps["vae0"]

    state, expected = state_of(photos), state_of(chosen)
    assert state["num_images"] == 3
    assert state.keys() == expected.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("where", ["metric", "inception"])
def test_an_error_in_the_thread_of_metrics_reaches_the_caller(
    where: str, place: int, photos: list[Prepared], subject: OpenedVae
) -> None:
    culprit = photos[place].pixels.mean(axis=(0, 1))

    def check(means: Tensor) -> Tensor:
        if np.isclose(means.numpy(), culprit, rtol=1e-5).all(axis=1).any():
            raise ZeroDivisionError("in the thread")
        return means

    fields: dict[str, Any] = {"inception": lambda pixels: check(channel_means(pixels))}
    if where == "metric":
        fields = {"metrics": {"psnr": lambda recon, image: check(image.mean(dim=(2, 3)) * 255)[:, 0].double()}}
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        measure(photos, subject, batch_size=1, **fields)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdvae-metrics")]


def test_the_vae_goes_on_while_metrics_are_computed_but_by_one_batch_alone(subject: OpenedVae) -> None:
    decoded: list[int] = []
    hook = subject.model.get_submodule("decoder").register_forward_hook(lambda *_: decoded.append(1))
    ahead: list[int] = []

    def slow(recon: Tensor, image: Tensor) -> Tensor:
        deadline = time.monotonic() + 5
        while len(decoded) < min(6, len(ahead) + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.03)  # long enough for another one, if nothing held it back
        ahead.append(len(decoded) - len(ahead))
        return torch.zeros(len(image), dtype=torch.float64)

    try:
        measure([photo(index, (16, 16)) for index in range(6)], subject, metrics={"psnr": slow}, batch_size=1)
    finally:
        hook.remove()
    assert ahead == [2, 2, 2, 2, 2, 1]


def test_lpips_takes_the_features_of_an_image_once_for_all_vaes(
    assets: Path, subject: OpenedVae, other: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    features = LPIPS.features

    def count(network: LPIPS, x: Tensor) -> list[Tensor]:
        counted.append(len(x))
        return features(network, x)

    monkeypatch.setattr(LPIPS, "features", count)
    lpips = IMAGE_METRICS["lpips_alex"].build(assets / "weights")
    images = [photo(index, (40, 40)) for index in range(3)]
    block = measure(images, subject, other, subject, metrics={"lpips_alex": lpips}, batch_size=2)
    assert counted == [2, 1]
    assert block.values["vae0"] == block.values["vae2"] != block.values["vae1"]


def test_progress_counts_images_up_to_all(photos: list[Prepared], subject: OpenedVae) -> None:
    told: list[int] = []
    listen: Callable[[int], None] = told.append
    images = [(0, ImageError("broken.png: truncated")), *((each.index, each) for each in photos)]
    block = measure_block(set_up(subject, batch_size=2), images, listen)
    assert told == sorted(told) and told[-1] == len(photos) and len(told) == 4
    assert block.unreadable == [{"key": "broken.png", "reason": "truncated"}]
    assert block.pixels == sum(height * width for height, width in SHAPES)
