"""The swap test: verdicts on pairs whose relation is known, and numbers against direct computation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vaes import build_vae

import sdvae
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.checkpoints.store import load_autoencoder
from sdvae.data.images import read_image, round_to_8_bits
from sdvae.evaluation.swap import SwapTest, _sentence, _verdict, swap_obstacle
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import Encoding

CPU = torch.device("cpu")
PHOTOS = Path(sdvae.__file__).parent / "assets" / "photos"


def subject_of(model: AutoencoderKL) -> OpenedVae:
    return open_any_vae(model.eval(), CPU, torch.float32)


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Photographs, (1, 3, H, W) in [0, 1], of two sizes."""
    pixels = [read_image(path).pixels[100:180, 100:196] for path in sorted(PHOTOS.glob("*.jpg"))[:3]]
    tensors = [torch.from_numpy(each.copy()).permute(2, 0, 1)[None].float() / 255 for each in pixels]
    return [*tensors[:2], tensors[2][..., :67, :51]]


@pytest.fixture(scope="module")
def mini() -> OpenedVae:
    """The bundled VAE: a trained one, whose decoders and encoders fit each other."""
    return open_any_vae(None, CPU, torch.float32)


def altered(change: Callable[[AutoencoderKL], None]) -> OpenedVae:
    model = load_autoencoder()
    with torch.no_grad():
        change(model)
    return subject_of(model)


def run(candidate: OpenedVae, reference: OpenedVae, images: list[Tensor], **metrics: Any) -> SwapTest:
    test = SwapTest(candidate, reference)
    for image in images:
        x = image * 2 - 1
        test.update(candidate.encode(x), reference.encode(x), image, metrics)
    return test


def result(candidate: OpenedVae, reference: OpenedVae, images: list[Tensor], **metrics: Any) -> dict[str, Any]:
    return run(candidate, reference, images, **metrics).result("mine", "theirs")


def test_a_vae_is_a_drop_in_for_itself_without_any_drift(mini: OpenedVae, images: list[Tensor]) -> None:
    found = result(mini, mini, images)
    assert found["verdict"] == "drop-in" and "the encoder is the same" in found["sentence"]
    drift = found["drift"]
    assert drift["latents_rms"] == drift["relative_rms"] == found["decode_loss_db"] == 0
    assert drift["kl_nats"] == pytest.approx(0, abs=1e-3)
    assert drift["correlation"] == pytest.approx([1.0] * 4)
    assert drift["mean"]["mine"] == drift["mean"]["theirs"]
    assert len({entry["psnr"] for row in found["cross_decode"].values() for entry in row.values()}) == 1


@pytest.mark.parametrize(("strength", "worse"), [(0.002, False), (0.5, True)])
def test_another_decoder_on_the_same_latents_is_a_drop_in(
    mini: OpenedVae, images: list[Tensor], strength: float, worse: bool
) -> None:
    def perturb(model: AutoencoderKL) -> None:
        weight = model.decoder.conv_out.weight
        weight += strength * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    found = result(altered(perturb), mini, images)
    assert found["verdict"] == "drop-in" and "the encoder is the same" in found["sentence"]
    assert ("a loss that comes from the decoder alone" in found["sentence"]) == worse
    assert found["drift"]["relative_rms"] < 1e-4  # weights that lie elsewhere in memory are summed in another order
    cross = found["cross_decode"]
    psnr = {(encoder, decoder): cross[encoder][decoder]["psnr"] for encoder in cross for decoder in cross}
    for decoder in cross:
        assert psnr["mine", decoder] == pytest.approx(psnr["theirs", decoder], abs=1e-3)
    assert found["decode_loss_db"] == pytest.approx(psnr["theirs", "theirs"] - psnr["theirs", "mine"])


