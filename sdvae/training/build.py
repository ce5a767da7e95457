"""Building what a run trains and what trains it: autoencoder, optimizer."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.store import load_autoencoder
from sdvae.data.loader import TrainingData
from sdvae.errors import CheckpointError, ConfigError
from sdvae.features.lpips import LPIPS, MIN_PX, build_lpips, find_lpips_weights
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.config import PerceptualConfig, TrainConfig, TrainingConfig
from sdvae.training.discriminator import NLayerDiscriminator
from sdvae.training.equivariance import Transform
from sdvae.training.linear_init import linear_init

__all__ = [
    "autoencoder_of_checkpoint",
    "build_autoencoder",
    "build_optimizer",
    "build_perceptual",
    "require_model",
    "require_perceptual",
    "require_sizes",
    "starting_autoencoder",
]

_WEIGHTS_OPTION = "loss.perceptual.weights_path"
_WITHOUT_PERCEPTUAL = "loss.perceptual.weight=0 trains without it"
INIT_PIXELS = 800_000  # of training crops that the linear start is fitted to


def build_autoencoder(model: Mapping[str, Any], seed: int) -> AutoencoderKL:
    """An autoencoder with seeded weights. The block types follow from `block_out_channels` and need not be given.

    Raises: ConfigError for a key that is no parameter of AutoencoderKL, or values that cannot be built.
    """
    _require_known(model)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}
    levels = len(fields.get("block_out_channels", (64,)))
    fields.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    fields.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: AutoencoderKL = AutoencoderKL(**fields)
    return vae


def starting_autoencoder(config: TrainConfig, data: TrainingData | None) -> AutoencoderKL:
    """The autoencoder as `training.init` says, in float32: random, linear, or a copy of another one.

    data: crops for the linear start; None leaves it out, for a look at the architecture.
    Raises: ConfigError where `model` contradicts the VAE that `training.init` names; what load_autoencoder raises.
    """
    options = config.training
    if options.init not in ("default", "linear"):
        vae = load_autoencoder(None if options.init == "bundled" else options.init)
        require_model(config.model, vae, f"the VAE {options.init} (training.init)")
        return vae
    vae = build_autoencoder(config.model, options.seed)
    if options.init == "linear" and data is not None:
        crops = list(data.first_crops(math.ceil(INIT_PIXELS / config.data.crop_px**2)))
        linear_init(vae, torch.stack(crops), torch.Generator().manual_seed(options.seed))
    return vae


def require_model(model: Mapping[str, Any], vae: AutoencoderKL, what: str) -> None:
    """Raise ConfigError unless `vae` has every value that the `model` section gives."""
    _require_known(model)
    for key, value in model.items():
        has = vae.config[key]
        if _plain(has) != _plain(value):
            raise ConfigError(f"'model.{key}' is {_plain(value)}, but {what} has {_plain(has)}; leave model.{key} out")


def autoencoder_of_checkpoint(checkpoint_dir: Path, model: Mapping[str, Any]) -> AutoencoderKL:
    """An autoencoder of the architecture that a checkpoint holds, weights not yet loaded.

    Raises: CheckpointError where the checkpoint names none; ConfigError where `model` contradicts it.
    """
    try:
        fields = AutoencoderKL.load_config(checkpoint_dir)
    except OSError as error:
        raise CheckpointError(f"{checkpoint_dir} has no config.json with the autoencoder's architecture") from error
    vae: AutoencoderKL = AutoencoderKL.from_config(fields)
    require_model(model, vae, f"the checkpoint {checkpoint_dir}")
    return vae


def build_optimizer(
    parameters: Iterable[Tensor], options: TrainingConfig, device: torch.device, lr: float | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW in float32 or with 8-bit states. lr: null means training.lr; the schedule is set from outside.

    Raises: ConfigError where 8-bit states are asked for and bitsandbytes is not installed.
    """
    arguments: dict[str, Any] = {"lr": lr or options.lr, "betas": options.betas, "weight_decay": options.weight_decay}
    if options.optimizer.endswith("8bit"):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"'training.optimizer' is {options.optimizer}, which needs bitsandbytes: pip install bitsandbytes, "
                f"or set training.optimizer={options.optimizer.removesuffix('8bit')}"
            )
        from bitsandbytes import optim

        kind = optim.AdamW8bit if options.optimizer == "adamw8bit" else optim.Adam8bit
        return kind(parameters, **arguments)  # type: ignore[no-any-return]
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    # one kernel for all parameters, where torch has it for the device
    return kind(parameters, **arguments, fused=device.type in ("cpu", "cuda", "mps", "xpu"))


def build_perceptual(config: PerceptualConfig) -> LPIPS:
    """The perceptual network with its weights. Raises: MissingWeightsError, which says how to provide them."""
    return build_lpips(config.net, config.weights_path, option=_WEIGHTS_OPTION, without=_WITHOUT_PERCEPTUAL)


def require_perceptual(config: PerceptualConfig) -> None:
    """Raise MissingWeightsError unless the perceptual network's weights are on this machine."""
    find_lpips_weights(config.net, config.weights_path, option=_WEIGHTS_OPTION, without=_WITHOUT_PERCEPTUAL)


def require_sizes(config: TrainConfig, vae: AutoencoderKL) -> None:
    """Raise ConfigError unless crops, and what a transform of z leaves of them, suit all networks of the run."""
    crop_px, ratio, equivariance = config.data.crop_px, vae.spatial_compression_ratio, config.loss.equivariance
    if crop_px % ratio:
        raise ConfigError(f"'data.crop_px' is {crop_px}; expected a multiple of {ratio}, the compression of this VAE")
    scale = equivariance.min_scale if equivariance.probability else 1.0
    smallest_px = ratio * Transform(scale, 0).latent_size(crop_px // ratio, crop_px // ratio)[0]
    if config.loss.perceptual.weight and smallest_px < (min_px := MIN_PX[config.loss.perceptual.net]):
        raise ConfigError(
            f"reconstructions of {smallest_px} px reach LPIPS, which needs {min_px}; raise 'data.crop_px' "
            "(loss.equivariance.min_scale shrinks it further)"
        )
    if config.loss.adversarial.weight:
        with torch.device("meta"):  # no weights, and no random numbers for them
            net = NLayerDiscriminator(channels=1, num_layers=config.loss.adversarial.num_layers)
        net.require_size(smallest_px)


def _require_known(model: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(AutoencoderKL.__init__).parameters if name != "self"]
    if unknown := [key for key in model if key not in known]:
        raise ConfigError(f"unknown key 'model.{unknown[0]}'; known keys: {', '.join(known)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
