"""Encoder and decoder of the Stable-Diffusion-style autoencoder, as plain torch modules.

State-dict keys, and so the module names, are those of diffusers' `AutoencoderKL`. Numbers equal it within rounding.
This is the hot path; what is not here: the posterior, quant convs, configuration and files (see `network.py`).

`in_strips`, beside each `forward`, describes the same computation for a pass in strips of rows, which takes less memory
and on CPUs less time: `Strips` has its terms. A block without it, or a subclass that changes `forward` alone, makes the
network run by `forward`. `adds_to_stream` and `scales_inside` name the parameters that `checkpoints/rewrite/fp16.py`
may scale by a power of two. A new kind of block needs nothing outside its class.

Letters of the shape comments: B batch, C channels of the layer, H and W its height and width, N = H * W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.strips.maps import Layer, Rows
from sdvae.model.strips.passes import Strips

__all__ = ["ACTIVATIONS", "Decoder", "Encoder"]

NORM_EPS = 1e-6  # of every GroupNorm in the family, from latent-diffusion on

LARGE_MAP = 128 * 128  # positions; up to here torch's own statistics are good to a few 1e-7 in either memory layout


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else uses: in place where no gradient needs it, for time and memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GroupNorm(nn.GroupNorm):
    """torch's layer, with accurate statistics for large images in channels_last on a CPU.

    There torch adds up all values of a channel one after the other in float32: at 512 px, decoded images are wrong by
    1e-4 of their scale, larger ones by more; in the default layout, by 1e-6. This layer comes to 1e-6 in both, in about
    the same time. Where gradients are wanted, which is on the small crops of training, torch's layer runs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad and x.device.type == "cpu":
            # the first layer that is trained: torch's backward pass in channels_last crashes the process if it need not
            # give a gradient to x
            x = x.detach().requires_grad_()
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        large = x.ndim == 4 and x.shape[2] * x.shape[3] > LARGE_MAP
        if not (on_cpu and large and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        mean, var = group_moments(x, self.num_groups)  # each (B, groups, 1), float64
        scale = (var + self.eps).rsqrt() * self.weight.view(self.num_groups, -1)  # (B, groups, C / groups)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return torch.addcmul(shift.float().view(*x.shape[:2], 1, 1), x, scale.float().view(*x.shape[:2], 1, 1))


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels of each image.

    Rows are added to rows, so that a sum has H terms instead of H * W; the law of total variance merges the sums.
    x: (B, C, H, W), in channels_last. Returns: each (B, groups, 1), float64.
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, 1, width * channels).permute(0, 3, 1, 2)  # (B, W * C, H, 1)
    # the one operator that gives both at the speed of memory; torch.var_mean takes twenty times as long in this layout
    parts = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in rows.split(1)]
    means, variances = (torch.stack(part).double().view(batch, width, groups, -1) for part in zip(*parts, strict=True))
    mean = means.mean((1, 3), keepdim=True)
    var = (variances + (means - mean).square()).mean((1, 3))
    return mean.view(batch, groups, 1), var.view(batch, groups, 1)


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    adds_to_stream = ("conv2.weight", "conv2.bias", "conv_shortcut.bias")
    scales_inside = {"": {"conv1.weight": 1, "conv1.bias": 1}}  # norm2 cancels it

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.activation(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        h = strips.keep(strips.conv(x, self.conv1, self.norm1, self.activation))
        h = strips.conv(h, self.conv2, self.norm2, self.activation, shortcut=(x, self.conv_shortcut))
        return strips.store(h, last_use=True)


class Attention(nn.Module):
    """Self-attention over all positions, one head as wide as the layer, with a residual."""

    # diffusers then also loads the older names (query, key, value, proj_attn) into this module
    _from_deprecated_attn_block = True

    adds_to_stream = ("to_out.0.weight", "to_out.0.bias")
    scales_inside = {
        "": {"to_v.weight": 1, "to_v.bias": 1, "to_out.0.weight": -1},
        ".to_q": {"to_q.weight": 1, "to_q.bias": 1, "to_k.weight": -1, "to_k.bias": -1},
    }

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, N, C)
        h = self._attend(h).transpose(1, 2)  # (B, C, N)
        # A sum lies in memory as its first term does: this order makes what follows channels_last, the faster layout on
        # CPUs, and makes it round as diffusers' layers do.
        return h.reshape(x.shape) + x

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        # x, the normalized tokens, queries, keys, values and their result
        return strips.whole(x, self.group_norm, self._attend, num_maps=6)

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))  # (B, 1, N, C)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))  # (B, N, C)


