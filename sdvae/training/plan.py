"""What a run would do, found out without doing it: exactly what --dry-run prints."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from sdvae.errors import MissingWeightsError
from sdvae.training.build import require_perceptual, require_sizes, starting_autoencoder
from sdvae.training.config import TrainConfig
from sdvae.training.data import open_data
from sdvae.training.memory import MemoryEstimate, estimate_memory
from sdvae.training.monitoring.trackers import resolve_trackers
from sdvae.training.step import select_trained

__all__ = ["TrainPlan", "plan_training"]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    num_train_images: int | None  # None for a stream
    num_val_images: int
    num_parameters: int
    num_trained_parameters: int  # of the autoencoder
    steps: int
    num_processes: int
    images_per_step: int  # over all devices
    epochs: float | None  # None for a stream
    trackers: tuple[str, ...]
    memory: MemoryEstimate  # per device
    notes: tuple[str, ...]  # what the run would have to find first

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory.to_json()}


def plan_training(config: TrainConfig) -> TrainPlan:
    """Check everything that a run checks before its first step, and count. Writes nothing, and downloads
    nothing but a VAE that `training.init` names on the hub.

    Raises: the errors that the run would begin with.
    """
    trackers = resolve_trackers(config.training.trackers)
    data, val_items = open_data(config.data, config.training.seed)
    notes = []
    if config.loss.perceptual.weight:
        try:
            require_perceptual(config.loss.perceptual)
        except MissingWeightsError as error:
            if config.loss.perceptual.weights_path is not None:
                raise
            notes.append(f"the run would first look for perceptual weights elsewhere: {error}")
    vae = starting_autoencoder(config, data=None)
    require_sizes(config, vae)
    select_trained(vae, config.training.trained, config.training.num_last_blocks)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    images_per_step = config.training.batch_size * config.training.accumulation * num_processes
    num_images = data.num_images
    return TrainPlan(
        num_train_images=num_images,
        num_val_images=len(val_items),
        num_parameters=sum(parameter.numel() for parameter in vae.parameters()),
        num_trained_parameters=sum(parameter.numel() for parameter in vae.parameters() if parameter.requires_grad),
        steps=config.training.steps,
        num_processes=num_processes,
        images_per_step=images_per_step,
        epochs=None if num_images is None else config.training.steps * images_per_step / num_images,
        trackers=tuple(trackers),
        memory=estimate_memory(config, vae),
        notes=tuple(notes),
    )
