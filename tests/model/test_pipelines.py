"""Real Stable Diffusion pipelines, tiny, give with our class what they give with the stock one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdvae.checkpoints.store import to_diffusers
from sdvae.model import execution
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.optimize import optimize

Images = np.ndarray[Any, Any]

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **NOISE),
    "PNDM": lambda: PNDMScheduler(skip_prk_steps=True, **NOISE),
}


def build_unet(**fields: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **fields,
    ).eval()


@pytest.fixture(scope="module")
def parts(text_parts: dict[str, Any]) -> dict[str, Any]:
    """Everything that a Stable Diffusion pipeline has beside VAE and scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "tokenizer": text_parts["tokenizer"],
            "text_encoder": CLIPTextModel(text_parts["config"]).eval(),
            "unet": build_unet(cross_attention_dim=16),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }


@pytest.fixture(scope="module")
def xl_parts(text_parts: dict[str, Any]) -> dict[str, Any]:
    """Everything that a Stable Diffusion XL pipeline has beside VAE and scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "tokenizer": text_parts["tokenizer"],
            "tokenizer_2": text_parts["tokenizer"],
            "text_encoder": CLIPTextModel(text_parts["config"]).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(text_parts["config"]).eval(),
            "unet": build_unet(
                cross_attention_dim=32,  # of both encoders
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 16,
            ),
            "add_watermarker": False,
        }


def with_controlnet(parts: dict[str, Any]) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 4, 4))
        # as made it adds zeros, so it would not show whether it sees its picture
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.3)
        torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return parts | {"controlnet": controlnet.eval()}


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


SIZE = {"height": 64, "width": 48}


def mask() -> torch.Tensor:
    """The upper half is to be painted."""
    return (torch.arange(64) < 32).float().view(1, 1, 64, 1).expand(2, 1, 64, 48).contiguous()


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "inpaint": (StableDiffusionInpaintPipeline, {"image": photos(), "mask_image": mask(), "strength": 0.7, **SIZE}),
    "controlnet": (StableDiffusionControlNetPipeline, {"image": photos(), **SIZE}),
    "controlnet image-to-image": (
        StableDiffusionControlNetImg2ImgPipeline,
        {"image": photos(), "control_image": photos().flip(3), "strength": 0.7, **SIZE},
    ),
    "controlnet inpaint": (
        StableDiffusionControlNetInpaintPipeline,
        {"image": photos(), "mask_image": mask(), "control_image": photos().flip(3), "strength": 0.7, **SIZE},
    ),
    "xl": (StableDiffusionXLPipeline, SIZE),
    "xl image-to-image": (StableDiffusionXLImg2ImgPipeline, {"image": photos(), "strength": 0.7}),
    "xl inpaint": (
        StableDiffusionXLInpaintPipeline,
        {"image": photos(), "mask_image": mask(), "strength": 0.7, **SIZE},
    ),
    "xl controlnet": (StableDiffusionXLControlNetPipeline, {"image": photos(), **SIZE}),
}


def build_kind(kind: str, parts: dict[str, Any], xl_parts: dict[str, Any], vae: Any) -> Any:
    used = xl_parts if kind.startswith("xl") else parts
    return build(KINDS[kind][0], with_controlnet(used) if "controlnet" in kind else used, vae)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline_gives_equal_images_with_either_class_and_when_optimized(
    parts: Any, xl_parts: Any, pair: Any, kind: str
) -> None:
    arguments = KINDS[kind][1]
    expected = generate(build_kind(kind, parts, xl_parts, pair.stock), **arguments)
    assert expected.shape == (2, 64, 48, 3)
    np.testing.assert_allclose(
        generate(build_kind(kind, parts, xl_parts, pair.ours), **arguments), expected, rtol=0, atol=1e-5
    )
    pipeline = build_kind(kind, parts, xl_parts, pair.stock)
    assert optimize(pipeline) is pipeline and type(pipeline.vae) is AutoencoderKL
    np.testing.assert_allclose(generate(pipeline, **arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_an_optimized_pipeline_gives_equal_images_where_its_vae_runs_in_strips(
    parts: Any, levels: Any, make_pair: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make_pair(**levels(8, 64, groups=4, sample_size=64)).stock
    photo = torch.rand(2, 3, 128, 136, generator=torch.Generator().manual_seed(3))
    arguments = {"height": 128, "width": 136} if kind is StableDiffusionPipeline else {"image": photo, "strength": 0.7}
    expected = generate(build(kind, parts, stock), **arguments)
    strips: list[int] = []
    streamed = execution.streamed
    monkeypatch.setattr(execution, "streamed", lambda *inputs, **o: strips.append(1) or streamed(*inputs, **o))
    pipeline = optimize(build(kind, parts, stock))
    pipeline.vae.execution = replace(pipeline.vae.execution, fast_from=10**6)
    actual = generate(pipeline, **arguments)
    assert actual.shape == (2, 128, 136, 3) and strips
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["xl", "xl image-to-image"])
def test_xl_pipelines_use_the_mean_and_std_of_our_config(xl_parts: Any, levels: Any, make_pair: Any, kind: str) -> None:
    plain, scaled = (
        make_pair(**levels(sample_size=64, **more))
        for more in ({}, {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]})
    )
    arguments = KINDS[kind][1]
    images = [generate(build_kind(kind, {}, xl_parts, vae), **arguments) for vae in (scaled.ours, scaled.stock)]
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)
    assert abs(images[0] - generate(build_kind(kind, {}, xl_parts, plain.ours), **arguments)).max() > 1e-2


@pytest.mark.parametrize("force_upcast", [True, False])
@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # diffusers' pipeline calls it itself
def test_an_xl_pipeline_upcasts_our_half_precision_vae_where_its_config_says_so(
    xl_parts: Any, levels: Any, make_pair: Any, force_upcast: bool
) -> None:
    pair = make_pair(**levels(sample_size=64, force_upcast=force_upcast))
    images = []
    for vae in (pair.ours, pair.stock):
        dtypes: list[torch.dtype] = []
        vae.decoder.register_forward_pre_hook(lambda module, inputs, seen=dtypes: seen.append(inputs[0].dtype))
        pipeline = build(StableDiffusionXLPipeline, copy.deepcopy(xl_parts), vae).to(torch.float16)
        images.append(generate(pipeline, **SIZE))
        assert set(dtypes) == {torch.float32 if force_upcast else torch.float16}
        assert vae.dtype == torch.float16
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5 if force_upcast else 1e-2)


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
