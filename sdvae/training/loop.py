"""`train`: the only place where devices, data, the step, logging, validation and saving meet.

A run folder holds
    config.yaml, environment.json       what the run was told and ran with
    metrics.jsonl, tensorboard/         what was logged, a line per `log_every` steps and per validation
    samples/step-*.png                  held-out images: original | reconstruction | difference
    checkpoints/step-*/                 for resuming
    vae/                                the finished autoencoder (averaged weights), a diffusers folder
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.store import save_autoencoder
from sdvae.codec.contact_sheet import contact_sheet
from sdvae.config import config_to_dict, dump_config, read_config
from sdvae.data.images import save_image
from sdvae.data.loader import CropDataset, build_loader
from sdvae.errors import ConfigError, OutputExistsError, TrainingError
from sdvae.evaluation.latents import LatentStatistics
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.build import build_autoencoder
from sdvae.training.config import TrainConfig
from sdvae.training.data import split_images
from sdvae.training.ema import EMA
from sdvae.training.linear_init import linear_init
from sdvae.training.state import Progress, checkpoint_dirs, load_checkpoint, save_checkpoint
from sdvae.training.step import GeneratorModule, Reconstruction, generator_loss, lr_at
from sdvae.training.validation import Validator

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)

INIT_PIXELS = 800_000  # of training crops that the linear start is fitted to


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    vae_dir: Path  # the finished autoencoder
    steps: int  # optimizer updates
    val_psnr: float | None  # dB, mean over the held-out images, averaged weights; None without such images
    scaling_factor: float
    is_main_process: bool = True  # false in all processes of a run on several devices but one


def train(
    config: TrainConfig | str | Path, overrides: Iterable[str] = (), *, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train an autoencoder and leave it in `run_dir`/vae.

    config: a TrainConfig, or a YAML file with `overrides` such as "training.lr=1e-4".
    resume: go on from the newest checkpoint in run_dir, bit for bit as if never stopped (same device and versions).
    overwrite: start afresh in a run_dir that holds another run, whose checkpoints are then replaced.
    Raises: ConfigError, OutputExistsError, ImageError, TrainingError (a loss that is not finite), CheckpointError.
    """
    if not isinstance(config, TrainConfig):
        config = read_config(TrainConfig, config, overrides)
    elif overrides:
        raise ConfigError("overrides go with a YAML file; change the TrainConfig itself with dataclasses.replace")
    was_initialized = AcceleratorState._shared_state != {}
    try:
        return _Run(config, resume, overwrite).train()
    finally:
        if not was_initialized:  # accelerate keeps one precision per process; the next run may want another
            AcceleratorState._reset_state()


