"""The discriminator: its layout against the stock one, its statistics over processes, and what a pass leaves behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sdvae.errors import ConfigError
from sdvae.training.discriminator import BatchNorm, DiscriminatorModule, NLayerDiscriminator, frozen
from sdvae.training.losses import hinge_d_loss, r1_penalty


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock_discriminator(channels: int = 64) -> nn.Module:
    """The 70 px PatchGAN written out with torch's own layers."""
    c = channels
    stock = nn.Module()
    stock.main = nn.Sequential(
        nn.Conv2d(3, c, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * c),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4 * c),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * c, 8 * c, 4, 1, 1, bias=False),
        nn.BatchNorm2d(8 * c),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8 * c, 1, 4, 1, 1),
    )
    return stock


def test_the_default_has_the_stock_layout_and_function() -> None:
    ours, stock = NLayerDiscriminator(channels=4), stock_discriminator(4)
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert missing == []
    assert {name.split(".")[-1] for name in unexpected} == {"running_mean", "running_var", "num_batches_tracked"}
    x = images(0, 2, 3, 40, 48)
    assert torch.allclose(ours(x), stock.main(x), atol=1e-6)
    assert torch.equal(ours.eval()(x), ours.train()(x)), "batch statistics in eval mode too"


def test_number_of_parameters() -> None:
    count = {
        norm: sum(parameter.numel() for parameter in NLayerDiscriminator(norm=norm).parameters())
        for norm in ("batch", "group", "none")
    }
    assert count["batch"] == sum(parameter.numel() for parameter in stock_discriminator().parameters()) == 2_765_633
    assert count["none"] == 2_764_737  # biases of the inner convolutions in place of the norms
    assert count["group"] == 2_764_737 + 2 * (128 + 256 + 512)


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    net = NLayerDiscriminator()
    assert net.main[5].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert net.main[9].weight.mean().item() == pytest.approx(1, abs=0.005)
    assert net.main[9].weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.all(net.main[9].bias == 0)


