"""`AutoencoderKL`: our network inside diffusers' model shell, so that any diffusers pipeline takes it.

The signature equals that of the stock class and the fields of `AutoencoderConfig`; every field is registered in
config.json. Files are read and written strictly in `sdvae.checkpoints.store`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.model.network import Autoencoder, AutoencoderConfig
from sdvae.model.posterior import DiagonalGaussian

ensure_torchvision_importable()

# A pipeline that was saved with this class looks the name ModelMixin up in this module, so it has to be here.
from diffusers import ConfigMixin, ModelMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402
from diffusers.utils.accelerate_utils import apply_forward_hook  # noqa: E402

__all__ = ["AutoencoderKL", "AutoencoderKLOutput", "DecoderOutput"]


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Result of `encode`: `latent_dist`, the posterior over z."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(BaseOutput):
    """Result of `decode` and of the whole pass: `sample`, (B, out_channels, H, W), about [-1, 1], not clamped."""

    sample: Tensor


class AutoencoderKL(Autoencoder, ModelMixin, ConfigMixin):
    """`Autoencoder` as a model of diffusers: x (B, 3, H, W) in [-1, 1] <-> z (B, latent_channels, h, w).

    Takes configuration and weights of diffusers' class of the same name, and gives the same numbers within rounding.
    z is never scaled here: `latents = (z - shift_factor) * scaling_factor` is left to whoever trains a diffusion model.

    Arguments are the stock ones; `AutoencoderConfig` says what they mean. Raises: ConfigError, as it does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float] | None = None,
        latents_std: tuple[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        # `register_to_config` has put the arguments there
        super().__init__(AutoencoderConfig(**{name: self.config[name] for name in AutoencoderConfig()}))

    # those of the shell, not of the network: registered fields, and weights that hooks move between devices
    config, device, dtype = ConfigMixin.config, ModelMixin.device, ModelMixin.dtype

    if TYPE_CHECKING:  # what the shell adds

        def __getattr__(self, name: str) -> Any: ...

    @apply_forward_hook
    def encode(  # type: ignore[override]
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Posterior of z for a batch of images.

        x: (B, in_channels, H, W), [-1, 1]. Sides that are no multiple of the compression ratio lose their rest.
        Returns: an output whose `latent_dist` has moments (B, 2 * latent_channels, h, w); with return_dict=False a
        1-tuple of the posterior.
        """
        posterior = super().encode(x).latent_dist
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(  # type: ignore[override]
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images for a batch of z (not scaled latents).

        z: (B, latent_channels, h, w). generator: accepted because pipelines pass it; decoding draws nothing.
        Returns: an output whose `sample` is (B, out_channels, H, W), not clamped, or with return_dict=False a 1-tuple.
        """
        recon = super().decode(z).sample
        return DecoderOutput(sample=recon) if return_dict else (recon,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, through a draw of z or (by default) its mode.

        sample: x, (B, in_channels, H, W), [-1, 1]. Returns: as `decode`.
        """
        posterior = self.encode(sample).latent_dist  # type: ignore[union-attr]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
