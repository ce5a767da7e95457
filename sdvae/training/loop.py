"""`train`: the only place where devices, data, the step, logging, validation and saving meet.

A run folder holds
    config.yaml, environment.json       what the run was told and ran with
    metrics.jsonl, tensorboard/         what was logged, a line per `log_every` steps and per validation
    samples/step-*.png                  held-out images: original | reconstruction | averaged weights | difference
    checkpoints/step-*/, best.json      for resuming
    vae/                                the finished autoencoder (averaged weights), a diffusers folder
    vae-best/                           the same from the step with the best validation
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.config import config_to_dict, dump_config, read_config
from sdvae.data.contact_sheet import contact_sheet
from sdvae.data.images import save_image
from sdvae.data.loader import Batch
from sdvae.errors import ConfigError, OutputExistsError, TrainingError, TrainingInterrupted
from sdvae.features.lpips import LPIPS
from sdvae.files import write_atomic
from sdvae.metrics.moments import LatentMoments
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.training.build import (
    autoencoder_of_checkpoint,
    build_optimizer,
    build_perceptual,
    require_sizes,
    starting_autoencoder,
)
from sdvae.training.config import TrainConfig
from sdvae.training.data import UnreadableGuard, open_data
from sdvae.training.discriminator import DiscriminatorModule, NLayerDiscriminator
from sdvae.training.ema import EMA
from sdvae.training.equivariance import draw_transform
from sdvae.training.interruption import StopRequest, stop_on_signals
from sdvae.training.losses import LeCam
from sdvae.training.monitoring.display import Display
from sdvae.training.monitoring.health import HealthMonitor
from sdvae.training.monitoring.trackers import flat_config, log_picture, resolve_trackers
from sdvae.training.monitoring.validation import Validator
from sdvae.training.state import Progress, checkpoint_dirs, load_checkpoint, save_checkpoint
from sdvae.training.step import (
    Adversary,
    GeneratorModule,
    Reconstruction,
    apply_updates,
    discriminator_loss,
    generator_loss,
    lr_at,
    select_trained,
)

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    vae_dir: Path  # the finished autoencoder
    steps: int  # optimizer updates
    val_psnr: float | None  # dB, mean over the held-out images, averaged weights; None without such images
    scaling_factor: float
    val_lpips: float | None = None  # the same; None where the perceptual loss is off
    best_step: int | None = None  # of vae-best
    is_main_process: bool = True  # false in all processes of a run on several devices but one


def train(
    config: TrainConfig | str | Path, overrides: Iterable[str] = (), *, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train an autoencoder and leave it in `run_dir`/vae.

    config: a TrainConfig, or a YAML file with `overrides` such as "training.lr=1e-4".
    resume: go on from the newest checkpoint in run_dir, bit for bit as if never stopped (same device and versions).
    overwrite: start afresh in a run_dir that holds another run, whose checkpoints are then replaced.
    The first SIGTERM or Ctrl-C writes a checkpoint after the step that runs.
    Raises: ConfigError, OutputExistsError, ImageError, MissingWeightsError, CheckpointError, TrainingError (a loss that
    is not finite), TrainingInterrupted.
    """
    if not isinstance(config, TrainConfig):
        config = read_config(TrainConfig, config, overrides)
    elif overrides:
        raise ConfigError("overrides go with a YAML file; change the TrainConfig itself with dataclasses.replace")
    was_initialized = AcceleratorState._shared_state != {}
    try:
        with stop_on_signals() as request:
            return _Run(config, resume, overwrite).train(request)
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
        options = config.training
        # what can be wrong is found out first, the cheapest first
        trackers = resolve_trackers(options.trackers)
        self.data, val_items = open_data(config.data, options.seed)
        self.guard = UnreadableGuard(config.data.max_unreadable_ratio)
        self.perceptual: LPIPS | None = None
        if config.loss.perceptual.weight:
            self.perceptual = build_perceptual(config.loss.perceptual)

        self.accelerator = Accelerator(
            mixed_precision=options.precision,
            cpu=options.cpu,
            log_with=trackers or None,
            project_config=ProjectConfiguration(str(self.run_dir), logging_dir=str(self.run_dir / "tensorboard")),
        )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and self.accelerator.num_processes == 1:
            raise ConfigError("several processes were started, but no accelerator was found: set training.cpu=true")
        if (kind := self.accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
            # the balance of the losses and the averages read whole weights; 1.7 GB a device leave nothing to split
            raise ConfigError(f"the accelerate config asks for {kind}; sdvae trains with whole weights on each device")
        set_seed(options.seed, device_specific=True)
        if checkpoint is None:
            vae = starting_autoencoder(config, self.data)
        else:
            vae = autoencoder_of_checkpoint(checkpoint, config.model)
        self._prepare_generator(vae)
        require_sizes(config, self.vae)
        self.discriminator: Any = None
        self.adversary: Adversary | None = None
        if config.loss.adversarial.weight:
            self._prepare_discriminator()
        self.progress, self.health = Progress(), HealthMonitor(config)
        self.accelerator.register_for_checkpointing(self.ema, self.progress, self.health)
        if self.adversary is not None and self.adversary.lecam is not None:
            self.accelerator.register_for_checkpointing(self.adversary.lecam)
        if checkpoint is not None:
            load_checkpoint(self.accelerator, checkpoint)
            states = self.progress.data
            self.data.load_state_dict(states[min(self.accelerator.process_index, len(states) - 1)])
            if self.accelerator.is_main_process:
                logger.info("resumed from %s", checkpoint)
        self.validator = Validator(val_items, config.data.val_crop_px)
        self.last_metrics: dict[str, float] = {}

    def _prepare_generator(self, vae: AutoencoderKL) -> None:
        options, device = self.config.training, self.accelerator.device
        select_trained(vae, options.trained, options.num_last_blocks)
        if options.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        # on its device before an optimizer is built, which has another kernel for each
        module = self._placed(GeneratorModule(vae, self.config.loss))
        if self.perceptual is not None:
            self.perceptual = self._placed(self.perceptual)
        if options.compile:
            # the balance of the adversarial loss runs backwards through the last layer before the whole pass does
            torch._functorch.config.donated_buffer = False
            module.compile()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # accelerate wraps the module for several devices and its forward for autocast
        self.module, self.optimizer = self.accelerator.prepare(module, build_optimizer(trained, options, device))
        self.generator: GeneratorModule = self.accelerator.unwrap_model(self.module)
        self.vae = self.generator.vae
        self.ema = EMA(self._averaged(), options.ema_decay)

    def _prepare_discriminator(self) -> None:
        config, options = self.config.loss.adversarial, self.config.training
        network = NLayerDiscriminator(
            channels=config.channels,
            num_layers=config.num_layers,
            norm=config.norm,
            spectral_norm=config.spectral_norm,
        )
        module = self._placed(DiscriminatorModule(network))
        optimizer = build_optimizer(module.parameters(), options, self.accelerator.device, config.lr)
        self.discriminator, self.d_optimizer = self.accelerator.prepare(module, optimizer)
        self.adversary = Adversary(
            self.accelerator.unwrap_model(self.discriminator),
            self.generator.last_layer,
            LeCam().to(self.accelerator.device) if config.lecam_weight else None,
            self._average if self.accelerator.num_processes > 1 else None,
        )

    def _placed(self, module: M) -> M:
        """The module on this process's device, in the memory layout of the run."""
        return module.to(device=self.accelerator.device, memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.training.channels_last else torch.contiguous_format

    def _averaged(self) -> list[Tensor]:
        """The weights that are averaged: those that are trained. The others stay what they are."""
        return [parameter for parameter in self.vae.parameters() if parameter.requires_grad]

    def _average(self, value: Tensor) -> Tensor:
        averaged: Tensor = self.accelerator.reduce(value, "mean")
        return averaged

    def train(self, request: StopRequest) -> TrainResult:
        options, accelerator = self.config.training, self.accelerator
        if accelerator.is_main_process:
            self._write_description()
        accelerator.init_trackers(
            "sdvae",
            config=flat_config(config_to_dict(self.config)),
            init_kwargs={"wandb": {"dir": str(self.run_dir), "name": self.run_dir.name}},
        )
        if accelerator.is_main_process and options.trackers is None and not accelerator.log_with:
            logger.info("metrics.jsonl is the only log; for TensorBoard: pip install 'sdvae[train]'")
        batches = self._batches()
        first_step = self.progress.step
        images_per_step = options.batch_size * options.accumulation * accelerator.num_processes
        self.display = Display(first_step, options.steps, images_per_step, silent=not accelerator.is_main_process)
        averages = _Averages()
        try:
            while self.progress.step < options.steps:
                averages.add(self._step(batches))
                step = self.progress.step
                self.display.step()
                if step % options.log_every == 0 or step == options.steps:
                    self._log_training(averages.take())
                is_best = _is_due(step, options.val_every, options.steps) and self._validate()
                stop_signal = self._agreed_signal(request)
                if is_best or stop_signal or _is_due(step, options.checkpoint_every, options.steps):
                    self._save_checkpoint()
                if stop_signal and step < options.steps:
                    raise TrainingInterrupted(
                        f"stopped by {stop_signal} after step {step} of {options.steps}; the checkpoint is in "
                        f"{self.checkpoints_dir}, and the same command with --resume goes on"
                    )
            if self.progress.step == first_step:  # resumed at the very end
                self._validate()
            result = self._finish()
            accelerator.wait_for_everyone()  # a process that leaves early takes its connections with it
        finally:
            self.display.close()
            accelerator.end_training()
        return result

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor | float]:
        """One update of the generator, and of the discriminator once it has set in. Returns: what is logged."""
        config, options, step = self.config.loss, self.config.training, self.progress.step
        is_adversarial = self.adversary is not None and step >= config.adversarial.disc_start
        scaler = self.accelerator.scaler
        if self.adversary is not None and scaler is not None:
            self.adversary.loss_scale = scaler.get_scale()
        # all devices draw the same transform: their reconstructions must have one size for the optimizer's balance
        transform = draw_transform(
            config.equivariance.probability,
            config.equivariance.min_scale,
            config.equivariance.rotate,
            torch.Generator().manual_seed(options.seed * 1_000_003 + step),
        )
        sums: dict[str, Tensor] = {}
        for index in range(options.accumulation):
            batch = next(batches)
            self.guard.add(batch.num_read, batch.unreadable)
            is_last = index == options.accumulation - 1
            # gradients are averaged over devices once per update, with the last pass
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                output = Reconstruction(*self.module(batch.x, transform))  # under autocast; float32 comes out
                x = batch.x if transform is None else transform.to_image(batch.x, self.vae.spatial_compression_ratio)
                with self.accelerator.autocast():
                    loss, terms = generator_loss(output, x, config, step, self.perceptual, self.adversary)
                self.accelerator.backward(loss / options.accumulation)
            if is_adversarial:
                terms |= self._discriminator_pass(output.recon, x, is_last)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term / options.accumulation
        logs: dict[str, Tensor | float] = {**sums}
        updates = [self._update_of(self.optimizer, lr_at(step, options))]
        logs["lr"] = self.optimizer.param_groups[0]["lr"]
        if is_adversarial:
            start = config.adversarial.disc_start
            updates.append(self._update_of(self.d_optimizer, lr_at(step, options, config.adversarial.lr, start)))
        norms = apply_updates(updates, options.max_grad_norm, scaler, lambda norms: self._require_finite(norms, sums))
        logs |= dict(zip(("grad_norm", "d_grad_norm"), norms, strict=False))
        self.ema.update(self._averaged())
        self.progress.step += 1
        return logs

    def _discriminator_pass(self, recon: Tensor, x: Tensor, is_last: bool) -> dict[str, Tensor]:
        assert self.adversary is not None
        with nullcontext() if is_last else self.accelerator.no_sync(self.discriminator):
            loss, terms = discriminator_loss(self.discriminator, recon, x, self.config.loss.adversarial, self.adversary)
            self.accelerator.backward(loss / self.config.training.accumulation)
        return terms

    def _update_of(self, optimizer: Any, lr: float) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimizer inside accelerate's shell, its learning rate set, and its parameters."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer.optimizer, parameters

    def _require_finite(self, norms: Sequence[float], terms: dict[str, Tensor]) -> None:
        """A loss that is not finite gives such a gradient, which is the same on every device: all of them stop here."""
        if all(math.isfinite(norm) for norm in norms):
            return
        wrong = [f"{name} is {value.item()}" for name, value in terms.items() if not value.isfinite()]
        if self.accelerator.scaler is not None and not wrong:
            return  # the gradients overflowed in fp16: the scaler leaves this step out and lowers its scale
        self._fail(wrong[0] if wrong else f"the gradient norms are {', '.join(map(str, norms))}")

    def _fail(self, reason: str) -> None:
        saved = checkpoint_dirs(self.checkpoints_dir)
        raise TrainingError(
            f"step {self.progress.step + 1}: {reason}; the weights were not changed by this step. "
            f"Newest checkpoint: {saved[-1] if saved else 'none yet'}. "
            "Lower training.lr, lengthen training.warmup_steps or set training.precision=no."
        )

    def _batches(self) -> Iterator[Batch]:
        """Endless batches on the device, from the run's position on."""
        for batch in self.data.batches(
            batch_size=self.config.training.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.data.num_workers,
        ):
            x = batch.x.to(self.accelerator.device, non_blocking=True, memory_format=self.memory_format)
            yield Batch(**{**vars(batch), "x": x})

    def _agreed_signal(self, request: StopRequest) -> str | None:
        """The signal that any process was sent: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return request.signal
        flag = torch.tensor(float(request.signal is not None), device=self.accelerator.device)
        stops = float(self.accelerator.reduce(flag, "sum")) > 0
        return (request.signal or "a signal to another process") if stops else None

    def _save_checkpoint(self) -> None:
        self.progress.data = gather_object([self.data.state_dict()])
        save_checkpoint(
            self.accelerator, self.checkpoints_dir, self.progress, self.vae, self.config.training.num_checkpoints
        )

    def _validate(self) -> bool:
        """Metrics and a picture of the held-out images. Returns: whether this is the best validation so far."""
        if not self.validator.items:
            return False
        result = self.validator.run(
            self.vae,
            self._averaged_weights,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            gather=gather_object,
            perceptual=self.perceptual,
        )
        self.last_metrics = result.metrics()
        self._log(self.last_metrics)
        if self.accelerator.is_main_process:
            for reason in result.unreadable:
                logger.warning("left out of validation: %s", reason)
        if self.accelerator.is_main_process and result.rows:
            title = f"step {self.progress.step}"
            subtitle = ", ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in self.last_metrics.items())
            sheet = contact_sheet(result.rows, title, f"averaged weights: {subtitle}")
            save_image(sheet, _made(self.run_dir / "samples") / f"step-{self.progress.step:08d}.png")
            for tracker in self.accelerator.trackers:
                log_picture(tracker, "val/samples", sheet, self.progress.step)
        return self._note_best()

    def _note_best(self) -> bool:
        """Keep the averaged weights as vae-best if the chosen metric has never been better."""
        metric, progress = self.config.training.best_metric, self.progress
        if metric == "none":
            return False
        value, sign = self.last_metrics[f"val/{metric}"], {"psnr": 1.0, "lpips": -1.0}[metric]
        if progress.best_step is not None and sign * value <= sign * progress.best_value:
            return False
        progress.best_step, progress.best_metric, progress.best_value = progress.step, metric, value
        if self.accelerator.is_main_process:
            with self._averaged_weights():
                save_autoencoder(self.vae, self.run_dir / "vae-best", overwrite=True)
        self.accelerator.wait_for_everyone()
        return True

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return _weights_of(self.ema, self._averaged())

    def _finish(self) -> TrainResult:
        """Write the averaged weights with their measured scaling factor."""
        vae_dir, best_dir = self.run_dir / "vae", self.run_dir / "vae-best"
        if self.accelerator.is_main_process:
            self.ema.copy_to(self._averaged())
            self._calibrate(self.vae)
            save_autoencoder(self.vae, vae_dir, overwrite=True)
            if best_dir.exists():
                best = load_autoencoder(best_dir, device=self.accelerator.device)
                self._calibrate(best)
                save_autoencoder(best, best_dir, overwrite=True)
        # only the main process has measured; the others wait here for it and report the same
        scaling_factor = broadcast_object_list([float(self.vae.config.scaling_factor)])[0]
        return TrainResult(
            vae_dir,
            self.progress.step,
            self.last_metrics.get("val/psnr"),
            scaling_factor,
            self.last_metrics.get("val/lpips"),
            self.progress.best_step,
            self.accelerator.is_main_process,
        )

    @torch.inference_mode()
    def _calibrate(self, vae: AutoencoderKL) -> None:
        """Set the scaling factor from draws of z of training crops, the same in every run of this seed.

        The random state is not touched.
        """
        if not self.config.training.num_calibration_images:
            return
        moments = LatentMoments(vae.config.latent_channels)
        generator = torch.Generator().manual_seed(self.config.training.seed)
        for crop in self.data.first_crops(self.config.training.num_calibration_images):
            z = vae.encode(crop[None].to(vae.device)).latent_dist.sample(generator)
            moments.update(z.cpu().double().numpy(), None)
        vae.register_to_config(scaling_factor=round(moments.scaling_factor().value, 6))

    def _log_training(self, averages: dict[str, float]) -> None:
        """Log the averages over the last steps and all devices, and what is wrong with them in words."""
        names = sorted(averages)
        values = torch.tensor([averages[name] for name in names], dtype=torch.float32, device=self.accelerator.device)
        logs = dict(zip(names, self._average(values).tolist(), strict=True))
        for warning in self.health.update(self.progress.step, logs):
            if self.accelerator.is_main_process:
                logger.warning("step %d: %s", self.progress.step, warning)
        logs |= self.display.rates(self.progress.step)
        if self.guard.num_unreadable:
            logs["num_unreadable"] = self.guard.num_unreadable
        self._log({f"train/{name}": value for name, value in logs.items()})

    def _log(self, values: dict[str, float]) -> None:
        step = self.progress.step
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.display.line(step, values)

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
            for name in ("metrics.jsonl", "checkpoints", "samples", "tensorboard", "vae", "vae-best"):
                _remove(self.run_dir / name)
        _drop_rows_after(self.run_dir / "metrics.jsonl", self.progress.step)
        write_atomic(dump_config(self.config).encode(), self.run_dir / "config.yaml")
        environment = {
            "sdvae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(self.accelerator.device),
            "num_processes": self.accelerator.num_processes,
            "num_parameters": sum(parameter.numel() for parameter in self.vae.parameters()),
            "num_trained_parameters": sum(
                parameter.numel() for parameter in self.generator.parameters() if parameter.requires_grad
            ),
            "num_train_images": self.data.num_images,
            "num_val_images": len(self.validator.items),
            "config": config_to_dict(self.config),
        }
        write_atomic(f"{json.dumps(environment, indent=2)}\n".encode(), self.run_dir / "environment.json")


class _Averages:
    """Means of logged values over steps, each over the steps that had it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor | float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


@contextmanager
def _weights_of(ema: EMA, parameters: list[Tensor]) -> Iterator[None]:
    """Inside the block `parameters` have the averaged values; afterwards their own again, bit for bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _drop_rows_after(metrics_path: Path, step: int) -> None:
    """What a killed run logged after the checkpoint that is resumed from comes once more."""
    if metrics_path.exists():
        rows = metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        write_atomic("".join(kept).encode(), metrics_path)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
