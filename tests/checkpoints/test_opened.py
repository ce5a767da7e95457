"""Autoencoders of every class behind one interface, at any image size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from vaes import vae_fields

from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.checkpoints.store import load_autoencoder
from sdvae.data.images import round_to_8_bits
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import DiagonalGaussian, Encoding

CPU = torch.device("cpu")


def kl(**fields: Any) -> Any:
    return AutoencoderKL(**vae_fields(8, 8, **fields))


def dc() -> Any:
    blocks = {side + "_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
    widths = {side + "_block_out_channels": (8, 8, 16) for side in ("encoder", "decoder")}
    layers = {side + "_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
    scales = {side + "_qkv_multiscales": ((), (), (5,)) for side in ("encoder", "decoder")}
    return diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=8, scaling_factor=0.41, **blocks, **widths, **layers, **scales
    )


def asymmetric() -> Any:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        down_block_out_channels=(8, 8, 8),
        up_block_types=("UpDecoderBlock2D",) * 3,
        up_block_out_channels=(8, 16, 16),
        norm_num_groups=4,
    )


def vq() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.VQModel(**blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16)


def consistency() -> Any:
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8,) * 4,
        encoder_norm_num_groups=4,
        encoder_layers_per_block=1,
        decoder_block_out_channels=(8,) * 4,
        decoder_norm_num_groups=4,
        decoder_layers_per_block=1,
    )


def tiny(channels: int = 4) -> Any:
    widths = {side + "_block_out_channels": (8,) * 4 for side in ("encoder", "decoder")}
    return diffusers.AutoencoderTiny(latent_channels=channels, **widths)


# builder, ratio, channels, scaling factor, has a posterior
CLASSES: list[tuple[Callable[[], Any], int, int, float, bool]] = [
    (lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), 2, 16, 0.18215, True),
    (tiny, 8, 4, 1.0, False),
    (asymmetric, 4, 4, 0.18215, True),
    (dc, 4, 8, 0.41, False),
    (vq, 2, 3, 0.18215, False),
    (consistency, 8, 4, 0.18215, True),
]
NAMES = ["kl16", "tiny", "asymmetric", "dc", "vq", "consistency"]


def picture(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def subject(vae_path: Path) -> OpenedVae:
    return open_any_vae(vae_path, CPU, torch.float32)


@pytest.mark.parametrize(("build", "ratio", "channels", "scale", "has_posterior"), CLASSES, ids=NAMES)
def test_every_class_takes_images_of_odd_sizes(
    build: Callable[[], Any], ratio: int, channels: int, scale: float, has_posterior: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "vae")
    subject = open_any_vae(tmp_path / "vae", CPU, torch.float32)
    assert (subject.class_name, subject.dtype_name) == (type(model).__name__, "float32")
    assert subject.digest == autoencoder_digest(model)
    assert subject.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (subject.spatial_compression_ratio, subject.latent_channels) == (ratio, channels)
    assert (subject.scale.scaling_factor, subject.scale.shift_factor) == (scale, 0.0 if build is tiny else None)
    x = picture(2, 67, 101)
    encoding = subject.encode(x)
    assert encoding.z.shape == (2, channels, -(-67 // ratio), -(-101 // ratio))
    assert (encoding.posterior is not None) == has_posterior
    recon = subject.decode(encoding.z, 67, 101)
    assert recon.shape == x.shape and recon.dtype == encoding.z.dtype == torch.float32
    # one image of the batch alone gives the same
    alone = subject.encode(x[1:])
    assert torch.allclose(alone.z, encoding.z[1:], atol=1e-5)
    assert torch.allclose(subject.decode(alone.z, 67, 101), recon[1:], atol=1e-4)


@pytest.mark.parametrize(("build", "ratio"), [(each[0], each[1]) for each in CLASSES], ids=NAMES)
def test_what_is_padded_repeats_the_edge_and_is_cut_off_again(build: Callable[[], Any], ratio: int) -> None:
    torch.manual_seed(0)
    subject = open_any_vae(build().eval(), CPU, torch.float32)
    x = picture(1, 16, 24)[..., : 16 - ratio + 1, : 24 - ratio + 1]
    padded = nn.functional.pad(x, (0, ratio - 1, 0, ratio - 1), mode="replicate")
    z, of_padded = subject.encode(x).z, subject.encode(padded).z
    assert torch.allclose(z, of_padded, atol=1e-6)
    whole = subject.decode(z, 16, 24)
    assert torch.equal(subject.decode(z, *x.shape[2:]), whole[..., : x.shape[2], : x.shape[3]])


def test_ours_gives_what_the_model_gives(vae_path: Path, subject: OpenedVae) -> None:
    model, x = load_autoencoder(vae_path), picture(2, 64, 40)
    with torch.inference_mode():
        posterior = model.encode(x).latent_dist
        recon = model.decode(posterior.mode()).sample
    encoding = subject.encode(x)
    assert encoding.posterior is not None
    assert torch.allclose(encoding.z, posterior.mean, atol=1e-5)
    assert torch.allclose(encoding.posterior.logvar, posterior.logvar, atol=1e-5)
    assert torch.allclose(subject.decode(encoding.z, 64, 40), recon, atol=1e-5)


def test_the_bundled_vae_opens_without_a_reference() -> None:
    subject = open_any_vae(None, CPU, torch.float32)
    assert subject.name == "sdvae-mini" and subject.class_name == "AutoencoderKL"
    x = picture(1, 24, 24) * 0 + 0.5
    recon = subject.decode(subject.encode(x).z, 24, 24)
    assert float((recon - x).abs().mean()) < 0.1


def test_a_draw_has_one_stream_per_image_and_needs_one_for_each(subject: OpenedVae) -> None:
    encoding = subject.encode(picture(3, 16, 16))
    together = encoding.draw([torch.Generator().manual_seed(seed) for seed in range(3)])
    assert encoding.posterior is not None
    alone = Encoding(z=encoding.z[1:2], posterior=DiagonalGaussian(encoding.posterior.moments[1:2]))
    assert torch.equal(alone.draw([torch.Generator().manual_seed(1)]), together[1:2])
    assert not torch.equal(together, encoding.z)
    with pytest.raises(ValueError, match="1 generators for 3 images"):
        encoding.draw([torch.Generator()])


def test_a_draw_without_a_posterior_is_z() -> None:
    encoding = open_any_vae(tiny().eval(), CPU, torch.float32).encode(picture(1, 16, 16))
    assert encoding.draw([torch.Generator()]) is encoding.z


@pytest.mark.parametrize("build", [tiny, dc], ids=["tiny", "dc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_a_copy_and_gives_nearly_the_same(build: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build().eval()
    subject = open_any_vae(model, CPU, torch.float32)
    half = subject.in_dtype(dtype)
    assert half.dtype_name == str(dtype).removeprefix("torch.")
    assert (half.digest, half.scale, half.num_parameters) == (subject.digest, subject.scale, subject.num_parameters)
    assert {parameter.dtype for parameter in half.model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}
    x = picture(1, 20, 20)
    recon, rough = (each.decode(each.encode(x).z, 20, 20) for each in (subject, half))
    assert rough.dtype == torch.float32
    assert 0 < float((rough - recon).abs().max()) < 0.2


def test_a_loaded_model_is_not_changed() -> None:
    model = kl().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    subject = open_any_vae(model, CPU, torch.bfloat16)
    assert subject.model is not model and model.training and not subject.model.training
    assert subject.dtype == next(subject.model.parameters()).dtype == torch.bfloat16
    assert subject.digest == autoencoder_digest(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ready = kl().eval()
    assert open_any_vae(ready, CPU, torch.float32).model is ready


def test_tiles_are_on_within_the_context_only(vae_path: Path) -> None:
    subject = open_any_vae(vae_path, CPU, torch.float32)  # sample_size 32
    x = picture(1, 64, 64)
    whole = subject.encode(x).z
    with subject.tiled("blended"):
        assert not torch.allclose(subject.encode(x).z, whole, atol=1e-4)
    assert torch.equal(subject.encode(x).z, whole)
    model: Any = subject.model
    model.enable_tiling()
    with pytest.raises(RuntimeError, match="stop"), subject.tiled("off"):
        assert torch.equal(subject.encode(x).z, whole)
        raise RuntimeError("stop")
    assert model.use_tiling


@pytest.mark.parametrize("build", [asymmetric, lambda: tiny(16)], ids=["asymmetric", "tiny16"])
def test_a_class_without_tiles_says_so(build: Callable[[], Any]) -> None:
    subject = open_any_vae(build().eval(), CPU, torch.float32)
    with subject.tiled("off"):
        subject.encode(picture(1, 16, 16))
    with pytest.raises(ConfigError, match="has no tiled mode"), subject.tiled("blended"):
        pass


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # inside diffusers
def test_a_network_that_takes_no_images_is_refused() -> None:
    sound = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )
    with pytest.raises(
        CheckpointError, match=r"AutoencoderOobleck does not take images: a pass over \(1, 3, 128, 128\)"
    ):
        open_any_vae(sound.eval(), CPU, torch.float32)
    with pytest.raises(CheckpointError, match="AutoencoderKL does not take images"):
        open_any_vae(kl(in_channels=4).eval(), CPU, torch.float32)
    with pytest.raises(CheckpointError, match=r"and of that \(1, 4, 128, 128\); expected"):
        open_any_vae(kl(out_channels=4).eval(), CPU, torch.float32)


def test_taesd_reconstructs_a_photograph_and_its_z_are_latents(taesd_path: Path, assets: Path) -> None:
    from sdvae.data.images import read_image

    path = sorted((assets / "images" / "val").iterdir())[0]
    pixels = torch.from_numpy(read_image(path).pixels[:120, :150].copy()).permute(2, 0, 1)[None]
    subject = open_any_vae(taesd_path, CPU, torch.float32)
    encoding = subject.encode(pixels.float() / 127.5 - 1)
    recon = round_to_8_bits(subject.decode(encoding.z, 120, 150))
    mse = float((recon * 255 - pixels).square().mean())
    assert 10 * torch.log10(torch.tensor(255**2 / mse)) > 20
    assert torch.equal(subject.scale.to_latents(encoding.z), encoding.z)
    assert 0.3 < float(encoding.z.std()) < 2  # of about unit variance already, so never multiplied by 0.18215
