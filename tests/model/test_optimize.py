"""`optimize` puts our class in the place of diffusers' own, with all of its state, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import AutoencoderTiny
from torch import nn
from vaes import build_vae, vae_fields

import sdvae
from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.optimize import optimize

FIELDS = vae_fields(8, 16, sample_size=32, scaling_factor=0.31)


@pytest.fixture
def stock() -> StockAutoencoderKL:
    return build_vae(8, 16, kind=StockAutoencoderKL, **FIELDS)


def photos() -> torch.Tensor:
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_result_computes_what_the_original_did_and_keeps_its_config(stock: StockAutoencoderKL) -> None:
    with torch.no_grad():
        expected = stock(photos()).sample
        fast = sdvae.optimize(stock)
        assert type(fast) is AutoencoderKL
        torch.testing.assert_close(fast(photos()).sample, expected, rtol=0, atol=1e-5)
    assert {name: fast.config[name] for name in FIELDS} == {name: stock.config[name] for name in FIELDS}


def test_weights_are_shared_so_that_memory_does_not_double(stock: StockAutoencoderKL) -> None:
    fast = optimize(stock)
    weight = "decoder.mid_block.attentions.0.to_q.weight"
    assert fast.get_parameter(weight).data_ptr() == stock.get_parameter(weight).data_ptr()
    assert fast.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_switches_and_frozen_weights_are_kept(stock: StockAutoencoderKL, training: bool) -> None:
    stock = stock.to(torch.float64).train(training)
    stock.encoder.requires_grad_(False)
    stock.enable_slicing()
    stock.enable_tiling()
    stock.tile_sample_min_size = 24
    stock.enable_gradient_checkpointing()
    fast = optimize(stock)
    assert (fast.dtype, fast.training, fast.is_gradient_checkpointing) == (torch.float64, training, True)
    assert (fast.use_slicing, fast.use_tiling, fast.tile_sample_min_size) == (True, True, 24)
    assert {name for name, p in fast.named_parameters() if p.requires_grad} == {
        name for name, p in stock.named_parameters() if p.requires_grad
    }


def test_our_own_class_comes_back_as_it_is_and_a_pipeline_can_be_optimized_twice(tiny_vae: AutoencoderKL) -> None:
    assert optimize(tiny_vae) is tiny_vae
    assert tiny_vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def _fused(vae: StockAutoencoderKL) -> StockAutoencoderKL:
    vae.fuse_qkv_projections()
    return vae


def _offloaded(vae: StockAutoencoderKL) -> StockAutoencoderKL:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(vae, ModelHook())
    return vae


def _group_offloaded(vae: StockAutoencoderKL) -> StockAutoencoderKL:
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return vae


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_fused, "unfuse_qkv_projections"),
        (_offloaded, "optimize first, then offload"),
        (_group_offloaded, "optimize first, then offload"),
        (lambda vae: torch.compile(vae, backend="eager"), "before it is compiled"),
        (lambda vae: AutoencoderTiny(), "AutoencoderTiny"),
        (lambda vae: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(
    stock: StockAutoencoderKL, change: Callable[[Any], Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        optimize(change(stock))


def test_a_pipeline_without_a_vae_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no vae"):
        optimize(SimpleNamespace(register_modules=None, vae=None))
