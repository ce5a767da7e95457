"""What validation measures, what it leaves alone, and that the number of processes changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.contact_sheet import contact_sheet, difference
from sdvae.data.images import ReadImage, image_to_x, x_to_image
from sdvae.errors import ImageError
from sdvae.metrics.table import psnr
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.monitoring.validation import MAX_PSNR, SHEET_LABELS, SHEET_ROWS, ValidationResult, Validator

Block = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Photo:
    """A picture of smooth noise; with no size, one that cannot be read."""

    key: str
    seed: int
    size: tuple[int, int] | None  # width, height
    bits: int = 8

    def read(self) -> ReadImage:
        if self.size is None:
            raise ImageError(f"{self.key}: is damaged")
        levels = np.random.default_rng(self.seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(levels).resize(self.size, Image.Resampling.BICUBIC))
        return ReadImage(pixels=pixels if self.bits == 8 else pixels.astype(np.uint16) * 257)


def photos(count: int) -> list[Photo]:
    return [Photo(f"{index}.png", index, (33 + 7 * index % 20, 40)) for index in range(count)]


@pytest.fixture
def averaged(tiny_vae: AutoencoderKL) -> Block:
    """A `with` block in which tiny_vae has other weights."""
    own = copy.deepcopy(tiny_vae.state_dict())
    other = {name: 1.05 * value for name, value in own.items()}

    @contextmanager
    def block() -> Iterator[None]:
        tiny_vae.load_state_dict(other)
        yield
        tiny_vae.load_state_dict(own)

    return block


def mse(recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (recon - x).square().mean((1, 2, 3))


class _Sent(Exception):
    pass


def run_on(world_size: int, validator: Validator, vae: AutoencoderKL, block: Block) -> list[ValidationResult]:
    """The result of each process. They run one after the other: first for what each sends, then with all of it."""
    sent: list[Any] = []

    def send(records: list[Any]) -> list[Any]:
        sent.append(pickle.dumps(records))
        raise _Sent

    def receive(_: list[Any]) -> list[Any]:
        return [record for records in sent for record in pickle.loads(records)]

    for rank in range(world_size):
        with pytest.raises(_Sent):
            validator.run(vae, block, rank=rank, world_size=world_size, gather=send, perceptual=mse)
    return [
        validator.run(vae, block, rank=rank, world_size=world_size, gather=receive, perceptual=mse)
        for rank in range(world_size)
    ]


def test_means_are_those_of_the_averaged_weights_by_hand(tiny_vae: AutoencoderKL, averaged: Block) -> None:
    items = photos(3)
    result = Validator(items, None).run(tiny_vae, averaged, perceptual=mse)
    expected: dict[str, list[float]] = {name: [] for name in ("psnr", "kl", "lpips", "std", "clamped")}
    with averaged(), torch.no_grad():
        for item in items:
            image = item.read().pixels
            height, width = image.shape[:2]
            padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
            posterior = tiny_vae.encode(image_to_x(padded)[None]).latent_dist
            recon = x_to_image(tiny_vae.decode(posterior.mean).sample[0, :, :height, :width])
            expected["psnr"].append(psnr(image, recon))
            expected["kl"].append(float(posterior.kl()))
            expected["lpips"].append(float(mse(image_to_x(recon)[None], image_to_x(image)[None])))
            expected["std"].append(float(posterior.std.mean()))
    assert result.num_images == 3 and result.clamped_logvar == 0.0 and result.unreadable == ()
    assert result.metrics() == pytest.approx(
        {
            "val/psnr": np.mean(expected["psnr"]),
            "val/lpips": np.mean(expected["lpips"]),
            "val/kl": np.mean(expected["kl"]),
            "val/posterior_std": np.mean(expected["std"]),
            "val/clamped_logvar": 0.0,
        },
        rel=1e-6,
    )
    plain = Validator(items, None).run(tiny_vae, nullcontext)
    assert plain.psnr != result.psnr
    assert plain.lpips is None and "val/lpips" not in plain.metrics()


@pytest.mark.parametrize("world_size", [2, 3, 13])
def test_every_process_of_any_number_reports_what_one_alone_does(
    world_size: int, tiny_vae: AutoencoderKL, averaged: Block
) -> None:
    validator = Validator([*photos(SHEET_ROWS + 2), Photo("bad.png", 0, None)], crop_px=32)
    alone = validator.run(tiny_vae, averaged, perceptual=mse)
    for result in run_on(world_size, validator, tiny_vae, averaged):
        assert result.metrics() == alone.metrics()  # to the last bit
        assert replace(result, rows=()) == replace(alone, rows=())
        assert [row.name for row in result.rows] == [f"{index}.png" for index in range(SHEET_ROWS)]
        assert np.array_equal(contact_sheet(result.rows, "", ""), contact_sheet(alone.rows, "", ""))


def test_a_row_shows_the_weights_themselves_the_averaged_ones_and_what_the_latter_miss(
    tiny_vae: AutoencoderKL, averaged: Block
) -> None:
    validator = Validator(photos(1), crop_px=32)
    (row,) = validator.run(tiny_vae, averaged).rows
    (plain,) = validator.run(tiny_vae, nullcontext).rows
    with averaged():
        (other,) = validator.run(tiny_vae, nullcontext).rows
    assert row.labels == SHEET_LABELS and len(row.tiles) == 4
    original, recon, of_averages, distance = (np.asarray(tile) for tile in row.tiles)
    assert np.array_equal(recon, np.asarray(plain.tiles[1]))
    assert np.array_equal(of_averages, np.asarray(other.tiles[1]))
    assert not np.array_equal(recon, of_averages)
    assert np.array_equal(distance, difference(original, of_averages))
    assert row.details == f"{psnr(original, recon):.2f} dB, averaged weights {psnr(original, of_averages):.2f} dB"


def test_nothing_is_drawn_and_every_module_keeps_its_mode(tiny_vae: AutoencoderKL, averaged: Block) -> None:
    tiny_vae.train()
    tiny_vae.encoder.eval()  # as when the decoder alone is trained
    modes = [module.training for module in tiny_vae.modules()]
    weights, state = copy.deepcopy(tiny_vae.state_dict()), torch.get_rng_state()
    Validator(photos(2), None).run(tiny_vae, averaged)
    assert [module.training for module in tiny_vae.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_vae.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_vae.parameters())
    tiny_vae(torch.zeros(1, 3, 32, 32)).sample.mean().backward()  # no parameter became an inference tensor

    def broken(recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Validator(photos(1), None).run(tiny_vae, nullcontext, perceptual=broken)
    assert [module.training for module in tiny_vae.modules()] == modes


def test_clamped_elements_are_counted(tiny_vae: AutoencoderKL) -> None:
    with torch.no_grad():
        tiny_vae.quant_conv.bias[4] = 1000.0  # the logvar of one channel of four, above the clamp
        tiny_vae.quant_conv.bias[5] = -1000.0  # and below
    result = Validator(photos(2), None).run(tiny_vae, nullcontext)
    assert result.clamped_logvar == 0.5
    assert result.posterior_std > 0.24 * math.exp(10)  # as large as the clamp lets it be


def test_a_damaged_image_is_left_out_and_named_and_all_damaged_is_an_error(tiny_vae: AutoencoderKL) -> None:
    whole, damaged = photos(1)[0], Photo("bad.png", 0, None)
    result = Validator([damaged, whole], None).run(tiny_vae, nullcontext)
    assert (result.num_images, result.unreadable) == (1, ("bad.png: is damaged",))
    assert result.psnr == Validator([whole], None).run(tiny_vae, nullcontext).psnr
    assert [row.name for row in result.rows] == [whole.key]
    with pytest.raises(ImageError, match="none of the 2 validation images can be read; the first: bad.png: is damaged"):
        Validator([damaged, damaged], None).run(tiny_vae, nullcontext)


def test_an_image_without_any_error_does_not_make_the_mean_infinite(tiny_vae: AutoencoderKL) -> None:
    white = Photo("white.png", 0, (16, 16))
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    with torch.no_grad():
        tiny_vae.decoder.conv_out.weight.zero_()
        tiny_vae.decoder.conv_out.bias.fill_(5.0)  # clamped to white
    items = [_Still(white.key, image), photos(1)[0]]
    result = Validator(items, None).run(tiny_vae, nullcontext)
    assert MAX_PSNR / 2 < result.psnr < MAX_PSNR


@dataclass(frozen=True)
class _Still:
    key: str
    image: np.ndarray

    def read(self) -> ReadImage:
        return ReadImage(pixels=self.image)


def test_the_centre_is_cut_out_and_16_bits_count_as_8(tiny_vae: AutoencoderKL) -> None:
    photo = Photo("a.png", 3, (50, 40))
    cut = photo.read().pixels[4:36, 9:41]
    expected = Validator([_Still("a.png", np.ascontiguousarray(cut))], None).run(tiny_vae, nullcontext)
    for bits in (8, 16):
        result = Validator([replace(photo, bits=bits)], crop_px=32).run(tiny_vae, nullcontext)
        assert result.metrics() == expected.metrics()
