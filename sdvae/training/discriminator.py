"""PatchGAN discriminator: tells patches of photographs from patches of reconstructions.

The losses on its logits are in sdvae.training.losses; when it is trained is for sdvae.training.step to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as apply_spectral_norm

from sdvae.errors import ConfigError

__all__ = ["BatchNorm", "DiscriminatorModule", "NLayerDiscriminator", "frozen"]

NORM_GROUPS = 32  # of GroupNorm, as in the autoencoder; fewer where the channels do not divide


class _SumOverProcesses(torch.autograd.Function):
    """Every process gets the sum, and so every process's loss depends on every process's tensor.

    The gradient is therefore the sum as well; it goes through this function again, which makes it differentiable too.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum_over_processes(grads[0])


def _sum_over_processes(tensor: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(tensor)  # type: ignore[no-untyped-call]
    return total


def _joined_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the batches of all processes, which may differ in size.

    x: (B, C, h, w). Returns: (C,) each, float32, differentiable with respect to the x of every process.
    """
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    own = torch.cat([count, mean, var])
    # a table with a row of each process, gathered as a sum: one exchange, and no difference of large numbers follows
    table = torch.zeros(dist.get_world_size(), len(own), dtype=own.dtype, device=own.device)
    here = torch.arange(len(table), device=own.device) == dist.get_rank()
    table = _sum_over_processes(torch.where(here[:, None], own, table))
    counts, means, variances = table[:, :1].detach(), table[:, 1 : 1 + len(mean)], table[:, 1 + len(mean) :]
    share = counts / counts.sum()  # (processes, 1)
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean).square())).sum(dim=0)


class BatchNorm(nn.Module):
    """BatchNorm by the statistics of the batch at hand, always, joined over all processes.

    In training `nn.BatchNorm2d` does the same on one process. It keeps running statistics besides, which a
    discriminator never uses and which processes overwrite for each other; there are none here. nn.SyncBatchNorm joins
    statistics on accelerators only.

    Every process must take part in every forward and backward pass.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w). Returns: the same shape and dtype."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        mean, var = _joined_moments(x)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x.float() * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, no gradient is taken for the module's parameters, and eval mode keeps its buffers as they are."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = [child for child in module.modules() if child.training]
    for parameter in wanted:
        parameter.requires_grad_(False)
    module.eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for child in training:
            child.training = True


class NLayerDiscriminator(nn.Module):
    """The PatchGAN of pix2pix, as VQGAN and latent-diffusion use it; weights have their names (`main.8.weight`).

    num_layers convolutions of stride 2, then two of stride 1; kernels of 4 px, padding of 1 px. A logit sees
    9 * 2**num_layers - 2 px: 70 px with 3 layers. Of an image of S px come floor(S / 2**num_layers) - 2 logits a side.

    channels: of the first layer; doubled by each further one, up to 8 times.
    norm: batch (see `BatchNorm`), group or none; neither the first nor the last layer has one.
    spectral_norm: every kernel is divided by an estimate of its largest singular value. The estimate is refined by one
    step in each forward pass in training mode, from the weights alone, so processes with equal weights agree on it.
    Source: Isola et al. 2017, section 6.1.2; spectral norm: Miyato et al. 2018.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 3,
        norm: str = "batch",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        widths = [channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            # a bias in front of BatchNorm would be taken off again with the mean
            bias = norm != "batch"
            layers.append(nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=bias))
            layers += [*_norm_layers(norm, widths[layer]), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)
        if spectral_norm:
            for module in layers:
                if isinstance(module, nn.Conv2d):
                    apply_spectral_norm(module)

    @property
    def min_size_px(self) -> int:
        """Shortest side of an image that yields a logit."""
        return int(3 * 2**self.num_layers)

    def require_size(self, size_px: int) -> None:
        """Raise ConfigError if images with sides of size_px are too small."""
        if size_px < self.min_size_px:
            raise ConfigError(
                f"images of {size_px} px reach a discriminator with {self.num_layers} layers, which needs at least "
                f"{self.min_size_px} px; raise 'data.crop_px' (loss.equivariance.min_scale shrinks it further) or "
                "lower 'loss.adversarial.num_layers'"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W), [-1, 1]. Returns: logits (B, 1, h, w), high for photographs. Raises: ConfigError."""
        self.require_size(min(x.shape[-2:]))
        logits: Tensor = self.main(x)
        return logits


def _norm_layers(norm: str, channels: int) -> list[nn.Module]:
    if norm == "none":
        return []
    return [BatchNorm(channels) if norm == "batch" else nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)]


def _init_weights(module: nn.Module) -> None:
    """Kernels from N(0, 0.02), norm weights from N(1, 0.02), as pix2pix; biases of convolutions stay torch's."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (BatchNorm, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)


class DiscriminatorModule(nn.Module):
    """The discriminator as its two users see it: its own step (`forward`) and the generator's (`logits`).

    Several devices wrap it and call `forward`, where all that its backward pass needs happens once. The generator's
    step calls `logits` of the unwrapped module: that leaves nothing to exchange.
    """

    def __init__(self, net: NLayerDiscriminator) -> None:
        super().__init__()
        self.net = net

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """real, fake: (B, 3, H, W), [-1, 1]; each has batch statistics of its own, as in the papers.

        Returns: logits of real and of fake, (B, 1, h, w).
        """
        return self.net(real), self.net(fake)

    def logits(self, fake: Tensor) -> Tensor:
        """Logits with a gradient to `fake` and none to the discriminator, which stays as it is, buffers included.

        fake: (B, 3, H, W), [-1, 1]. Returns: (B, 1, h, w).
        """
        with frozen(self.net):
            logits: Tensor = self.net(fake)
        return logits
