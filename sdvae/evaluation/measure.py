"""Blocks of images through every autoencoder and every metric, into the store of blocks.

Images are read in threads ahead of this; set metrics are made of the features that are kept here.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.data.batches import OnProgress, default_workers, group_by_shape, read_ahead
from sdvae.data.images import round_to_8_bits
from sdvae.errors import SdvaeError
from sdvae.evaluation.blocks import Block, BlockStore
from sdvae.evaluation.images import Prepared, blocks_of, measured_z, prepare
from sdvae.evaluation.plan import ORIGINALS, EvaluationPlan
from sdvae.evaluation.protocol import CORE_METRICS
from sdvae.evaluation.setup import Setup
from sdvae.evaluation.swap import SwapTest
from sdvae.metrics.latent_health import LatentHealth
from sdvae.metrics.table import compute_metrics, large_enough
from sdvae.model.device import batch_pixels
from sdvae.model.posterior import Encoding

__all__ = ["measure_block", "measure_blocks", "read_images"]

# Inception takes 90 ms for an image among four and 104 for one alone (256 px, one core), whereas a VAE is fastest with
# one at a time there; so images wait until there are so many of them.
_FEATURE_IMAGES = 4

_inference = torch.inference_mode()  # of a thread: each has its own


def measure_blocks(setup: Setup, store: BlockStore, on_progress: OnProgress | None = None) -> None:
    """Measure this process's share of the blocks, as far as they are missing.

    on_progress: is told how many images this process has measured, and how many it has to measure.
    """
    plan, processes = setup.plan, setup.processes
    blocks = blocks_of(len(plan.files))
    mine = range(processes.rank, len(blocks), processes.count)
    missing = store.missing(mine)
    total = sum(len(blocks[number]) for number in mine)
    done = total - sum(len(blocks[number]) for number in missing)
    tell = on_progress if processes.is_main and on_progress is not None else lambda done, total: None
    tell(done, total)
    with closing(read_images(plan, [index for number in missing for index in blocks[number]])) as reading:
        for number in missing:
            tell_more = partial(lambda before, count: tell(before + count, total), done)
            store.save(number, measure_block(setup, islice(reading, len(blocks[number])), tell_more))
            done += len(blocks[number])
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


def measure_block(
    setup: Setup,
    images: Iterable[tuple[int, Prepared | Exception]],
    on_progress: Callable[[int], None] = lambda count: None,
) -> Block:
    """Measure the images of a block; all of them, or those that could be read.

    images: as `read_images` gives them. on_progress: is told how many images are reconstructed.
    """
    prepared: list[Prepared] = []
    unreadable: list[dict[str, str]] = []
    for index, item in sorted(images, key=lambda each: each[0]):
        if isinstance(item, Prepared):
            prepared.append(item)
        else:
            file = setup.plan.files[index]
            unreadable.append({"key": file.key, "reason": str(item).removeprefix(f"{file.path}: ")})
    metrics, sizes = setup.networks.metrics, [each.num_px for each in prepared]
    core_metrics = {name: metrics[name] for name in CORE_METRICS if name in metrics}
    block = _new_block(setup, prepared)
    block.unreadable, block.pixels = unreadable, sum(sizes)
    latents: dict[str, LatentHealth] = {}
    swaps = {id_: SwapTest(*pair) for id_, pair in setup.swap_pairs.items()}
    features = None if setup.networks.inception is None else _Features(setup.networks.inception, len(prepared))
    # Metrics in a thread of their own, with as many OpenMP threads as the VAE. On one core this is up to 3 % slower
    # than by turns, on two 3 %; but there, beside a program that keeps a core busy, it is some ten times faster, since
    # libgomp stops spinning at barriers once it has more threads than cores. Half of the threads for each was 19 %
    # slower than all for both: one of the two always waits.
    with torch.inference_mode(), ThreadPoolExecutor(1, thread_name_prefix="sdvae-metrics") as pool:
        pending: list[Future[Any]] = []
        values: list[tuple[str, Sequence[int], Future[dict[str, Tensor]]]] = []  # VAE, places of images, metrics
        done = 0
        batches = group_by_shape(
            range(len(prepared)),
            shape=lambda place: prepared[place].pixels.shape,
            pixels=lambda place: sizes[place],
            batch_size=setup.plan.options.batch_size,
            batch_pixels=batch_pixels(setup.device),
        )
        for places in batches:
            batch = [prepared[place] for place in places]
            pixels = torch.from_numpy(np.stack([each.pixels for each in batch])).permute(0, 3, 1, 2).to(setup.device)
            image = pixels.float().div_(255)  # (B, 3, H, W)
            x = image * 2 - 1
            before, pending = pending, []
            if features is not None and setup.keeps_originals:
                pending.append(pool.submit(features.take, ORIGINALS, places, pixels))
            encodings: dict[str, Encoding] = {}
            for id_, subject in setup.subjects.items():
                with _timed(block.seconds[id_], "encode", setup.device):
                    encodings[id_] = subject.encode(x)
                z = measured_z(encodings[id_], setup.plan.protocol, [each.key for each in batch])
                with _timed(block.seconds[id_], "decode", setup.device):
                    recon = subject.decode(z, *image.shape[2:])
                block.nonfinite[id_] += int((~recon.isfinite()).flatten(1).any(dim=1).sum())
                if id_ not in latents:
                    latents[id_] = LatentHealth(subject.latent_channels)
                latents[id_].update(encodings[id_], batch[0].num_px)
                for future in before:  # at most one batch waits, so memory is bounded
                    future.result()
                before = []
                rounded = round_to_8_bits(recon)
                values.append((id_, places, pool.submit(_inference(compute_metrics), metrics, rounded, image)))
                pending.append(values[-1][2])
                if features is not None:
                    pending.append(pool.submit(features.take, id_, places, (rounded * 255).round_().to(torch.uint8)))
            if rows := [row for row, each in enumerate(batch) if each.index in setup.swap_images]:
                # metrics know an image that comes again by the tensor itself, so it is copied only where it has to be
                seen = image if len(rows) == len(batch) else image[rows]
                measured = large_enough(core_metrics, image)
                for id_, test in swaps.items():
                    assert setup.plan.reference is not None
                    pair = (encodings[id_].of(rows), encodings[setup.plan.reference.id].of(rows))
                    pending.append(pool.submit(_inference(test.update), *pair, seen, measured))
            done += len(places)
            on_progress(done)
        if features is not None:
            pending.append(pool.submit(features.finish))
        for future in pending:
            future.result()
    for id_, measured_places, found in values:
        for name, column in found.result().items():
            for place, value in zip(measured_places, column.tolist(), strict=True):
                block.values[id_][name][place] = value if math.isfinite(value) else None
    block.features = {} if features is None else features.of_owners()
    block.latents = {id_: health.state() for id_, health in latents.items()}
    block.swaps = {id_: test.state() for id_, test in swaps.items()}
    return block


def _new_block(setup: Setup, prepared: Sequence[Prepared]) -> Block:
    """The images, and no numbers yet."""
    ids, names = setup.subjects, setup.networks.metrics
    sides = [each.pixels.shape[:2] for each in prepared]
    return Block(
        images=[
            {"index": each.index, "key": each.key, "digest": each.digest, "width": width, "height": height}
            for each, (height, width) in zip(prepared, sides, strict=True)
        ],
        values={id_: {name: [None] * len(prepared) for name in names} for id_ in ids},
        seconds={id_: {"encode": 0.0, "decode": 0.0} for id_ in ids},
        nonfinite=dict.fromkeys(ids, 0),
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str, device: torch.device) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[step] += time.perf_counter() - started


class _Features:
    """Features of the images of a block, of several images of one shape at a time."""

    def __init__(self, inception: Callable[[Tensor], Tensor], num_images: int) -> None:
        """inception: uint8 (B, 3, H, W) -> (B, D)."""
        self._inception = inception
        self._rows: dict[str, list[NDArray[np.float32] | None]] = defaultdict(lambda: [None] * num_images)
        self._waiting: list[tuple[str, int, Tensor]] = []  # owner, place, uint8 (3, H, W) of one shape

    @_inference
    def take(self, owner: str, places: Sequence[int], pixels: Tensor) -> None:
        if self._waiting and self._waiting[0][2].shape != pixels.shape[1:]:
            self.finish()
        self._waiting += [(owner, place, each) for place, each in zip(places, pixels, strict=True)]
        if len(self._waiting) >= _FEATURE_IMAGES:
            self.finish()

    @_inference
    def finish(self) -> None:
        """Those of the images that wait for others."""
        if not self._waiting:
            return
        features = self._inception(torch.stack([each for _, _, each in self._waiting])).float().cpu().numpy()
        for (owner, place, _), row in zip(self._waiting, features, strict=True):
            self._rows[owner][place] = row
        self._waiting.clear()

    def of_owners(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Owner -> "rows": (n, D), in the order of the images."""
        return {
            owner: {"rows": np.stack([row for row in rows if row is not None])} for owner, rows in self._rows.items()
        }
