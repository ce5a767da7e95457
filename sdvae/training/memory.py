"""How much memory a training step takes on a device, found out without a device and without allocating it.

A step is carried out as it is written in `step.py`, with tensors that have a shape and no values, and the bytes that
are alive are counted. So the estimate follows the code: frozen parts, gradient checkpointing, the chunks of LPIPS.
Fake tensors, not those of the device "meta": they claim to be on a CPU, so that autocast and attention act on them.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.features.lpips import LPIPS
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.config import AdversarialConfig, TrainConfig, TrainingConfig
from sdvae.training.discriminator import DiscriminatorModule, NLayerDiscriminator
from sdvae.training.losses import LeCam
from sdvae.training.step import Adversary, GeneratorModule, Reconstruction, discriminator_loss, generator_loss

__all__ = ["MemoryEstimate", "estimate_memory"]

_FLOAT32_BYTES = 4
_ADAM_BYTES = {"adam": 8, "adamw": 8, "adam8bit": 2, "adamw8bit": 2}  # two moments per parameter
_LOWER_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device."""

    weights: int  # of the autoencoder
    gradients: int
    optimizer: int
    averaged_weights: int
    activations: int  # the most that the pass through the autoencoder and back holds at once
    perceptual: int  # what LPIPS adds: its weights, the features of the images, its own pass
    discriminator: int  # what it adds: weights, gradients, optimizer, and its passes

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators within it make, from when they are made to when they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id, while alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._notice(tensor, counts=False)  # one that is new here was made outside
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._notice(tensor, counts=True)
        return result

    def _notice(self, tensor: Any, counts: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one Python object per storage as long as that lives
        if key not in self._storages:
            num_bytes = storage.nbytes() if counts else 0
            self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), num_bytes)
            self.live += num_bytes
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]


def estimate_memory(config: TrainConfig, vae: AutoencoderKL) -> MemoryEstimate:
    """The memory of a step with everything at work that the run switches on by its end.

    vae: on any device; which of its parameters require a gradient says what is trained. It is left as it is.
    Nothing of the size of an image or of weights is allocated, and no random number drawn.

    Included is what torch allocates: its own record of a step on a CPU is within 1 % of the estimate. Not included:
    a device's context (a few hundred MB with CUDA), scratch memory of its convolutions, what its allocator cannot
    reuse, and the buckets in which several processes exchange gradients (as large as the gradients). The resident
    memory of a process on a CPU came to 1.02 to 1.26 times the total, with gradient checkpointing to 1.5 times: up to
    200 MB more, for a model of 4 M parameters and 8 crops of 128 px.

    bf16 and fp16 are taken to be CUDA's, which runs norms in float32, unless training.cpu is set: bf16 then takes half.
    With torch.compile a step needs less.
    """
    with FakeTensorMode():
        ghost = _ghost(vae)
        if config.training.gradient_checkpointing:
            ghost.enable_gradient_checkpointing()
        module = GeneratorModule(ghost, config.loss)
        perceptual = _ghost_lpips(config.loss.perceptual.net) if config.loss.perceptual.weight else None
        adversary = _ghost_adversary(config.loss.adversarial, module) if config.loss.adversarial.weight else None
        alone = _peak_bytes(config, module, None, None)
        with_lpips = alone if perceptual is None else _peak_bytes(config, module, perceptual, None)
        with_all = with_lpips if adversary is None else _peak_bytes(config, module, perceptual, adversary)
    num_trained = _num_elements(parameter for parameter in module.parameters() if parameter.requires_grad)
    adam = _ADAM_BYTES[config.training.optimizer]
    weights_and_their_state = 2 * _FLOAT32_BYTES + adam
    lpips_weights = 0 if perceptual is None else _num_elements(perceptual.parameters()) * _FLOAT32_BYTES
    disc_state = 0 if adversary is None else _num_elements(adversary.module.parameters()) * weights_and_their_state
    return MemoryEstimate(
        weights=_num_elements(module.parameters()) * _FLOAT32_BYTES,
        gradients=num_trained * _FLOAT32_BYTES,
        optimizer=num_trained * adam,
        averaged_weights=num_trained * _FLOAT32_BYTES if config.training.ema_decay else 0,
        activations=alone,
        perceptual=lpips_weights + with_lpips - alone,
        discriminator=disc_state + with_all - with_lpips,
    )


def _peak_bytes(
    config: TrainConfig, module: GeneratorModule, perceptual: LPIPS | None, adversary: Adversary | None
) -> int:
    """Most bytes that a step holds at once, besides weights and gradients.

    Gradients are there from the start, as they are from the second of several accumulated passes on.
    """
    nets: list[nn.Module] = [module] if adversary is None else [module, adversary.module]
    for parameter in (parameter for net in nets for parameter in net.parameters() if parameter.requires_grad):
        parameter.grad = torch.empty_like(parameter)
    step = config.training.steps - 1
    shape = (config.training.batch_size, 3, config.data.crop_px, config.data.crop_px)
    with _LiveBytes() as counted, _precision(config.training, nets):
        x = torch.empty(shape)
        output = Reconstruction(*(tensor.float() for tensor in module(x)))  # as accelerate hands it on
        loss, _ = generator_loss(output, x, config.loss, step, perceptual, adversary)
        loss.backward()  # type: ignore[no-untyped-call]
        if adversary is not None and step >= config.loss.adversarial.disc_start:
            loss, _ = discriminator_loss(adversary.module, output.recon, x, config.loss.adversarial, adversary)
            loss.backward()  # type: ignore[no-untyped-call]
    peak: int = counted.peak
    return peak


@contextmanager
def _precision(training: TrainingConfig, nets: Iterable[nn.Module]) -> Iterator[None]:
    """Autocast as the run's device has it, for tensors that count as a CPU's."""
    if training.precision == "no":
        yield
        return
    norms = [module for net in nets for module in net.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [] if training.cpu else [norm.register_forward_pre_hook(_in_float32) for norm in norms]
    with torch.autocast("cpu", _LOWER_PRECISION[training.precision]):
        yield
    for hook in hooks:
        hook.remove()


def _in_float32(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What autocast does before a GroupNorm on CUDA; on a CPU it leaves the input as it is."""
    return tuple(x.float() for x in args)


def _ghost(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy without values: the same modules, shapes and flags."""
    shells: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
        for parameter in vae.parameters()
    }
    ghost = copy.deepcopy(vae, shells)  # what deepcopy finds in this dict it takes for copied
    for module in ghost.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = nn.GroupNorm  # ours adds up large maps by an operator that cannot do without values
    return ghost


def _ghost_lpips(net: str) -> LPIPS:
    """LPIPS without values, so that no weights need to be there."""
    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's on the argument `pretrained`
        import lpips

        package = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    heads = [head.model[-1].weight.detach() for head in package.lins]
    perceptual = LPIPS(nn.Identity(), package.scaling_layer, heads, min_px=1)
    perceptual.backbone = package.net  # afterwards: LPIPS changes its layout in memory, which it has not
    return perceptual


def _ghost_adversary(config: AdversarialConfig, module: GeneratorModule) -> Adversary:
    net = NLayerDiscriminator(
        channels=config.channels, num_layers=config.num_layers, norm=config.norm, spectral_norm=config.spectral_norm
    )
    return Adversary(DiscriminatorModule(net), module.last_layer, LeCam() if config.lecam_weight else None)


def _num_elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
