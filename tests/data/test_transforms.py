"""Cropping, resizing and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.data.transforms import Padding, RandomCrop, pad_to_multiple, resize_and_crop, unpad
from sdvae.errors import ImageError


def positions(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    """A picture whose pixels say where they are: (row, column, 0)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 67, 101), (2, 3, 64, 64), (1, 1), (5, 1, 3), (3, 4096, 3), (2, 1, 3, 8, 9)])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_padding_repeats_the_edge_and_unpad_undoes_it(
    shape: tuple[int, ...], multiple: int, dtype: torch.dtype
) -> None:
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    height, width = shape[-2:]
    padded, padding = pad_to_multiple(x, multiple)
    assert padded.dtype == dtype and padded.shape[:-2] == x.shape[:-2]
    assert (padding.top, padding.left) == (0, 0)
    assert padded.shape[-2:] == (height + padding.bottom, width + padding.right)
    assert all(side % multiple == 0 for side in padded.shape[-2:])
    assert max(padding.bottom, padding.right) < multiple
    rows = torch.arange(padded.shape[-2]).clamp(max=height - 1)
    columns = torch.arange(padded.shape[-1]).clamp(max=width - 1)
    assert torch.equal(padded, x[..., rows, :][..., columns])
    assert torch.equal(unpad(padded, height, width), x)


def test_padding_that_adds_nothing_copies_nothing() -> None:
    x = torch.zeros(3, 16, 24)
    padded, padding = pad_to_multiple(x, 8)
    assert padded is x and padding == Padding(top=0, left=0, bottom=0, right=0)


def test_unpad_refuses_to_grow() -> None:
    with pytest.raises(ValueError, match="cut 17 x 8"):
        unpad(torch.zeros(3, 16, 8), 17, 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (60, 90, 30, (30, 45)),
        (90, 60, 30, (45, 30)),
        (10, 15, 20, (20, 30)),
        (101, 67, 67, (101, 67)),
        (1, 1, 8, (8, 8)),
    ],
)
def test_the_short_side_becomes_size(
    height: int, width: int, size: int, expected: tuple[int, int], dtype: type
) -> None:
    pixels = np.full((height, width, 3), (9, 8, 7), dtype)
    for crop, shape in (("none", expected), ("center", (size, size))):
        result = resize_and_crop(pixels, size, crop)  # type: ignore[arg-type]
        assert result.shape == (*shape, 3) and result.dtype == dtype
        assert (result == [9, 8, 7]).all()  # a flat picture stays flat, up to the edges


def test_pixels_that_have_the_size_stay_untouched() -> None:
    pixels = positions(30, 47)
    assert np.array_equal(resize_and_crop(pixels, 30, "none"), pixels)
    assert np.array_equal(resize_and_crop(pixels, 30, "center"), pixels[:, 8:38])
    assert np.array_equal(resize_and_crop(pixels.swapaxes(0, 1), 30, "center"), pixels.swapaxes(0, 1)[8:38])


def test_center_crop_is_the_middle_of_the_resized_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize((64, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(resize_and_crop(pixels, 32, "center") - whole[:, 16:48]).max() <= 1


def test_making_smaller_is_antialiased() -> None:
    checks = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], 3, 2)
    for dtype, factor in ((np.uint8, 1), (np.uint16, 257)):
        small = resize_and_crop((checks * factor).astype(dtype), 15, "none") / factor
        assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 8  # without antialiasing: 0 and 255


def test_16_bit_resizes_like_8_bit_with_more_precision() -> None:
    pixels = np.random.default_rng(0).integers(80, 176, (40, 52, 3), dtype=np.uint8)
    low = resize_and_crop(pixels, 25, "none")
    high = resize_and_crop(pixels.astype(np.uint16) * 257, 25, "none")
    assert np.abs(high / 257 - low).max() < 1.5  # 8 bits round after each of the two directions
    assert len(np.unique(high)) > 1000


def test_lanczos_overshoot_does_not_wrap_round_in_16_bits() -> None:
    step = np.zeros((16, 32, 3), np.uint16)
    step[:, 16:] = 65535
    wide = resize_and_crop(step, 32, "none")  # (32, 64, 3)
    assert wide[:, :30].max() < 6000 and wide[:, 34:].min() > 59000


def test_a_strip_is_cut_but_not_blown_up() -> None:
    strip = np.zeros((3, 4096, 3), np.uint8)
    assert resize_and_crop(strip, 512, "center").shape == (512, 512, 3)
    with pytest.raises(ImageError, match="699051 x 512"):
        resize_and_crop(strip, 512, "none")


