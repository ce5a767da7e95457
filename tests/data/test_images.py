"""Reading and writing image files: made by hand here, and the awkward files among the external assets."""

from __future__ import annotations

import csv
import io
import os
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from sdvae.data.images import (
    DEFAULT_MAX_PIXELS,
    JPEG_MARGIN,
    EncodedImage,
    _pillow_limit_of_at_least,
    image_to_x,
    read_image,
    read_image_bytes,
    round_to_8_bits,
    save_image,
    x_to_image,
)
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import ConfigError, ImageError, SdvaeError


def colours(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(width: int, height: int, depth: int, kind: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: kind is its colour type, `chunks` come before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + pixels + chunk(b"IEND", b"")


def tiff(width: int, bits: int, white_is_zero: bool, data: bytes) -> bytes:
    """A TIFF of one row of gray, written by hand."""
    tags = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: int(not white_is_zero),
        273: 122,
        277: 1,
        278: 1,
        279: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + data


def icc_profile(space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 4, with just these tags."""
    d50 = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    head = b"\0" * 4 + b"\x04\x30\0\0" + kind + space + pcs + b"\0" * 12 + b"acsp" + b"\0" * 28 + d50
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    rest = head.ljust(124, b"\0") + table + body
    return struct.pack(">I", 4 + len(rest)) + rest


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HHi", 0, 0, round(value * 65536))


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(
    ">HHiiiii", 3, 0, *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
WHITE = xyz(0.9642, 1.0, 0.8249)
RED, GREEN, BLUE = xyz(0.43607, 0.22249, 0.01392), xyz(0.38515, 0.71687, 0.09708), xyz(0.14307, 0.06061, 0.7141)


def rgb_profile(red: bytes, green: bytes, blue: bytes) -> bytes:
    curves = {name: SRGB_CURVE for name in (b"rTRC", b"gTRC", b"bTRC")}
    return icc_profile(b"RGB ", {b"wtpt": WHITE, b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


SRGB = rgb_profile(RED, GREEN, BLUE)
SWAPPED = rgb_profile(GREEN, RED, BLUE)  # its red is sRGB's green, and the other way round
LINEAR_GRAY = icc_profile(b"GRAY", {b"wtpt": WHITE, b"kTRC": gamma(1.0)})


def only_cyan_profile() -> bytes:
    """A CMYK profile for an ink set whose magenta, yellow and black are invisible: L* = 100 (1 - cyan)."""
    corners = b"".join(bytes([0 if cyan else 255, 128, 128]) for cyan in (0, 1) for _ in range(8))
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + corners + ramp * 3
    return icc_profile(b"CMYK", {b"wtpt": WHITE, b"A2B0": table, b"A2B1": table}, kind=b"prtr", pcs=b"Lab ")


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """The definition of compositing, rounded to nearest: (H, W, 3), (H, W) -> (H, W, 3)."""
    share = alpha[..., None].astype(np.int64)
    return (((colour * share + np.array(background) * (255 - share)) * 2 + 255) // 510).astype(np.uint8)


# The external collection of awkward files.


def test_every_awkward_file_does_what_its_table_says(assets: Path) -> None:
    odd = assets / "images" / "odd"
    with open(odd / "EXPECT.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    wrong = []
    for row in rows:
        expectation, observed = row["expectation"], row["observed_with_Pillow_13.0.0_strict"]
        must_fail = any(word in expectation for word in ("must fail", "truncated", "must be refused"))
        try:
            result = read_image(odd / row["file"])
        except ImageError as error:
            if not must_fail and "may fail" not in expectation:
                wrong.append(f"{row['file']}: should load, but {error}")
            if str(odd / row["file"]) not in str(error):
                wrong.append(f"{row['file']}: not named in {error}")
            continue
        if must_fail:
            wrong.append(f"{row['file']}: loaded, but {expectation}")
        elif observed.startswith("ok"):
            width, height = map(int, observed.split()[3].split("x"))
            turned = observed.partition("orientation=")[2][:1] in ("5", "6", "7", "8")
            shape = (width, height, 3) if turned else (height, width, 3)
            if result.pixels.shape != shape:
                wrong.append(f"{row['file']}: {result.pixels.shape}, expected {shape}")
        expected_dtype = np.uint16 if " I;16 " in observed or " F " in observed else np.uint8
        if result.pixels.dtype != expected_dtype:
            wrong.append(f"{row['file']}: {result.pixels.dtype}")
    assert len(rows) > 150
    assert not wrong, "\n".join(wrong)


def test_one_photo_in_all_orientations_reads_the_same(assets: Path) -> None:
    made = assets / "images" / "odd" / "made"
    images = [read_image(path).pixels.astype(int) for path in sorted(made.glob("exif_orientation_*.jpg"))]
    assert len(images) >= 4
    for image in images[1:]:
        assert image.shape == images[0].shape == (160, 192, 3)
        assert np.abs(image - images[0]).mean() < 4  # each was compressed in its own orientation

    webps = [read_image(assets / f"images/odd/pillow/hopper_orientation_{n}.webp").pixels for n in range(2, 9)]
    for webp in webps[1:]:
        assert np.abs(webp.astype(int) - webps[0]).mean() < 8


def test_the_rotated_portrait_is_the_upright_one(assets: Path) -> None:
    upright = assets / "images" / "hard" / "face_portrait.jpg"
    if not upright.exists():
        pytest.skip("the assets hold no upright copy of it")
    rotated = read_image(assets / "images" / "odd" / "exif" / "immich_portrait-orientation-6.jpg").pixels
    reference = read_image(upright).pixels
    assert rotated.shape == reference.shape
    assert np.abs(rotated.astype(int) - reference).mean() < 4


def test_real_files_have_the_colours_they_should(assets: Path) -> None:
    pillow = assets / "images" / "odd" / "pillow"
    hopper = read_image(pillow / "hopper.ppm").pixels.astype(int)
    for same, tolerance in (("hopper.tif", 2), ("hopper16.rgb", 0.1), ("hopper.jpg", 2), ("hopper.Lab.tif", 3)):
        assert np.abs(read_image(pillow / same).pixels - hopper).mean() < tolerance, same
    made = assets / "images" / "odd" / "made"
    photo = read_image(made / "photo.jpg").pixels
    assert np.array_equal(read_image(made / "jpeg_named.png").pixels, photo)
    assert np.array_equal(read_image(made / "no_extension").pixels, photo)
    garbage = read_image(made / "icc_garbage.jpg")
    assert np.abs(garbage.pixels.astype(int) - photo).mean() < 1
    assert "profile ignored" in garbage.notes[0]


def test_a_24_megapixel_picture_passes_the_default_limit(assets: Path) -> None:
    result = read_image(assets / "images" / "odd" / "made" / "big_6000x4000_flat.png")
    assert result.pixels.shape == (4000, 6000, 3)
    assert result.notes == ()


# Bit depths and modes.


def test_plain_8_bit_files_read_exactly(tmp_path: Path) -> None:
    pixels = colours(5, 7)
    for name in ("a.png", "a.bmp", "a.ppm", "a.tif", "a.tga", "a.qoi"):
        Image.fromarray(pixels).save(tmp_path / name)
        result = read_image(tmp_path / name)
        assert result.pixels.dtype == np.uint8
        assert np.array_equal(result.pixels, pixels), name
        assert result.pixels.flags.writeable and result.pixels.flags.c_contiguous
        assert result.notes == ()


@pytest.mark.parametrize(("name", "order"), [("ramp.png", "<u2"), ("ramp.tif", "<u2"), ("ramp.tif", ">u2")])
def test_16_bit_gray_keeps_every_level(tmp_path: Path, name: str, order: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp.astype(order)).save(tmp_path / name)
    pixels = read_image(tmp_path / name).pixels
    assert pixels.dtype == np.uint16 and pixels.dtype.isnative
    assert np.array_equal(pixels, np.repeat(ramp[..., None], 3, axis=2))
    assert image_to_x(pixels)[0].unique().numel() == 65536


def test_16_bit_pgm_is_16_bit(tmp_path: Path) -> None:
    gray = np.array([[0, 1, 256], [4660, 65534, 65535]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + gray.astype(">u2").tobytes())
    result = read_image(tmp_path / "a.pgm")
    assert np.array_equal(result.pixels[..., 1], gray)
    assert result.notes == ()


def test_tiff_gray_of_12_bits_and_with_white_at_zero(tmp_path: Path) -> None:
    twelve = b"\x00\x08\x00\xff\xf0\x01"  # 0, 2048, 4095, 1, two to three bytes
    path = tmp_path / "a.tif"
    for bits, white_is_zero, data, expected in (
        (12, False, twelve, [0, 32776, 65535, 16]),
        (16, False, struct.pack("<4H", 0, 1, 4660, 65535), [0, 1, 4660, 65535]),
        (16, True, struct.pack("<4H", 0, 1, 4660, 65535), [65535, 65534, 60875, 0]),
        (8, True, bytes([0, 1, 200, 255]), [255, 254, 55, 0]),
    ):
        path.write_bytes(tiff(4, bits, white_is_zero, data))
        assert read_image(path).pixels[0, :, 1].tolist() == expected


def test_16_bit_colour_is_cut_to_8_and_says_so(tmp_path: Path) -> None:
    row = struct.pack(">6H", 0x12FF, 0x3400, 0x5678, 0, 0xFFFF, 0x00FF)
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, [row]))
    result = read_image(tmp_path / "a.png")
    assert result.pixels.tolist() == [[[0x12, 0x34, 0x56], [0, 0xFF, 0]]]
    assert result.notes == ("16-bit colour reduced to 8 bits",)


@pytest.mark.parametrize(
    ("samples", "expected", "note"),
    [
        (np.array([[0, 1000, 65535]], np.int32), [0, 1000, 65535], "integer samples taken as 0 to 65535"),
        (np.array([[-100, 0, 100]], np.int32), [0, 32768, 65535], "samples from -100 to 100 stretched"),
        (np.array([[0, 0.25, 0.5]], np.float32), [0, 16384, 32768], "float samples taken as 0 to 1"),
        (np.array([[-2, 0, 2]], np.float32), [0, 32768, 65535], "samples from -2 to 2 stretched"),
        (np.array([[np.nan, 1, 3]], np.float32), [0, 0, 65535], "samples from 1 to 3 stretched"),
        (np.array([[7, 7, 7]], np.float32), [0, 0, 0], "samples from 7 to 7 stretched"),
    ],
)
def test_32_bit_samples_become_16_bit_by_a_stated_rule(
    tmp_path: Path, samples: np.ndarray, expected: list[int], note: str
) -> None:
    Image.fromarray(samples).save(tmp_path / "a.tif")
    result = read_image(tmp_path / "a.tif")
    assert result.pixels.dtype == np.uint16
    assert result.pixels[0, :, 0].tolist() == expected
    assert note in result.notes[0]


def test_one_bit_and_gray_become_rgb(tmp_path: Path) -> None:
    gray = colours(6, 9, 1)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray > 127).save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "gray.png").pixels, np.repeat(gray[..., None], 3, 2))
    assert np.array_equal(read_image(tmp_path / "bits.png").pixels[..., 2], np.where(gray > 127, 255, 0))


def test_cmyk_without_a_profile_goes_by_the_plain_formula(tmp_path: Path) -> None:
    inks = colours(4, 5, 4)
    Image.frombytes("CMYK", (5, 4), inks.tobytes()).save(tmp_path / "a.tif")
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(read_image(tmp_path / "a.tif").pixels - expected).max() <= 1

    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # Pillow writes CMYK JPEG inverted, as Adobe does
    flat.save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "a.jpg").pixels.astype(int) - [0, 255, 255]).max() <= 2


def test_lab_becomes_rgb(tmp_path: Path) -> None:
    Image.new("LAB", (3, 2), (255, 128, 128)).save(tmp_path / "white.tif")
    Image.new("LAB", (3, 2), (128, 128, 128)).save(tmp_path / "gray.tif")
    assert read_image(tmp_path / "white.tif").pixels.min() >= 254
    assert np.abs(read_image(tmp_path / "gray.tif").pixels.astype(int) - 119).max() <= 1  # L* = 50


# Transparency.


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 77)])
def test_transparency_is_composited_exactly(tmp_path: Path, background: tuple[int, int, int]) -> None:
    rgba = colours(64, 64, 4)
    rgba[..., 3] = np.resize(np.arange(256), (64, 64))
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    result = read_image(tmp_path / "rgba.png", background=background)
    assert np.array_equal(result.pixels, over(rgba[..., :3], rgba[..., 3], background))
    assert result.notes == ("transparency composited over rgb({}, {}, {})".format(*background),)

    gray_alpha = rgba[..., 2:]
    Image.frombytes("LA", (64, 64), gray_alpha.tobytes()).save(tmp_path / "la.png")
    expected = over(np.repeat(gray_alpha[..., :1], 3, 2), gray_alpha[..., 1], background)
    assert np.array_equal(read_image(tmp_path / "la.png", background=background).pixels, expected)


def test_an_opaque_alpha_channel_leaves_no_note(tmp_path: Path) -> None:
    rgb = colours(3, 3)
    Image.fromarray(np.dstack([rgb, np.full((3, 3), 255, np.uint8)])).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png", background="black")
    assert np.array_equal(result.pixels, rgb) and result.notes == ()


def test_palette_with_graded_transparency(tmp_path: Path) -> None:
    palette = colours(1, 256)[0]
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    alphas = bytes(range(255, -1, -1))
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=alphas)
    colour = palette[indices]
    assert np.array_equal(read_image(tmp_path / "opaque.png", background="red").pixels, colour)
    expected = over(colour, np.frombuffer(alphas, np.uint8)[indices], (255, 0, 0))
    assert np.array_equal(read_image(tmp_path / "clear.png", background="red").pixels, expected)


@pytest.mark.parametrize(
    ("depth", "kind", "key", "row", "expected"),
    [
        (1, 0, (1,), b"\x40", [(0, 0, 0), (9, 8, 7)]),
        (2, 0, (2,), b"\x60", [(85, 85, 85), (9, 8, 7)]),
        (4, 0, (15,), b"\xcf", [(204, 204, 204), (9, 8, 7)]),
        (8, 0, (200,), b"\xc7\xc8", [(199, 199, 199), (9, 8, 7)]),
        (8, 2, (1, 2, 3), b"\1\2\4\1\2\3", [(1, 2, 4), (9, 8, 7)]),
        (16, 0, (515,), b"\2\2\2\3", [(514, 514, 514), (9 * 257, 8 * 257, 7 * 257)]),
        (16, 2, (256, 512, 768), b"\4\0\2\0\3\0\1\0\2\0\3\0", [(4, 2, 3), (9, 8, 7)]),
    ],
)
def test_the_transparent_colour_of_a_png_shows_the_background(
    tmp_path: Path, depth: int, kind: int, key: tuple[int, ...], row: bytes, expected: list[tuple[int, int, int]]
) -> None:
    chunk = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "a.png").write_bytes(png(2, 1, depth, kind, [row], chunk))
    assert read_image(tmp_path / "a.png", background="#090807").pixels[0].tolist() == [list(c) for c in expected]


def test_a_background_that_is_no_colour_is_a_config_error(tmp_path: Path) -> None:
    for background in ("whitish", (1, 2), (0, 0, 256)):
        with pytest.raises(ConfigError, match="background"):
            read_image(tmp_path / "a.png", background=background)  # type: ignore[arg-type]


# Colour profiles.


def test_an_srgb_profile_changes_no_pixel(tmp_path: Path) -> None:
    pixels = colours(16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=SRGB)
    result = read_image(tmp_path / "a.png")
    assert np.array_equal(result.pixels, pixels) and result.notes == ()


def test_another_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    pixels = colours(16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=SWAPPED)
    Image.fromarray(pixels).save(tmp_path / "a.tif", icc_profile=SWAPPED)
    for name in ("a.png", "a.tif"):
        assert np.abs(read_image(tmp_path / name).pixels.astype(int) - pixels[..., [1, 0, 2]]).max() <= 1


def test_the_profile_applies_to_the_picture_and_not_to_the_background(tmp_path: Path) -> None:
    rgba = np.array([[[200, 30, 60, 255], [200, 30, 60, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=SWAPPED)
    pixels = read_image(tmp_path / "a.png", background=(250, 10, 20)).pixels.astype(int)
    assert np.abs(pixels - [[[30, 200, 60], [250, 10, 20]]]).max() <= 1


def test_the_profile_of_a_palette_applies_to_its_colours(tmp_path: Path) -> None:
    image = Image.frombytes("P", (2, 1), b"\0\1")
    image.putpalette(bytes([255, 0, 0, 10, 20, 30]))
    image.save(tmp_path / "a.png", icc_profile=SWAPPED)
    assert np.abs(read_image(tmp_path / "a.png").pixels.astype(int) - [[[0, 255, 0], [20, 10, 30]]]).max() <= 1


def test_a_gray_profile_is_converted(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 128).save(tmp_path / "a.png", icc_profile=LINEAR_GRAY)
    Image.new("LA", (2, 2), (128, 255)).save(tmp_path / "b.png", icc_profile=LINEAR_GRAY)
    for name in ("a.png", "b.png"):
        assert np.abs(read_image(tmp_path / name).pixels.astype(int) - 188).max() <= 1  # linear 0.5 in sRGB


def test_a_cmyk_profile_is_used_in_place_of_the_plain_formula(tmp_path: Path) -> None:
    profile = only_cyan_profile()
    for name in ("a.tif", "a.jpg"):
        for ink, expected in (((0, 0, 255, 0), 255), ((255, 0, 0, 0), 0), ((128, 90, 0, 40), 119)):
            Image.new("CMYK", (16, 16), ink).save(tmp_path / name, icc_profile=profile)
            pixels = read_image(tmp_path / name).pixels.astype(int)
            assert np.abs(pixels - expected).max() <= 4, (name, ink)


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", b"not a profile at all", "cannot open profile"),
        ("RGB", SWAPPED[:200], "profile ignored"),
        ("RGB", LINEAR_GRAY, "made for GRAY, the picture is RGB"),
        ("L", SWAPPED, "made for RGB, the picture is GRAY"),
        ("I;16", LINEAR_GRAY, "not supported for 16-bit gray"),
        ("I;16", b"not a profile at all", "cannot open profile"),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_note(
    tmp_path: Path, mode: str, profile: bytes, reason: str
) -> None:
    image = Image.new(mode, (4, 3), 77 if mode != "RGB" else (77, 77, 77))
    image.save(tmp_path / "a.png", icc_profile=profile)
    result = read_image(tmp_path / "a.png")
    assert (result.pixels == 77).all()
    assert "colour profile ignored" in result.notes[0] and reason in result.notes[0]


# Orientation.

STORED = {  # from the table of the EXIF standard: which visual side row 0 and column 0 of the stored picture are
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "png16", "tif", "webp"])
def test_all_eight_exif_orientations_come_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = colours(5, 8) if kind != "png16" else (colours(5, 8, 1).astype(np.uint16) * 250)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    path = tmp_path / f"a.{kind.removesuffix('16')}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, **({"tiffinfo": {0x0112: orientation}} if kind == "tif" else {"exif": exif, "lossless": True}))
    pixels = read_image(path).pixels
    assert np.array_equal(pixels if kind != "png16" else pixels[..., 0], upright)


@pytest.mark.parametrize(
    "exif",
    [b"garbage!", b"MM\0*\0\0\0\x08\0\x05\x01\x12", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\2\0\0\0\xff\0\xff\xff\xff"],
)
def test_damaged_exif_data_does_not_keep_a_picture_from_loading(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (8, 4), "teal").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + exif)
    assert read_image(tmp_path / "a.jpg").pixels.shape == (4, 8, 3)


# More than one frame.


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("a.gif", "animated: first of 3 frames"),
        ("a.webp", "animated: first of 3 frames"),
        ("a.png", "animated: first of 3 frames"),
        ("a.avif", "animated: first of 3 frames"),
        ("a.tif", "multipage: first of 3 pages"),
    ],
)
def test_the_first_frame_is_read_and_the_note_says_so(tmp_path: Path, name: str, note: str) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    try:
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    except KeyError:
        pytest.skip(f"this Pillow does not write {name}")
    result = read_image(tmp_path / name)
    assert result.notes == (note,)
    assert np.abs(result.pixels.astype(int) - [255, 0, 0]).max() <= 4


def test_an_animation_whose_later_frames_are_cut_off_still_gives_its_first(tmp_path: Path) -> None:
    frames = [Image.fromarray(colours(32, 32, 1, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: len(whole) * 3 // 4])
    result = read_image(tmp_path / "cut.gif")
    assert np.array_equal(result.pixels, read_image(tmp_path / "a.gif").pixels)
    assert "animated: first" in result.notes[0]


# Files that cannot be read.


def encoded(kind: str, pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is a text and no picture", "not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"\0" * 5000, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (encoded("JPEG", colours(64, 64))[:2000], "truncated"),
        (encoded("PNG", colours(64, 64))[:6000], "truncated"),
        (encoded("BMP", colours(64, 64))[:6000], "truncated"),
        (encoded("TIFF", colours(64, 64))[:6000], "a.jpg"),
        (encoded("WEBP", colours(64, 64))[:1500], "damaged"),
        (encoded("GIF", colours(64, 64, 1))[:1500], "truncated"),
        (png(0, 5, 8, 2, [b""] * 5), "a.jpg"),
        (png(5000, 5000, 8, 2, [b"\0" * 15000]), "claims 5000 x 5000, more than its"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    ],
)
def test_a_bad_file_is_an_image_error_that_names_file_and_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_what_is_no_file_is_an_image_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, reason in (
        ("missing.png", "no such file"),
        ("dangling.png", "no such file"),
        ("loop.png", "cannot be read"),
        ("", "folder"),
        ("pipe.png", "not a regular file"),
        ("a\0b.png", "no such file"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_image_error(tmp_path: Path) -> None:
    save_image(colours(4, 4), tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        read_image(tmp_path / "a.png")


def test_heic_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)
    with pytest.raises(ImageError, match="HEIC is not among the formats that can be read: convert it"):
        read_image(tmp_path / "a.HEIC")


# The limit on pixels.


def test_a_lying_header_is_refused_before_decoding(tmp_path: Path) -> None:
    # No pixel data worth the name: if decoding were tried, the reason would be another.
    for side in (100_000, 12_000):  # above Pillow's own limit, and below
        (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, [b"\0"]))
        with pytest.raises(ImageError, match=r"header claims .*10,000,000,000|12000 x 12000") as caught:
            read_image(tmp_path / "bomb.png")
        assert f"{DEFAULT_MAX_PIXELS:,}" in str(caught.value) and "--max-pixels" in str(caught.value)


def test_the_limit_is_inclusive(tmp_path: Path) -> None:
    save_image(colours(20, 20), tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=400).pixels.shape == (20, 20, 3)
    with pytest.raises(ImageError, match="20 x 20 = 400 pixels, above the limit of 399"):
        read_image(tmp_path / "a.png", max_pixels=399)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.gif"])
@pytest.mark.parametrize("pillow_limit", [100, 300, None])  # 20 x 20 is an error, a warning, nothing for Pillow
def test_our_limit_replaces_pillows_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pillow_limit: int | None
) -> None:
    pixels = colours(20, 20)
    Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    assert read_image(tmp_path / name).pixels.shape == (20, 20, 3)
    with pytest.raises(ImageError, match="above the limit of 399"):
        read_image(tmp_path / name, max_pixels=399)
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


# Threads and warnings.


def test_pillows_warnings_stay_inside_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\3\0\0\0\1\0\1\0\0")
    with pytest.raises(UserWarning, match="EXIF"), Image.open(path) as image:
        image.getexif()  # warnings are errors in these tests: the file does make Pillow warn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with warnings.catch_warnings():
        for action in ("default", "error"):  # a filter that is put in front later changes nothing
            warnings.simplefilter(action)
            assert read_image(path).pixels.shape == (20, 20, 3)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", UserWarning, stacklevel=1)


def test_many_threads_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pictures above Pillow's limit and pictures that make Pillow warn among them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    paths = []
    for number in range(24):
        side = 48 if number % 3 == 0 else 24  # 48 x 48 is above twice Pillow's limit
        suffix = ("png", "webp", "tif", "jpg")[number % 4]
        pixels = colours(side, side, 3 if suffix == "jpg" else 4, seed=number)
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\3\0\0\0\1\0\1\0\0"
        paths.append(tmp_path / f"{number}.{suffix}")
        Image.fromarray(pixels).save(paths[-1], **({"exif": exif} if suffix == "jpg" else {"icc_profile": SWAPPED}))
    expected = [read_image(path) for path in paths]

    def read_all(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(paths)):
            result = read_image(paths[i])
            assert np.array_equal(result.pixels, expected[i].pixels) and result.notes == expected[i].notes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_all, range(16)))
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(UserWarning, match="mine"):  # the filters are whole: warnings are still errors here
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_pillows_limit_comes_back_when_two_threads_lift_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    first_inside, first_may_leave, first_left = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with _pillow_limit_of_at_least(100):
            first_inside.set()
            first_may_leave.wait(10)
        first_left.set()

    def second() -> int | None:
        first_inside.wait(10)
        threading.Timer(0.05, first_may_leave.set).start()
        with _pillow_limit_of_at_least(200):
            first_left.wait(10)
            return Image.MAX_IMAGE_PIXELS

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(first), pool.submit(second)]
        assert running[1].result() == 200
    assert Image.MAX_IMAGE_PIXELS == 10


def test_the_first_reads_of_a_process_may_come_from_many_threads(tmp_path: Path) -> None:
    # Pillow loads its plugins on first use; a second thread that comes meanwhile must not miss one.
    for number in range(16):
        kind = ("PNG", "WEBP", "TIFF", "JPEG", "QOI", "SGI", "TGA", "PCX")[number % 8]
        Image.fromarray(colours(8, 8)).save(tmp_path / f"{number}.png", kind)
    script = (
        "import sys; from pathlib import Path; from concurrent.futures import ThreadPoolExecutor\n"
        "from sdvae.data.images import read_image\n"
        "paths = sorted(Path(sys.argv[1]).iterdir())\n"
        "with ThreadPoolExecutor(16) as pool: print(len(list(pool.map(read_image, paths))))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("16\n", 0), done.stderr


# Tensors.


def test_pixels_to_x_and_back_is_identity() -> None:
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.stack([levels, levels[::-1], np.roll(levels, 7)], axis=-1).reshape(4, 64, 3)
    x = image_to_x(pixels)
    assert x.shape == (3, 4, 64) and x.dtype == torch.float32 and x.is_contiguous()
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x[1], torch.from_numpy(pixels[..., 1].astype(np.float32)) / 127.5 - 1)
    for same in (x, x.double(), x.half(), x.requires_grad_()):
        assert np.array_equal(x_to_image(same), pixels)


def test_8_and_16_bit_white_and_black_are_the_same_x() -> None:
    low, high = np.array([[[0, 255, 51]]], np.uint8), np.array([[[0, 65535, 51 * 257]]], np.uint16)
    assert torch.equal(image_to_x(low), image_to_x(high))


def test_x_is_clamped_and_rounded_to_nearest() -> None:
    x = torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 1.5, torch.inf, -torch.inf])
    pixels = x_to_image(x.expand(3, 1, -1).clone())
    assert pixels.shape == (1, 8, 3) and pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255, 0]


def test_nan_does_not_become_a_black_picture() -> None:
    x = torch.zeros(3, 4, 4)
    x[1, 2, 3] = torch.nan
    with pytest.raises(SdvaeError, match="NaN"):
        x_to_image(x)


def test_pixels_are_rounded_and_clamped_as_in_a_file() -> None:
    recon = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.5, float("nan"), 2 * 100.4 / 255 - 1])
    assert (round_to_8_bits(recon) * 255).tolist() == pytest.approx([0, 0, 128, 255, 255, 0, 100])


# Writing.


@pytest.mark.parametrize("name", ["a.png", "a.webp", "A.PNG"])
def test_png_and_webp_are_lossless_unless_told_otherwise(tmp_path: Path, name: str) -> None:
    pixels = colours(33, 17)
    pixels[:, :5] = 0
    save_image(pixels, tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name).pixels, pixels)
    save_image(pixels[::-1, ::-1], tmp_path / name)  # over itself, from a view
    assert np.array_equal(read_image(tmp_path / name).pixels, pixels[::-1, ::-1])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_jpeg_keeps_full_colour_resolution_and_quality_counts(tmp_path: Path) -> None:
    pixels = colours(64, 64)
    for name, quality in (("a.jpg", None), ("b.jpeg", 50), ("c.jpg", 95), ("d.webp", 50), ("e.webp", 90)):
        save_image(pixels, tmp_path / name, quality=quality)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert size["a.jpg"] == size["c.jpg"] > size["b.jpeg"] and size["e.webp"] > size["d.webp"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    pixels = colours(4, 4)
    for name, quality in (("a.gif", None), ("a", None), ("a.png", 90), ("a.jpg", 0), ("a.webp", 101)):
        with pytest.raises(ConfigError, match="expected"):
            save_image(pixels, tmp_path / name, quality=quality)
    with pytest.raises(ImageError, match="16384 x 1 px.*16383"):
        save_image(np.zeros((1, 16384, 3), np.uint8), tmp_path / "a.webp")
    with pytest.raises(ValueError, match="uint8"):
        save_image(pixels.astype(np.uint16), tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        save_image(pixels, tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_removes_its_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()  # a folder is in the way: the last step, the renaming, fails
    with pytest.raises(OSError, match="directory"):
        save_image(colours(4, 4), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_as_the_system_reports_it(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, numpy as np; from sdvae.data.images import save_image\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)\n"
        "try: save_image(pixels, sys.argv[1])\n"
        "except OSError as error: print(error.strerror)\n"
    )
    target = tmp_path / "a.png"
    save_image(colours(4, 4), target)
    before = target.read_bytes()
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=False)
    assert done.stdout == "File too large\n", done.stderr
    assert target.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_written_files_have_the_usual_permissions_and_may_have_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    save_image(colours(4, 4), path)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# Images in memory, headers alone, and JPEG at reduced scale.


def smooth(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(colours(3, 4)).resize((width, height), Image.Resampling.BICUBIC))


def test_bytes_read_as_the_file_does_and_so_do_their_errors(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, icc_profile=SWAPPED)
    image.convert("RGBA").resize((9, 9)).save(tmp_path / "b.png")
    for name in ("a.jpg", "b.png"):
        data = (tmp_path / name).read_bytes()
        from_file, from_bytes = read_image(tmp_path / name), read_image_bytes(data, name)
        assert np.array_equal(from_file.pixels, from_bytes.pixels) and from_file.notes == from_bytes.notes
    hollow = png(60000, 2000, 8, 2, [b"\0" * 30])
    for data, reason in (
        (b"", "cd/e.heic: is empty"),
        (b"nonsense", "cd/e.heic: HEIC is not among"),
        ((tmp_path / "a.jpg").read_bytes()[:900], "cd/e.heic: truncated"),
        (hollow, "more than its .* bytes can hold"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_image_bytes(data, "cd/e.heic")


def test_the_size_comes_from_the_header_alone(tmp_path: Path) -> None:
    Image.fromarray(smooth(300, 500)).save(tmp_path / "a.jpg", quality=95)
    start = (tmp_path / "a.jpg").read_bytes()[:1000]  # no whole picture
    assert EncodedImage("a", start).size() == EncodedImage("a", tmp_path / "a.jpg").size() == (500, 300)
    with pytest.raises(ImageError, match="a: truncated"):
        EncodedImage("a", start).read()
    with pytest.raises(ImageError, match="b.jpg: no such file"):
        EncodedImage("b", tmp_path / "b.jpg").size()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("height", "width"), [(600, 810), (801, 601), (512, 512), (300, 400)])
def test_a_jpeg_comes_reduced_but_never_below_what_was_asked(
    tmp_path: Path, height: int, width: int, progressive: bool
) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(smooth(height, width)).save(path, quality=95, progressive=progressive, exif=exif)
    whole = read_image(path).pixels
    for min_side_px in (1, 75, 76, 100, 151, 299, 512, 5000):
        reduced = read_image(path, min_side_px=min_side_px).pixels
        factor = next(f for f in (8, 4, 2, 1) if f == 1 or min(height, width) // f >= min_side_px)
        assert reduced.shape == (-(-width // factor), -(-height // factor), 3)  # lying on its side
        assert min(reduced.shape[:2]) >= min(min_side_px, height, width)
        same_size = Image.fromarray(whole).resize(reduced.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(np.asarray(same_size).astype(int) - reduced).mean() < 3  # 601 px at 1/8 are 76, not 75.1
    with pytest.raises(ImageError, match="truncated"):
        read_image_bytes(path.read_bytes()[:-200], "a.jpg", min_side_px=75)


def test_other_formats_come_whole(tmp_path: Path) -> None:
    Image.fromarray(smooth(100, 120)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", min_side_px=10).pixels.shape == (100, 120, 3)


def resized(path: Path, size: int, crop: str, *, margin: int | None) -> np.ndarray:
    read = read_image(path, min_side_px=None if margin is None else size * margin)
    return resize_and_crop(read.pixels, size, crop, read.place).astype(int)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(601, 827), (600, 800), (607, 601), (16, 9)])
def test_a_reduced_jpeg_is_resized_as_the_whole_one_however_it_was_turned(
    tmp_path: Path, height: int, width: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth(height, width)).save(tmp_path / "a.jpg", quality=98, exif=exif)
    for size in {min(height, width) // part // JPEG_MARGIN for part in (8, 4, 2)} - {0}:
        for crop in ("none", "center"):
            whole, reduced = (resized(tmp_path / "a.jpg", size, crop, margin=margin) for margin in (None, JPEG_MARGIN))
            assert reduced.shape == whole.shape
            assert np.abs(reduced - whole).max() <= (6 if min(height, width) > 100 else 25)


def test_photographs_lose_less_than_a_hundredth_by_reduced_decoding(assets: Path) -> None:
    paths = sorted((assets / "images" / "train").glob("*.jpg"))[::40]
    assert paths
    for path in paths:
        with Image.open(path) as image:
            size = min(image.size) // 4 // JPEG_MARGIN
        for crop in ("none", "center"):
            whole, reduced = (resized(path, size, crop, margin=margin) for margin in (None, JPEG_MARGIN))
            psnr = 10 * np.log10(255**2 / max(np.square(whole - reduced).mean(), 1e-9))
            assert psnr > 38, path.name


def test_every_awkward_file_reads_the_same_at_reduced_scale(assets: Path) -> None:
    """Refused or read with the same notes, upright and in the same colours."""

    def read(path: Path, margin: int | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
        try:
            found = read_image(path, min_side_px=None if margin is None else 16 * margin)
        except ImageError as error:
            return None, (str(error),)
        place = found.place
        height, width = found.pixels.shape[:2] if place is None else (place.height, place.width)
        if max(height, width) > 50 * min(height, width):  # a strip
            return None, found.notes
        return resize_and_crop(found.pixels, 16, "none", place).astype(int), found.notes

    count = 0
    for path in sorted(path for path in (assets / "images" / "odd").rglob("*.*") if path.suffix != ".tsv"):
        if not path.is_file():
            continue
        (whole, notes), (reduced, reduced_notes) = (read(path, margin) for margin in (None, JPEG_MARGIN))
        assert notes == reduced_notes, path.name
        assert (whole is None) == (reduced is None), path.name
        if path.name == "hopper_bad_exif.jpg":  # its samples, far outside of 0 to 255, are cut off before or after
            continue
        if whole is not None and reduced is not None:
            assert whole.shape == reduced.shape and np.abs(whole - reduced).mean() < 3 * (
                1 if whole.max() < 256 else 257
            )
            count += not np.array_equal(whole, reduced)
    assert count > 5  # JPEGs that did come reduced


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_reduced_jpeg_keeps_its_colours_without_and_with_a_profile(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(smooth(400, 512)).convert(mode)
    image.save(tmp_path / "a.jpg", quality=98)
    whole, reduced = (resized(tmp_path / "a.jpg", 32, "none", margin=margin) for margin in (None, JPEG_MARGIN))
    assert np.abs(whole - reduced).max() <= 6
    Image.fromarray(smooth(400, 512)).save(tmp_path / "b.jpg", quality=98, icc_profile=SWAPPED)
    whole, reduced = (resized(tmp_path / "b.jpg", 32, "none", margin=margin) for margin in (None, JPEG_MARGIN))
    assert np.abs(whole - reduced).max() <= 6
