"""`Autoencoder`: the network as plain torch, and the configuration that describes it.

Encoding, decoding and converting need no more than this. `AutoencoderKL`, the same network in diffusers' shell, is in
`autoencoder.py`; it is imported only if a pipeline, training or the public API asks for it, because importing diffusers
takes longer than all the rest. Files are read and written in `sdvae.checkpoints`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.model.execution import Execution, Tiling, run
from sdvae.model.layers import Decoder, Encoder
from sdvae.model.posterior import DiagonalGaussian

__all__ = ["Autoencoder", "AutoencoderConfig", "Decoded", "Encoded"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Mapping[str, Any]):
    """What config.json says of the network: fields, order and defaults are those of diffusers' AutoencoderKL.

    Fields are read as attributes or as items, as in the configurations of diffusers' models.

    `block_out_channels` has one width per level, and each level but the last halves the image; `sample_size` sets the
    tile size of blended tiling; `force_upcast` tells pipelines that fp16 overflows; `scaling_factor`, `shift_factor`,
    `latents_mean` and `latents_std` are carried for the diffusion model.
    Raises: ConfigError for block types, widths or groups that cannot be built.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        _check_blocks(self.down_block_types, self.up_block_types, self.block_out_channels, self.norm_num_groups)

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)


@dataclass(frozen=True)
class Encoded:
    """Result of `encode`: `latent_dist`, the posterior over z."""

    latent_dist: DiagonalGaussian


@dataclass(frozen=True)
class Decoded:
    """Result of `decode`: `sample`, (B, out_channels, H, W), about [-1, 1], not clamped."""

    sample: Tensor