class _Run:
    """One run: everything set up in __init__, carried out by `train`."""

    def __init__(self, config: TrainConfig, resume: bool, overwrite: bool) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.checkpoints_dir = self.run_dir / "checkpoints"
        checkpoint = self._claim_run_dir(resume, overwrite)
        train_paths, val_paths = split_images(config.data)
        options = config.training

        self.accelerator = Accelerator(
            mixed_precision=options.precision,
            cpu=options.cpu,
            log_with="tensorboard" if _has_tensorboard() else None,
            project_dir=str(self.run_dir),
        )
        set_seed(options.seed, device_specific=True)
        self.dataset = CropDataset(train_paths, config.data.crop_px, options.seed, config.data.cache_images)
        vae = build_autoencoder(config.model, options.seed)
        if options.init == "linear" and checkpoint is None:
            sample = torch.stack([self.dataset[i] for i in range(math.ceil(INIT_PIXELS / config.data.crop_px**2))])
            linear_init(vae, sample, torch.Generator().manual_seed(options.seed))
        if options.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if options.channels_last:
            vae = vae.to(memory_format=torch.channels_last)
        module = GeneratorModule(vae, config.loss.sample_posterior)
        optimizer = torch.optim.Adam(module.parameters(), lr=options.lr, betas=options.betas, fused=True)  # type: ignore[arg-type]
        # accelerate moves the module to the device, wraps it for several devices and the forward for autocast
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.vae: AutoencoderKL = self.accelerator.unwrap_model(self.module).vae
        self.ema = EMA(self.vae.parameters(), options.ema_decay)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.ema, self.progress)
        if checkpoint is not None:
            load_checkpoint(self.accelerator, checkpoint)
            if self.accelerator.is_main_process:
                logger.info("resumed from %s", checkpoint)

        self.validator = Validator(val_paths, config.data.val_crop_px)
        self.last_val_psnr: float | None = None

    def train(self) -> TrainResult:
        options = self.config.training
        if self.accelerator.is_main_process:
            self._write_description()
        self.accelerator.init_trackers("tensorboard")
        if self.accelerator.is_main_process and not _has_tensorboard():
            logger.info("tensorboard is not installed, so metrics.jsonl is the only log; pip install 'sdvae[train]'")
        batches = self._batches()
        first_step = self.progress.step
        window_start, window_step = time.perf_counter(), first_step
        while self.progress.step < options.steps:
            logs = self._step(batches)
            step = self.progress.step
            if step % options.log_every == 0 or step == options.steps:
                now = time.perf_counter()
                logs["seconds_per_step"] = (now - window_start) / (step - window_step)
                window_start, window_step = now, step
                self._log({f"train/{name}": value for name, value in logs.items()})
            if _is_due(step, options.val_every, options.steps):
                self._validate()
            if _is_due(step, options.checkpoint_every, options.steps):
                save_checkpoint(self.accelerator, self.checkpoints_dir, step, options.num_checkpoints)
        if self.progress.step == first_step:  # resumed at the very end
            self._validate()
        result = self._finish()
        self.accelerator.end_training()
        return result

    def _step(self, batches: Iterator[Tensor]) -> dict[str, float]:
        """One optimizer update. Returns: what is logged."""
        options = self.config.training
        lr = lr_at(
            self.progress.step,
            lr=options.lr,
            steps=options.steps,
            warmup_steps=options.warmup_steps,
            final_lr_ratio=options.final_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, Tensor] = {}
        for index in range(options.accumulation):
            x = next(batches)
            is_last = index == options.accumulation - 1
            # gradients are averaged over devices once per update, with the last pass
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                output = Reconstruction(*self.module(x))  # under autocast; float32 comes out
                loss, terms = generator_loss(output, x, self.config.loss)
                self._require_finite(loss)
                self.accelerator.backward(loss / options.accumulation)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term / options.accumulation
        logs = {name: value.item() for name, value in self.accelerator.reduce(sums, "mean").items()}
        logs["lr"] = lr
        if options.max_grad_norm is not None:
            norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), options.max_grad_norm))
            if not math.isfinite(norm) and options.precision != "fp16":  # fp16's loss scaler skips such steps itself
                self._fail(f"the gradient norm is {norm}")
            logs["grad_norm"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.vae.parameters())
        self.progress.step += 1
        self.progress.num_samples += options.batch_size * options.accumulation * self.accelerator.num_processes
        return logs

    def _require_finite(self, loss: Tensor) -> None:
        # every device must agree, or the others wait for ever in their next exchange
        if not bool(self.accelerator.reduce(loss.detach(), "sum").isfinite()):
            self._fail(f"the loss is {loss.item()}")

    def _fail(self, reason: str) -> None:
        saved = checkpoint_dirs(self.checkpoints_dir)
        raise TrainingError(
            f"step {self.progress.step + 1}: {reason}; the weights were not changed by this step. "
            f"Newest checkpoint: {saved[-1] if saved else 'none yet'}. "
            "Lower training.lr, lengthen training.warmup_steps or set training.precision=no."
        )

    def _batches(self) -> Iterator[Tensor]:
        """Endless batches x on the device, from the run's position on."""
        loader = build_loader(
            self.dataset,
            batch_size=self.config.training.batch_size,
            first=self.progress.num_samples,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.data.num_workers,
        )
        memory_format = torch.channels_last if self.config.training.channels_last else torch.contiguous_format
        for x in loader:
            yield x.to(self.accelerator.device, non_blocking=True, memory_format=memory_format)

    def _validate(self) -> None:
        """PSNR and a picture of the held-out images, with the averaged weights."""
        if not self.validator.paths:
            return
        if self.accelerator.is_main_process:
            with _weights_of(self.ema, self.vae):
                result = self.validator.run(self.vae)
            self.last_val_psnr = result.psnr
            self._log({"val/psnr": result.psnr, "val/kl": result.kl})
            title, subtitle = f"step {self.progress.step}", f"PSNR {result.psnr:.2f} dB, averaged weights"
            sheet = contact_sheet(result.rows, title, subtitle)
            save_image(sheet, _made(self.run_dir / "samples") / f"step-{self.progress.step:08d}.png")
            for tracker in self.accelerator.trackers:
                tracker.log_images({"val/samples": sheet[None]}, step=self.progress.step, dataformats="NHWC")
        self.accelerator.wait_for_everyone()

    def _finish(self) -> TrainResult:
        """Write the averaged weights with their measured scaling factor."""
        vae_dir = self.run_dir / "vae"
        if self.accelerator.is_main_process:
            self.ema.copy_to(self.vae.parameters())
            if self.config.training.num_calibration_images:
                self.vae.register_to_config(scaling_factor=self._measure_scaling_factor())
            save_autoencoder(self.vae, vae_dir, overwrite=True)
        # only the main process has measured; the others wait here for it and report the same
        measured = [self.last_val_psnr, float(self.vae.config.scaling_factor)]
        val_psnr, scaling_factor = broadcast_object_list(measured)
        return TrainResult(vae_dir, self.progress.step, val_psnr, scaling_factor, self.accelerator.is_main_process)

    @torch.inference_mode()
    def _measure_scaling_factor(self) -> float:
        """From draws of z of training crops, which are the same in every run of this seed; random state untouched."""
        statistics = LatentStatistics(self.vae.config.latent_channels)
        generator = torch.Generator().manual_seed(self.config.training.seed)
        for position in range(self.config.training.num_calibration_images):
            x = self.dataset[position][None].to(self.accelerator.device)
            statistics.update(self.vae.encode(x).latent_dist.sample(generator))
        return round(statistics.scaling_factor, 6)

    def _log(self, values: dict[str, Any]) -> None:
        step = self.progress.step
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            named = ", ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in values.items())
            logger.info("step %d/%d: %s", step, self.config.training.steps, named)

    def _claim_run_dir(self, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to resume from, or None for a fresh run."""
        saved = checkpoint_dirs(self.checkpoints_dir)
        if resume:
            if not saved:
                raise ConfigError(f"nothing to resume: no checkpoint in {self.checkpoints_dir}; start without --resume")
            return saved[-1]
        if (self.run_dir / "config.yaml").exists() and not overwrite:
            raise OutputExistsError(
                f"{self.run_dir} holds a run already; go on with --resume, start afresh with --overwrite, "
                "or choose another folder with --set run_dir=..."
            )
        return None

    def _write_description(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.progress.step == 0:  # a fresh run: what an overwritten one left must not be resumed or mixed in
            for name in ("metrics.jsonl", "checkpoints", "samples", "tensorboard"):
                _remove(self.run_dir / name)
        _drop_rows_after(self.run_dir / "metrics.jsonl", self.progress.step)
        (self.run_dir / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        environment = {
            "sdvae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(self.accelerator.device),
            "num_processes": self.accelerator.num_processes,
            "num_parameters": sum(parameter.numel() for parameter in self.vae.parameters()),
            "num_train_images": len(self.dataset.paths),
            "num_val_images": len(self.validator.paths),
            "config": config_to_dict(self.config),
        }
        (self.run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _weights_of(ema: EMA, vae: AutoencoderKL) -> Iterator[None]:
    """Inside the block `vae` has the averaged weights; afterwards its own again, bit for bit."""
    own = [parameter.detach().clone() for parameter in vae.parameters()]
    ema.copy_to(vae.parameters())
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(vae.parameters(), own, strict=True):
                parameter.copy_(value)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _drop_rows_after(metrics_path: Path, step: int) -> None:
    """What a killed run logged after the checkpoint that is resumed from comes once more."""
    if metrics_path.exists():
        rows = metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        metrics_path.write_text("".join(kept), encoding="utf-8")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
