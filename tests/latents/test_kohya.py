"""The kohya-npz format: an independent reader with the checks of kohya's trainers takes what is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import EncodeRun, encode_folder
from sdvae.data.images import image_to_x, read_image
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.header import Size
from sdvae.latents.kohya import crop_ltrb
from sdvae.latents.manifest import read_manifest
from sdvae.latents.registry import FORMATS
from sdvae.latents.safetensors import LatentFile
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import image_generator

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
MakeVae = Callable[..., Path]


def kohya_path(image: Path, suffix: str = "sd") -> Path:
    """Where kohya's trainers look for the latents of an image (library/strategy_sd.py of kohya-ss/sd-scripts).

    An .npz with the bare stem comes first; the size is that of the stored picture: EXIF is not looked at.
    """
    old = image.with_suffix(".npz")
    with Image.open(image) as opened:
        width, height = opened.size
    stem, _ = os.path.splitext(image)
    return old if old.exists() else Path(f"{stem}_{width:04d}x{height:04d}_{suffix}.npz")


def kohya_load(
    path: Path, bucket: tuple[int, int], *, by_resolution: bool, flip: bool = False
) -> tuple[NDArray[Any], list[float], list[float], NDArray[Any] | None]:
    """What the trainers read of a cache (library/strategy_base.py), in either generation.

    by_resolution: since February 2026 arrays are named after the size of the latent, and one without is taken where
    its shape is the expected one; before, the shape was not looked at and showed when a batch was stacked.
    """
    expected = (bucket[1] // 8, bucket[0] // 8)  # bucket is (width, height)
    with np.load(path) as npz:
        name = "latents"
        if by_resolution:
            name = f"latents_{expected[0]}x{expected[1]}"
            if name not in npz:
                name = "latents"
        assert name in npz and npz[name].shape == (4, *expected)
        assert not flip or "latents_flipped" in npz
        latents, flipped = npz["latents"], npz["latents_flipped"] if flip else None
        return latents, npz["original_size"].tolist(), npz["crop_ltrb"].tolist(), flipped


def sdxl_conditioning(original_size: list[float], crop: list[float], latents: NDArray[Any], flipped: bool) -> list[int]:
    """original height and width, crop top and left, target height and width, as the SDXL trainer makes them."""
    target_width, target_height = latents.shape[2] * 8, latents.shape[1] * 8
    left = target_width - crop[2] if flipped else crop[0]
    return [int(v) for v in (original_size[1], original_size[0], crop[1], left, target_height, target_width)]


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", {"wide.png": (160, 64), "sub/tall.png": (80, 200), "a.b.jpg": (64, 64)})


@pytest.mark.parametrize("by_resolution", [False, True])
def test_the_trainers_find_and_load_the_latents_beside_the_images(
    images: Path, opened_vae: OpenedVae, vae: AutoencoderKL, by_resolution: bool
) -> None:
    report = encode_folder(
        images,
        images,
        vae=opened_vae,
        options=EncodeOptions(format="kohya-npz", store="mode", latent_dtype="float32", size=64, crop="center"),
    )
    assert (report.done, report.format) == (3, "kohya-npz")
    conditions = {}
    for image in (images / "wide.png", images / "sub/tall.png", images / "a.b.jpg"):
        latents, original_size, crop, _ = kohya_load(kohya_path(image), (64, 64), by_resolution=by_resolution)
        assert latents.dtype == np.float32
        conditions[image.name] = sdxl_conditioning(original_size, crop, latents, False)
    assert conditions == {
        "wide.png": [64, 160, 19, 0, 64, 64],  # the whole picture fitted into 64 x 64 is 64 x 25.6, from (0, 19)
        "tall.png": [200, 80, 0, 19, 64, 64],
        "a.b.jpg": [64, 64, 0, 0, 64, 64],
    }
    x = image_to_x(read_image(images / "a.b.jpg").pixels)[None]
    with torch.inference_mode():
        mean = vae.encode(x).latent_dist.mean[0]
    latents, *_ = kohya_load(kohya_path(images / "a.b.jpg"), (64, 64), by_resolution=by_resolution)
    np.testing.assert_allclose(latents, mean, atol=1e-5)  # not scaled: the trainers multiply by themselves


def test_crop_ltrb_is_the_place_of_the_fitted_picture() -> None:
    assert crop_ltrb(Size(width=512, height=512), Size(width=800, height=600)) == (0, 64, 512, 448)
    assert crop_ltrb(Size(width=512, height=512), Size(width=600, height=800)) == (64, 0, 448, 512)
    assert crop_ltrb(Size(width=768, height=512), Size(width=600, height=600)) == (128, 0, 640, 512)
    assert crop_ltrb(Size(width=768, height=512), Size(width=3000, height=2000)) == (0, 0, 768, 512)


def test_without_a_crop_every_image_keeps_its_own_shape(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (192, 64)})
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    path = kohya_path(images / "a.png")
    assert path.name == "a_0192x0064_sd.npz"
    assert kohya_load(path, (192, 64), by_resolution=True)[0].shape == (4, 8, 24)


@pytest.mark.parametrize("latent_dtype", ["float16", "float32"])
@pytest.mark.parametrize("store", ["moments", "mode", "sample"])
def test_the_file_holds_what_the_default_format_holds(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, store: str, latent_dtype: str
) -> None:
    options: dict[str, Any] = {
        "store": store,
        "latent_dtype": latent_dtype,
        "size": 64,
        "crop": "center",
        "batch_size": 1,
    }
    encode_folder(images, tmp_path / "plain", vae=opened_vae, options=EncodeOptions(**options))
    encode_folder(
        images,
        tmp_path / "kohya",
        vae=opened_vae,
        options=EncodeOptions(format="kohya-npz", seed=7 if store == "moments" else 0, **options),
    )
    path = tmp_path / "kohya/wide_0160x0064_sd.npz"
    plain = LatentFile.read(tmp_path / "plain/wide.png.safetensors")
    ((header, tensors),) = FORMATS["kohya-npz"].read_items(path)
    assert tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(tensors[name], plain.tensors[name]) for name in tensors)
    assert header.source == plain.header.source
    with np.load(path) as npz:
        latents = torch.from_numpy(npz["latents"])
        assert set(npz.files) == {"latents", "original_size", "crop_ltrb", "sdvae", *plain.tensors} - {"z"}
    if store == "moments":  # a fresh draw beside the posterior
        noise = torch.randn(latents.shape, generator=image_generator(7, "wide.png"))
        mean, logvar = (tensors[name].float() for name in ("mean", "logvar"))
        torch.testing.assert_close(latents, mean + torch.exp(logvar / 2) * noise, atol=4e-3, rtol=2e-3)
        assert header.seed == 7
    else:
        assert torch.equal(latents, plain.z())


def test_flip_encodes_the_mirrored_image(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, vae: AutoencoderKL
) -> None:
    options: dict[str, Any] = {"format": "kohya-npz", "store": "mode", "size": 64, "crop": "center"}
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(**options))
    assert (
        encode_folder(images, images, vae=opened_vae, options=EncodeOptions(**options, flip=True)).done == 3
    )  # stale: without the mirrored image
    assert encode_folder(images, images, vae=opened_vae, options=EncodeOptions(**options, flip=True)).skipped == 3
    assert (
        encode_folder(images, images, vae=opened_vae, options=EncodeOptions(**options)).skipped == 3
    )  # one that has it serves without flip_aug too
    path = kohya_path(images / "a.b.jpg")
    latents, original_size, crop, flipped = kohya_load(path, (64, 64), by_resolution=True, flip=True)
    x = image_to_x(read_image(images / "a.b.jpg").pixels)[None]
    with torch.inference_mode():
        expected = vae.encode(x.flip(-1)).latent_dist.mean[0].numpy()
    assert flipped is not None
    np.testing.assert_allclose(flipped, expected, atol=2e-5)
    assert np.abs(latents - flipped).max() > 0.01 and np.abs(latents[..., ::-1] - flipped).max() > 1e-4
    assert sdxl_conditioning(original_size, crop, latents, True) == [64, 64, 0, 0, 64, 64]


def test_draws_of_image_and_mirrored_image_differ(tmp_path: Path, images: Path, opened_vae: OpenedVae) -> None:
    for image in images.rglob("*.*"):
        if image.suffix in (".png", ".jpg"):
            Image.new("RGB", (64, 64), "gray").save(image)  # equal to its mirror image, to the bit
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz", flip=True))
    with np.load(kohya_path(images / "a.b.jpg")) as npz:
        assert np.abs(npz["latents"] - npz["latents_flipped"]).max() > 0.1


def test_a_turned_photograph_has_the_name_that_the_trainers_look_for(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.jpg": (128, 64)})
    with Image.open(images / "a.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # lies on its side
        image.save(images / "a.jpg", exif=exif)
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    path = kohya_path(images / "a.jpg")
    assert path.name == "a_0128x0064_sd.npz"
    latents, original_size, _, _ = kohya_load(path, (64, 128), by_resolution=True)
    assert latents.shape == (4, 16, 8) and original_size == [64, 128]


def test_sizes_that_no_bucket_has_are_refused(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64), "b.png": (68, 64)})
    report = encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    assert (report.done, [failure.key for failure in report.failures], report.exit_code) == (1, ["b.png"], 3)
    assert "68 x 64 px" in report.failures[0].reason and "--crop center" in report.failures[0].reason
    with pytest.raises(ConfigError, match="size is 60; kohya's buckets are multiples of 8 px"):
        encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz", size=60, crop="center"))


def test_what_the_trainers_would_mix_up_is_refused(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(
        tmp_path / "images", {"a.jpg": (64, 64), "a.png": (64, 64), "a.webp": (64, 128), "old.png": (64, 64)}
    )
    (images / "old.npz").write_bytes(b"of an earlier version")
    (images / "broken.png").write_bytes(b"no image")
    report = encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    assert (report.done, report.failed) == (2, 3)
    reasons = {failure.key: failure.reason for failure in report.failures}
    assert "the latents of a.jpg" in reasons["a.png"]
    assert "would read instead" in reasons["old.png"]
    assert sorted(path.name for path in images.glob("*_sd.npz")) == ["a_0064x0064_sd.npz", "a_0064x0128_sd.npz"]


def test_caches_of_the_trainers_themselves_are_left_alone(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    path = images / "a_0064x0064_sd.npz"
    np.savez(path, latents=np.zeros((4, 8, 8), np.float32))
    report = encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    assert report.failed == 1 and "no latent file of sdvae" in report.failures[0].reason
    assert read_manifest(images).num_files == 0
    assert (
        encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz", overwrite=True)).done
        == 1
    )
    with np.load(path) as npz:
        kept = {name: npz[name] for name in npz.files}
    np.savez(path, **kept, **{"latents_16x16": np.zeros((4, 16, 16), np.float32)})  # as the trainers add a resolution
    assert encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz")).skipped == 1


def test_an_image_of_another_size_takes_its_older_file_away(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64), "b.png": (64, 64)})
    for suffix in ("sd", "sdxl"):
        encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz", kohya_suffix=suffix))
    make_images(images, {"a.png": (64, 128)})
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    names = sorted(path.name for path in images.glob("*.npz"))
    assert names == [
        "a_0064x0064_sdxl.npz",
        "a_0064x0128_sd.npz",
        "b_0064x0064_sd.npz",
        "b_0064x0064_sdxl.npz",
    ]
    assert list(read_manifest(images).files) == names


def test_a_folder_in_the_folder_keeps_its_files_where_keys_are_equal(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64), "sub/a.png": (128, 64)})
    encode_folder(images / "sub", images / "sub", vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    encode_folder(
        images / "a.png", images, vae=opened_vae, options=EncodeOptions(format="kohya-npz")
    )  # its key is a.png too
    assert list(read_manifest(images).files) == ["a_0064x0064_sd.npz", "sub/a_0128x0064_sd.npz"]


def test_another_seed_makes_the_draws_stale(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    run = EncodeRun(images, images, opened_vae, EncodeOptions(format="kohya-npz", seed=1))
    assert [item.reason for item in run.plan.items] == ["stale: sampled with another seed"]
    run = EncodeRun(images, images, opened_vae, EncodeOptions(format="kohya-npz"))
    assert [item.reason for item in run.plan.items] == ["up to date"]


@pytest.mark.parametrize(
    ("suffix", "factor", "shift", "warns"),
    [
        ("sd", 0.18215, None, False),
        ("sdxl", 0.13025, None, False),
        ("sdxl", 0.18215, None, True),
        ("sd", 0.18215, 0.1, True),
    ],
)
def test_a_scale_that_the_trainers_do_not_apply_is_told(
    tmp_path: Path, make_images: MakeImages, make_vae: MakeVae, suffix: str, factor: float, shift: float, warns: bool
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    vae = make_vae(scaling_factor=factor, shift_factor=shift)
    report = encode_folder(images, images, vae=vae, options=EncodeOptions(format="kohya-npz", kohya_suffix=suffix))
    assert [("--fold-scale" in warning) for warning in report.warnings] == [True] * warns
    assert kohya_path(images / "a.png", suffix).is_file()


def test_latents_that_the_trainers_cannot_take_are_refused(
    tmp_path: Path, make_images: MakeImages, make_vae: MakeVae, vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    with pytest.raises(ConfigError, match="has 16 at 8: choose another --format"):
        encode_folder(images, images, vae=make_vae(latent_channels=16), options=EncodeOptions(format="kohya-npz"))
    with pytest.raises(ConfigError, match="flip is given, but the format parquet"):
        EncodeOptions(format="parquet", flip=True)
    assert not (images / "manifest.jsonl").exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "nan", "no-latents", "pickle"])
def test_damage_is_named(tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, damage: str) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz", latent_dtype="float32"))
    path = kohya_path(images / "a.png")
    data = bytearray(path.read_bytes())
    with np.load(path) as npz:
        arrays = {name: npz[name] for name in npz.files}
    if damage == "cut":
        path.write_bytes(data[:-30])
    elif damage == "bit":
        data[1000] ^= 4
        path.write_bytes(data)
    elif damage == "pickle":
        np.savez(path, **{**arrays, "mean": np.array([object()])})
    else:
        latents = arrays.pop("latents")
        latents[0, 0, 0] = np.nan
        np.savez(path, **arrays, **({"latents": latents} if damage == "nan" else {}))
    with pytest.raises(LatentFileError, match="a_0064x0064_sd.npz: "):
        list(FORMATS["kohya-npz"].read_items(path))
