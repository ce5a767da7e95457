"""Folders through the codec: sizes, values, batches, collisions, failures, and what a second run does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.decoded_image import read_mark
from sdvae.codec.image_encoder import load_image
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.planning.encode import preprocessing_of
from sdvae.codec.run import DecodeRun, EncodeRun, decode_folder, encode_folder
from sdvae.codec.verify import verify_cache
from sdvae.data.images import JPEG_MARGIN, image_to_x, read_image, x_to_image
from sdvae.data.sources.files import ImageFile
from sdvae.errors import CheckpointError, ConfigError, LatentFileError, SdvaeError
from sdvae.latents.header import Preprocessing, read_header
from sdvae.latents.safetensors import LatentFile
from sdvae.model.autoencoder import AutoencoderKL

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

SIZES = {
    "photo.jpg": (101, 67),
    "sub/dot.png": (1, 1),
    "sub/tiny.png": (7, 5),
    "strip.png": (300, 3),
    "even.bmp": (64, 32),
}


def files_below(folder: Path) -> list[str]:
    """All but the manifest, which has its own tests."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.jsonl")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def times_below(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files_below(folder)}


# ----------------------------------------------------------------------------------------------------- there and back


def test_images_of_any_size_come_back_with_their_size_and_name(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", SIZES)
    encoded = encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decoded = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (encoded.done, encoded.exit_code, decoded.done, decoded.exit_code) == (5, 0, 5, 0)
    assert files_below(tmp_path / "latents") == sorted(f"{name}.safetensors" for name in SIZES)
    expected = {str(Path(name).with_suffix(".png")): size for name, size in SIZES.items()}
    assert {name: size_of(tmp_path / "out" / name) for name in files_below(tmp_path / "out")} == expected


def test_the_file_holds_what_the_vae_says_of_the_padded_image(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, vae: AutoencoderKL
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (101, 67)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae, options=EncodeOptions(latent_dtype="float32"))
    file = LatentFile.read(tmp_path / "latents/a.png.safetensors")
    x = image_to_x(read_image(images / "a.png").pixels)
    x = torch.nn.functional.pad(x[None], (0, 3, 0, 5), mode="replicate")  # (1, 3, 72, 104)
    with torch.inference_mode():
        posterior = vae.encode(x).latent_dist
        recon = x_to_image(vae.decode(posterior.mode()).sample[0, :, :67, :101])
    torch.testing.assert_close(file.tensors["mean"], posterior.mean[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(file.tensors["logvar"], posterior.logvar[0], atol=1e-5, rtol=1e-5)
    header = file.header
    assert (header.image.width, header.image.height, header.source.width) == (101, 67, 101)
    assert (header.padding.top, header.padding.left, header.padding.bottom, header.padding.right) == (0, 0, 5, 3)
    assert (header.vae.scaling_factor, header.vae.shift_factor) == (0.18215, 0.1)
    torch.testing.assert_close(file.latents(), (posterior.mean[0] - 0.1) * 0.18215, atol=1e-5, rtol=1e-5)
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    written = read_image(tmp_path / "out/a.png").pixels
    assert np.abs(written.astype(int) - recon).max() <= 1


def test_half_precision_latents_cost_less_than_rounding_to_8_bits(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, vae: AutoencoderKL
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (64, 64)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    z = LatentFile.read(tmp_path / "latents/a.png.safetensors").z()
    with torch.inference_mode():
        exact = vae.decode(vae.encode(image_to_x(read_image(images / "a.png").pixels)[None]).latent_dist.mode()).sample
        levels = (vae.decode(z[None]).sample - exact) * 127.5
    assert 0 < levels.square().mean().sqrt() < 0.29 / 5  # rounding: 1 / sqrt(12) = 0.29 of a level


@pytest.mark.parametrize("store", ["moments", "mode", "sample"])
def test_batch_size_and_workers_change_nothing(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, store: str
) -> None:
    images = make_images(tmp_path / "images", {f"{i}.png": (40, 24) if i % 3 else (24, 24) for i in range(7)})
    for out, batch_size, workers in (("one", 1, 1), ("many", 4, 3)):
        encode_folder(
            images,
            tmp_path / out,
            vae=opened_vae,
            options=EncodeOptions(store=store, latent_dtype="float32", batch_size=batch_size, workers=workers),
        )
    names = files_below(tmp_path / "one")
    assert len(names) == 7 and names == files_below(tmp_path / "many")
    for name in names:
        one, many = (LatentFile.read(tmp_path / out / name) for out in ("one", "many"))
        for tensor in one.tensors:
            torch.testing.assert_close(one.tensors[tensor], many.tensors[tensor], atol=2e-6, rtol=2e-6)
    if store == "moments":  # one batch size: bit for bit
        encode_folder(
            images,
            tmp_path / "again",
            vae=opened_vae,
            options=EncodeOptions(latent_dtype="float32", batch_size=4, workers=1),
        )
        for name in names:
            again, many = (LatentFile.read(tmp_path / out / name).tensors["mean"] for out in ("again", "many"))
            assert torch.equal(again, many)


def test_draws_follow_the_seed_and_differ_between_images(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (32, 32)})
    shutil.copy(images / "a.png", images / "b.png")

    def z(seed: int, name: str) -> torch.Tensor:
        encode_folder(
            images,
            tmp_path / "z",
            vae=opened_vae,
            options=EncodeOptions(store="sample", seed=seed, latent_dtype="float32"),
        )
        return LatentFile.read(tmp_path / "z" / name).z()

    first, other_image = z(0, "a.png.safetensors"), z(0, "b.png.safetensors")
    other_seed, back = z(1, "a.png.safetensors"), z(0, "a.png.safetensors")
    assert torch.equal(first, back)
    assert (first - other_image).abs().max() > 0.1
    assert (first - other_seed).abs().max() > 0.1


def test_size_and_crop_give_equal_shapes_and_are_recorded(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"wide.png": (120, 60), "tall.png": (30, 45)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae, options=EncodeOptions(size=32, crop="center"))
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert {size_of(path) for path in (tmp_path / "out").iterdir()} == {(32, 32)}
    header = read_header(tmp_path / "latents/wide.png.safetensors")
    assert (header.source.width, header.image.width, header.preprocessing.size, header.preprocessing.crop) == (
        120,
        32,
        32,
        "center",
    )


def test_a_model_in_memory_serves_as_it_is(tmp_path: Path, make_images: MakeImages, vae: AutoencoderKL) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    before = {name: tensor.stride() for name, tensor in vae.state_dict().items()}
    report = encode_folder(images, tmp_path / "latents", vae=vae)
    assert (report.done, report.device, report.dtype) == (1, "cpu", "float32")
    assert {name: tensor.stride() for name, tensor in vae.state_dict().items()} == before


def test_bfloat16_runs_and_its_latents_are_recorded_as_such(
    tmp_path: Path, make_images: MakeImages, vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    encode_folder(images, tmp_path / "exact", vae=vae_path)
    encode_folder(images, tmp_path / "rough", vae=vae_path, options=EncodeOptions(dtype="bfloat16"))
    exact, rough = (LatentFile.read(tmp_path / name / "a.png.safetensors") for name in ("exact", "rough"))
    assert (rough.header.vae.dtype, rough.header.vae.digest) == ("bfloat16", exact.header.vae.digest)
    assert 0 < (exact.z() - rough.z()).abs().max() < 0.05
    report = decode_folder(tmp_path / "rough", tmp_path / "out", vae=vae_path, options=DecodeOptions(dtype="bfloat16"))
    assert report.done == 1


@pytest.mark.parametrize(
    ("format", "quality"), [("png", None), ("webp", None), ("webp", 80), ("jpg", None), ("jpg", 50)]
)
def test_every_output_format_keeps_the_picture_and_its_mark(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, format: str, quality: int | None
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (33, 17)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "png", vae=opened_vae)
    decode_folder(
        tmp_path / "latents", tmp_path / "out", vae=opened_vae, options=DecodeOptions(format=format, quality=quality)
    )
    exact, found = read_image(tmp_path / "png/a.png").pixels, read_image(tmp_path / f"out/a.{format}").pixels
    error = np.abs(exact.astype(int) - found).mean()
    assert error < (25 if quality else 5 if format == "jpg" else 1e-9)  # noise, the worst case
    assert quality is None or error > 5
    mark = read_mark(tmp_path / f"out/a.{format}")
    assert mark is not None and mark.latent_digest == read_header(tmp_path / "latents/a.png.safetensors").latent_digest
    again = decode_folder(
        tmp_path / "latents", tmp_path / "out", vae=opened_vae, options=DecodeOptions(format=format, quality=quality)
    )
    assert (again.done, again.skipped) == (0, 1)


# --------------------------------------------------------------------------------------------------------------- names


def test_names_that_collide_keep_apart_and_stay_when_files_are_added(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    before = times_below(tmp_path)
    make_images(images, {"a.jpg": (24, 24), "A.png": (32, 32)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    report = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (report.done, report.skipped) == (2, 1)
    outputs = files_below(tmp_path / "out")
    assert len({name.casefold() for name in outputs}) == 3
    assert len({name.casefold() for name in files_below(tmp_path / "latents")}) == 3
    assert {size_of(tmp_path / "out" / name) for name in outputs} == {(16, 16), (24, 24), (32, 32)}
    assert size_of(tmp_path / "out/a.png") == (16, 16)
    assert size_of(tmp_path / "out/a.jpg.png") == (24, 24)
    after = times_below(tmp_path)
    assert {name: time for name, time in after.items() if name in before and "images" not in name} == {
        name: time for name, time in before.items() if "images" not in name
    }


def test_a_part_of_the_latents_leaves_the_images_of_the_others_alone(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "a.jpg": (24, 24)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    for name, expected in (("a.png", ["a.png"]), ("a.jpg", ["a.jpg.png", "a.png"])):
        decode_folder(tmp_path / f"latents/{name}.safetensors", tmp_path / "out", vae=opened_vae)
        assert files_below(tmp_path / "out") == expected
    assert size_of(tmp_path / "out/a.png") == (16, 16)


def test_a_file_name_that_is_no_utf8_goes_through(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    name = os.fsdecode(b"caf\xe9.png")
    try:
        os.rename(images / "a.png", images / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    encoded = encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decoded = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (encoded.done, decoded.done) == (1, 1)
    assert (tmp_path / "out" / name).is_file()
    json.dumps(encoded.to_json())


def test_a_glob_and_a_single_file_name_latents_too(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a/1.png": (16, 16), "a/2.png": (16, 16), "b/3.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(f"{tmp_path}/latents/*/?.png.safetensors", tmp_path / "glob", vae=opened_vae)
    assert files_below(tmp_path / "glob") == ["a/1.png", "a/2.png", "b/3.png"]
    decode_folder(tmp_path / "latents/a/1.png.safetensors", tmp_path / "one", vae=opened_vae)
    assert files_below(tmp_path / "one") == ["1.png"]
    with pytest.raises(ConfigError, match="no latent files found"):
        decode_folder(images, tmp_path / "none", vae=opened_vae)


# --------------------------------------------------------------------------------------------------------- second runs


def test_a_second_run_does_nothing_and_a_touched_file_is_recognised(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", SIZES)
    for _ in range(2):
        encoded = encode_folder(images, tmp_path / "latents", vae=opened_vae)
        decoded = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
        times = times_below(tmp_path)
        os.utime(images / "photo.jpg", (1, 1))
    assert (encoded.done, encoded.skipped, decoded.done, decoded.skipped) == (0, 5, 0, 5)
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    times.pop("images/photo.jpg")
    assert times.items() <= times_below(tmp_path).items()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"store": "mode"}, "stored as moments in float16"),
        ({"latent_dtype": "float32"}, "stored as moments in float16"),
        ({"size": 16}, "other preprocessing"),
        ({"background": "black"}, "other preprocessing"),
        ({"dtype": "bfloat16"}, "computed in float32"),
        ({"batch_size": 1}, None),
        ({"workers": 1}, None),
        ({"seed": 3}, None),  # moments are not drawn
    ],
)
def test_options_that_change_the_latents_make_them_stale(
    tmp_path: Path,
    make_images: MakeImages,
    vae_path: Path,
    opened_vae: OpenedVae,
    changes: dict[str, object],
    reason: str | None,
) -> None:
    vae = vae_path if "dtype" in changes else opened_vae  # that computes in its own
    images = make_images(tmp_path / "images", {"a.png": (24, 24)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    run = EncodeRun(images, tmp_path / "latents", vae, EncodeOptions(**changes))  # type: ignore[arg-type]
    (item,) = run.plan.items
    assert item.reason == ("up to date" if reason is None else f"stale: {reason}")
    assert run.run().done == (0 if reason is None else 1)
    assert EncodeRun(images, tmp_path / "latents", vae, EncodeOptions(**changes)).plan.jobs == ()  # type: ignore[arg-type]


def test_latents_and_their_files_have_the_statistics_of_the_vae(
    tmp_path: Path, make_images: MakeImages, make_vae: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (24, 24)})
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 0.5, 1.0, 4.0)
    vae = make_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    encode_folder(images, tmp_path / "latents", vae=vae)
    path = tmp_path / "latents/a.png.safetensors"
    file = LatentFile.read(path)
    assert (file.header.vae.latents_mean, file.header.vae.latents_std) == (mean, std)
    expected = (file.z() - torch.tensor(mean).view(4, 1, 1)) * 0.5 / torch.tensor(std).view(4, 1, 1)
    torch.testing.assert_close(file.latents(), expected)
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=vae)

    # a file of before the statistics were recorded is done again, for its latents would come out wrong
    old = replace(file.header, vae=replace(file.header.vae, latents_mean=None, latents_std=None))
    LatentFile(header=old, tensors=file.tensors).write(path)
    (item,) = EncodeRun(images, tmp_path / "latents", vae).plan.items
    assert item.reason == "stale: written without the VAE's latents_mean and latents_std"
    assert decode_folder(tmp_path / "latents", tmp_path / "out", vae=vae).skipped == 1  # z and its image are as before
    assert encode_folder(images, tmp_path / "latents", vae=vae).done == 1
    assert LatentFile.read(path).header == file.header


def test_statistics_for_another_number_of_channels_are_refused(
    tmp_path: Path, make_images: MakeImages, make_vae: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (24, 24)})
    with pytest.raises(CheckpointError, match="latents_std has 3 values; expected 4"):
        encode_folder(images, tmp_path / "latents", vae=make_vae(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 3))
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("size", [None, 64, 60])
def test_the_plan_for_kohya_refuses_the_sizes_that_the_run_cannot_write(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, size: int | None
) -> None:
    sizes = {f"{width}x{height}.png": (width, height) for width in (64, 68, 96) for height in (64, 70, 97)}
    images = make_images(tmp_path / "images", sizes)
    turned = Image.Exif()
    turned[274] = 6  # lies on its side
    with Image.open(images / "96x64.png") as image:
        image.save(images / "turned.jpg", exif=turned)
    options = EncodeOptions(format="kohya-npz", size=size)
    run = EncodeRun(images, tmp_path / "out", opened_vae, options)
    encoded_at = {
        path.name: load_image(ImageFile(path.name, path), preprocessing_of(options)).pixels.shape[:2]
        for path in images.iterdir()
    }
    expected = {name for name, (height, width) in encoded_at.items() if width % 8 or height % 8}
    planned = {item.key: item.reason for item in run.plan.failures}
    assert planned.keys() == expected
    for name, reason in planned.items():
        height, width = encoded_at[name] if name != "turned.jpg" else encoded_at[name][::-1]  # as stored, like its name
        assert reason.startswith(f"would be encoded at {width} x {height} px, but kohya's buckets")
    report = run.run()
    assert {failure.key: failure.reason for failure in report.failures} == planned
    assert report.done == 10 - len(expected) and (size == 60) == (report.done == 0)


def test_a_large_jpeg_is_decoded_small_where_it_is_resized_and_its_size_is_recorded_whole(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.jpg": (331, 245), "b.png": (331, 245)})
    encode_folder(images, tmp_path / "small", vae=opened_vae, options=EncodeOptions(size=24))
    encode_folder(images, tmp_path / "whole", vae=opened_vae)
    for name in ("a.jpg", "b.png"):
        small, whole = (read_header(tmp_path / kind / f"{name}.safetensors") for kind in ("small", "whole"))
        assert (small.source.width, small.source.height) == (331, 245)
        assert (small.image.width, small.image.height) == (32, 24)  # 32.4: by the size of the whole picture
        assert (small.preprocessing.jpeg_margin, whole.preprocessing.jpeg_margin) == (JPEG_MARGIN, None)
    with_margin = small.preprocessing
    without = replace(with_margin, jpeg_margin=None)

    def pixels(name: str, preprocessing: Preprocessing) -> np.ndarray:
        return load_image(ImageFile(name, images / name), preprocessing).pixels

    assert not np.array_equal(pixels("a.jpg", with_margin), pixels("a.jpg", without))
    assert np.array_equal(pixels("b.png", with_margin), pixels("b.png", without))


def written_before_there_was_a_jpeg_margin(latent_path: Path) -> None:
    """Make a latent file what an earlier sdvae would have written: no such field, and the digest without it."""
    file = LatentFile.read(latent_path)
    header = replace(file.header, preprocessing=replace(file.header.preprocessing, jpeg_margin=None))
    data = header.to_json()
    assert data["preprocessing"].pop("jpeg_margin") is None
    fields = {"version": 1, "background": "white", "size": data["preprocessing"]["size"], "crop": "none"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert data["preprocessing"]["digest"] == f"sha256:{digest}"
    metadata = {"format": "sdvae-latent", "sdvae": json.dumps(data)}
    latent_path.write_bytes(safetensors.torch.save(dict(file.tensors), metadata=metadata))


def test_latents_of_wholly_decoded_jpegs_are_stale_only_where_they_would_be_reduced_now(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    """24 px twice are 48: from a short side of 96 on, half of it is enough."""
    images = make_images(tmp_path / "images", {"large.jpg": (130, 96), "small.jpg": (130, 95)})
    for size, stale in ((24, {"large.jpg"}), (None, set())):
        latents = tmp_path / f"latents-{size}"
        encode_folder(images, latents, vae=opened_vae, options=EncodeOptions(size=size))
        for path in latents.glob("*.safetensors"):
            written_before_there_was_a_jpeg_margin(path)
        run = EncodeRun(images, latents, opened_vae, EncodeOptions(size=size))
        assert {item.key: item.reason for item in run.plan.jobs} == dict.fromkeys(stale, "stale: other preprocessing")
        assert run.run().done == len(stale)
        assert EncodeRun(images, latents, opened_vae, EncodeOptions(size=size)).plan.jobs == ()
        report = verify_cache(latents, images=images, vae=opened_vae)
        assert (report.problems, report.warnings) == ((), ())


def test_a_decoded_image_stays_up_to_date_where_its_latent_has_no_jpeg_margin(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.jpg": (64, 48)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    written_before_there_was_a_jpeg_margin(tmp_path / "latents/a.jpg.safetensors")
    assert DecodeRun(tmp_path / "latents", tmp_path / "out", opened_vae).plan.jobs == ()


@pytest.mark.parametrize(
    ("suffix", "fields", "named", "unnamed"),
    [
        ("sd", {"scaling_factor": 0.18215, "shift_factor": 0.1}, ["shift_factor 0.1"], ["scaling_factor"]),
        ("sd", {"scaling_factor": 0.5}, ["scaling_factor 0.5"], ["shift_factor", "latents_mean"]),
        ("sdxl", {"scaling_factor": 0.5, "shift_factor": 0.1}, ["scaling_factor 0.5 and shift_factor 0.1"], []),
        (
            "sdxl",
            {"scaling_factor": 0.13025, "shift_factor": 0.1, "latents_mean": (0.1,) * 4, "latents_std": (2.0,) * 4},
            ["latents_mean and latents_std"],
            ["scaling_factor", "shift_factor"],
        ),
    ],
)
def test_the_warning_for_kohya_names_what_its_trainers_leave_out(
    tmp_path: Path,
    make_images: MakeImages,
    make_vae: Callable[..., Path],
    suffix: str,
    fields: dict[str, object],
    named: list[str],
    unnamed: list[str],
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    out, vae = tmp_path / "out", make_vae(**fields)
    (warning,) = encode_folder(
        images, out, vae=vae, options=EncodeOptions(format="kohya-npz", kohya_suffix=suffix)
    ).warnings
    assert all(word in warning for word in named) and not any(word in warning for word in unnamed)
    assert f"--fold-scale {0.18215 if suffix == 'sd' else 0.13025}" in warning


def test_a_changed_source_and_another_vae_make_latents_and_images_stale(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, other_vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (24, 24), "b.png": (24, 24)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    status = (images / "b.png").stat()
    make_images(images, {"b.png": (40, 40)})
    os.utime(images / "b.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` leaves it: the size tells
    plan = EncodeRun(images, tmp_path / "latents", opened_vae).plan
    assert [(item.key, item.reason) for item in plan.items] == [
        ("a.png", "up to date"),
        ("b.png", "stale: the source changed"),
    ]
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    decoded = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (decoded.done, decoded.skipped, size_of(tmp_path / "out/b.png")) == (1, 1, (40, 40))

    encoded = encode_folder(images, tmp_path / "latents", vae=other_vae_path)
    assert encoded.done == 2
    assert decode_folder(tmp_path / "latents", tmp_path / "out", vae=other_vae_path).done == 2
    plan = DecodeRun(tmp_path / "latents", tmp_path / "out", other_vae_path).plan
    assert {item.reason for item in plan.items} == {"up to date"}


def test_files_of_others_are_replaced_only_when_asked(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "b.png": (16, 16)})
    latent, picture = tmp_path / "latents/a.png.safetensors", tmp_path / "out/a.png"
    shutil.copytree(vae_path, tmp_path / "latents")
    shutil.copy(vae_path / "diffusion_pytorch_model.safetensors", latent)
    report = encode_folder(images, tmp_path / "latents", vae=opened_vae)
    assert (report.done, report.failed, report.exit_code) == (1, 1, 3)
    assert "is no latent file of sdvae" in report.failures[0].reason and "--overwrite" in report.failures[0].reason
    assert encode_folder(images, tmp_path / "latents", vae=opened_vae, options=EncodeOptions(overwrite=True)).done == 2
    (tmp_path / "latents/diffusion_pytorch_model.safetensors").unlink()

    make_images(tmp_path / "out", {"a.png": (3, 3)})
    report2 = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (report2.done, report2.failed, size_of(picture)) == (1, 1, (3, 3))
    assert (
        decode_folder(
            tmp_path / "latents", tmp_path / "out", vae=opened_vae, options=DecodeOptions(overwrite=True)
        ).done
        == 2
    )
    assert size_of(picture) == (16, 16)


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_bad_image_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(6)})
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    (images / "4.png").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    report = encode_folder(images, tmp_path / "latents", vae=opened_vae, on_progress=lambda *n: seen.append(n))
    assert (report.total, report.done, report.failed, report.exit_code) == (6, 4, 2, 3)
    assert [failure.key for failure in report.failures] == ["2.png", "4.png"]
    assert report.failures[1].reason == "is empty (0 bytes)"
    assert seen[-1] == (6, 6) and len(seen) == 6
    assert len(files_below(tmp_path / "latents")) == 4


def test_bad_latents_are_recorded_and_the_rest_goes_on(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(3)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    path = tmp_path / "latents/1.png.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = decode_folder(tmp_path / "latents", tmp_path / "out", vae=opened_vae)
    assert (report.done, [failure.key for failure in report.failures], report.exit_code) == (2, ["1.png"], 3)


def test_latents_of_another_vae_are_refused_unless_allowed(
    tmp_path: Path, make_images: MakeImages, vae_path: Path, opened_vae: OpenedVae, other_vae_path: Path
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "b.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", vae=opened_vae)
    with pytest.raises(LatentFileError, match=f"made by the VAE '{vae_path}'.*--allow-other-vae"):
        decode_folder(tmp_path / "latents", tmp_path / "out", vae=other_vae_path)
    assert not (tmp_path / "out").exists()
    encode_folder(images / "b.png", tmp_path / "latents", vae=other_vae_path)
    mixed = decode_folder(tmp_path / "latents", tmp_path / "out", vae=other_vae_path)
    assert (mixed.done, mixed.failed, files_below(tmp_path / "out")) == (1, 1, ["b.png"])
    assert mixed.failures[0].reason.startswith("made by another VAE")
    allowed = decode_folder(
        tmp_path / "latents", tmp_path / "out", vae=other_vae_path, options=DecodeOptions(allow_other_vae=True)
    )
    assert (allowed.done, allowed.skipped) == (1, 1)


def test_when_memory_runs_out_the_run_goes_on_image_by_image_and_says_so(
    tmp_path: Path, make_images: MakeImages, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {f"{i}.png": (16, 16) for i in range(7)} | {"large.png": (48, 48)})
    batches: list[int] = []
    encode = vae.encode

    def encode_in_little_memory(x: torch.Tensor) -> object:
        batches.append(len(x))
        if len(x) > 1 or x.shape[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return encode(x)

    monkeypatch.setattr(vae, "encode", encode_in_little_memory)
    report = encode_folder(images, tmp_path / "latents", vae=vae, options=EncodeOptions(batch_size=3))
    assert (report.done, [failure.key for failure in report.failures]) == (7, ["large.png"])
    assert report.failures[0].reason.startswith("out of memory at 48 x 48 px")
    assert report.warnings == ("out of memory with a batch of 3: went on image by image",)
    assert sorted(batches) == [1] * 8 + [3]


def test_the_advice_at_out_of_memory_fits_what_is_done(
    tmp_path: Path, make_images: MakeImages, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", vae=vae)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae, "encode", fail)
    monkeypatch.setattr(vae, "decode", fail)
    encoded = encode_folder(images, tmp_path / "others", vae=vae).failures[0].reason
    decoded = decode_folder(tmp_path / "latents", tmp_path / "out", vae=vae).failures[0].reason
    assert "a smaller --size" in encoded
    assert decoded == "out of memory at 16 x 16 px: use a lower --max-memory, or a device with more memory"


def test_a_full_disk_stops_the_run_with_what_to_do_and_the_next_run_goes_on(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {f"{i:02}.png": (16, 16) for i in range(20)})
    written, fsync = 0, os.fsync

    def fsync_on_a_small_disk(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 6:  # the first is the manifest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_on_a_small_disk)
        with pytest.raises(SdvaeError, match=r"No space left.*MB free.*5 of 20 files were written.*again to continue"):
            encode_folder(images, tmp_path / "latents", vae=opened_vae, options=EncodeOptions(batch_size=1, workers=1))
    assert len(files_below(tmp_path / "latents")) == 5
    assert written < 13  # it stopped, and did not try all the others
    report = encode_folder(images, tmp_path / "latents", vae=opened_vae)
    assert (report.done, report.skipped) == (15, 5)


def test_an_output_that_cannot_be_written_is_recorded(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16), "sub/b.png": (16, 16)})
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/sub").write_text("in the way")
    report = encode_folder(images, tmp_path / "latents", vae=opened_vae)
    assert (report.done, report.failed) == (1, 1)
    assert "sub" in report.failures[0].reason and "cannot be written" in report.failures[0].reason


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_done(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        encode_folder(images, images / "a.png", vae=opened_vae)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"store": "means"}, "store is 'means'; expected one of moments, mode, sample"),
        ({"crop": "center"}, "no size is given"),
        ({"size": 0}, "size is 0; expected 1 or more"),
        ({"background": "blurple"}, "background is 'blurple'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"shard_size": 10}, "shard_size is given, but the format safetensors .*; webdataset and parquet have"),
        ({"shard_size": 1000, "format": "kohya-npz"}, "shard_size is given, but the format kohya-npz"),
        ({"shard_size": 0, "format": "parquet"}, "shard_size is 0"),
        ({"kohya_suffix": "sd"}, "kohya_suffix is given, but the format safetensors .*; kohya-npz has"),
        ({"kohya_suffix": "sd3", "format": "kohya-npz"}, "kohya_suffix is 'sd3'; expected one of sd, sdxl"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EncodeOptions(**options)  # type: ignore[arg-type]


def test_a_vae_for_other_than_colour_images_is_refused(tmp_path: Path, make_images: MakeImages) -> None:
    images = make_images(tmp_path / "images", {"a.png": (16, 16)})
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ConfigError, match="1 input channels; images have 3"):
        encode_folder(images, tmp_path / "latents", vae=vae)
