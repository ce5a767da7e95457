"""verify on kohya-npz caches: each array that kohya's trainers read, damaged while all else agrees, is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import EncodeOptions
from sdvae.codec.run import encode_folder
from sdvae.codec.verify import VerifyReport, verify_cache
from sdvae.errors import LatentFileError
from sdvae.latents import kohya
from sdvae.latents.kohya_check import trainer_problems
from sdvae.latents.manifest import MANIFEST_NAME

Arrays = dict[str, NDArray[Any]]
Damage = Callable[[Arrays], Any]
MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]

NAME = "sub/a_0064x0096_sd.npz"  # of sub/a.png
STORES = ("moments", "mode", "sample")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are not their own mirror images."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for seed, name in enumerate(("sub/a.png", "b.png")):
        levels = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((64, 96), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, images: Path, opened_vae: OpenedVae) -> dict[str, Path]:
    """By `--store`, with the mirrored images."""
    out = tmp_path_factory.mktemp("caches")
    for store in STORES:
        encode_folder(
            images,
            out / store,
            vae=opened_vae,
            options=EncodeOptions(format="kohya-npz", store=store, flip=True, seed=3, size=64),
        )
    return {store: out / store for store in STORES}


def damaged(tmp_path: Path, cache: Path, damage: Damage, manifest: str = "agrees") -> Path:
    """A copy whose file `NAME` has other arrays; its manifest agrees, or is gone."""
    out = shutil.copytree(cache, tmp_path / "cache")
    with np.load(out / NAME) as npz:
        arrays = {name: npz[name] for name in npz.files}
    damage(arrays)
    np.savez(out / NAME, **arrays)
    if manifest == "gone":
        (out / MANIFEST_NAME).unlink()
        return out
    lines = [json.loads(line) for line in (out / MANIFEST_NAME).read_text().splitlines()]
    content = (out / NAME).read_bytes()
    [line] = [line for line in lines[1:] if line["path"] == NAME]
    line |= {"digest": f"sha256:{sha256(content).hexdigest()}", "size_bytes": len(content)}
    (out / MANIFEST_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def reasons(report: VerifyReport) -> str:
    assert {problem.file for problem in report.problems} == {NAME}
    assert report.exit_code == 3
    return " | ".join(problem.reason for problem in report.problems)


def scaled(name: str, factor: float = 0.18215) -> Damage:
    return lambda arrays: arrays.update({name: arrays[name] * arrays[name].dtype.type(factor)})


def edited_header(**changes: Any) -> Damage:
    def damage(arrays: Arrays) -> None:
        header = json.loads(arrays["sdvae"].item())
        arrays["sdvae"] = np.array(json.dumps(header | changes).encode("ascii"))

    return damage


# ---------------------------------------------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("store", STORES)
def test_what_was_written_is_right_with_and_without_the_images(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, store: str, dtype: str
) -> None:
    out = tmp_path / "cache"
    options: dict[str, Any] = {"store": store, "latent_dtype": dtype, "size": 64, "crop": "center", "seed": 9}
    encode_folder(
        images,
        out,
        vae=opened_vae,
        options=EncodeOptions(format="kohya-npz", kohya_suffix="sdxl", flip=True, **options),
    )
    report = verify_cache(out, images=images, vae=opened_vae)
    assert (report.problems, report.warnings, len(report.reencoded)) == ((), (), 2)
    # beside the type of mean, logvar or z, `latents` and `latents_flipped` are of float32
    assert max(each.difference for each in report.reencoded) < (1e-4 if dtype == "float32" else 0.01)


def test_turned_photographs_and_names_with_dots_are_right(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"a.b.jpg": (128, 64), "é ü.png": (64, 64)})
    with Image.open(images / "a.b.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(images / "a.b.jpg", exif=exif)
    encode_folder(images, images, vae=opened_vae, options=EncodeOptions(format="kohya-npz"))
    assert verify_cache(images, images=images, vae=opened_vae).problems == ()


def test_files_for_both_trainers_lie_side_by_side_but_not_of_two_sizes(
    tmp_path: Path, caches: dict[str, Path], images: Path, opened_vae: OpenedVae
) -> None:
    cache = shutil.copytree(caches["moments"], tmp_path / "cache")
    options: dict[str, Any] = {"seed": 3, "size": 64, "flip": True}
    encode_folder(
        images, cache, vae=opened_vae, options=EncodeOptions(format="kohya-npz", kohya_suffix="sdxl", **options)
    )
    assert verify_cache(cache).problems == ()
    shutil.copy(cache / NAME, cache / NAME.replace("0064x0096", "0096x0064"))
    problems = verify_cache(cache).problems
    assert any("the key is in" in problem.reason for problem in problems)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_rounding_of_a_draw_is_measured_at_its_own_size(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, dtype: str
) -> None:
    """What the writer leaves stays inside; three times as much as the type may round does not."""
    encode_folder(
        images, tmp_path / "cache", vae=opened_vae, options=EncodeOptions(format="kohya-npz", latent_dtype=dtype)
    )
    header, arrays = kohya.read_all(tmp_path / "cache" / NAME)
    assert trainer_problems(NAME, header, arrays) == []
    mean, logvar, latents = (arrays[name].astype(np.float32) for name in ("mean", "logvar", "latents"))
    step = 2.0**-11 if dtype == "float16" else 1e-4
    rounding = step * (np.abs(mean) + np.abs(logvar) / 2 * np.abs(latents - mean))
    [reason] = trainer_problems(NAME, header, {**arrays, "latents": latents + 3 * rounding.astype(np.float32)})
    assert "latents is not the draw from mean and logvar by the seed 0" in reason


# ------------------------------------------------------------------------------------------------------ planted damage


@pytest.mark.parametrize("manifest", ["agrees", "gone"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (scaled("latents"), "latents is not the draw from mean and logvar by the seed 3"),
        (scaled("latents", 0), "latents is not the draw"),
        (lambda arrays: arrays.update(latents=arrays["mean"].astype(np.float32)), "latents is not the draw"),
        (lambda arrays: arrays.update(latents=arrays["latents_flipped"]), "latents is not the draw"),
        (lambda arrays: arrays["latents"].__setitem__((1, 2, 3), arrays["latents"][1, 2, 3] + 0.1), "not the draw"),
        (scaled("mean", 1.1), "latents is not the draw"),
        (lambda arrays: arrays.update(logvar=arrays["logvar"] + np.float16(0.5)), "latents is not the draw"),
        (edited_header(seed=None), "no seed of the draw"),
        (lambda arrays: arrays.update(latents=arrays["latents"][:, :-1]), "latents has shape (4, 11, 8)"),
        (lambda arrays: arrays.update(latents=arrays["latents"].astype(np.float64)), "type float64"),
        (lambda arrays: arrays.update(latents_flipped=arrays["latents_flipped"][:3]), "latents_flipped has shape (3,"),
        (lambda arrays: arrays.update(latents_12x8=arrays["latents"]), "has latents_12x8, which sdvae does not write"),
        (lambda arrays: arrays.update(original_size=np.array([96, 64])), "original_size is [96, 64]; by its header"),
        (lambda arrays: arrays.pop("original_size"), "has no original_size"),
        (lambda arrays: arrays.update(crop_ltrb=np.array([0.0, 0, 64, 64])), "crop_ltrb is [0.0, 0.0, 64.0, 64.0]"),
        (lambda arrays: arrays.pop("crop_ltrb"), "has no crop_ltrb"),
    ],
)  # fmt: skip
def test_what_the_trainers_read_is_checked_without_the_images(
    tmp_path: Path, caches: dict[str, Path], damage: Damage, reason: str, manifest: str
) -> None:
    report = verify_cache(damaged(tmp_path, caches["moments"], damage, manifest))
    assert reason in reasons(report)
    assert report.has_manifest == (manifest == "agrees")


@pytest.mark.parametrize("store", ["mode", "sample"])
def test_scaled_latents_that_stand_alone_are_not_of_the_files_precision(
    tmp_path: Path, caches: dict[str, Path], store: str
) -> None:
    """float16: times 0.18215 it has more bits than the type."""
    assert "precision float16" in reasons(verify_cache(damaged(tmp_path, caches[store], scaled("latents"))))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "damage",
    [
        scaled("latents_flipped"),
        scaled("latents_flipped", 0),
        lambda arrays: arrays.update(latents_flipped=arrays["latents"][..., ::-1].copy()),
        lambda arrays: arrays.update(latents_flipped=arrays["latents"]),
    ],
)  # fmt: skip
def test_mirrored_latents_that_are_not_those_of_the_mirrored_image_are_found_by_encoding_it(
    tmp_path: Path, caches: dict[str, Path], images: Path, opened_vae: OpenedVae, store: str, damage: Damage
) -> None:
    cache = damaged(tmp_path, caches[store], damage)
    assert verify_cache(cache).exit_code == 0  # nothing in the file says what they should be
    report = verify_cache(cache, images=images, vae=opened_vae)
    assert "gives another latent: latents_flipped is" in reasons(report)
    assert [each.ok for each in report.reencoded if each.key == "sub/a.png"] == [False]


def test_mirrored_draws_by_the_seed_of_the_image_itself_are_found(
    tmp_path: Path, caches: dict[str, Path], images: Path, opened_vae: OpenedVae
) -> None:
    """A draw from the right posterior with the wrong random numbers is another latent."""
    other = tmp_path / "other"
    encode_folder(images, other, vae=opened_vae, options=EncodeOptions(format="kohya-npz", flip=True, seed=4, size=64))
    with np.load(other / NAME) as npz:
        flipped = npz["latents_flipped"]
    cache = damaged(tmp_path, caches["moments"], lambda arrays: arrays.update(latents_flipped=flipped))
    assert "latents_flipped is" in reasons(verify_cache(cache, images=images, vae=opened_vae))


@pytest.mark.parametrize("store", STORES)
def test_latents_are_compared_with_the_image_too(
    tmp_path: Path, caches: dict[str, Path], images: Path, opened_vae: OpenedVae, store: str
) -> None:
    cache = damaged(tmp_path, caches[store], scaled("latents", 0.5))  # a power of two keeps the precision
    found = reasons(verify_cache(cache, images=images, vae=opened_vae))
    assert "gives another latent: latents is" in found or "gives another latent: z is" in found


def test_some_files_without_the_mirrored_image_are_told(tmp_path: Path, caches: dict[str, Path]) -> None:
    report = verify_cache(damaged(tmp_path, caches["mode"], lambda arrays: arrays.pop("latents_flipped")))
    assert (report.problems, report.warnings) == ((), ("latents_flipped is in 1 of 2 files: not in all",))


def test_files_that_changed_names_are_found_without_a_manifest(tmp_path: Path, caches: dict[str, Path]) -> None:
    cache = damaged(tmp_path, caches["moments"], lambda arrays: None, "gone")
    (cache / NAME).rename(cache / "sub/c_0064x0096_sd.npz")
    [problem] = verify_cache(cache).problems
    assert problem.key == "sub/a.png" and "not the name under which" in problem.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [("latents", np.array("text")), ("mean", np.array([b"x"])), ("latents_flipped", np.zeros((4, 12, 8), ">f4"))],
)
def test_arrays_of_other_types_are_damage_and_no_crash(
    tmp_path: Path, caches: dict[str, Path], name: str, value: NDArray[Any]
) -> None:
    cache = damaged(tmp_path, caches["moments"], lambda arrays: arrays.update({name: value}))
    assert f"damaged latent file: {name} has the type" in reasons(verify_cache(cache))
    with pytest.raises(LatentFileError):
        kohya.read_arrays(cache / NAME)


def test_latents_beyond_the_type_of_z_are_damage_and_no_warning(tmp_path: Path, caches: dict[str, Path]) -> None:
    cache = damaged(tmp_path, caches["mode"], scaled("latents", 1e6))
    assert "z has values that are not finite" in reasons(verify_cache(cache))