class _Choice:
    """An attribute of a model that stands for a field of its `execution`."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __get__(self, model: Autoencoder, owner: type[Autoencoder]) -> Any:
        return getattr(model.execution, self._field)

    def __set__(self, model: Autoencoder, value: Any) -> None:
        model.execution = replace(model.execution, **{self._field: value})


class Autoencoder(nn.Module):
    """Convolutional autoencoder with a Gaussian latent: x (B, 3, H, W) in [-1, 1] <-> z (B, latent_channels, h, w).

    Weights and numbers are those of diffusers' AutoencoderKL, within rounding.
    z is never scaled here: `latents = (z - shift_factor) * scaling_factor` is left to whoever trains a diffusion model.
    Source: Rombach et al. 2022, appendix D; Kingma & Welling 2014.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self._network_config = config
        shape = {
            "block_out_channels": tuple(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "groups": config.norm_num_groups,
            "act_fn": config.act_fn,
            "mid_block_add_attention": config.mid_block_add_attention,
        }
        channels = config.latent_channels
        self.encoder = Encoder(in_channels=config.in_channels, latent_channels=channels, **shape)  # type: ignore[arg-type]
        self.decoder = Decoder(latent_channels=channels, out_channels=config.out_channels, **shape)  # type: ignore[arg-type]
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

        size = config.sample_size
        tile_size_px = size[0] if isinstance(size, (list, tuple)) else size
        self.execution = Execution(
            tile_sample_min_size=tile_size_px, tile_latent_min_size=tile_size_px // self.spatial_compression_ratio
        )

    @property
    def config(self) -> AutoencoderConfig:
        return self._network_config

    @property
    def spatial_compression_ratio(self) -> int:
        """H / h: pixels per latent position, along one side."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(self, x: Tensor) -> Encoded:
        """Posterior of z for a batch of images.

        x: (B, in_channels, H, W), [-1, 1]. Sides that are no multiple of the compression ratio lose their rest.
        Returns: an output whose `latent_dist` has moments (B, 2 * latent_channels, h, w).
        """
        execution = self.execution
        tile, out_tile = execution.tile_sample_min_size, execution.tile_latent_min_size
        return Encoded(DiagonalGaussian(execution.apply(self._moments, x, tile, out_tile)))

    def decode(self, z: Tensor) -> Decoded:
        """Images for a batch of z (not scaled latents).

        z: (B, latent_channels, h, w). Returns: an output whose `sample` is (B, out_channels, H, W), not clamped.
        """
        execution = self.execution
        tile, out_tile = execution.tile_latent_min_size, execution.tile_sample_min_size
        return Decoded(execution.apply(self._recon, z, tile, out_tile))

    def _moments(self, x: Tensor) -> Tensor:
        h = run(self.encoder, x, self.execution)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _recon(self, z: Tensor) -> Tensor:
        return run(self.decoder, z if self.post_quant_conv is None else self.post_quant_conv(z), self.execution)

    # diffusers' names for what `execution` says

    use_slicing = _Choice("slicing")
    tile_sample_min_size = _Choice("tile_sample_min_size")
    tile_latent_min_size = _Choice("tile_latent_min_size")
    tile_overlap_factor = _Choice("tile_overlap_factor")

    @property
    def use_tiling(self) -> bool:
        """Whether tiles of any kind are on. Setting it turns blended tiles on, or all tiles off."""
        return self.execution.tiling != "off"

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        if value != self.use_tiling:
            self.execution = replace(self.execution, tiling="blended" if value else "off", max_memory_bytes=None)

    def enable_slicing(self) -> None:
        """Run the images of a batch one by one, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run a batch in one pass (the default)."""
        self.use_slicing = False

    def enable_tiling(
        self,
        mode: str = "blended",
        *,
        max_memory_bytes: int | None = None,
        tile_size_px: int | None = None,
        overlap: float | None = None,
    ) -> None:
        """Less memory for large images.

        mode: blended: images larger than a tile run in blended tiles, as diffusers does; approximate. exact: in strips,
            with the result of one pass, to rounding; without gradients. auto: in one pass, and exactly in strips where
            that does not fit into memory.
        max_memory_bytes: of exact and auto, with what is in use already: by the process on a CPU, by tensors elsewhere;
            None: what is free.
        tile_size_px, overlap: of blended tiles; a multiple of the compression ratio, and the share of a tile, below 1,
            that two tiles have in common. None: `sample_size`, and 0.25, as diffusers.
        Raises: ConfigError.
        """
        if mode not in get_args(Tiling) or mode == "off":
            raise ConfigError(f"tiling is '{mode}'; expected blended, exact or auto")
        if mode == "blended" and max_memory_bytes is not None:
            raise ConfigError("blended tiling is given max_memory_bytes; its memory is decided by tile_size_px")
        if mode != "blended" and (tile_size_px, overlap) != (None, None):
            raise ConfigError(
                f"{mode} tiling is given a tile size or overlap; it has no tiles to choose: leave them out"
            )
        changes: dict[str, Any] = {"tiling": mode, "max_memory_bytes": max_memory_bytes}
        ratio = self.spatial_compression_ratio
        if tile_size_px is not None:
            if tile_size_px < 1 or tile_size_px % ratio:
                raise ConfigError(f"tile_size_px is {tile_size_px}; expected a multiple of {ratio}")
            changes |= {"tile_sample_min_size": tile_size_px, "tile_latent_min_size": tile_size_px // ratio}
        if overlap is not None:
            tile = changes.get("tile_latent_min_size", self.tile_latent_min_size)
            if not 0 <= overlap < 1 or int(tile * (1 - overlap)) < 1:
                raise ConfigError(
                    f"overlap is {overlap}; expected 0 to below 1, with a latent position left of each tile"
                )
            changes["tile_overlap_factor"] = overlap
        self.execution = replace(self.execution, **changes)

    def disable_tiling(self) -> None:
        """Run images of any size in one pass (the default)."""
        self.execution = replace(self.execution, tiling="off", max_memory_bytes=None)


def _check_blocks(
    down_block_types: tuple[str, ...], up_block_types: tuple[str, ...], widths: tuple[int, ...], groups: int
) -> None:
    for field, types, known in (
        ("down_block_types", down_block_types, "DownEncoderBlock2D"),
        ("up_block_types", up_block_types, "UpDecoderBlock2D"),
    ):
        if set(types) != {known}:
            raise ConfigError(f"{field} is {list(types)}; this autoencoder is built from '{known}' only")
        if len(types) != len(widths):
            raise ConfigError(
                f"{field} names {len(types)} levels, but block_out_channels has {len(widths)}: "
                f"{list(widths)}; give one block type per width"
            )
    if bad := [width for width in widths if width % groups]:
        raise ConfigError(f"block_out_channels {bad} cannot be divided into norm_num_groups = {groups} equal groups")