KINDS = [{"kind": "native"}, {"kind": "resized", "resize_px": 19}, {"kind": "random_resized", "min_ratio": 0.3}]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_native_crops_are_pieces_from_everywhere_mirrored_half_of_the_time(dtype: type) -> None:
    pixels = positions(10, 12, dtype)
    generator, crop = np.random.default_rng(0), RandomCrop(crop_px=8)
    places, mirrored = set(), 0
    for _ in range(600):
        piece = crop(pixels, generator)
        assert piece.shape == (8, 8, 3) and piece.dtype == dtype and piece.flags.c_contiguous
        flipped = piece[0, 0, 1] > piece[0, -1, 1]
        mirrored += flipped
        upright = piece[:, ::-1] if flipped else piece
        top, left = (int(value) for value in upright[0, 0, :2])
        assert np.array_equal(upright, pixels[top : top + 8, left : left + 8])
        places.add((top, left))
    assert places == {(top, left) for top in range(3) for left in range(5)}
    assert 240 < mirrored < 360


@pytest.mark.parametrize("options", KINDS)
def test_without_flip_no_crop_is_mirrored(options: dict) -> None:
    generator, crop = np.random.default_rng(0), RandomCrop(crop_px=16, flip=False, **options)
    for _ in range(30):
        piece = crop(positions(40, 50), generator).astype(int)
        assert piece[8, -1, 1] > piece[8, 0, 1]


@pytest.mark.parametrize("options", KINDS)
def test_random_crops_repeat_with_the_same_generator_and_own_their_memory(options: dict) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    one, two, crop = np.random.default_rng(7), np.random.default_rng(7), RandomCrop(crop_px=16, **options)
    first = [crop(pixels, one) for _ in range(5)]
    assert all(np.array_equal(piece, crop(pixels, two)) for piece in first)
    assert any(not np.array_equal(first[0], piece) for piece in first[1:])
    assert not any(np.shares_memory(piece, pixels) for piece in first)


@pytest.mark.parametrize("options", KINDS)
def test_small_pictures_are_scaled_up_and_strips_cut_first(options: dict) -> None:
    generator, crop = np.random.default_rng(0), RandomCrop(crop_px=8, **options)
    for shape in ((5, 7, 3), (1, 1, 3), (3, 4096, 3), (8, 5, 3)):
        piece = crop(np.full(shape, 90, np.uint8), generator)
        assert piece.shape == (8, 8, 3) and (piece == 90).all()


@pytest.mark.parametrize("size", [(60, 90), (131, 71), (24, 57)])
def test_a_resized_crop_is_a_piece_of_the_resized_picture(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = resize_and_crop(pixels, 24, "none").astype(int)
    generator, crop = np.random.default_rng(0), RandomCrop(crop_px=16, kind="resized", resize_px=24, flip=False)
    places = set()
    for _ in range(60):
        piece = crop(pixels, generator)
        distances = {
            (top, left): np.abs(whole[top : top + 16, left : left + 16] - piece).max()
            for top in range(whole.shape[0] - 15)
            for left in range(whole.shape[1] - 15)
        }
        place = min(distances, key=distances.__getitem__)
        assert distances[place] <= 4  # the filter's outermost taps may fall to the other side of a rounding
        places.add(place)
    assert len(places) > 20


def test_without_resize_px_the_short_side_becomes_that_of_the_crop() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    whole = resize_and_crop(pixels, 24, "none").astype(int)  # (24, 36, 3)
    piece = RandomCrop(crop_px=24, kind="resized", flip=False)(pixels, np.random.default_rng(0))
    assert min(np.abs(whole[:, left : left + 24] - piece).max() for left in range(13)) <= 4


def test_a_random_resized_crop_shows_from_min_ratio_to_all_of_the_short_side() -> None:
    pixels = positions(200, 240)
    generator, crop = np.random.default_rng(0), RandomCrop(crop_px=20, kind="random_resized", min_ratio=0.4, flip=False)
    sides = []
    for _ in range(400):
        piece = crop(pixels, generator).astype(float)
        rows, columns = piece[:, 10, 0], piece[10, :, 1]
        assert rows[15] - rows[5] == pytest.approx(columns[15] - columns[5], abs=1.01)  # a square
        sides.append((rows[15] - rows[5]) * 2)
    assert 78 <= min(sides) < 86 and 194 < max(sides) <= 202
    assert np.mean(sides) == pytest.approx(140, abs=5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "native"}, None),
        ({"kind": "resized"}, 256),
        ({"kind": "resized", "resize_px": 300}, 300),
        ({"kind": "random_resized", "min_ratio": 0.3}, 854),
    ],
)
def test_how_far_a_picture_may_be_reduced_before(options: dict, expected: int | None) -> None:
    crop = RandomCrop(crop_px=256, **options)
    assert crop.min_side_px == expected
    if expected is not None:  # at this size no crop has to be enlarged
        assert round(expected * (0.3 if crop.kind == "random_resized" else 1)) >= 256
