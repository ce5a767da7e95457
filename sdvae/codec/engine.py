"""What encoding and decoding share: a plan's jobs are read, computed, written and counted, and bad files survived.

It knows plans and outputs, and nothing of what a VAE does with a batch; threads and batches are in `data/batches.py`.
"""

from __future__ import annotations

import errno
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import RunOptions
from sdvae.codec.planning.plan import Item, Plan
from sdvae.data import batches
from sdvae.data.batches import OnProgress, Tally, WriteBehind, compute_batches
from sdvae.data.sources.files import FileReason
from sdvae.errors import SdvaeError
from sdvae.latents.header import LatentHeader

__all__ = ["CodecTally", "Member", "Work", "carry_out"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, eq=False)
class Member(batches.Member):
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
        self.megapixels += math.prod(member.size_px) / 1e6
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

    def tell(self) -> None:
        self.told = max(self.told, self.done + len(self.failures) + len(self.held))
        if self.on_progress is not None:
            self.on_progress(self.told, self.total)

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


class Work(ABC):
    """What is done with each file of a plan: `read` and `write` in threads, `compute` in the main one."""

    out: Path
    options: RunOptions
    vae: OpenedVae
    if_out_of_memory: ClassVar[str]  # advice for an image that does not fit even alone

    @abstractmethod
    def read(self, item: Item) -> Member:
        """Raises: SdvaeError for a file that cannot be read."""

    @abstractmethod
    def compute(self, batch: Sequence[Member]) -> Sequence[Tensor]:
        """What `write` is given for each member of a batch of one shape."""

    @abstractmethod
    def write(self, member: Member, computed: Tensor) -> None:
        """Raises: SdvaeError, OSError."""

    @property
    def by_output(self) -> bool:
        """Whether files share an output, which `finish` writes. The outputs then come one after the other."""
        return False

    def finish(self, output: Path) -> None:
        """Write an output all of whose files went through `write`, or failed. Raises: SdvaeError, OSError."""
        raise NotImplementedError


def carry_out(work: Work, plan: Plan, on_progress: OnProgress | None = None) -> CodecTally:
    """Do the jobs of a plan.

    A file that fails is recorded. Interrupted at any moment, every output is whole or not there.
    Raises: SdvaeError where the disk is full.
    """
    options = work.options
    tally = CodecTally(on_progress, total=len(plan.jobs))

    def on_done(member: Member, error: Exception | None) -> None:
        if error is not None:
            record(error, [member])
        elif work.by_output:
            tally.hold(member)
        else:
            tally.succeed(member)

    def record(error: Exception, members: Sequence[Member]) -> None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise _disk_full(error, work.out, tally) from error
        for job in (member.job for member in members):
            reason = str(error).removeprefix(f"{job.output}: ")
            if isinstance(error, OSError):
                reason = f"{job.output} cannot be written: {error.strerror or error}"
            tally.fail(job, SdvaeError(reason))

    for jobs in _by_output(plan.jobs) if work.by_output else [plan.jobs]:
        computed = compute_batches(
            jobs,
            work.read,
            work.compute,
            tally,
            workers=options.num_workers,
            batch_size=options.batch_size,
            batch_pixels=work.vae.batch_pixels,
            if_out_of_memory=work.if_out_of_memory,
        )
        with closing(computed), WriteBehind(options.num_workers, on_done) as writer:
            for members, results in computed:
                for member, result in zip(members, results, strict=True):
                    writer.submit(member, partial(work.write, member, result), math.prod(member.size_px))
        if work.by_output:
            held = tally.release()
            try:
                work.finish(jobs[0].output)
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


def _disk_full(error: OSError, out: Path, tally: CodecTally) -> SdvaeError:
    free = shutil.disk_usage(out).free
    return SdvaeError(
        f"{out}: {error.strerror} ({free / 1e6:.1f} MB free). {tally.done} of {tally.total} files were written and are "
        "whole; make room, then run the same command again to continue"
    )
