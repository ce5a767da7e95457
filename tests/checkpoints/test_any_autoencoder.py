"""Autoencoders of diffusers' other classes: found, built, and loaded as strictly as our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.run import convert
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.store import bundled_path, load_any_autoencoder
from sdvae.errors import CheckpointError, MissingWeightsError
from sdvae.model.network import Autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def build_tiny() -> Any:
    return diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


def build_vq() -> Any:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_vq_embeddings=16,
    )


def build_counting() -> Any:
    """Its batch norm counts in whole numbers, as part of the weights."""
    return diffusers.AutoencoderKLFlux2(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    build_tiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("build", [build_tiny, build_vq, build_counting])
def test_every_weight_and_the_class_come_back_and_the_random_state_stays(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build()
    model.save_pretrained(tmp_path / "vae")
    state = torch.get_rng_state()
    loaded = load_any_autoencoder(tmp_path / "vae")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert autoencoder_digest(loaded) == autoencoder_digest(model)


def test_a_file_with_a_header_of_ours_is_what_the_header_says_whatever_lies_beside_it(
    vae_path: Path, tiny_path: Path
) -> None:
    file = tiny_path / "mine.safetensors"
    convert(vae_path, file, options=ConvertOptions(to="ldm"))
    assert autoencoder_digest(load_any_autoencoder(file)) == autoencoder_digest(load_any_autoencoder(vae_path))
    file.rename(tiny_path / WEIGHTS)  # now it is a part of the folder
    with pytest.raises(CheckpointError, match="do not fit"):
        load_any_autoencoder(tiny_path / WEIGHTS)


def test_half_precision_files_are_loaded_as_float32(tiny_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(tiny_path / WEIGHTS).items()}
    save_file(half, tiny_path / WEIGHTS)
    model = load_any_autoencoder(tiny_path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in model.state_dict().items())


def test_an_autoencoder_kl_is_ours_in_every_place_that_a_reference_can_name(vae_path: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_path, tmp_path / "pipeline" / "vae")
    places = [vae_path, vae_path / WEIGHTS, tmp_path / "pipeline"]
    models = [load_any_autoencoder(place) for place in places]
    assert {type(model) for model in models} == {Autoencoder}
    assert len({autoencoder_digest(model) for model in models}) == 1
    assert autoencoder_digest(load_any_autoencoder(None)) == autoencoder_digest(load_any_autoencoder(bundled_path()))


def test_another_class_is_found_in_a_pipeline_folder_as_a_pickle_and_as_a_file(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "pipeline" / "vae")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_path, pickled)
    torch.save(load_file(pickled / WEIGHTS), pickled / "diffusion_pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    digests = {
        autoencoder_digest(load_any_autoencoder(place))
        for place in (tiny_path, tmp_path / "pipeline", pickled, tiny_path / WEIGHTS)
    }
    assert len(digests) == 1


def test_shards_of_another_class_are_put_together(tmp_path: Path) -> None:
    model = build_vq()
    model.save_pretrained(tmp_path / "vq", max_shard_size="20KB")
    assert len(list((tmp_path / "vq").glob("*.safetensors"))) > 1
    assert autoencoder_digest(load_any_autoencoder(tmp_path / "vq")) == autoencoder_digest(model)


def test_missing_unexpected_and_misshapen_keys_are_named(tiny_path: Path) -> None:
    tensors = load_file(tiny_path / WEIGHTS)
    tensors["strange.weight"] = tensors.pop("encoder.layers.0.weight")
    tensors["encoder.layers.0.bias"] = torch.zeros(5)
    save_file(tensors, tiny_path / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        load_any_autoencoder(tiny_path)
    for part in ("1 missing (encoder.layers.0.weight", "1 unexpected (strange.weight", "file (5,), model (8,)"):
        assert part in str(error.value)


def test_whole_numbers_are_refused_where_weights_belong(tiny_path: Path) -> None:
    tensors = load_file(tiny_path / WEIGHTS)
    tensors["encoder.layers.0.bias"] = torch.zeros(8, dtype=torch.int8)
    save_file(tensors, tiny_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 not floating point \(encoder.layers.0.bias torch.int8\)"):
        load_any_autoencoder(tiny_path)


def test_values_that_are_not_finite_are_refused(tiny_path: Path) -> None:
    tensors = load_file(tiny_path / WEIGHTS)
    tensors["encoder.layers.0.bias"][3] = torch.nan
    save_file(tensors, tiny_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="`encoder.layers.0.bias` has values that are not finite"):
        load_any_autoencoder(tiny_path)


def test_a_field_that_the_class_ignores_is_refused(tiny_path: Path) -> None:
    edit_config(tiny_path, skip_scaling=True)
    with pytest.raises(CheckpointError, match="unknown field `skip_scaling` of AutoencoderTiny"):
        load_any_autoencoder(tiny_path)


def test_a_configuration_that_the_class_cannot_build_is_refused(tiny_path: Path) -> None:
    edit_config(tiny_path, num_encoder_blocks=[1, 1])
    with pytest.raises(CheckpointError, match="no AutoencoderTiny can be built from it: .*same length"):
        load_any_autoencoder(tiny_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("AutoencoderTinny", "did you mean AutoencoderTiny"), ("UNet2DModel", "no autoencoder of")]
)
def test_a_class_that_is_no_autoencoder_of_diffusers_is_refused(tiny_path: Path, name: str, hint: str) -> None:
    edit_config(tiny_path, _class_name=name)
    with pytest.raises(CheckpointError, match=hint):
        load_any_autoencoder(tiny_path)


def test_an_autoencoder_of_video_is_refused(tmp_path: Path) -> None:
    model = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    model.save_pretrained(tmp_path / "wan")
    with pytest.raises(CheckpointError, match="AutoencoderKLWan is made for video"):
        load_any_autoencoder(tmp_path / "wan")


def test_nothing_at_the_place_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="does not exist"):
        load_any_autoencoder(tmp_path / "none" / "here")