def test_the_unit_and_origin_of_z_are_no_difference(mini: OpenedVae, images: list[Tensor]) -> None:
    """z' = 2 z + 3 with its own scale and shift: other weights and another z, the same latents and posteriors."""

    def rescale(model: AutoencoderKL) -> None:
        c = model.config.latent_channels
        model.quant_conv.weight[:c] *= 2
        model.quant_conv.bias[:c] = model.quant_conv.bias[:c] * 2 + 3
        model.quant_conv.bias[c:] += 2 * math.log(2)
        model.post_quant_conv.weight /= 2
        model.post_quant_conv.bias -= (model.post_quant_conv.weight * 3).sum(dim=(1, 2, 3))
        model.register_to_config(scaling_factor=model.config.scaling_factor / 2, shift_factor=3.0)

    candidate = altered(rescale)
    x = images[0] * 2 - 1
    assert not torch.allclose(candidate.encode(x).z, mini.encode(x).z, atol=0.5)
    found = result(candidate, mini, images)
    assert found["verdict"] == "drop-in" and "the encoder is the same" in found["sentence"]
    assert found["drift"]["relative_rms"] < 1e-5
    assert found["drift"]["kl_nats"] == pytest.approx(0, abs=1)  # one that forgets the scale: hundreds
    assert found["decode_loss_db"] == pytest.approx(0, abs=1e-3)


def test_forgetting_the_scale_in_the_config_makes_the_space_unfit(mini: OpenedVae, images: list[Tensor]) -> None:
    found = result(
        replace(mini, scale=replace(mini.scale, scaling_factor=mini.scale.scaling_factor * 1.5)), mini, images
    )
    assert found["verdict"] == "fine-tune"
    assert found["drift"]["relative_rms"] > 0.4
    assert found["drift"]["std"]["mine"] == pytest.approx([1.5 * std for std in found["drift"]["std"]["theirs"]])


def noisy_encoder(strength: float) -> Callable[[AutoencoderKL], None]:
    def change(model: AutoencoderKL) -> None:
        weight = model.encoder.conv_out.weight
        weight += strength * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    return change


def test_the_verdict_follows_a_growing_drift_of_the_encoder(mini: OpenedVae, images: list[Tensor]) -> None:
    found = [result(altered(noisy_encoder(strength)), mini, images) for strength in (0.005, 0.25, 8.0)]
    assert [each["verdict"] for each in found] == ["drop-in", "fine-tune", "different"]
    assert "the encoder is the same" not in found[0]["sentence"]
    # the decoder is the reference's own, so text-to-image is not touched
    assert "text-to-image can use the candidate's decoder at once" in found[1]["sentence"]
    assert "trained anew" in found[2]["sentence"]


def test_permuted_and_negated_channels_are_another_space(mini: OpenedVae, images: list[Tensor]) -> None:
    def permute(model: AutoencoderKL) -> None:
        order = [1, 2, 3, 0]
        model.quant_conv.weight[:] = model.quant_conv.weight[order + [4 + c for c in order]]
        model.quant_conv.bias[:] = model.quant_conv.bias[order + [4 + c for c in order]]
        model.post_quant_conv.weight[:] = model.post_quant_conv.weight[:, order]

    def negate(model: AutoencoderKL) -> None:
        model.quant_conv.weight[:4] *= -1
        model.quant_conv.bias[:4] *= -1
        model.post_quant_conv.weight *= -1

    for change in (permute, negate):
        candidate = altered(change)
        found = result(candidate, mini, images)
        cross = found["cross_decode"]
        assert cross["mine"]["mine"]["psnr"] == pytest.approx(cross["theirs"]["theirs"]["psnr"], abs=0.01)
        assert found["verdict"] == "different" and found["decode_loss_db"] > 3


def test_another_random_vae_is_another_space(vae_path: Path, other_vae_path: Path, images: list[Tensor]) -> None:
    found = result(*(open_any_vae(path, CPU, torch.float32) for path in (vae_path, other_vae_path)), images)
    assert found["verdict"] == "different"
    assert found["drift"]["kl_nats"] > 0


