"""Real Stable Diffusion pipelines, tiny, give with our class what they give with the stock one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdvae.checkpoints.store import to_diffusers
from sdvae.model.autoencoder import AutoencoderKL

Images = np.ndarray[Any, Any]

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **NOISE),
    "PNDM": lambda: PNDMScheduler(skip_prk_steps=True, **NOISE),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that a Stable Diffusion pipeline has beside VAE and scheduler."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    text_config = CLIPTextConfig(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "tokenizer": CLIPTokenizer.from_pretrained(folder, model_max_length=16),
            "text_encoder": CLIPTextModel(text_config).eval(),
            "unet": UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=8,
                cross_attention_dim=16,
            ).eval(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }


@pytest.fixture
def pair(make_pair: Any, levels: Any) -> Any:
    return make_pair(**levels(sample_size=64))


def build(cls: Any, parts: dict[str, Any], vae: Any, scheduler: str = "DDIM") -> Any:
    return quiet(cls(vae=vae, scheduler=SCHEDULERS[scheduler](), **parts))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, **arguments: Any) -> Images:
    """Two images as (2, H, W, 3) in [0, 1]."""
    images = pipeline(
        prompt=["a cat", "the sea"],
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
        **arguments,
    ).images
    assert images.shape[0] == 2 and images.shape[3] == 3
    assert images.std() > 0.05
    assert abs(images[0] - images[1]).max() > 0.05
    return images  # type: ignore[no-any-return]


def photos() -> torch.Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image_gives_equal_images_with_either_class(parts: Any, pair: Any, scheduler: str) -> None:
    ours, stock = (
        generate(build(StableDiffusionPipeline, parts, vae, scheduler), height=64, width=48)
        for vae in (pair.ours, pair.stock)
    )
    assert ours.shape == (2, 64, 48, 3)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_to_image_gives_equal_images_with_either_class(parts: Any, pair: Any, scheduler: str) -> None:
    ours, stock = (
        generate(build(StableDiffusionImg2ImgPipeline, parts, vae, scheduler), image=photos(), strength=0.7)
        for vae in (pair.ours, pair.stock)
    )
    assert ours.shape == (2, 64, 48, 3)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5)


def test_the_switches_of_a_pipeline_reach_our_class(parts: Any, pair: Any) -> None:
    pipelines = [build(StableDiffusionPipeline, parts, vae) for vae in (pair.ours, pair.stock)]
    whole = generate(pipelines[0], height=96, width=72)
    for pipeline in pipelines:
        pipeline.vae.enable_slicing()
        pipeline.vae.enable_tiling()
    assert pair.ours.use_slicing and pair.ours.use_tiling
    ours, stock = (generate(pipeline, height=96, width=72) for pipeline in pipelines)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5)
    assert abs(ours - whole).max() > 1e-3


def test_a_pipeline_made_from_another_takes_our_vae_where_it_is_passed(parts: Any, pair: Any) -> None:
    text_to_image = build(StableDiffusionPipeline, parts, pair.ours)
    # without vae=, diffusers carries over only what is exactly of the class that the new pipeline names
    pipeline = quiet(StableDiffusionImg2ImgPipeline.from_pipe(text_to_image, vae=text_to_image.vae))
    assert pipeline.vae is pair.ours
    stock = build(StableDiffusionImg2ImgPipeline, parts, pair.stock)
    np.testing.assert_allclose(generate(pipeline, image=photos()), generate(stock, image=photos()), rtol=0, atol=1e-5)


# On disk


def test_a_pipeline_saved_with_to_diffusers_needs_nothing_of_ours(parts: Any, pair: Any, tmp_path: Path) -> None:
    pipeline = build(StableDiffusionPipeline, parts, pair.ours)
    expected = generate(pipeline)
    pipeline.register_modules(vae=to_diffusers(pair.ours))
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert "sdvae" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))

    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert type(loaded) is StableDiffusionPipeline
    assert type(loaded.vae) is StockAutoencoderKL
    np.testing.assert_allclose(generate(loaded), expected, rtol=0, atol=1e-5)


def test_a_stock_pipeline_takes_our_vae_while_loading(parts: Any, pair: Any, tmp_path: Path) -> None:
    pipeline = build(StableDiffusionPipeline, parts, pair.stock)
    expected = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, vae=ours))
    assert loaded.vae is ours
    np.testing.assert_allclose(generate(loaded), expected, rtol=0, atol=1e-5)


def test_a_pipeline_saved_with_our_class_loads_where_a_vae_is_passed(parts: Any, pair: Any, tmp_path: Path) -> None:
    pipeline = build(StableDiffusionPipeline, parts, pair.ours)
    expected = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == [AutoencoderKL.__module__, "AutoencoderKL"]

    for vae in (pair.ours, pair.stock):
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, vae=vae))
        assert loaded.vae is vae
        np.testing.assert_allclose(generate(loaded), expected, rtol=0, atol=1e-5)
    # the VAE itself is on disk as any other
    assert type(StockAutoencoderKL.from_pretrained(tmp_path, subfolder="vae")) is StockAutoencoderKL


def test_a_pipeline_saved_with_our_class_loads_as_it_was_where_sdvae_is_installed(
    parts: Any, pair: Any, tmp_path: Path
) -> None:
    pipeline = build(StableDiffusionPipeline, parts, pair.ours)
    expected = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded.vae) is AutoencoderKL
    np.testing.assert_allclose(generate(loaded), expected, rtol=0, atol=1e-5)
