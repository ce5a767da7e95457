"""Fixtures that several tests share."""

from __future__ import annotations

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each has one core; threads of torch that fight over cores cost tenfold
    os.environ["OMP_NUM_THREADS"] = "1"  # read where torch is first imported, here and in processes of the tests

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae._torchvision import ensure_torchvision_importable

ensure_torchvision_importable()  # before anything here imports diffusers

from vaes import build_vae  # noqa: E402

from sdvae.checkpoints.opened import OpenedVae, open_vae  # noqa: E402
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder  # noqa: E402
from sdvae.model.autoencoder import AutoencoderKL  # noqa: E402

WIDTHS = (8, 16, 16, 16)


@pytest.fixture(scope="session")
def assets() -> Path:
    """External photographs and weights: $SDVAE_TEST_ASSETS, or shared/assets beside the repository."""
    named = os.environ.get("SDVAE_TEST_ASSETS")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"no external test assets at {folder}")
    return folder


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """A small seeded f8 autoencoder with 4 latent channels, in eval mode."""
    return build_vae(*WIDTHS, sample_size=64)


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(build_vae(*WIDTHS, shift_factor=0.1), tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="session")
def opened_vae(vae_path: Path) -> OpenedVae:
    """What opening `vae_path` gives, once for all tests that only use it: opening takes ten times a small image."""
    return open_vae(vae_path)


@pytest.fixture(scope="session")
def other_vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(build_vae(*WIDTHS, seed=1, shift_factor=0.1), tmp_path_factory.mktemp("vae") / "other")


@pytest.fixture
def make_vae(tmp_path: Path) -> Callable[..., Path]:
    """Saves a small autoencoder with other fields, such as latent_channels, and perhaps with damaged weights."""

    def make(name: str = "made", damage: Callable[[AutoencoderKL], None] = lambda vae: None, **fields: Any) -> Path:
        vae = build_vae(*WIDTHS, **fields)
        with torch.no_grad():
            damage(vae)
        return save_autoencoder(vae, tmp_path / "vaes" / name)

    return make


@pytest.fixture(scope="session")
def taesd_path(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published TAESD as a diffusers folder, from its files in the original layout."""
    import diffusers
    from safetensors.torch import load_file

    encoder = load_file(assets / "weights" / "taesd_encoder.safetensors")
    decoder = load_file(assets / "weights" / "taesd_decoder.safetensors")
    state = {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():
        layer, rest = name.split(".", 1)
        state[f"decoder.layers.{int(layer) - 1}.{rest}"] = (
            tensor  # layer 0 is the clamp, which diffusers has no layer for
        )
    model = diffusers.AutoencoderTiny()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    folder = tmp_path_factory.mktemp("vae") / "taesd"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For tiny pipelines: a tokenizer of a few letters, and the configuration of a text encoder for its tokens."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    return {"tokenizer": CLIPTokenizer.from_pretrained(folder, model_max_length=16), "config": config}


@pytest.fixture(scope="session")
def vae(vae_path: Path) -> AutoencoderKL:
    return load_autoencoder(vae_path)


@pytest.fixture
def make_images() -> Callable[[Path, Mapping[str, tuple[int, int]]], Path]:
    """Writes pictures of smooth noise: name -> (width, height)."""

    def make(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
        for index, (name, (width, height)) in enumerate(sizes.items()):
            levels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return folder

    return make