@pytest.mark.parametrize(("num_layers", "receptive_px"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_stated_patch(num_layers: int, receptive_px: int) -> None:
    net = NLayerDiscriminator(channels=2, num_layers=num_layers, norm="none")
    x = images(0, 1, 3, 160, 160).requires_grad_()
    logits = net(x)
    assert logits.shape[-2:] == (160 // 2**num_layers - 2,) * 2
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = (x.grad[0].abs().sum(dim=0) > 0).nonzero()
    assert (seen.max(dim=0).values - seen.min(dim=0).values + 1).tolist() == [receptive_px] * 2
    assert receptive_px == 9 * 2**num_layers - 2


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_image_gives_one_logit_and_a_smaller_one_names_the_setting(num_layers: int) -> None:
    net = NLayerDiscriminator(channels=2, num_layers=num_layers)
    size = net.min_size_px
    assert net(images(0, 2, 3, size, size + 5)).shape[:3] == (2, 1, 1)
    with pytest.raises(ConfigError, match=rf"{size - 1} px.*at least {size} px.*data\.crop_px"):
        net(images(0, 2, 3, size + 5, size - 1))


def test_batch_norm_equals_torchs_in_training_up_to_second_derivatives() -> None:
    ours, stock = BatchNorm(5).double(), nn.BatchNorm2d(5).double().train()
    with torch.no_grad():
        ours.weight.copy_(images(0, 5))
        ours.bias.copy_(images(1, 5))
    stock.load_state_dict(ours.state_dict(), strict=False)
    x, factor = images(2, 3, 5, 4, 6).double() * 3 + 7, images(3, 3, 5, 4, 6).double()
    found = []
    for norm in (ours, stock):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        (grad,) = torch.autograd.grad((out.square() * factor).sum(), leaf, create_graph=True)
        (out.sum() * 0 + grad.square().sum()).backward()
        found.append([out, grad, leaf.grad, norm.weight.grad])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_spectral_norm_bounds_every_kernel(norm: str) -> None:
    torch.manual_seed(0)
    net = NLayerDiscriminator(channels=4, num_layers=2, norm=norm, spectral_norm=True)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("original"):
                parameter.mul_(50)
    x = images(0, 2, 3, 16, 16)
    for _ in range(30):
        net(x)
    kernels = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    values = [torch.linalg.matrix_norm(kernel.flatten(1), ord=2).item() for kernel in kernels]
    assert len(values) == 4 and values == pytest.approx([1.0] * 4, rel=0.02)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_saved_discriminator_goes_on_bit_for_bit(spectral_norm: bool) -> None:
    def build() -> DiscriminatorModule:
        return DiscriminatorModule(NLayerDiscriminator(channels=4, num_layers=2, spectral_norm=spectral_norm))

    def step(module: DiscriminatorModule) -> torch.Tensor:
        loss = hinge_d_loss(*module(images(0, 2, 3, 16, 16), images(1, 2, 3, 16, 16)))
        module.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * parameter.grad
        return loss.detach()

    first, second = build(), build()
    step(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [step(first).item() for _ in range(3)] == [step(second).item() for _ in range(3)]


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_generators_pass_has_a_gradient_to_the_image_and_leaves_the_discriminator_as_it_is(
    spectral_norm: bool,
) -> None:
    module = DiscriminatorModule(NLayerDiscriminator(channels=4, num_layers=2, spectral_norm=spectral_norm))
    module.net.main[2].requires_grad_(False)  # what was frozen before stays frozen
    before = copy.deepcopy(module.state_dict())
    fake = images(0, 2, 3, 16, 16).requires_grad_()
    module.logits(fake).sum().backward()
    assert fake.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    frozen_names = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen_names and all(name.startswith("net.main.2.") for name in frozen_names)
    assert all(child.training for child in module.modules())


def test_freezing_ends_with_an_error_too() -> None:
    net = NLayerDiscriminator(channels=2, num_layers=1)
    with pytest.raises(ConfigError), frozen(net):
        assert not net.training
        net(images(0, 1, 3, 2, 2))
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())


def test_real_and_fake_have_statistics_of_their_own() -> None:
    module = DiscriminatorModule(NLayerDiscriminator(channels=4, num_layers=2))
    real, fake = images(0, 2, 3, 16, 16), 3 * images(1, 2, 3, 16, 16) + 2
    logits_real, logits_fake = module(real, fake)
    assert torch.equal(logits_real, module.net(real)) and torch.equal(logits_fake, module.net(fake))


def build_pair(spectral_norm: bool) -> DiscriminatorModule:
    torch.manual_seed(0)
    return DiscriminatorModule(NLayerDiscriminator(channels=4, num_layers=2, spectral_norm=spectral_norm)).double()


# Run by each of two processes: its part of what `joined` below computes alone.
PROCESS = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sdvae.training.discriminator import BatchNorm, DiscriminatorModule, NLayerDiscriminator
from sdvae.training.losses import hinge_d_loss, r1_penalty

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt")
result = {}

norm = BatchNorm(5).double()
norm.load_state_dict(given["norm"])
part = slice(0, 3) if rank == 0 else slice(3, 4)  # batches of 3 and 1
x = given["x"][part].clone().requires_grad_()
out = norm(x)
(out.square() * given["factor"][part]).sum().backward()
result["norm"] = [out.detach(), x.grad, norm.weight.grad, norm.bias.grad]

for spectral_norm in (False, True):
    module = DiscriminatorModule(NLayerDiscriminator(channels=4, num_layers=2, spectral_norm=spectral_norm)).double()
    module.load_state_dict(given["net", spectral_norm])
    wrapped = DistributedDataParallel(module)
    half = slice(2 * rank, 2 * rank + 2)
    real, fake = given["real"][half].clone().requires_grad_(), given["fake"][half].clone().requires_grad_()
    logits = wrapped(real, fake.detach())
    (hinge_d_loss(*logits) + 0.1 * r1_penalty(logits[0], real)).backward()
    grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.logits(fake).square().mean().backward()
    unchanged = all(torch.equal(parameter.grad, grads[name]) for name, parameter in module.named_parameters())
    result[spectral_norm] = {
        "logits": [value.detach() for value in logits], "grads": grads, "fake": fake.grad / 2,
        "unchanged": unchanged, "buffers": dict(module.named_buffers()),
    }
torch.save(result, f"{folder}/{rank}.pt")
dist.barrier()
os._exit(0)  # gloo's threads now and then abort an interpreter that winds down, which is not what is tested
"""


def test_two_processes_compute_what_one_does_with_the_joined_batch(tmp_path: Path) -> None:
    """Values and gradients; a local mean, statistics without a gradient, or batches counted alike give others."""
    norm = BatchNorm(5).double()
    nn.init.normal_(norm.weight)
    x = (images(0, 4, 5, 4, 6) + torch.arange(4.0).view(4, 1, 1, 1)).double().requires_grad_()
    given = {"norm": norm.state_dict(), "x": x.detach(), "factor": images(1, 4, 5, 4, 6).double()}
    given |= {"real": images(2, 4, 3, 16, 16).double(), "fake": images(3, 4, 3, 16, 16).double()}
    given["fake"] *= torch.arange(1.0, 5.0).view(4, 1, 1, 1)
    modules = {spectral_norm: build_pair(spectral_norm) for spectral_norm in (False, True)}
    given |= {("net", key): copy.deepcopy(module.state_dict()) for key, module in modules.items()}
    torch.save(given, tmp_path / "given.pt")

    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    out = norm(x)
    (out.square() * given["factor"]).sum().backward()
    outs, grads, weights, biases = zip(*(result["norm"] for result in found), strict=True)
    torch.testing.assert_close(torch.cat(outs), out.detach(), rtol=1e-5, atol=1e-5)  # statistics are float32
    torch.testing.assert_close(torch.cat(grads), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(weights), norm.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum(biases), norm.bias.grad, rtol=1e-5, atol=1e-4)

    for spectral_norm, module in modules.items():
        real, fake = given["real"].requires_grad_(), given["fake"].clone().requires_grad_()
        logits = module(real, fake.detach())
        (hinge_d_loss(*logits) + 0.1 * r1_penalty(logits[0], real)).backward()
        results = [result[spectral_norm] for result in found]
        for index in range(2):
            joined = torch.cat([result["logits"][index] for result in results])
            torch.testing.assert_close(joined, logits[index].detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in module.named_parameters():
            for result in results:
                scale = parameter.grad.abs().max().item()
                torch.testing.assert_close(result["grads"][name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)
        module.logits(fake).square().mean().backward()
        torch.testing.assert_close(
            torch.cat([result["fake"] for result in results]), fake.grad, rtol=1e-4, atol=1e-5 * fake.grad.abs().max()
        )
        assert all(result["unchanged"] for result in results), (
            "the generator's pass left gradients in the discriminator"
        )
        for name, buffer in module.named_buffers():
            assert torch.equal(results[0]["buffers"][name], results[1]["buffers"][name])
            torch.testing.assert_close(results[0]["buffers"][name], buffer)
