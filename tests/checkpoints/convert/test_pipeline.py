from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel
from vaes import build_vae

from sdvae.checkpoints.convert import verify
from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.pipeline import read_pipeline
from sdvae.checkpoints.convert.run import convert
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError


def make_vae(seed: int, *widths: int, **others: Any) -> StockAutoencoderKL:
    return build_vae(*widths or (8, 8), seed=seed, kind=StockAutoencoderKL, sample_size=32, **others)


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory, text_parts: dict[str, Any]) -> Path:
    """A tiny real Stable Diffusion pipeline, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("pipeline")
    unet = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=make_vae(0),
            text_encoder=CLIPTextModel(text_parts["config"]).eval(),
            tokenizer=text_parts["tokenizer"],
            unet=UNet2DConditionModel(**unet).eval(),
            scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture
def pipeline(saved_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_pipeline, tmp_path / "pipeline"))


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    make_vae(1, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def without_vae(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith("vae/")}


def generate(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline("a cat", num_inference_steps=2, height=16, width=16, generator=generator, output_type="np").images


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_the_new_pipeline_differs_in_its_vae_alone_and_draws_with_it(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    (pipeline / "notes").mkdir()
    (pipeline / "notes/é.bin").write_bytes(bytes(range(256)))
    before = contents(pipeline)
    report = convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    assert contents(pipeline) == before
    assert without_vae(tmp_path / "new") == without_vae(pipeline)
    assert sorted(path.name for path in (tmp_path / "new/vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert report.num_copied_files == len(without_vae(pipeline))
    assert report.verification and report.verification.identical

    expected = load(pipeline)
    expected.register_modules(vae=StockAutoencoderKL.from_pretrained(vae))
    np.testing.assert_array_equal(generate(load(tmp_path / "new")), generate(expected))
    assert abs(generate(load(tmp_path / "new")) - generate(load(pipeline))).max() > 1e-2


def test_a_pipeline_saved_with_our_class_gets_the_stock_one_and_keeps_its_other_entries(
    pipeline: Path, vae: Path, tmp_path: Path
) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(
        json.dumps(index | {"vae": ["sdvae.model.autoencoder", "AutoencoderKL"], "extra": [1, None]})
    )
    convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    assert json.loads((tmp_path / "new/model_index.json").read_text()) == index | {"extra": [1, None]}
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_links_become_files_and_what_a_download_left_is_not_copied(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    weights = pipeline / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(blob)
    weights.symlink_to(blob)
    (pipeline / ".cache").mkdir()
    (pipeline / ".cache/lock").write_text("")
    convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    copied = tmp_path / "new/unet/diffusion_pytorch_model.safetensors"
    assert not copied.is_symlink() and copied.read_bytes() == blob.read_bytes()
    assert not (tmp_path / "new/.cache").exists()


@pytest.mark.parametrize(
    ("widths", "others", "message"),
    [
        ((8, 8), {"latent_channels": 16}, "latent_channels 16, the one in .* has 4"),
        ((8, 8, 8), {}, "spatial_compression_ratio 4, the one in .* has 2"),
    ],
)
def test_latents_of_another_shape_are_refused_with_the_reason(
    pipeline: Path, tmp_path: Path, widths: tuple[int, ...], others: dict[str, Any], message: str
) -> None:
    make_vae(2, *widths, **others).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=f"{message}.*diffusion model was made for latents of that shape"):
        convert(tmp_path / "vae", tmp_path / "new", options=ConvertOptions(into=pipeline))
    assert not (tmp_path / "new").exists()


def test_another_scale_is_told_with_what_it_means(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    (warning,) = convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline)).warnings
    assert "scaling_factor 0.18215 -> 0.5" in warning and "--fold-scale 0.18215" in warning
    folded = convert(vae, tmp_path / "folded", options=ConvertOptions(into=pipeline, fold_scale=0.18215))
    assert not folded.warnings
    assert json.loads((tmp_path / "folded/vae/config.json").read_text())["scaling_factor"] == 0.18215


def test_a_dry_run_says_how_much_would_be_copied_and_writes_nothing(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    report = convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline, dry_run=True))
    assert report.status == "new"
    copied = sum(len(data) for data in without_vae(pipeline).values())
    assert copied < report.num_bytes < copied + 2e6
    assert contents(tmp_path) == before


def test_a_copy_in_or_around_the_pipeline_is_refused(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pipeline)
    for target in (pipeline, pipeline / "new", pipeline / "vae", tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="choose another folder"):
            convert(vae, target, options=ConvertOptions(into=pipeline, overwrite=True))
    assert (
        convert(vae, tmp_path / "pipeline2", options=ConvertOptions(into=pipeline)).status == "written"
    )  # no folder inside, for all its name


def test_what_is_no_pipeline_with_a_vae_is_refused(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a diffusers pipeline"):
        read_pipeline(vae)
    with pytest.raises(ConfigError, match="no pipeline at '.*/nothing': .* does not exist"):
        convert(vae, tmp_path / "new", options=ConvertOptions(into=tmp_path / "nothing"))
    index = json.loads((pipeline / "model_index.json").read_text())
    for entry in ([None, None], ["diffusers", "VQModel"], None):
        (pipeline / "model_index.json").write_text(json.dumps(index | {"vae": entry}))
        with pytest.raises(CheckpointError, match="`vae` is"):
            convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))


def test_the_same_again_is_up_to_date_until_the_pipeline_or_the_copy_changes(
    pipeline: Path, vae: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    convert(vae, new, options=ConvertOptions(into=pipeline))
    assert convert(vae, new, options=ConvertOptions(into=pipeline)).status == "up to date"
    (new / "unet/config.json").unlink()
    with pytest.raises(OutputExistsError):
        convert(vae, new, options=ConvertOptions(into=pipeline))
    assert convert(vae, new, options=ConvertOptions(into=pipeline, overwrite=True)).status == "written"
    config = pipeline / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("1000", "2000"))  # of the same size
    with pytest.raises(OutputExistsError):
        convert(vae, new, options=ConvertOptions(into=pipeline))
    assert convert(vae, new, options=ConvertOptions(into=pipeline, overwrite=True)).status == "written"
    assert "2000" in (new / "scheduler/scheduler_config.json").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda new: (new / "mine.txt").write_text(""), "files that the new pipeline would not have: mine.txt"),
        (lambda new: (new / "vae/mine.txt").write_text(""), "its vae/ holds more than a VAE: mine.txt"),
        (lambda new: (new / ".git").mkdir() or (new / ".git/HEAD").write_text(""), "would not have: .git/HEAD"),
        (lambda new: (new / "model_index.json").unlink(), "holds no pipeline"),
    ],
)
def test_what_the_new_pipeline_would_lose_is_not_replaced(
    pipeline: Path, vae: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    spoil(tmp_path / "new")
    before = contents(tmp_path / "new")
    with pytest.raises(OutputExistsError, match=message):
        convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline, dtype="float16", overwrite=True))
    assert contents(tmp_path / "new") == before


def test_a_pipeline_that_sdvae_did_not_write_is_not_replaced(pipeline: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "other")
    with pytest.raises(OutputExistsError, match="sdvae did not write"):
        convert(vae, tmp_path / "other", options=ConvertOptions(into=pipeline, overwrite=True))


def test_a_pipeline_that_cannot_be_copied_whole_leaves_nothing(
    pipeline: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdvae.checkpoints.convert.pipeline.shutil.copy2", full)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    monkeypatch.undo()

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "vae"]


def test_a_disk_that_is_too_small_is_noticed_before_copying(
    pipeline: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("sdvae.checkpoints.convert.pipeline.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GB left"):
        convert(vae, tmp_path / "new", options=ConvertOptions(into=pipeline))
