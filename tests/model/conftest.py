"""Our autoencoder and diffusers' own, with one set of weights that none of the layers leaves without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from torch import Tensor
from vaes import vae_fields

from sdvae.model.autoencoder import AutoencoderKL


class Pair(NamedTuple):
    """Two autoencoders of one configuration that share their weights."""

    ours: AutoencoderKL
    stock: StockAutoencoderKL

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ours.encode(x).latent_dist.parameters, self.stock.encode(x).latent_dist.parameters

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.ours.decode(z).sample, self.stock.decode(z).sample


def _levels(*widths: int, groups: int = 4, **others: Any) -> dict[str, Any]:
    """Config fields of an autoencoder with these widths; without any, four narrow levels."""
    return vae_fields(*widths or (8, 16, 16, 16), norm_num_groups=groups, **others)


def _random_weights(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Values for all parameters that keep the scale of the features, with biases and norms away from 0 and 1.

    A fresh model is a poor witness: its norms have weight 1 and bias 0, so it cannot tell where they are missing.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.state_dict().items():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.1
        weights[name] = values
    return weights


def _make_pair(seed: int = 0, **fields: Any) -> Pair:
    with torch.device("meta"):  # no time lost on initial weights
        ours, stock = AutoencoderKL(**fields), StockAutoencoderKL(**fields)
    weights = _random_weights(ours, seed)
    for model in (ours, stock):
        model.load_state_dict(weights, strict=True, assign=True)
        model.eval()
    return Pair(ours, stock)


@pytest.fixture(scope="session")
def levels() -> Callable[..., dict[str, Any]]:
    return _levels


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    return _make_pair


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
