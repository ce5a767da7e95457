"""What a training run can be told. No torch.

A YAML file has the sections `model`, `data`, `loss` and `training`; every field and its default stands here, except
those of `model`, which are the parameters of `sdvae.AutoencoderKL`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sdvae.errors import ConfigError

__all__ = ["DataConfig", "LossConfig", "TrainConfig", "TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the photographs come from and how crops are cut from them."""

    path: str  # folder, glob, one file, or .txt list of training images
    val_path: str | None = None  # the same for validation; null: num_val_images are held out of `path`
    num_val_images: int = (
        16  # held out of `path` when val_path is null; else the most that are read from val_path; 0: none
    )
    crop_px: int = 256  # side of the square random crops; smaller images are enlarged first
    val_crop_px: int | None = 256  # validation sees this centre crop; null: whole images
    num_workers: int = 0  # processes that read images; 0: the training process itself
    cache_images: bool = False  # keep decoded images in memory; saves decoding where the set fits

    def __post_init__(self) -> None:
        _require(self.crop_px >= 8, "data.crop_px", self.crop_px, "at least 8 px")
        _require(
            self.val_crop_px is None or self.val_crop_px >= 8, "data.val_crop_px", self.val_crop_px, "8 px or more"
        )
        _require(self.num_val_images >= 0, "data.num_val_images", self.num_val_images, "0 or more")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the generator's loss. Every term is per image element (3 * H * W); see `sdvae.training.losses`."""

    rec: Literal["l1", "l2"] = "l1"  # reconstruction: mean absolute or mean squared error, images in [-1, 1]
    kl_weight: float = 1e-6  # of the KL per image element, so the papers' 1e-6 (summed form) is 1e-6 here
    sample_posterior: bool = True  # decode a draw of z; false: the mean, a plain autoencoder

    def __post_init__(self) -> None:
        _require(self.kl_weight >= 0, "loss.kl_weight", self.kl_weight, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation and what is written on the way."""

    steps: int = 100_000  # optimizer updates
    batch_size: int = 8  # images per device and forward pass
    accumulation: int = 1  # forward passes per optimizer update
    lr: float = 1e-4  # peak learning rate, whatever the batch size and the number of devices
    final_lr_ratio: float = 1.0  # cosine decay from lr to lr * this over the run; 1: constant after the warm-up
    warmup_steps: int = 500  # linear from 0
    betas: tuple[float, ...] = (0.9, 0.99)  # of Adam
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this norm; null: not
    ema_decay: float = 0.999  # of the averaged weights that validation and export use; 0: the weights themselves
    init: Literal["default", "linear"] = "default"  # linear: the best linear transform, see sdvae.training.linear_init
    precision: Literal["no", "bf16", "fp16"] = "no"  # autocast; weights and optimizer stay float32
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    channels_last: bool = True  # memory layout; several times faster on CPUs, faster on tensor cores
    cpu: bool = False  # train on the CPU even where an accelerator is found
    seed: int = 0
    log_every: int = 50  # steps
    val_every: int = 1000  # steps; 0: only at the end
    checkpoint_every: int = 1000  # steps; 0: only at the end
    num_checkpoints: int = 2  # newest ones that are kept
    num_calibration_images: int = 512  # crops from which scaling_factor is measured at the end; 0: left as configured

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "num_checkpoints"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        for name in ("warmup_steps", "val_every", "checkpoint_every", "num_calibration_images"):
            _require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        _require(self.lr > 0, "training.lr", self.lr, "above 0")
        _require(0 <= self.final_lr_ratio <= 1, "training.final_lr_ratio", self.final_lr_ratio, "from 0 to 1")
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "from 0 up to, not including, 1")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "training.betas",
            list(self.betas),
            "two numbers from 0 up to, not including, 1",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    run_dir: str  # folder for checkpoints, samples, logs and the finished VAE
    data: DataConfig
    model: dict[str, Any] = field(
        default_factory=dict
    )  # parameters of sdvae.AutoencoderKL that differ from its defaults
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"'{key}' is {value}; expected {expected}")