def test_drift_and_matrix_equal_a_direct_computation(vae_path: Path, images: list[Tensor]) -> None:
    reference = open_any_vae(vae_path, CPU, torch.float32)  # shift_factor 0.1
    model = copy.deepcopy(load_autoencoder(vae_path))
    with torch.no_grad():
        noisy_encoder(0.3)(model)
    model.register_to_config(shift_factor=None, scaling_factor=0.3)
    candidate = subject_of(model)
    psnr = IMAGE_METRICS["psnr"].compute
    assert psnr is not None
    l1 = IMAGE_METRICS["l1"].compute
    found = result(candidate, reference, images, l1=l1)
    columns: list[list[np.ndarray[Any, Any]]] = [[], []]
    kl, crossed = [], []
    for image in images:
        ours, theirs = candidate.encode(image * 2 - 1), reference.encode(image * 2 - 1)
        a, b = ours.z.double() * 0.3, (theirs.z.double() - 0.1) * 0.18215
        assert ours.posterior is not None and theirs.posterior is not None
        normals = [
            torch.distributions.Normal(latents, encoding.std.double() * scale)
            for latents, encoding, scale in ((a, ours.posterior, 0.3), (b, theirs.posterior, 0.18215))
        ]
        kl.append(float(torch.distributions.kl_divergence(*normals).sum()))
        recon = candidate.decode((b / 0.3).float(), *image.shape[2:])
        crossed.append(float(psnr(round_to_8_bits(recon), image)))
        for column, latents in zip(columns, (a, b), strict=True):
            column.append(latents[0].flatten(1).numpy())
    a, b = (np.concatenate(column, axis=1) for column in columns)
    drift = found["drift"]
    assert drift["latents_rms"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-6)
    spread = np.sqrt(((b - b.mean(axis=1, keepdims=True)) ** 2).mean())
    assert drift["relative_rms"] == pytest.approx(drift["latents_rms"] / spread, rel=1e-6)
    assert drift["mean"]["mine"] == pytest.approx(a.mean(axis=1), rel=1e-6)
    assert drift["std"]["theirs"] == pytest.approx(b.std(axis=1), rel=1e-6)
    assert drift["correlation"] == pytest.approx([np.corrcoef(a[c], b[c])[0, 1] for c in range(4)], rel=1e-6)
    assert drift["kl_nats"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["cross_decode"]["theirs"]["mine"]["psnr"] == pytest.approx(np.mean(crossed), abs=1e-4)
    assert list(found["cross_decode"]["mine"]["mine"]) == ["psnr", "l1"]


def test_merged_parts_in_any_order_equal_one_pass(vae_path: Path, other_vae_path: Path, images: list[Tensor]) -> None:
    # float64: in float32 the encoders themselves round otherwise for another batch or number of threads
    pair = [open_any_vae(path, CPU, torch.float64) for path in (vae_path, other_vae_path)]
    whole = result(*pair, images)
    merged = SwapTest(*pair)
    for part in (images[2:], [torch.cat(images[:2])]):
        state = run(*pair, part).state()
        merged.merge({name: np.array(array) for name, array in state.items()})
    found = merged.result("mine", "theirs")
    assert json.dumps(found, indent=0).count("\n") == json.dumps(whole, indent=0).count("\n")
    assert found["drift"]["latents_rms"] == pytest.approx(whole["drift"]["latents_rms"], rel=1e-5)
    assert found["drift"]["correlation"] == pytest.approx(whole["drift"]["correlation"], abs=1e-5)
    assert found["drift"]["kl_nats"] == pytest.approx(whole["drift"]["kl_nats"], rel=1e-4)
    assert found["decode_loss_db"] == pytest.approx(whole["decode_loss_db"], abs=1e-3)
    assert found["verdict"] == whole["verdict"]


def test_an_image_where_a_metric_is_undefined_counts_in_no_mean_of_it(mini: OpenedVae, images: list[Tensor]) -> None:
    found = run(mini, mini, [images[0]], sharpness=lambda recon, image: torch.tensor([2.0]))
    found.merge(run(mini, mini, [images[1]], sharpness=lambda recon, image: torch.tensor([math.nan])).state())
    found.merge(run(mini, mini, [images[2]]).state())  # too small for it, so it is not measured at all
    cross = found.result("mine", "theirs")["cross_decode"]
    assert cross["mine"]["theirs"]["sharpness"] == 2.0
    undefined = result(mini, mini, [images[0]], sharpness=lambda recon, image: torch.tensor([math.nan]))
    assert undefined["cross_decode"]["mine"]["mine"]["sharpness"] is None


def test_metrics_see_the_very_image_that_was_given(mini: OpenedVae, images: list[Tensor]) -> None:
    seen: list[int] = []

    def record(recon: Tensor, image: Tensor) -> Tensor:
        seen.append(id(image))
        return torch.zeros(1)

    result(mini, mini, images[:1], l1=record)
    assert seen == [id(images[0])] * 4


def test_latents_that_are_not_finite_are_left_out(mini: OpenedVae, images: list[Tensor]) -> None:
    image = torch.cat(images[:2])
    encoding = mini.encode(image * 2 - 1)
    broken = encoding.z.clone()
    broken[1, 0, 0, 0] = math.inf
    test = SwapTest(mini, mini)
    test.update(Encoding(z=broken, posterior=encoding.posterior), encoding, image)
    assert test.result("a", "b")["num_images"] == 1
    assert test.result("a", "b")["verdict"] == "drop-in"
    lost = SwapTest(mini, mini)
    nothing = Encoding(z=torch.full_like(encoding.z, math.nan), posterior=None)
    lost.update(nothing, encoding, image)
    assert lost.result("a", "b") == {"skipped": "none of 2 images gave finite latents with both"}


def test_latents_of_different_shapes_are_no_pair(mini: OpenedVae) -> None:
    def build(levels: int, channels: int) -> OpenedVae:
        return subject_of(build_vae(*(8,) * levels, latent_channels=channels))

    f8c16, f4c4 = build(4, 16), build(3, 4)
    assert swap_obstacle(mini, mini) is None
    assert "4 latent channels against 16;" in str(swap_obstacle(mini, f8c16))
    assert "4 pixels per latent position along a side against 8;" in str(swap_obstacle(f4c4, mini))
    with pytest.raises(ValueError, match="16 latent channels against 4"):
        SwapTest(f8c16, mini)


def test_kl_is_none_where_one_has_no_posterior(taesd_path: Path, mini: OpenedVae, images: list[Tensor]) -> None:
    taesd = open_any_vae(taesd_path, CPU, torch.float32)
    assert result(taesd, mini, images)["drift"]["kl_nats"] is None
    itself = result(taesd, taesd, images)
    assert itself["drift"]["kl_nats"] is None and itself["verdict"] == "drop-in"


@pytest.mark.parametrize(
    ("relative_rms", "decode_loss", "pooled", "expected"),
    [
        (0.0, 5.0, 1.0, "drop-in"),
        (0.09, 0.4, 0.99, "drop-in"),
        (0.09, 0.6, 0.99, "fine-tune"),
        (0.11, 0.0, 0.99, "fine-tune"),
        (0.09, -3.0, 0.99, "drop-in"),
        (1.0, 0.0, 0.69, "different"),
        (None, 0.0, 0.0, "different"),
    ],
)
def test_the_thresholds_decide(relative_rms: float | None, decode_loss: float, pooled: float, expected: str) -> None:
    assert _verdict(relative_rms, decode_loss, pooled) == expected
    psnr = np.array([[25.0, 24.0], [25.0 - decode_loss, 25.0]])
    sentence = _sentence(expected, relative_rms, pooled, psnr)
    assert sentence.split()[0].rstrip(":").lower() == expected and sentence.endswith(".")
