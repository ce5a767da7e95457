"""What diffusers expects of a model class: signature, files, hooks, checkpointing, slicing, casts."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL as StockAutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.layers import Decoder, Encoder, ResnetBlock2D

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = pytest.mark.parametrize("cls", [AutoencoderKL, StockAutoencoderKL], ids=["ours", "stock"])
LAYOUTS: dict[str, dict[str, Any]] = {
    "SD 1.x": {"layers_per_block": 2},
    "no quant convs": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "quant_conv alone": {"use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "RGBA": {"in_channels": 4, "out_channels": 4, "layers_per_block": 3},
}


@pytest.fixture
def pair(make_pair: Any, levels: Any) -> Any:
    return make_pair(**levels())


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def parameters_of(function: Any) -> list[tuple[str, object, object]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def other_class(cls: type) -> Any:
    return StockAutoencoderKL if cls is AutoencoderKL else AutoencoderKL


# Names


def test_the_class_has_the_stock_name_signature_and_config_fields() -> None:
    assert AutoencoderKL.__name__ == StockAutoencoderKL.__name__ == "AutoencoderKL"
    assert parameters_of(AutoencoderKL.__init__) == parameters_of(StockAutoencoderKL.__init__)
    assert AutoencoderKL.config_name == StockAutoencoderKL.config_name
    ours, stock = (
        {k: v for k, v in cls(norm_num_groups=4).config.items()} for cls in (AutoencoderKL, StockAutoencoderKL)
    )
    assert ours == stock


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_methods_take_the_stock_arguments(method: str) -> None:
    assert parameters_of(getattr(AutoencoderKL, method)) == parameters_of(getattr(StockAutoencoderKL, method))


def test_a_saved_pipeline_finds_its_base_class_in_the_defining_module() -> None:
    module = sys.modules[AutoencoderKL.__module__]
    assert module.ModelMixin is diffusers.ModelMixin
    # diffusers takes the last folder of a module path for one of its pipelines if one has that name
    assert not hasattr(diffusers.pipelines, AutoencoderKL.__module__.split(".")[-2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_have_the_stock_names_and_shapes(levels: Any, layout: str) -> None:
    with torch.device("meta"):
        ours, stock = (cls(**levels(**LAYOUTS[layout])) for cls in (AutoencoderKL, StockAutoencoderKL))
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (ours, stock)]
    assert shapes[0] == shapes[1]


# Files


@CLASSES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_pretrained_reads_what_the_other_class_saved(
    make_pair: Any, levels: Any, tmp_path: Path, layout: str, cls: Any
) -> None:
    pair = make_pair(**levels(**LAYOUTS[layout]))
    (pair.stock if cls is AutoencoderKL else pair.ours).save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    assert not any(info.values()), info
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pair.ours.state_dict().items())
    assert not any(tensor.is_meta for tensor in weights.values())


def test_both_classes_save_the_same_files(make_pair: Any, levels: Any, tmp_path: Path) -> None:
    pair = make_pair(**levels(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], shift_factor=0.1))
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.stock.save_pretrained(tmp_path / "stock")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock")]
    assert configs[0] == configs[1]
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "stock" / WEIGHTS).read_bytes()


@CLASSES
def test_every_config_field_survives_saving_and_loading(tmp_path: Path, levels: Any, cls: Any) -> None:
    changed = levels(
        8,
        16,
        in_channels=4,
        out_channels=1,
        layers_per_block=2,
        act_fn="mish",
        latent_channels=2,
        sample_size=96,
        scaling_factor=0.9,
        shift_factor=-0.5,
        latents_mean=[0.5, -0.25],
        latents_std=[2.0, 3.0],
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    assert changed.keys() == inspect.signature(AutoencoderKL.__init__).parameters.keys() - {"self"}
    model = cls(**changed)
    model.save_pretrained(tmp_path)
    loaded = other_class(cls).from_pretrained(tmp_path)
    for field, value in changed.items():
        found = loaded.config[field]
        assert (tuple(found) if isinstance(found, list) else found) == (
            tuple(value) if isinstance(value, list) else value
        )


def test_each_class_builds_from_the_config_of_the_other(pair: Any) -> None:
    for cls, source in ((AutoencoderKL, pair.stock), (StockAutoencoderKL, pair.ours)):
        built = cls.from_config(source.config)
        assert {k: built.config[k] for k in source.config if k[0] != "_"} == {
            k: v for k, v in source.config.items() if k[0] != "_"
        }


@CLASSES
def test_from_pretrained_reads_the_older_attention_names(pair: Any, tmp_path: Path, cls: Any) -> None:
    pair.stock.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert len(renamed.keys() - pair.ours.state_dict().keys()) == 16
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})

    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    weights = loaded.state_dict()
    assert weights.keys() == pair.ours.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pair.ours.state_dict().items())


def test_from_pretrained_casts_and_finds_a_subfolder(pair: Any, tmp_path: Path) -> None:
    pair.stock.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


# Calls


def test_without_return_dict_results_are_tuples_of_the_same_tensors(pair: Any, x: Tensor) -> None:
    with torch.inference_mode():
        for model in pair:
            (posterior,) = model.encode(x, return_dict=False)
            output = model.encode(x)
            assert torch.equal(posterior.parameters, output.latent_dist.parameters)
            assert output[0] is output.latent_dist is output["latent_dist"]
            (recon,) = model.decode(posterior.mode(), return_dict=False)
            assert torch.equal(recon, model.decode(posterior.mode()).sample)
            (whole,) = model(x, return_dict=False)
            assert torch.equal(whole, recon) and torch.equal(whole, model(x).sample)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_call_leaves_its_input_as_it_was(pair: Any, x: Tensor, memory_format: torch.memory_format) -> None:
    model = pair.ours.to(memory_format=memory_format)
    x = x.to(memory_format=memory_format)
    z = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
    given_x, given_z = x.clone(), z.clone()
    with torch.inference_mode():
        model.encode(x)
        model.decode(z)
    assert torch.equal(x, given_x)
    assert torch.equal(z, given_z)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_results_with_and_without_gradients_are_equal(pair: Any, x: Tensor, context: Any) -> None:
    with_gradients = pair.ours(x).sample
    with context():
        assert torch.equal(pair.ours(x).sample, with_gradients)


class Recorder(ModelHook):  # type: ignore[misc]
    """A real accelerate hook that counts how often it was asked to bring the weights."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


