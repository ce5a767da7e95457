"""YAML, overrides and what is said when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from sdvae.config import config_from_dict, config_to_dict, dump_config, read_config
from sdvae.errors import ConfigError
from sdvae.training.config import TrainConfig

BASE = {"run_dir": "runs/x", "data": {"path": "photos"}}
RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def read(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(TrainConfig, path, overrides)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    text = yaml.safe_dump({**BASE, "training": {"lr": 0.5, "steps": 7}})
    config = read(
        tmp_path, text, "training.lr=1e-4", "loss.rec=l2", "data.val_crop_px=null", "model.block_out_channels=[8, 16]"
    )
    assert config.training.lr == 1e-4 and isinstance(config.training.lr, float)
    assert (config.training.steps, config.training.batch_size) == (7, 8)
    assert config.loss.rec == "l2" and config.data.val_crop_px is None
    assert config.model == {"block_out_channels": [8, 16]}


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text."""
    config = read(tmp_path, yaml.safe_dump(BASE) + "loss:\n  kl:\n    weight: 1e-6\n")
    assert config.loss.kl.weight == 1e-6


def test_dump_and_read_again_is_the_identity(tmp_path: Path) -> None:
    config = config_from_dict(TrainConfig, {**BASE, "training": {"betas": [0.5, 0.9], "seed": 2**60 + 1}})
    assert read(tmp_path, dump_config(config)) == config
    assert config_from_dict(TrainConfig, config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lrr=1", r"unknown key 'training.lrr'; did you mean 'training?\.?lr'\?|did you mean 'lr'"),
        ("trainng.lr=1", "did you mean 'training'"),
        ("training.lr=fast", "'training.lr' is 'fast'; expected float"),
        ("training.lr=-1", "'training.lr' is -1.0; expected above 0"),
        ("training.steps=1.5", "'training.steps' is 1.5; expected int"),
        ("training.steps=true", "'training.steps' is True; expected int"),
        ("training.betas=0.9", r"'training.betas' is 0.9; expected a list"),
        ("training.betas=[0.9]", r"'training.betas' is \[0.9\]; expected two numbers"),
        ("training.channels_last=maybe", "'training.channels_last' is 'maybe'; expected bool"),
        ("loss.rec=l3", "'loss.rec' is 'l3'; expected one of l1, l2"),
        ("loss.kl_weight=1e-6", "unknown key 'loss.kl_weight'; did you mean 'rec_weight'"),
        ("loss.kl=1e-6", "'loss.kl' is .*1e-6.*; expected a section of keys and values"),
        ("loss.kl.from=mean", "unknown key 'loss.kl.from'; did you mean 'form'"),
        ("loss.adversarial.weight=-0.5", "'loss.adversarial.weight' is -0.5; expected 0 or more"),
        ("training.best_metric=lpips", "'training.best_metric' is lpips; expected psnr or none while"),
        ("data.source=webdataset", "'data.num_val_images' is 16; expected 0 for a stream"),
        ("data=photos", "'data' is 'photos'; expected a section"),
        ("data.path.deeper=1", "goes into 'path', which is a value"),
        ("training.lr", "not of the form key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_its_dotted_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, yaml.safe_dump(BASE), override)


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'data.path' is missing; .*--set data.path="):
        read(tmp_path, "run_dir: x\ndata: {}\n")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "holds a list"), ("run_dir: x", "'data' is missing")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.yaml.*{message}"):
        read(tmp_path, text)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: No such file"):
        read_config(TrainConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_builds_what_its_name_says(recipe: Path) -> None:
    """An f8 autoencoder, with 16 latent channels where the name says so and else 4; or it starts from a whole VAE."""
    from sdvae.training.build import build_autoencoder

    config = read_config(TrainConfig, recipe, ["data.path=photos"])
    assert config.run_dir == f"runs/{recipe.stem}"
    if config.training.init not in ("default", "linear"):
        assert config.model == {}, "the architecture is that of the VAE it starts from"
        return
    with torch.device("meta"):  # no weights are drawn: the full-width ones take seconds
        vae = build_autoencoder(config.model, seed=0)
    channels = 16 if "16ch" in recipe.stem else 4
    assert (vae.spatial_compression_ratio, vae.config.latent_channels) == (8, channels)
    if recipe.stem == "kl-f8":
        assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863, "Stable Diffusion's"


def test_the_recipes_differ_in_what_they_are_named_for() -> None:
    recipes = {path.stem: read_config(TrainConfig, path) for path in RECIPES}
    assert {"kl-f8", "kl-f8-16ch", "ft-ema", "ft-mse", "eq-vae", "sdvae-mini"} <= recipes.keys()
    assert {name for name, config in recipes.items() if config.loss.equivariance.probability} == {"eq-vae"}
    assert {name for name, config in recipes.items() if config.training.trained == "decoder"} == {"ft-ema", "ft-mse"}
    assert [recipes[name].loss.rec for name in ("kl-f8", "ft-ema", "ft-mse")] == ["l1", "l1", "l2"]


def test_a_wrong_model_parameter_is_named() -> None:
    from sdvae.training.build import build_autoencoder

    with pytest.raises(ConfigError, match="unknown key 'model.channels'; known keys: in_channels"):
        build_autoencoder({"channels": 3}, seed=0)
    with pytest.raises(ConfigError, match=r"block_out_channels \[10\] cannot be divided into norm_num_groups = 4"):
        build_autoencoder({"block_out_channels": [8, 10], "norm_num_groups": 4}, seed=0)
