from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor, nn
from vaes import vae_fields

from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.data.images import image_to_x
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import ConfigError, SdvaeError
from sdvae.evaluation.options import STRESS_NAMES
from sdvae.evaluation.stress.run import STRESS_TESTS, cycles, precision, resolution, run_stress, sampling, seams
from sdvae.evaluation.stress.tiling import Tiling
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.scale import LatentScale
from sdvae.model.tiling import blended_tiles

CPU = torch.device("cpu")
METRICS = {name: IMAGE_METRICS[name].compute for name in ("psnr", "ssim")}
PHOTOS = sorted(Path(str(resources.files("sdvae.assets") / "photos")).glob("*.jpg"))


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, np.ndarray]]:
    """Pieces of photographs, of several sizes, the first no multiple of 8."""
    whole = [(path.name, np.asarray(Image.open(path).convert("RGB"))) for path in PHOTOS[:3]]
    sizes = [(100, 131), (128, 96), (160, 192)]
    return [(name, each[60 : 60 + h, 80 : 80 + w]) for (name, each), (h, w) in zip(whole, sizes, strict=True)]


@pytest.fixture(scope="module")
def bundled() -> OpenedVae:
    return open_any_vae(None, CPU, torch.float32)


class PatchAutoencoder(nn.Module):
    """Codes each 8 x 8 px alone and without loss, so that tiles change nothing; unless each tile is darkened by a part
    of its own mean, as normalisation over a tile does."""

    def __init__(self, of_tile: float = 0.0, dtype_limit: torch.dtype | None = None) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.of_tile = of_tile
        self.use_tiling = False
        self.tile_sample_min_size = 64
        self.tile_overlap_factor = 0.25
        self.dtype_limit = dtype_limit

    def encode(self, x: Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=nn.functional.pixel_unshuffle(x, 8))

    def decode(self, z: Tensor) -> DecoderOutput:
        if self.dtype_limit == z.dtype:
            torch.fft.rfft2(z)  # has no half precision on CPUs
        if self.use_tiling:
            return DecoderOutput(sample=blended_tiles(self._decode, z, tile=8, stride=6, out_stride=48, blend=16))
        return DecoderOutput(sample=self._decode(z))

    def _decode(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(z, 8) - self.of_tile * z.mean(dim=(1, 2, 3), keepdim=True)


def _patch_subject(**options: Any) -> OpenedVae:
    return OpenedVae(
        name="patches",
        model=PatchAutoencoder(**options),
        class_name="PatchAutoencoder",
        digest="sha256:0",
        device=CPU,
        dtype=torch.float32,
        spatial_compression_ratio=8,
        latent_channels=192,
        scale=LatentScale(),
        num_parameters=1,
    )


def _by_hand(subject: OpenedVae, pixels: np.ndarray, passes: int = 1) -> np.ndarray:
    """The picture after so many times encoded, decoded and saved as 8 bits."""
    for _ in range(passes):
        x = image_to_x(pixels)[None]
        recon = subject.decode(subject.encode(x).z, *pixels.shape[:2])[0]
        pixels = ((recon + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _unit(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def test_the_names_are_those_of_the_options() -> None:
    assert tuple(STRESS_TESTS) == STRESS_NAMES


def test_cycles_are_means_against_the_original_of_pictures_saved_and_opened_again(
    bundled: OpenedVae, photos: list[tuple[str, np.ndarray]]
) -> None:
    found = cycles(bundled, photos, METRICS, counts=(3, 1))
    assert found["cycles"] == [1, 3] and found["num_images"] == 3
    for name, metric in METRICS.items():
        for place, passes in enumerate((1, 3)):
            by_hand = [float(metric(_unit(_by_hand(bundled, each, passes)), _unit(each))) for _, each in photos]
            assert found["metrics"][name][place] == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_more_cycles_are_worse(bundled: OpenedVae, photos: list[tuple[str, np.ndarray]]) -> None:
    found = cycles(bundled, photos[1:2], METRICS)
    assert found["cycles"] == [1, 2, 5, 10]
    for values in found["metrics"].values():
        assert sorted(values, reverse=True) == values and values[0] > values[-1]


def test_a_vae_without_loss_stays_perfect_over_cycles(photos: list[tuple[str, np.ndarray]]) -> None:
    found = cycles(_patch_subject(), photos, METRICS, counts=(1, 4))
    assert found["metrics"] == {"psnr": [100.0, 100.0], "ssim": [pytest.approx(1.0), pytest.approx(1.0)]}


def test_an_image_that_is_too_small_for_a_metric_is_left_out_of_its_mean(bundled: OpenedVae) -> None:
    photo = np.asarray(Image.open(PHOTOS[0]).convert("RGB"))[:64, :64]
    images = [("flat", np.full((8, 40, 3), 50, np.uint8)), ("photo", photo)]
    both = cycles(bundled, images, METRICS, counts=(1,))["metrics"]
    large = cycles(bundled, images[1:], METRICS, counts=(1,))["metrics"]
    assert both["ssim"] == large["ssim"] and both["psnr"] != large["psnr"]
    assert cycles(bundled, images[:1], METRICS, counts=(1,))["metrics"]["ssim"] == [None]
    undefined = {"nan": lambda recon, image: torch.tensor([float("nan")])}
    assert cycles(bundled, images, undefined, counts=(1,))["metrics"]["nan"] == [None]


def test_sizes_are_measured_on_central_squares_that_were_never_enlarged(
    bundled: OpenedVae, photos: list[tuple[str, np.ndarray]]
) -> None:
    notes: list[str] = []
    rows = resolution(bundled, photos, METRICS, sizes=(64, 128, 512), note=notes.append)
    assert [(row["size_px"], row["num_images"]) for row in rows] == [(64, 3), (128, 1), (512, 0)]
    assert rows[2]["metrics"] == {}
    square = resize_and_crop(photos[2][1], 128, "center")
    by_hand = float(METRICS["psnr"](_unit(_by_hand(bundled, square)), _unit(square)))
    assert rows[1]["metrics"]["psnr"] == pytest.approx(by_hand, abs=1e-5)
    assert notes == [
        "Resolution: images are never enlarged, so the larger sizes are measured over fewer of them: "
        "3 at 64 px, 1 at 128 px, 0 at 512 px."
    ]
    assert resolution(bundled, photos, METRICS, sizes=(64,), note=notes.append) == rows[:1] and len(notes) == 1


def test_tiles_that_change_nothing_have_no_seam(photos: list[tuple[str, np.ndarray]]) -> None:
    notes: list[str] = []
    (row,) = seams(_patch_subject(), photos, note=notes.append)
    assert row["mode"] == "blended" and row["num_images"] == 3
    # blended tiles of equal values are not bit for bit those values
    assert row["max_difference"] < 1e-6
    assert row["score"] == pytest.approx(0.0, abs=1e-6) and row["num_visible"] == 0 and row["colour_step"] == 0.0
    assert "no seam" in notes[-1]


def test_tiles_that_depend_on_their_own_mean_are_found(photos: list[tuple[str, np.ndarray]]) -> None:
    notes: list[str] = []
    (weak,) = seams(_patch_subject(of_tile=0.02), photos)
    (strong,) = seams(_patch_subject(of_tile=0.3), photos, note=notes.append)
    assert strong["score"] > strong["threshold"] and strong["num_visible"] > 0
    assert strong["score"] > weak["score"] and strong["colour_step"] > 3 > weak["colour_step"] > 0
    assert strong["max_difference"] > 0.05
    assert f"up to {strong['colour_step']:.2f} grey levels" in notes[-1]


def test_the_bundled_vae_in_tiles_differs_from_itself_without(photos: list[tuple[str, np.ndarray]]) -> None:
    subject = open_any_vae(None, CPU, torch.float32)
    subject.model.tile_sample_min_size, subject.model.tile_latent_min_size = 64, 8
    notes: list[str] = []
    (row,) = seams(subject, photos, note=notes.append)
    assert row["colour_step"] > 0.2 and row["max_difference"] > 0.02 and row["score"] > 0
    assert not subject.model.use_tiling
    assert "no two tiles" not in "".join(notes)
    small = [
        (name, image[:64, :48]) for name, image in photos
    ]  # smaller than a tile: without the mirror there were no tiles
    (row,) = seams(subject, small, note=notes.append)
    assert row["max_difference"] > 0.02
    assert "3 of 3 images hold no two tiles of 64 x 64 px, and were continued by mirroring." in " ".join(notes)


def _stock_kl() -> nn.Module:
    return StockAutoencoderKL(**vae_fields(8, 8, 8, 8, norm_num_groups=2, sample_size=64)).eval()


def _tiny() -> nn.Module:
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
    ).eval()
    model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    return model


@pytest.mark.parametrize("build", [_stock_kl, _tiny])
def test_the_ramps_are_where_the_model_blends(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    subject = open_any_vae(build(), CPU, torch.float32)
    model: Any = subject.model
    tiling, side = Tiling.of(model), 2 * model.tile_sample_min_size
    height = 40  # below the stride: one row of tiles
    z = torch.randn(1, 4, height // 8, side // 8)
    rows, columns = tiling.lines((height, side))
    assert rows == []
    first, _, last = columns[:3]
    with subject.tiled("blended"):
        recon = subject.decode(z, height, side)
    one, two = (
        subject.decode(z[..., start // 8 : (start + tiling.tile[1]) // 8], height, tiling.tile[1])
        for start in (0, tiling.stride[1])
    )
    assert torch.allclose(recon[..., :first], one[..., :first], atol=1e-5)  # before the ramp: the first tile alone
    beyond = slice(last, columns[3])
    assert torch.allclose(recon[..., beyond], two[..., last - first : columns[3] - first], atol=1e-5)
    assert not torch.allclose(recon[..., first + 2], one[..., first + 2], atol=1e-5)
    assert not torch.allclose(recon[..., last - 2], two[..., last - 2 - first], atol=1e-5)


def test_the_tiling_of_classes_with_strides() -> None:
    class Strided:
        tile_sample_min_height, tile_sample_min_width = 512, 256
        tile_sample_stride_height, tile_sample_stride_width = 448, 192

    tiling = Tiling.of(Strided())
    assert tiling.lines((960, 448)) == ([448, 480, 512, 896, 928, 960], [192, 224, 256, 384, 416, 448])
    assert tiling.middles((960, 300)) == ([480, 928], [224])


def test_a_model_without_tiles_is_left_out_with_a_note(photos: list[tuple[str, np.ndarray]]) -> None:
    subject = _patch_subject()
    del subject.model.use_tiling
    notes: list[str] = []
    assert seams(subject, photos, note=notes.append) == []
    assert len(notes) == 1 and notes[0].startswith("Seams: not measured; patches:")


def test_precision_of_each_dtype_against_float32(bundled: OpenedVae, photos: list[tuple[str, np.ndarray]]) -> None:
    full, bf16, fp16 = precision(bundled, photos)
    assert [row["dtype"] for row in (full, bf16, fp16)] == ["float32", "bfloat16", "float16"]
    assert (full["max_difference"], full["psnr_against_fp32"], full["finite"]) == (0.0, 100.0, True)
    # the plain numbers of this set, mean over images
    by_hand = [float(METRICS["psnr"](_unit(_by_hand(bundled, each)), _unit(each))) for _, each in photos]
    assert full["psnr"] == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert 0 < fp16["max_difference"] < bf16["max_difference"] < 0.3  # 11 bits of significand against 8
    assert 100 > fp16["psnr_against_fp32"] > bf16["psnr_against_fp32"] > 35
    assert bundled.dtype == torch.float32 and next(bundled.model.parameters()).dtype == torch.float32


def test_precision_of_a_subject_in_half_precision_still_compares_with_float32(
    bundled: OpenedVae, photos: list[tuple[str, np.ndarray]]
) -> None:
    half = bundled.in_dtype(torch.bfloat16)
    rows = precision(half, photos[:1], dtypes=(torch.float32, torch.bfloat16))
    assert rows[0]["max_difference"] == 0.0 < rows[1]["max_difference"]


def test_an_overflow_is_reported(tiny_vae: AutoencoderKL, photos: list[tuple[str, np.ndarray]]) -> None:
    with torch.no_grad():
        tiny_vae.decoder.conv_in.weight.mul_(3e5)  # what follows is normalised: in float32 nothing happens
    subject = open_any_vae(tiny_vae, CPU, torch.float32)
    notes: list[str] = []
    full, half = precision(subject, photos[:1], dtypes=(torch.float32, torch.float16), note=notes.append)
    assert full["finite"] and not half["finite"] and half["max_difference"] is None
    assert half["psnr"] is not None
    assert notes == ["Precision: float16 gives values that are not finite: use bfloat16 or float32."]


def test_a_dtype_without_a_kernel_is_a_note_and_no_crash(photos: list[tuple[str, np.ndarray]]) -> None:
    notes: list[str] = []
    subject = _patch_subject(dtype_limit=torch.bfloat16)
    full, bf16, fp16 = precision(subject, photos, note=notes.append)
    assert set(bf16) == {"dtype", "error"} and bf16["error"]
    assert full["finite"] and fp16["finite"]
    assert len(notes) == 1 and notes[0].startswith("Precision: bfloat16 does not run on cpu:")


def _with_logvar(vae: AutoencoderKL, logvar: float) -> OpenedVae:
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = logvar
    return open_any_vae(vae, CPU, torch.float32)


def test_a_sample_of_a_sure_posterior_is_its_mode(tiny_vae: AutoencoderKL, photos: list[Any]) -> None:
    found = sampling(_with_logvar(tiny_vae, -30.0), photos, METRICS)
    assert found is not None
    assert found["sample"] == pytest.approx(found["mode"], abs=1e-3)
    assert found["psnr_between_samples"] > 75


def test_samples_of_an_unsure_posterior_differ_with_the_seed_and_not_with_the_order(
    tiny_vae: AutoencoderKL, photos: list[Any]
) -> None:
    subject = _with_logvar(tiny_vae, 2.0)
    found, again, other = (sampling(subject, photos, METRICS, seed=seed) for seed in (0, 0, 1))
    assert found is not None and found == again and other is not None
    assert found["psnr_between_samples"] < 60
    assert found["mode"] == other["mode"] and found["sample"] != other["sample"]
    turned = sampling(subject, photos[::-1], METRICS)
    assert turned is not None and turned["sample"] == pytest.approx(found["sample"])
    assert found["mode"]["psnr"] == pytest.approx(cycles(subject, photos, METRICS, counts=(1,))["metrics"]["psnr"][0])


def test_an_encoder_without_a_posterior_is_left_out_with_a_note(photos: list[Any]) -> None:
    notes: list[str] = []
    assert sampling(_patch_subject(), photos, METRICS, note=notes.append) is None
    assert notes == ["Sampling: not measured; the encoder of PatchAutoencoder knows no distribution of z."]


def test_run_gives_what_was_asked_for_and_the_notes(photos: list[Any]) -> None:
    subject = _patch_subject()
    found = run_stress(("cycles", "sampling"), subject, photos, photos, METRICS)
    assert set(found) == {"cycles", "sampling", "notes"}
    assert found["cycles"] == cycles(subject, photos, METRICS) and found["sampling"] is None
    assert len(found["notes"]) == 1
    assert run_stress((), subject, photos, photos, METRICS) == {}
    with pytest.raises(ConfigError, match="'cycle' is no stress test; expected cycles, resolution"):
        run_stress(("cycle",), subject, photos, photos, METRICS)


def test_a_test_that_fails_leaves_the_others(photos: list[Any]) -> None:
    class Broken(PatchAutoencoder):
        def encode(self, x: Tensor) -> AutoencoderTinyOutput:
            if min(x.shape[2:]) == 128:
                raise SdvaeError("this size cannot be encoded")
            return super().encode(x)

    subject = _patch_subject()
    object.__setattr__(subject, "model", Broken())
    found = run_stress(("resolution", "cycles"), subject, photos[2:], photos[2:], METRICS)
    assert found["resolution"] is None and found["cycles"]["num_images"] == 1
    assert found["notes"] == ["Resolution: failed; this size cannot be encoded."]


def test_images_are_taken_one_by_one(photos: list[Any]) -> None:
    """Memory independent of their number: none is read before the last one is done."""
    read: list[int] = []

    class Lazy(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for index, image in enumerate(super().__iter__()):
                read.append(index)
                yield image

    encoded: list[int] = []  # how many were read when an image was encoded

    class Watched(PatchAutoencoder):
        def encode(self, x: Tensor) -> AutoencoderTinyOutput:
            encoded.append(len(read))
            return super().encode(x)

    subject = _patch_subject()
    object.__setattr__(subject, "model", Watched())
    for test in (
        lambda images: cycles(subject, images, METRICS, counts=(1,)),
        lambda images: resolution(subject, images, METRICS, sizes=(64,)),
        lambda images: seams(subject, images),
        lambda images: precision(subject, images),
    ):
        read.clear()
        encoded.clear()
        test(Lazy(photos))
        assert encoded == sorted(encoded) and {*encoded} == {1, 2, 3}
