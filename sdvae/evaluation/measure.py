"""Blocks of images through every autoencoder and every metric, into the store of blocks.

Images are read in threads ahead of this; set metrics are made of the features that are kept here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.batches import default_workers, group_by_shape, read_ahead
from sdvae.data.images import round_to_8_bits
from sdvae.errors import SdvaeError
from sdvae.evaluation.blocks import Block, BlockStore
from sdvae.evaluation.images import Prepared, blocks_of, prepare
from sdvae.evaluation.plan import ORIGINALS, EvaluationPlan
from sdvae.evaluation.protocol import CORE_METRICS, Protocol
from sdvae.evaluation.setup import Setup
from sdvae.evaluation.swap import SwapTest
from sdvae.metrics.latent_health import LatentHealth
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.device import batch_pixels
from sdvae.model.posterior import Encoding, image_generator

__all__ = ["Measurement", "MetricFunction", "measure_blocks", "read_images"]

MetricFunction = Callable[[Tensor, Tensor], Tensor]
OnProgress = Callable[[int, int], None]  # images that this process has measured, images that it has to measure

# Inception takes 90 ms for an image among four and 104 for one alone (256 px, one core), whereas a VAE is fastest with
# one at a time there; so images wait until there are so many of them.
_FEATURE_IMAGES = 4


def measure_blocks(setup: Setup, store: BlockStore, on_progress: OnProgress | None = None) -> None:
    """Measure this process's share of the blocks, as far as they are missing."""
    plan, processes = setup.plan, setup.processes
    blocks = blocks_of(len(plan.files))
    mine = range(processes.rank, len(blocks), processes.count)
    missing = store.missing(mine)
    total = sum(len(blocks[number]) for number in mine)
    done = total - sum(len(blocks[number]) for number in missing)
    tell = on_progress if processes.is_main and on_progress is not None else lambda done, total: None
    tell(done, total)
    measurement = Measurement(
        subjects=setup.subjects,
        protocol=plan.protocol,
        metrics=setup.networks.metrics,
        swap_pairs=setup.swap_pairs,
        reference=None if plan.reference is None else plan.reference.id,
        swap_images=setup.swap_images,
        inception=setup.networks.inception,
        originals=setup.fid_reference is None or plan.options.save_fid_statistics is not None,
        batch_size=plan.options.batch_size,
    )
    number_of = {index: number for number in missing for index in blocks[number]}
    with closing(read_images(plan, list(number_of))) as reading:
        for number, members in groupby(reading, key=lambda item: number_of[item[0]]):
            prepared: list[Prepared] = []
            unreadable: list[tuple[str, str]] = []
            for index, item in members:
                if isinstance(item, Prepared):
                    prepared.append(item)
                else:
                    file = plan.files[index]
                    unreadable.append((file.key, str(item).removeprefix(f"{file.path}: ")))

            def tell_more(count: int, before: int = done) -> None:
                tell(before + count, total)

            store.save(number, measurement.block(prepared, unreadable, tell_more))
            done += len(prepared) + len(unreadable)
            tell(done, total)


def read_images(
    plan: EvaluationPlan, indices: Sequence[int]
) -> Generator[tuple[int, Prepared | Exception], None, None]:
    """Images by their index among the plan's files, read ahead in threads; an ImageError in the place of an image."""
    workers = plan.options.workers or default_workers()
    with closing(
        read_ahead(
            indices, lambda index: prepare(index, plan.files[index], plan.protocol), attrgetter("num_px"), workers
        )
    ) as reading:
        for index, item in reading:
            if isinstance(item, Exception) and not isinstance(item, SdvaeError):
                raise item
            yield index, item


