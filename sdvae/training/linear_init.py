"""Starting weights with which the autoencoder is about the best linear one of its shape, fitted to photographs.

With the residual branches switched off, the network is a chain of convolutions. They are set one after the other: the
encoder's to principal components of blocks of pixels, the decoder's by least squares, to predict such components, and
at last the pixels, from z. Training then starts from the quality of a linear transform instead of from noise.

Two tricks carry linear signals through the last GroupNorm and SiLU. As silu(u) - silu(-u) = u, signals come there in
both signs. And channels that carry no signal hold constants, so that a group's variance hardly depends on the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.layers import Attention, ResnetBlock2D

__all__ = ["linear_init"]

FILLED = 0.75  # largest share of a layer's channels that carries signals
NUM_ROWS = 60_000  # positions that a least-squares fit sees
RIDGE = (
    1e-2  # of the mean diagonal: the systems are near singular, and large weights that cancel each other train badly
)
CONSTANT = 2.0  # magnitude of those, where the strongest signal has variance 1
LOG_STD = -3.0  # of the posterior at the start, where z has unit variance


@torch.no_grad()
def linear_init(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> None:
    """Set all weights of `vae` from a sample of training crops.

    x: (B, 3, H, W), [-1, 1], sides multiples of the compression ratio; half a million pixels suffice.
    generator: draws the first layers of the residual branches, and the positions that the fits see.
    Raises: ConfigError for a `vae` of a single level, where there is no block of pixels to transform.
    Source: principal components, Hotelling 1933; zero branches, Goyal et al. 2017, section 5.1.
    """
    if vae.spatial_compression_ratio == 1 or vae.config.in_channels != 3 or vae.config.out_channels != 3:
        raise ConfigError("training.init=linear needs RGB images and at least two levels in model.block_out_channels")
    for layer in vae.modules():
        if isinstance(layer, ResnetBlock2D):
            nn.init.normal_(layer.conv1.weight, std=(2.0 / layer.conv1.weight[0].numel()) ** 0.5, generator=generator)
            for parameter in (layer.conv1.bias, layer.conv2.weight, layer.conv2.bias):
                nn.init.zeros_(parameter)
        elif isinstance(layer, Attention):
            nn.init.zeros_(layer.to_out[0].weight)
            nn.init.zeros_(layer.to_out[0].bias)
    z = _fit_encoder(vae, x, generator)
    _fit_decoder(vae, z, x, generator)


def _fit_encoder(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns: the mean of z for x, (B, latent_channels, h, w), unit variance."""
    encoder, num_latents = vae.encoder, vae.config.latent_channels
    slots = _write(encoder.conv_in, torch.eye(3)[:, :, None, None], torch.zeros(3), torch.arange(3))
    h = encoder.conv_in(x)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            slots = _pass_on(resnet, slots)
            h = resnet(h)
        for down in block.downsamplers:
            is_last = block is encoder.down_blocks[-2]
            signals = int(FILLED * down.conv.out_channels)
            blocks = F.pixel_unshuffle(h[:, slots], 2)  # (B, 4 * signals, H / 2, W / 2)
            weight, bias = _principal_components(blocks, signals // 2 if is_last else signals)
            top = F.conv2d(blocks, weight[:num_latents, :, None, None], bias[:num_latents])
            top = top / top.std(dim=(0, 2, 3), keepdim=True)  # z, should this be the last level
            if is_last:
                weight, bias = torch.cat([weight, -weight]), torch.cat([bias, -bias])
            slots = _write(down.conv, weight.unflatten(1, (-1, 2, 2)), bias, slots)
            h = down(h)
    h = F.silu(encoder.conv_norm_out(encoder.mid_block(h)))
    _fit(encoder.conv_out, h, top, generator)
    encoder.conv_out.bias[num_latents:] = 2.0 * LOG_STD
    _set_identity(vae.quant_conv)
    return vae._moments(x)[:, :num_latents]


def _fit_decoder(vae: AutoencoderKL, z: Tensor, x: Tensor, generator: torch.Generator) -> None:
    decoder, ratio = vae.decoder, vae.spatial_compression_ratio
    _set_identity(vae.post_quant_conv)
    slots = torch.arange(z.shape[1])
    slots = _fit(decoder.conv_in, z, _block_components(x, ratio, decoder.conv_in.out_channels), generator, slots)
    h = decoder.mid_block(decoder.conv_in(z))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            slots = _pass_on(resnet, slots)
            h = resnet(h)
        for up in block.upsamplers:
            ratio //= 2
            target = _block_components(x, ratio, up.conv.out_channels) if ratio > 1 else torch.cat([x, -x], dim=1)
            slots = _fit(up.conv, F.interpolate(h, scale_factor=2.0, mode="nearest"), target, generator, slots)
            h = up(h)
    _fit(decoder.conv_out, F.silu(decoder.conv_norm_out(h)), x, generator)


def _pass_on(resnet: ResnetBlock2D, slots: Tensor) -> Tensor:
    """Carry the signals through a block whose branch is zero. Returns: their new channels."""
    shortcut = resnet.conv_shortcut
    if shortcut is None:
        return slots
    kept = slots[: max(1, int(FILLED * shortcut.out_channels))]  # signals come in falling importance
    return _write(shortcut, torch.eye(len(kept))[:, :, None, None], torch.zeros(len(kept)), kept)


def _write(conv: nn.Conv2d, weight: Tensor, bias: Tensor, slots: Tensor) -> Tensor:
    """Make `conv` read signals from channels `slots`, and write them spread evenly over its outputs, constants between.

    weight: (signals, len(slots), kh, kw): 3x3, 1x1 for the centre, or 2x2 for a downsampling.
    Returns: the output channels.
    """
    signals, size = weight.shape[0], weight.shape[-1]
    out = torch.arange(signals) * conv.out_channels // signals
    corner = 1 if size == 1 and conv.kernel_size == (3, 3) else 0
    conv.weight.zero_()
    region = conv.weight[:, :, corner : corner + size, corner : corner + size]
    region[out[:, None], slots] = weight
    conv.bias.copy_(CONSTANT * (1.0 - 2.0 * (torch.arange(conv.out_channels) % 2)))
    conv.bias[out] = bias
    return out


def _fit(conv: nn.Conv2d, h: Tensor, target: Tensor, generator: torch.Generator, slots: Tensor | None = None) -> Tensor:
    """Set a 3x3 `conv` to predict target (B, K, H, W) from h (B, C, H, W) with least squared error.

    slots: the channels of h to use, with constants between the outputs; None: all of h, and the outputs stand first.
    Returns: the output channels.
    """
    inputs = h if slots is None else h[:, slots]
    columns = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)  # (B * H * W, C * 9)
    values = target.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * H * W, K)
    rows = torch.randint(len(columns), (NUM_ROWS,), generator=generator)
    a, b = columns[rows].double(), values[rows].double()
    a_mean, b_mean = a.mean(dim=0), b.mean(dim=0)
    a, b = a - a_mean, b - b_mean
    gram = a.T @ a
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, a.T @ b)  # (C * 9, K)
    weight = solution.T.reshape(-1, inputs.shape[1], 3, 3).float()
    bias = (b_mean - a_mean @ solution).float()
    if slots is not None:
        return _write(conv, weight, bias, slots)
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[: len(weight)] = weight
    conv.bias[: len(bias)] = bias
    return torch.arange(len(weight))


def _block_components(x: Tensor, size: int, channels: int) -> Tensor:
    """Principal components of size x size blocks of pixels, as many as a layer of `channels` may carry.

    Returns: (B, K, H / size, W / size).
    """
    blocks = F.pixel_unshuffle(x, size)
    weight, bias = _principal_components(blocks, int(FILLED * channels))
    return F.conv2d(blocks, weight[:, :, None, None], bias)


def _principal_components(h: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) that take h (B, C, H, W) to its K = `count` leading components, of mean 0.

    All have the scale at which the first has variance 1. Scaled to variance 1 each, they would need large weights here
    and small ones in the decoder, and the small ones are lost in the first steps of an optimizer such as Adam.
    """
    values = h.transpose(0, 1).flatten(1).double()  # (C, N)
    variances, vectors = torch.linalg.eigh(torch.cov(values))
    weight = (vectors.flip(1)[:, :count] / variances[-1].sqrt()).T
    return weight.float(), (-weight @ values.mean(dim=1)).float()


def _set_identity(conv: nn.Conv2d | None) -> None:
    if conv is not None:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
