"""What a training run can be told. No torch.

A YAML file has the sections `model`, `data`, `loss` and `training`; every field and its default stands here, except
those of `model`, which are the parameters of `sdvae.AutoencoderKL`. Defaults train a plain autoencoder with L1 and KL;
the published recipes in configs/ switch the rest on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sdvae.errors import ConfigError

__all__ = [
    "AdversarialConfig",
    "DataConfig",
    "EquivarianceConfig",
    "KLConfig",
    "LatentNoiseConfig",
    "LogvarConfig",
    "LossConfig",
    "PerceptualConfig",
    "TrainConfig",
    "TrainingConfig",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the photographs come from and how crops are cut from them."""

    path: str  # folder, glob, file or .txt list; for other sources: dataset name or folder, or tar shards
    source: Literal["images", "datasets", "webdataset"] = "images"  # image files; Hugging Face datasets; tar shards
    split: str = "train"  # source datasets: which split
    subset: str | None = None  # source datasets: the dataset's configuration name
    image_column: str = "image"  # source datasets: the column of images; webdataset takes the image file of a sample
    streaming: bool = False  # source datasets: read in order through a shuffle buffer instead of at random
    shuffle_buffer: int = 1000  # samples, undecoded, that a stream is shuffled in
    val_path: str | None = None  # folder, glob, file or .txt list for validation; null: images held out of `path`
    num_val_images: int = 16  # held out of `path` when val_path is null; else the most taken from val_path; 0: none
    crop_px: int = 256  # side of the square training crops
    crop: Literal["native", "resized", "random_resized"] = "native"  # see sdvae.data.transforms
    resize_px: int | None = None  # crop resized: the short side is brought to this first; null: crop_px
    min_crop_ratio: float = 0.5  # crop random_resized: smallest square, as a part of the short side
    flip: bool = True  # mirror half of the crops left to right
    min_px: int = 0  # images whose short side is smaller are left out
    max_unreadable_ratio: float = 0.05  # more damaged samples than this part of what was read end the run
    val_crop_px: int | None = 256  # validation sees this centre crop; null: whole images
    num_workers: int = 0  # processes that read images; 0: the training process itself
    cache_images: bool = False  # keep decoded images in memory; saves decoding where the set fits

    def __post_init__(self) -> None:
        _require(self.crop_px >= 8, "data.crop_px", self.crop_px, "at least 8 px")
        _require(
            self.val_crop_px is None or self.val_crop_px >= 8, "data.val_crop_px", self.val_crop_px, "8 px or more"
        )
        _require(
            self.resize_px is None or self.resize_px >= self.crop_px,
            "data.resize_px",
            self.resize_px,
            f"null or at least data.crop_px = {self.crop_px}",
        )
        _require(0 < self.min_crop_ratio <= 1, "data.min_crop_ratio", self.min_crop_ratio, "above 0, up to 1")
        _require(0 <= self.max_unreadable_ratio <= 1, "data.max_unreadable_ratio", self.max_unreadable_ratio, "0 to 1")
        _require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "1 or more")
        for name in ("num_val_images", "num_workers", "min_px"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        _require(
            not self.streaming or self.source == "datasets",
            "data.streaming",
            self.streaming,
            "false unless data.source is datasets (webdataset always streams)",
        )
        _require(
            not self.is_stream or self.val_path is not None or self.num_val_images == 0,
            "data.num_val_images",
            self.num_val_images,
            "0 for a stream, from which nothing can be held out; or set data.val_path to a folder of images",
        )

    @property
    def is_stream(self) -> bool:
        """Whether samples come in the order of the source, so that a position cannot be jumped to."""
        return self.streaming or self.source == "webdataset"


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """LPIPS between reconstruction and image; its network is frozen and needs weights (see docs/training.md)."""

    weight: float = 0.0  # 0: off; the papers' value is 1
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    weights_path: str | None = None  # the backbone's weights: a file, or a folder that holds it; null: usual places

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "loss.perceptual.weight", self.weight, "0 or more")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """KL divergence of the posterior to the standard normal."""

    weight: float = 1e-6  # with form sum, the papers' 1e-6 is 1e-6 here
    form: Literal["sum", "mean"] = "sum"  # nats summed over the latent per image element; or mean per latent element
    warmup_steps: int = 0  # the weight grows linearly from 0 over these
    free_bits: float = 0.0  # nats per latent element below which the KL costs nothing

    def __post_init__(self) -> None:
        for name in ("weight", "warmup_steps", "free_bits"):
            _require(getattr(self, name) >= 0, f"loss.kl.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class LogvarConfig:
    """Log-variance of the output: the reconstruction terms are divided by its exponential, and it is added to them."""

    init: float = 0.0
    learned: bool = False  # true: one more parameter, in the generator's optimizer


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A PatchGAN discriminator against the reconstructions."""

    weight: float = 0.0  # 0: no discriminator; the papers' value is 0.5
    disc_start: int = 50_001  # optimizer updates before it sets in; no adversarial work is done before
    ramp_steps: int = 0  # the weight grows linearly from 0 over these, from disc_start on
    loss: Literal["hinge", "vanilla", "least_squares"] = "hinge"
    adaptive: bool = True  # balance with the gradient norms at the last layer
    max_adaptive_weight: float = 1e4  # its clamp, in the papers' unit: losses summed over an image
    num_layers: int = 3
    channels: int = 64  # of the first layer
    norm: Literal["batch", "group", "none"] = "batch"  # batch statistics are taken over all devices
    spectral_norm: bool = False
    r1_weight: float = 0.0  # of half the squared gradient at real images (Mescheder et al. 2018)
    lecam_weight: float = 0.0  # of the distance to averaged outputs (Tseng et al. 2021)
    lr: float | None = None  # null: training.lr; its schedule starts anew at disc_start

    def __post_init__(self) -> None:
        for name in ("weight", "disc_start", "ramp_steps", "r1_weight", "lecam_weight", "max_adaptive_weight"):
            _require(getattr(self, name) >= 0, f"loss.adversarial.{name}", getattr(self, name), "0 or more")
        for name in ("num_layers", "channels"):
            _require(getattr(self, name) >= 1, f"loss.adversarial.{name}", getattr(self, name), "1 or more")
        _require(self.lr is None or self.lr > 0, "loss.adversarial.lr", self.lr, "null or above 0")


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig:
    """EQ-VAE: z is scaled and rotated before decoding, and the reconstruction is compared with the image treated alike.

    Source: Kouzelis et al. 2025, "EQ-VAE: Equivariance Regularized Latent Space".
    """

    probability: float = 0.0  # of a step that transforms; 0: off; the paper's value is 0.5
    min_scale: float = 0.25  # z is scaled by a factor drawn evenly from here to 1
    rotate: bool = True  # and turned by 0, 90, 180 or 270 degrees

    def __post_init__(self) -> None:
        _require(0 <= self.probability <= 1, "loss.equivariance.probability", self.probability, "0 to 1")
        _require(0 < self.min_scale <= 1, "loss.equivariance.min_scale", self.min_scale, "above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class LatentNoiseConfig:
    """Noise on z before decoding, so that the decoder bears the errors of a diffusion model."""

    std: float = 0.0  # standard deviations of z (of its channel in the batch) at most; each image draws 0 to this

    def __post_init__(self) -> None:
        _require(self.std >= 0, "loss.latent_noise.std", self.std, "0 or more")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the generator's loss, each per image element (3 * H * W); see `sdvae.training.losses`."""

    rec: Literal["l1", "l2", "huber", "charbonnier"] = "l1"  # reconstruction, images in [-1, 1]
    rec_weight: float = 1.0
    rec_delta: float = 0.1  # huber: where it turns from square to straight; charbonnier: epsilon; units of x
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    logvar: LogvarConfig = field(default_factory=LogvarConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    latent_noise: LatentNoiseConfig = field(default_factory=LatentNoiseConfig)
    sample_posterior: bool = True  # decode a draw of z; false: the mean, a plain autoencoder

    def __post_init__(self) -> None:
        _require(self.rec_weight >= 0, "loss.rec_weight", self.rec_weight, "0 or more")
        _require(self.rec_delta > 0, "loss.rec_delta", self.rec_delta, "above 0")
        _require(
            self.rec_weight > 0 or self.perceptual.weight > 0,
            "loss.rec_weight",
            self.rec_weight,
            "above 0, unless loss.perceptual.weight is",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation and what is written on the way."""

    steps: int = 100_000  # optimizer updates
    batch_size: int = 8  # images per device and forward pass
    accumulation: int = 1  # forward passes per optimizer update
    init: str = "default"  # default: random; linear: see linear_init.py; else a VAE: folder, file, hub id or bundled
    trained: Literal["all", "encoder", "decoder", "last_blocks"] = "all"  # the rest stays as it is, bit for bit
    num_last_blocks: int = 1  # trained last_blocks: the decoder's last up blocks, with the output layers
    optimizer: Literal["adam", "adamw", "adam8bit", "adamw8bit"] = "adam"  # 8-bit states need bitsandbytes
    lr: float = 1e-4  # peak learning rate, whatever the batch size and the number of devices
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # from the warm-up to the last step
    final_lr_ratio: float = 0.0  # linear, cosine: the last step has lr * this
    warmup_steps: int = 500  # linear from 0
    betas: tuple[float, ...] = (0.9, 0.99)  # of Adam
    weight_decay: float = 0.0  # adamw
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this norm, each optimizer's own; null: not
    ema_decay: float = 0.999  # of the averaged weights that validation and export use; 0: the weights themselves
    precision: Literal["no", "bf16", "fp16"] = "no"  # autocast; weights and optimizer stay float32
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    channels_last: bool = True  # memory layout; faster on CPUs and on tensor cores
    compile: bool = False  # torch.compile of the autoencoder: minutes at the start, then faster on accelerators
    cpu: bool = False  # train on the CPU even where an accelerator is found
    seed: int = 0
    log_every: int = 50  # steps
    val_every: int = 1000  # steps; 0: only at the end
    checkpoint_every: int = 1000  # steps; 0: only at the end
    num_checkpoints: int = 2  # newest ones that are kept
    best_metric: Literal["psnr", "lpips", "none"] = "psnr"  # of validation: the best checkpoint is kept besides
    trackers: tuple[str, ...] | None = None  # tensorboard, wandb, trackio, mlflow, ...; null: tensorboard if installed
    num_calibration_images: int = 512  # crops from which scaling_factor is measured at the end; 0: left as it is

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "num_checkpoints", "num_last_blocks"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        for name in ("warmup_steps", "val_every", "checkpoint_every", "num_calibration_images", "weight_decay"):
            _require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        _require(self.lr > 0, "training.lr", self.lr, "above 0")
        _require(0 <= self.final_lr_ratio <= 1, "training.final_lr_ratio", self.final_lr_ratio, "from 0 to 1")
        _require(
            self.final_lr_ratio == 0 or self.schedule != "constant",
            "training.final_lr_ratio",
            self.final_lr_ratio,
            "0 with training.schedule constant; choose linear or cosine",
        )
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "from 0 up to, not including, 1")
        _require(
            self.weight_decay == 0 or self.optimizer.startswith("adamw"),
            "training.weight_decay",
            self.weight_decay,
            "0 unless training.optimizer is adamw or adamw8bit",
        )
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "training.max_grad_norm",
            self.max_grad_norm,
            "null or above 0",
        )
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
    model: dict[str, Any] = field(default_factory=dict)  # parameters of sdvae.AutoencoderKL that differ from defaults
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        metric, perceptual = self.training.best_metric, self.loss.perceptual.weight
        expected = "psnr or none while loss.perceptual.weight is 0"
        _require(metric != "lpips" or perceptual > 0, "training.best_metric", metric, expected)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"'{key}' is {value}; expected {expected}")