@dataclass(kw_only=True, eq=False)
class Measurement:
    """All that a block is measured with.

    subjects: by id. swap_pairs: what swap tests compare, by the candidate's id. reference: id of all their references.
    swap_images: indices of the images that swap tests use, since each costs four more decodings.
    metrics: callables of the image metrics, in the order of display. inception: uint8 (B, 3, H, W) -> (B, D); None: no
    features. originals: whether the originals' features are wanted as well.
    """

    subjects: Mapping[str, OpenedVae]
    protocol: Protocol
    metrics: Mapping[str, MetricFunction]
    swap_pairs: Mapping[str, tuple[OpenedVae, OpenedVae]] = field(default_factory=dict)
    reference: str | None = None
    swap_images: frozenset[int] = frozenset()
    inception: Callable[[Tensor], Tensor] | None = None
    originals: bool = True
    batch_size: int | None = None

    def block(
        self,
        prepared: Sequence[Prepared],
        unreadable: Sequence[tuple[str, str]],
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> Block:
        """Measure the images of a block; all of them, or those that could be read.

        unreadable: key and reason of the others. on_progress: is told how many images are reconstructed.
        """
        prepared = sorted(prepared, key=lambda each: each.index)
        work, sizes = _Work(self, prepared), [each.num_px for each in prepared]
        device = next(iter(self.subjects.values())).device
        # Metrics in a thread of their own, with as many OpenMP threads as the VAE. On one core this is up to 3 % slower
        # than by turns, on two 3 %; but there, beside a program that keeps a core busy, it is some ten times faster,
        # since libgomp stops spinning at barriers once it has more threads than cores. Half of the threads for each
        # was 19 % slower than all for both: one of the two always waits.
        with torch.inference_mode(), ThreadPoolExecutor(1, thread_name_prefix="sdvae-metrics") as pool:
            batches = group_by_shape(
                range(len(prepared)),
                shape=lambda place: prepared[place].pixels.shape,
                pixels=lambda place: sizes[place],
                batch_size=self.batch_size,
                batch_pixels=batch_pixels(device),
            )
            pending: list[Future[None]] = []
            done = 0
            for places in batches:
                pending = work.batch(places, pool, pending)
                done += len(places)
                on_progress(done)
            pending.append(pool.submit(work.finish_features))
            for future in pending:
                future.result()
        return work.to_block(unreadable)


class _Work:
    """A block while it is being measured."""

    def __init__(self, measurement: Measurement, prepared: Sequence[Prepared]) -> None:
        self.measurement = measurement
        self.prepared = prepared
        ids = measurement.subjects
        self.values = {id_: {name: [math.nan] * len(prepared) for name in measurement.metrics} for id_ in ids}
        self.features: dict[str, list[NDArray[np.float32] | None]] = {
            owner: [None] * len(prepared) for owner in (ORIGINALS, *ids)
        }
        self.waiting: list[tuple[str, int, Tensor]] = []  # owner, place, uint8 (3, H, W) of one shape, for features
        self.latents: dict[str, LatentHealth] = {}
        self.swaps = {id_: SwapTest(*pair) for id_, pair in measurement.swap_pairs.items()}
        self.seconds = {id_: {"encode": 0.0, "decode": 0.0} for id_ in ids}
        self.nonfinite = dict.fromkeys(ids, 0)

    def batch(self, places: Sequence[int], pool: ThreadPoolExecutor, before: list[Future[None]]) -> list[Future[None]]:
        """Reconstruct images of one shape. Their metrics are computed in the pool's thread meanwhile.

        before: what is still being computed of the last batch. Returns: the same of this one.
        """
        batch = [self.prepared[place] for place in places]
        pixels = torch.from_numpy(np.stack([each.pixels for each in batch])).permute(0, 3, 1, 2)  # (B, 3, H, W)
        pending: list[Future[None]] = []
        subjects = self.measurement.subjects
        device = next(iter(subjects.values())).device
        pixels = pixels.to(device)
        image = pixels.float().div_(255)
        x = image * 2 - 1
        if self.measurement.inception is not None and self.measurement.originals:
            pending.append(pool.submit(self._take_features, ORIGINALS, places, pixels))
        encodings: dict[str, Encoding] = {}
        for id_, subject in subjects.items():
            with self._timed(id_, "encode", device):
                encodings[id_] = subject.encode(x)
            z = self._z(encodings[id_], batch)
            with self._timed(id_, "decode", device):
                recon = subject.decode(z, *image.shape[2:])
            self.nonfinite[id_] += int((~recon.isfinite()).flatten(1).any(dim=1).sum())
            if id_ not in self.latents:
                self.latents[id_] = LatentHealth(subject.latent_channels)
            self.latents[id_].update(encodings[id_], batch[0].num_px)
            for future in before:  # at most one batch waits, so memory is bounded
                future.result()
            before = []
            pending.append(pool.submit(self._compare, id_, places, round_to_8_bits(recon), image))
        rows = [row for row, each in enumerate(batch) if each.index in self.measurement.swap_images]
        for id_ in self.swaps if rows else ():
            pending.append(pool.submit(self._swap, id_, encodings, image, rows))
        return pending

    def _z(self, encoding: Encoding, batch: Sequence[Prepared]) -> Tensor:
        if self.measurement.protocol.posterior == "mode":
            return encoding.z
        return encoding.draw([image_generator(self.measurement.protocol.seed, each.key) for each in batch])

    @contextmanager
    def _timed(self, id_: str, step: str, device: torch.device) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[id_][step] += time.perf_counter() - started

    @torch.inference_mode()
    def _compare(self, id_: str, places: Sequence[int], recon: Tensor, image: Tensor) -> None:
        for name, function in self.measurement.metrics.items():
            if min(image.shape[2:]) < IMAGE_METRICS[name].min_px:
                continue
            for place, value in zip(places, function(recon, image).tolist(), strict=True):
                self.values[id_][name][place] = value
        if self.measurement.inception is not None:
            self._take_features(id_, places, (recon * 255).round_().to(torch.uint8))

    @torch.inference_mode()
    def _swap(self, id_: str, encodings: Mapping[str, Encoding], image: Tensor, rows: Sequence[int]) -> None:
        assert self.measurement.reference is not None
        pair = (encodings[id_], encodings[self.measurement.reference])
        if len(rows) < len(image):
            pair, image = (pair[0].of(rows), pair[1].of(rows)), image[rows]
        metrics = {name: self.measurement.metrics[name] for name in CORE_METRICS if name in self.measurement.metrics}
        large = {
            name: function for name, function in metrics.items() if min(image.shape[2:]) >= IMAGE_METRICS[name].min_px
        }
        self.swaps[id_].update(*pair, image, large)

    @torch.inference_mode()
    def _take_features(self, owner: str, places: Sequence[int], pixels: Tensor) -> None:
        if self.waiting and self.waiting[0][2].shape != pixels.shape[1:]:
            self.finish_features()
        self.waiting += [(owner, place, each) for place, each in zip(places, pixels, strict=True)]
        if len(self.waiting) >= _FEATURE_IMAGES:
            self.finish_features()

    @torch.inference_mode()
    def finish_features(self) -> None:
        """Features of the images that wait for others."""
        if not self.waiting:
            return
        assert self.measurement.inception is not None
        pixels = torch.stack([each for _, _, each in self.waiting])
        features = self.measurement.inception(pixels).float().cpu().numpy()
        for (owner, place, _), row in zip(self.waiting, features, strict=True):
            self.features[owner][place] = row
        self.waiting.clear()

    def to_block(self, unreadable: Sequence[tuple[str, str]]) -> Block:
        images = [
            {
                "index": each.index,
                "key": each.key,
                "digest": each.digest,
                "width": each.pixels.shape[1],
                "height": each.pixels.shape[0],
            }
            for each in self.prepared
        ]
        return Block(
            images=images,
            unreadable=[{"key": key, "reason": reason} for key, reason in unreadable],
            values={
                id_: {name: [_or_none(value) for value in values] for name, values in metrics.items()}
                for id_, metrics in self.values.items()
            },
            pixels=sum(each.num_px for each in self.prepared),
            seconds=self.seconds,
            nonfinite=self.nonfinite,
            features={
                owner: {"rows": np.stack([row for row in rows if row is not None])}
                for owner, rows in self.features.items()
                if any(row is not None for row in rows)
            },
            latents={id_: health.state() for id_, health in self.latents.items()},
            swaps={id_: swap.state() for id_, swap in self.swaps.items()},
        )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
