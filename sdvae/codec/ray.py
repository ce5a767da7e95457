"""Carries out a plan with the workers of a Ray cluster: Ray Data hands out jobs, each worker has a VAE.

The only file that knows Ray, which is imported when a run begins. The plan is divided into blocks: whole shards, or
some images of the formats that have a file for each. A worker writes the files of a block itself, each in one step, and
reports what it did when the block is done. Ray gives a block whose worker was killed to another one; it then writes the
same files again, and only that one reports. So nothing is lost, nothing is done twice in the count, and where the
driver is killed the same command continues.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdvae.checkpoints.opened import OpenedVae, VaeRef, open_vae
from sdvae.codec.engine import CodecTally, carry_out
from sdvae.codec.image_encoder import ImageEncoder
from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.plan import Item, Plan
from sdvae.data.batches import OnProgress
from sdvae.errors import ConfigError, SdvaeError
from sdvae.files import remove_leftovers
from sdvae.latents.header import VaeRecord
from sdvae.latents.manifest import Manifest
from sdvae.latents.registry import FORMATS

__all__ = ["BlockWorker", "check_installed", "divide", "encode_on_ray"]

_BLOCK_IMAGES = 64  # where images have files of their own: what a killed worker costs at most
_BLOCKS_PER_WORKER = 4  # at least, so that no worker waits long for the last one
_RAY_BLOCKS = 2000  # Ray keeps a book about each; beyond, a block of Ray's holds several of ours


@dataclass(frozen=True, kw_only=True)
class _BlockResult:
    """What a worker did with a block."""

    tally: CodecTally
    written: Manifest
    device: str


class BlockWorker:
    """A process with a VAE, for Ray Data; it encodes one block after another."""

    def __init__(self, out: Path, options: EncodeOptions, vae: VaeRef, expected: VaeRecord) -> None:
        self.out, self.options, self.expected = out, options, expected
        self.vae: OpenedVae | None = None
        self.error: SdvaeError | None = None
        try:
            vae = open_vae(vae, **options.opening)
            if vae.digest != expected.digest:
                raise ConfigError(f"{expected.name}: a worker finds another VAE there than this process does")
            self.vae = vae
        except SdvaeError as error:  # told with the first block: Ray would try for ever to start a worker that raises
            self.error = error

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._encode(pickle.loads(block))) for block in batch["block"]]}

    def _encode(self, jobs: tuple[Item, ...]) -> _BlockResult | SdvaeError:
        if self.vae is None:
            return self.error or SdvaeError("the worker has no VAE")
        encoder = ImageEncoder(self.out, self.options, self.vae, self.expected, jobs)
        try:
            tally = carry_out(encoder, Plan(items=jobs))
        except SdvaeError as error:  # the disk is full: this ends the run
            return error
        return _BlockResult(tally=tally, written=encoder.written, device=str(self.vae.device))


def check_installed() -> None:
    """Raises: ConfigError where Ray Data is not installed."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise ConfigError(
            "engine ray needs the package ray, which is not installed: pip install -c constraints.txt '.[ray]'"
        )


def encode_on_ray(
    plan: Plan,
    out: Path,
    options: EncodeOptions,
    vae: VaeRef,
    record: VaeRecord,
    written: Manifest,
    on_progress: OnProgress | None = None,
) -> tuple[CodecTally, str]:
    """Do the jobs of a plan on the cluster of RAY_ADDRESS, or on a Ray of this machine's that ends with the run.

    out: on the machines of the workers the same folder, by the same path; so are the images and the VAE.
    record: of the VAE, which every worker checks its own against.
    written: takes the files that were written, also where this raises.
    Returns: what happened, and the devices of the workers.
    Raises: ConfigError where a worker cannot load the VAE; SdvaeError where the disk is full, or Ray fails.
    """
    tally, devices = CodecTally(on_progress, total=len(plan.jobs)), set[str]()
    if not plan.jobs:
        return tally, options.device
    import ray

    # a worker has a working directory of its own
    out = out.absolute()
    jobs = [_absolute(job) for job in plan.jobs]
    vae = Path(vae).absolute() if isinstance(vae, (str, Path)) and Path(vae).exists() else vae
    with _ray(options.ray_workers) as num_gpus:
        workers = options.ray_workers or num_gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
        try:
            for result in _results(divide(jobs, options, workers), workers, num_gpus, (out, options, vae, record)):
                if isinstance(result, SdvaeError):
                    raise result
                written.update(result.written)
                devices.add(result.device)
                tally.add(result.tally)
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise SdvaeError(
                f"Ray: {error}\n{tally.done} of {tally.total} images are reported as done; the same command continues"
            ) from error
        finally:
            remove_leftovers({out} | {job.output.parent for job in jobs})  # of workers that were killed
    return tally, ", ".join(sorted(devices))


def _absolute(job: Item) -> Item:
    member = job.member.absolute() if job.member else None
    return replace(job, path=job.path.absolute(), output=job.output.absolute(), member=member)


def divide(jobs: Sequence[Item], options: EncodeOptions, workers: int) -> list[tuple[Item, ...]]:
    """The jobs, in blocks that workers can do apart from each other: those of a shard stay together."""
    if FORMATS[options.format].is_sharded:
        shards: dict[Path, list[Item]] = {}
        for job in jobs:
            shards.setdefault(job.output, []).append(job)
        return [tuple(shard) for shard in shards.values()]
    size = max(1, min(_BLOCK_IMAGES, len(jobs) // (_BLOCKS_PER_WORKER * workers)))
    return [tuple(jobs[start : start + size]) for start in range(0, len(jobs), size)]


def _results(
    blocks: Sequence[tuple[Item, ...]], workers: int, num_gpus: int, arguments: tuple[Any, ...]
) -> Iterator[_BlockResult | SdvaeError]:
    """The results as they come, from at most that many workers."""
    import ray.data

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")  # about settings of its own
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it is made anew where ray.data is imported
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = ray.data.from_items(
            [{"block": pickle.dumps(block)} for block in blocks], override_num_blocks=min(len(blocks), _RAY_BLOCKS)
        )
        results = rows.map_batches(
            BlockWorker,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
            num_cpus=None if num_gpus else 1,
            num_gpus=1 if num_gpus else None,
        )
        for row in results.iter_rows():
            yield pickle.loads(row["result"])


@contextmanager
def _ray(workers: int | None) -> Iterator[int]:
    """Ray, joined or started; what was started here ends here. Yields: the number of its GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # says on stderr that it was set, and then no more
    import ray

    ours = not ray.is_initialized()
    if ours:
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(**quiet)
            else:
                cores = max(os.cpu_count() or 1, workers or 1)
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = f"cannot be reached at RAY_ADDRESS={address}" if address else "cannot be started on this machine"
            raise SdvaeError(f"Ray {where}: {error}") from error
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker was killed, above a result in JSON
        try:
            yield int(ray.cluster_resources().get("GPU", 0))
        finally:
            if ours:
                ray.shutdown()