@CLASSES
def test_encode_and_decode_call_the_hook_of_accelerate(pair: Any, x: Tensor, cls: Any) -> None:
    model, hook = pair.ours if cls is AutoencoderKL else pair.stock, Recorder()
    add_hook_to_module(model, hook)
    with torch.inference_mode():
        z = model.encode(x).latent_dist.mode()
        assert hook.calls == 1
        model.decode(z)
        assert hook.calls == 2


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_there_when_encode_and_decode_need_them(
    pair: Any, x: Tensor, tmp_path: Path, where: str
) -> None:
    model = copy.deepcopy(pair.ours)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.inference_mode():
        moments, expected = model.encode(x).latent_dist.parameters, pair.ours.encode(x).latent_dist.parameters
        assert torch.equal(moments, expected)
        z = expected.chunk(2, dim=1)[0]
        assert torch.equal(model.decode(z).sample, pair.ours.decode(z).sample)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.to(dtype=torch.float16), lambda m: m.half(), lambda m: m.double()],
    ids=["to(bfloat16)", "to(dtype=float16)", "half", "double"],
)
def test_a_cast_reaches_every_weight_and_the_result(pair: Any, x: Tensor, cast: Callable[[Any], Any]) -> None:
    model = cast(copy.deepcopy(pair.ours))
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}
    with torch.inference_mode():
        posterior = model.encode(x.to(model.dtype)).latent_dist
        recon = model.decode(posterior.sample()).sample
    assert posterior.mean.dtype == posterior.std.dtype == recon.dtype == model.dtype != torch.float32
    assert recon.isfinite().all()


# Gradient checkpointing


def test_gradient_checkpointing_runs_every_block_again_and_changes_no_gradient(pair: Any, x: Tensor) -> None:
    model, runs = pair.ours.train(), dict.fromkeys(("plain", "checkpointed", "off again"), 0)
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]

    def gradients(name: str) -> list[Tensor]:
        def count(*_: Any) -> None:
            runs[name] += 1

        # before, not after: the second run of a segment ends as soon as it has what the gradient needs
        handles = [block.register_forward_pre_hook(count) for block in blocks]
        posterior = model.encode(x).latent_dist
        z = posterior.sample(generator=torch.Generator().manual_seed(1))
        loss = (model.decode(z).sample - x).abs().mean() + 1e-3 * posterior.kl().mean()
        result = torch.autograd.grad(loss, list(model.parameters()))
        for handle in handles:
            handle.remove()
        return list(result)

    plain = gradients("plain")
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert {type(m) for m in model.modules() if getattr(m, "gradient_checkpointing", False)} == {Encoder, Decoder}
    checkpointed = gradients("checkpointed")
    with torch.no_grad():
        model(x)  # nothing to run again
    model.disable_gradient_checkpointing()
    off_again = gradients("off again")

    assert runs == {"plain": len(blocks), "checkpointed": 2 * len(blocks), "off again": len(blocks)}
    assert all(map(torch.equal, plain, checkpointed))
    assert all(map(torch.equal, plain, off_again))


def test_gradient_checkpointing_keeps_fewer_activations(pair: Any, x: Tensor) -> None:
    def saved_bytes() -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pair.ours(x)
        return total

    plain = saved_bytes()
    pair.ours.enable_gradient_checkpointing()
    assert saved_bytes() < plain / 4


# Slicing


def test_slicing_changes_no_output_and_runs_images_one_by_one(pair: Any, x: Tensor) -> None:
    model, batches = pair.ours, []
    z = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1))

    def results() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return model.encode(x).latent_dist.parameters, model.decode(z).sample

    whole = results()
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].shape[0]))
    model.enable_slicing()
    sliced = results()
    assert batches == [1] * 6
    model.disable_slicing()
    again = results()
    assert batches[6:] == [3, 3]
    for one, other, same in zip(whole, sliced, again, strict=True):
        # a batch of one takes other kernels than a batch of three, which round in another order
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
        assert torch.equal(one, same)


def test_slices_equal_the_stock_ones(pair: Any, x: Tensor) -> None:
    for model in pair:
        model.enable_slicing()
    with torch.inference_mode():
        ours, stock = pair.encode(x)
        assert (ours - stock).abs().max() <= 1e-6 * stock.abs().max()
        ours, stock = pair.decode(stock.chunk(2, dim=1)[0])
        assert (ours - stock).abs().max() <= 1e-6 * stock.abs().max()


# Configurations that cannot be built


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"down_block_types": ("AttnDownEncoderBlock2D",)}, "down_block_types"),
        ({"up_block_types": ("UpBlock2D",)}, "UpDecoderBlock2D"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 2}, "2 levels, but block_out_channels has 1"),
        ({"block_out_channels": (30,)}, r"block_out_channels \[30\] cannot be divided into norm_num_groups = 32"),
        ({"act_fn": "tanh"}, "act_fn is 'tanh'; expected one of silu"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AutoencoderKL(**fields)