class Downsample2D(nn.Module):
    """Halves height and width with a strided 3x3 convolution, padded at the bottom and the right only.

    The asymmetric padding comes from latent-diffusion; weights trained with it are wrong under any other.
    """

    adds_to_stream = ("conv.bias",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H // 2, W // 2)

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        return strips.store(strips.downsample(x, self.conv), last_use=True)


class Upsample2D(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    adds_to_stream = ("conv.bias",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2 * H, 2 * W)

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        return strips.keep(strips.upsample(x, self.conv), last_use=True)


class DownEncoderBlock2D(nn.Module):
    """One level of the encoder: residual blocks, then a downsampling except on the last level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        activation: Callable[[Tensor], Tensor],
        add_downsample: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(
            ResnetBlock2D(widths[i], widths[i + 1], groups, activation) for i in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)] if add_downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        for block in (*self.resnets, *self.downsamplers):
            x = block.in_strips(x, strips)
        return x


class UpDecoderBlock2D(nn.Module):
    """One level of the decoder: residual blocks, then an upsampling except on the last level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        activation: Callable[[Tensor], Tensor],
        add_upsample: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(
            ResnetBlock2D(widths[i], widths[i + 1], groups, activation) for i in range(num_layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if add_upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        for block in (*self.resnets, *self.upsamplers):
            x = block.in_strips(x, strips)
        return x


class UNetMidBlock2D(nn.Module):
    """The narrowest part: a residual block, self-attention unless switched off, a residual block."""

    def __init__(self, channels: int, groups: int, activation: Callable[[Tensor], Tensor], add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups, activation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)

    def in_strips(self, x: Rows, strips: Strips) -> Rows:
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = block.in_strips(x, strips)
        return x


class Encoder(nn.Module):
    """x (B, in_channels, H, W) -> features (B, 2 * latent_channels, h, w), before quant_conv.

    h = H / 2 ** (levels - 1), rounded down at every level.
    """

    adds_to_stream = ("conv_in.weight", "conv_in.bias")

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        activation = _activation(act_fn)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width, last = block_out_channels[0], len(block_out_channels) - 1
        for level, out_width in enumerate(block_out_channels):
            self.down_blocks.append(
                DownEncoderBlock2D(width, out_width, layers_per_block, groups, activation, add_downsample=level != last)
            )
            width = out_width
        self.mid_block = UNetMidBlock2D(width, groups, activation, mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C, H, W)
        for block in (*self.down_blocks, self.mid_block):
            h = _run(self, block, h)
        # the last activation is SiLU whatever act_fn says, in every program of the family
        return self.conv_out(silu(self.conv_norm_out(h)))  # (B, 2 * latent_channels, h, w)

    def in_strips(self, x: Rows, strips: Strips) -> Layer:
        h: Rows = strips.store(strips.conv(x, self.conv_in))
        for block in (*self.down_blocks, self.mid_block):
            h = block.in_strips(h, strips)
        return strips.conv(h, self.conv_out, self.conv_norm_out, silu)


class Decoder(nn.Module):
    """z after post_quant_conv (B, latent_channels, h, w) -> recon (B, out_channels, H, W), not clamped.

    H = h * 2 ** (levels - 1).
    """

    adds_to_stream = ("conv_in.weight", "conv_in.bias")

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        activation = _activation(act_fn)
        width, last = block_out_channels[-1], len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid_block = UNetMidBlock2D(width, groups, activation, mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for level, out_width in enumerate(reversed(block_out_channels)):
            # one residual block more than the encoder has, as in every program of the family
            self.up_blocks.append(
                UpDecoderBlock2D(width, out_width, layers_per_block + 1, groups, activation, add_upsample=level != last)
            )
            width = out_width
        self.conv_norm_out = GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, C, h, w)
        for block in (self.mid_block, *self.up_blocks):
            h = _run(self, block, h)
        return self.conv_out(silu(self.conv_norm_out(h)))  # (B, out_channels, H, W)

    def in_strips(self, z: Rows, strips: Strips) -> Layer:
        h: Rows = strips.store(strips.conv(z, self.conv_in))
        for block in (self.mid_block, *self.up_blocks):
            h = block.in_strips(h, strips)
        return strips.conv(h, self.conv_out, self.conv_norm_out, silu)


def _run(owner: Encoder | Decoder, block: nn.Module, h: Tensor) -> Tensor:
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        # diffusers' enable_gradient_checkpointing() sets this function
        return owner._gradient_checkpointing_func(block, h)  # type: ignore[operator]
    return block(h)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    try:
        return ACTIVATIONS[name.lower()]
    except KeyError:
        raise ConfigError(f"act_fn is '{name}'; expected one of {', '.join(ACTIVATIONS)}") from None
