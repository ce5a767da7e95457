"""What encoding and decoding share: a plan's jobs are read, computed, written and counted, and bad files survived.

It knows plans and outputs, and nothing of what a VAE does with a batch; threads and batches are in `data/batches.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import RunOptions
from sdvae.codec.planning.plan import Item, Plan
from sdvae.data.batches import OnProgress, Tally, WriteBehind, compute_batches, pixels_of
from sdvae.data.sources.files import FileReason
from sdvae.errors import ConfigError, SdvaeError
from sdvae.files import remove_leftovers
from sdvae.latents.header import LatentHeader

__all__ = ["CodecTally", "Member", "carry_out", "prepare_folder"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, eq=False)
class Member:
    """One file that was read: the tensor that goes into a batch, and what its latent file says."""

    job: Item
    tensor: Tensor  # x (3, H, W) with its padding, or z (C, h, w)
    header: LatentHeader

    @property
    def size_px(self) -> tuple[int, int]:
        return self.header.image.width, self.header.image.height


@dataclass
class CodecTally(Tally):
    """What happened so far, for the report."""

    started: float = field(default_factory=time.perf_counter)
    megapixels: float = 0.0
    notes: list[FileReason] = field(default_factory=list)
    held: list[Member] = field(default_factory=list)  # computed, but not yet in a whole file
    told: int = 0  # what moves from held to done is not told twice

    def succeed(self, member: Member) -> None:
        self.done += 1
        self.megapixels += pixels_of(member) / 1e6
        self.notes += [FileReason.of(member.job.key, member.job.path, note) for note in member.header.notes]
        self.tell()

    def hold(self, member: Member) -> None:
        self.held.append(member)
        self.tell()

    def release(self) -> list[Member]:
        held, self.held = self.held, []
        return held

    def add(self, other: CodecTally) -> None:
        """Count what was done elsewhere."""
        self.done += other.done
        self.megapixels += other.megapixels
        self.failures += other.failures
        self.notes += other.notes
        self.warnings += [warning for warning in other.warnings if warning not in self.warnings]
        self.tell()

    @property
    def num_finished(self) -> int:
        self.told = max(self.told, self.done + len(self.failures) + len(self.held))
        return self.told

    def to_fields(self, plan: Plan, out: Path, vae: OpenedVae) -> dict[str, Any]:
        """The fields of a `CodecReport`."""
        failures = self.failures + [FileReason.of(item.key, item.path, item.reason) for item in plan.failures]
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
) -> CodecTally:
    """Do the jobs of a plan: `read` and `write` in threads, `compute` in this one.

    if_out_of_memory: advice for an image that does not fit even alone.
    batch_pixels: how large batches are where the options leave it open.
    finish: for outputs of many files: called with each output once all its jobs went through `write`, or failed. The
        outputs then come one after the other, so that no more than one is held in memory.
    A file that fails in any of the three is recorded. Interrupted at any moment, every output is whole or not there.
    Raises: SdvaeError where the disk is full.
    """
    tally = CodecTally(on_progress, total=len(plan.jobs))

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
        for job in (member.job for member in members):
            reason = str(error).removeprefix(f"{job.output}: ")
            if isinstance(error, OSError):
                reason = f"{job.output} cannot be written: {error.strerror or error}"
            tally.fail(job, SdvaeError(reason))

    for jobs in [plan.jobs] if finish is None else _by_output(plan.jobs):
        computed = compute_batches(
            jobs,
            read,
            compute,
            tally,
            workers=options.num_workers,
            batch_size=options.batch_size,
            batch_pixels=batch_pixels,
            if_out_of_memory=if_out_of_memory,
        )
        with closing(computed), WriteBehind(options.num_workers, on_done) as writer:
            for members, results in computed:
                for member, result in zip(members, results, strict=True):
                    writer.submit(member, partial(write, member, result), pixels_of(member))
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


def _disk_full(error: OSError, out: Path, tally: CodecTally) -> SdvaeError:
    free = shutil.disk_usage(out).free
    return SdvaeError(
        f"{out}: {error.strerror} ({free / 1e6:.1f} MB free). {tally.done} of {tally.total} files were written and are "
        "whole; make room, then run the same command again to continue"
    )
