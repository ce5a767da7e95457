"""The loop that encoding and decoding share: read ahead, batch, compute, write behind, count, and survive bad files.

It knows plans, tensors and threads, and nothing of what a VAE does with a batch.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import RunOptions
from sdvae.codec.plan import Item, Plan, reason_without_path
from sdvae.codec.reports import FileReason
from sdvae.data.batches import WriteBehind, group_by_shape, read_ahead
from sdvae.errors import ConfigError, SdvaeError
from sdvae.files import remove_leftovers
from sdvae.latents.header import LatentHeader

__all__ = ["Member", "OnProgress", "Tally", "carry_out", "prepare_folder"]

OnProgress = Callable[[int, int], None]  # files finished or failed so far, files to do

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, eq=False)
class Member:
    """One file that was read: the tensor that goes into a batch, and what its latent file says."""

    item: Item
    tensor: Tensor  # x (3, H, W) with its padding, or z (C, h, w)
    header: LatentHeader


@dataclass
class Tally:
    """What happened so far."""

    on_progress: OnProgress | None
    total: int
    started: float = field(default_factory=time.perf_counter)
    done: int = 0
    megapixels: float = 0.0
    failures: list[FileReason] = field(default_factory=list)
    notes: list[FileReason] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    held: list[Member] = field(default_factory=list)  # computed, but not yet in a whole file
    finished: int = 0  # as was told last: what moves from held to done is not told twice

    def succeed(self, member: Member) -> None:
        self.done += 1
        self.megapixels += _pixels(member) / 1e6
        self.notes += [_about(member.item, note) for note in member.header.notes]
        self._tell()

    def hold(self, member: Member) -> None:
        self.held.append(member)
        self._tell()

    def release(self) -> list[Member]:
        held, self.held = self.held, []
        return held

    def add(self, other: Tally) -> None:
        """Count what was done elsewhere."""
        self.done += other.done
        self.megapixels += other.megapixels
        self.failures += other.failures
        self.notes += other.notes
        self.warnings += [warning for warning in other.warnings if warning not in self.warnings]
        self._tell()

    def fail(self, item: Item, error: Exception) -> None:
        reason = reason_without_path(error, item.source).removeprefix(f"{item.output}: ")
        self.failures.append(_about(item, reason))
        self._tell()

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.finished = max(self.finished, self.done + len(self.failures) + len(self.held))
            self.on_progress(self.finished, self.total)

    def to_fields(self, plan: Plan, out: Path, vae: OpenedVae) -> dict[str, Any]:
        """The fields of a `CodecReport`."""
        failures = self.failures + [_about(item, item.reason) for item in plan.failures]
        return {
            "out": str(out),
            "vae": vae.name,
            "vae_digest": vae.digest,
            "device": str(vae.device),
            "dtype": vae.dtype_name,
            "done": self.done,
            "skipped": len(plan.skips),
            "failed": len(failures),
            "seconds": time.perf_counter() - self.started,
            "megapixels": self.megapixels,
            "failures": tuple(sorted(failures, key=lambda failure: failure.key)),
            "notes": tuple(self.notes),
            "warnings": tuple(self.warnings),
        }


def carry_out(
    plan: Plan,
    out: Path,
    options: RunOptions,
    batch_pixels: int,
    *,
    read: Callable[[Item], Member],
    compute: Callable[[Sequence[Member]], Sequence[Tensor]],
    write: Callable[[Member, Tensor], None],
    on_progress: OnProgress | None,
    if_out_of_memory: str,
    finish: Callable[[Path], None] | None = None,
) -> Tally:
    """Do the jobs of a plan: `read` and `write` in threads, `compute` in this one.

    if_out_of_memory: advice for an image that does not fit even alone.
    batch_pixels: how large batches are where the options leave it open.
    finish: for outputs of many files: called with each output once all its jobs went through `write`, or failed. The
        outputs then come one after the other, so that no more than one is held in memory.
    A file that fails in any of the three is recorded. Interrupted at any moment, every output is whole or not there.
    Raises: SdvaeError where the disk is full.
    """
    tally = Tally(on_progress, total=len(plan.jobs))

    def on_done(member: Member, error: Exception | None) -> None:
        if error is not None:
            record(error, [member])
        elif finish is None:
            tally.succeed(member)
        else:
            tally.hold(member)

    def record(error: Exception, members: Sequence[Member]) -> None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise _disk_full(error, out, tally) from error
        for member in members:
            if isinstance(error, OSError):
                reason = f"{member.item.output} cannot be written: {error.strerror or error}"
                tally.fail(member.item, SdvaeError(reason))
            else:
                tally.fail(member.item, error)

    split = _Splitting(compute, tally.warnings, if_out_of_memory)
    for jobs in [plan.jobs] if finish is None else _by_output(plan.jobs):
        loaded = read_ahead(jobs, read, _pixels, options.num_workers)
        with (
            closing(loaded),
            WriteBehind(options.num_workers, on_done) as writer,
            torch.inference_mode(),
        ):
            for batch in group_by_shape(_readable(loaded, tally), _shape, _pixels, options.batch_size, batch_pixels):
                for member, result in zip(batch, split(batch), strict=True):
                    if isinstance(result, Exception):
                        tally.fail(member.item, result)
                    else:
                        writer.submit(member, partial(write, member, result), _pixels(member))
        if finish is not None:
            held = tally.release()
            try:
                finish(jobs[0].output)
            except (OSError, SdvaeError) as error:
                record(error, held)
            else:
                for member in held:
                    tally.succeed(member)
    return tally


def _by_output(jobs: Sequence[Item]) -> list[Sequence[Item]]:
    groups: dict[Path, list[Item]] = {}
    for job in jobs:
        groups.setdefault(job.output, []).append(job)
    return list(groups.values())


def _shape(member: Member) -> torch.Size:
    return member.tensor.shape


def _pixels(member: Member) -> int:
    return member.header.image.width * member.header.image.height


def _readable(loaded: Iterable[tuple[Item, Member | Exception]], tally: Tally) -> Iterator[Member]:
    for item, result in loaded:
        if isinstance(result, Exception):
            tally.fail(item, result)
        else:
            yield result


class _Splitting:
    """Computes a batch; one that fails is tried again image by image, so that only the bad ones are lost.

    Once memory ran out, all batches that follow go image by image too: the next large one would only fail again.
    """

    def __init__(
        self, compute: Callable[[Sequence[Member]], Sequence[Tensor]], warnings: list[str], advice: str
    ) -> None:
        self._compute = compute
        self._advice = advice
        self._warnings = warnings
        self._singly = False

    def __call__(self, batch: Sequence[Member]) -> list[Tensor | Exception]:
        if self._singly or len(batch) == 1:
            return [self._one(member) for member in batch]
        try:
            return list(self._compute(batch))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if _is_out_of_memory(error):
                self._singly = True
                self._warnings.append(f"out of memory with a batch of {len(batch)}: went on image by image")
        except SdvaeError:  # a size that does not fit into the memory that is allowed
            pass
        # Only here, where the exception is gone: its frames hold the tensors of the failed batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [self._one(member) for member in batch]

    def _one(self, member: Member) -> Tensor | Exception:
        try:
            return self._compute([member])[0]
        except RuntimeError as error:
            size = f"{member.header.image.width} x {member.header.image.height} px"
            if _is_out_of_memory(error):
                return SdvaeError(f"out of memory at {size}: {self._advice}")
            return SdvaeError(f"the VAE failed at {size}: {error}")
        except SdvaeError as error:
            return error


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and MPS, CPU on Linux, on Windows
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def prepare_folder(plan: Plan, out: Path) -> None:
    """Make the output folder, where it is not there, and remove what killed runs left in it. Raises: ConfigError."""
    _make_folder(out)
    remove_leftovers({out} | {item.output.parent for item in plan.items})


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: this folder cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"{out}: this folder cannot be written to")


def _disk_full(error: OSError, out: Path, tally: Tally) -> SdvaeError:
    free = shutil.disk_usage(out).free
    return SdvaeError(
        f"{out}: {error.strerror} ({free / 1e6:.1f} MB free). {tally.done} of {tally.total} files were written and are "
        "whole; make room, then run the same command again to continue"
    )


def _about(item: Item, reason: str) -> FileReason:
    return FileReason(key=item.key, source=str(item.source), reason=reason)
