"""The plain network: the configuration that diffusers has, and in its shell the same weights and numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from torch import Tensor

from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.network import Autoencoder, AutoencoderConfig


@pytest.fixture
def both(make_pair: Any, levels: Any) -> tuple[Autoencoder, AutoencoderKL]:
    """A network on its own, and in diffusers' shell, with the same weights."""
    shell = make_pair(**levels()).ours
    network = Autoencoder(AutoencoderConfig(**levels()))
    network.load_state_dict(shell.state_dict(), strict=True)
    return network.eval(), shell


def pass_through(model: Any) -> tuple[Tensor, Tensor]:
    """Returns: moments and recon of a batch of two."""
    x = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        posterior = model.encode(x).latent_dist
        return posterior.parameters, model.decode(posterior.mode()).sample


@pytest.mark.parametrize("cls", [AutoencoderKL, StockAutoencoderKL], ids=["shell", "stock"])
def test_the_fields_of_the_configuration_are_the_arguments_of_the_class(cls: Any) -> None:
    arguments = list(signature(cls.__init__).parameters.values())[1:]
    assert [(f.name, f.default) for f in fields(AutoencoderConfig)] == [(p.name, p.default) for p in arguments]


def test_fields_are_read_as_attributes_or_as_items() -> None:
    config = AutoencoderConfig(scaling_factor=0.5)
    assert config.scaling_factor == config["scaling_factor"] == dict(config)["scaling_factor"] == 0.5
    assert config.get("_name_or_path") is None
    with pytest.raises(KeyError):
        config["get"]


def test_no_base_of_the_network_is_of_diffusers() -> None:
    assert {cls.__module__.split(".")[0] for cls in Autoencoder.__mro__} == {"sdvae", "torch", "builtins"}


def test_in_its_shell_the_network_has_the_same_weights_and_gives_the_same_numbers(
    both: tuple[Autoencoder, AutoencoderKL],
) -> None:
    network, shell = both
    assert list(network.state_dict()) == list(shell.state_dict())
    assert network.spatial_compression_ratio == shell.spatial_compression_ratio
    assert (network.device, network.dtype) == (shell.device, shell.dtype)
    assert all(map(torch.equal, pass_through(network), pass_through(shell)))


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: model.enable_slicing(),
        lambda model: model.enable_tiling(tile_size_px=32),
        lambda model: model.enable_tiling("exact"),
    ],
    ids=["slices", "blended tiles", "exact tiles"],
)
def test_the_switches_are_those_of_the_shell(
    both: tuple[Autoencoder, AutoencoderKL], switch: Callable[[Any], None]
) -> None:
    network, shell = both
    for model in both:
        switch(model)
    assert all(map(torch.equal, pass_through(network), pass_through(shell)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_gives_the_same_numbers(both: tuple[Autoencoder, AutoencoderKL], copied: Callable[[Any], Any]) -> None:
    for model in both:
        again = copied(model)
        assert type(again) is type(model) and again.config == model.config
        assert all(map(torch.equal, pass_through(again), pass_through(model)))


def test_a_field_that_is_registered_later_is_one_of_the_shells_configuration(levels: Any) -> None:
    shell = AutoencoderKL(**levels())
    shell.register_to_config(scaling_factor=0.5)
    assert shell.config.scaling_factor == shell.config["scaling_factor"] == 0.5
