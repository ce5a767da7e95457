"""What a plan says: one item for each input, with what happens to it and why. No torch.

`encode.py` and `files.py` make plans, `run.py` carries them out and `--dry-run` prints them. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdvae.data.sources.files import ImageFile, Member
from sdvae.latents.header import LatentHeader

__all__ = ["OTHER_VAE", "Action", "Item", "Plan", "WhyStale", "decide", "item_of"]

UP_TO_DATE = "up to date"
OTHER_VAE = "made by another VAE"

Action = Literal["run", "skip", "fail"]
WhyStale = Callable[[LatentHeader, ImageFile], str | None]  # why a latent is not what its image would give now


@dataclass(frozen=True, kw_only=True)
class Item:
    """One input file, what happens with it, and why."""

    key: str  # path below the input folder, with "/"
    path: Path
    output: Path
    action: Action
    reason: str
    member: Member | None = None  # where the input is part of a larger file

    def to_json(self) -> dict[str, Any]:
        """What a user may want to know of it."""
        names = {"key": "key", "source": "path", "output": "output", "action": "action", "reason": "reason"}
        return {name: str(getattr(self, field)) for name, field in names.items()}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, in its order."""

    items: tuple[Item, ...]

    @property
    def jobs(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.action == "run")

    @property
    def skips(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.action == "skip")

    @property
    def failures(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.action == "fail")

    @property
    def exit_code(self) -> int:
        """0, or 3 where some files are refused."""
        return 3 if self.failures else 0

    @classmethod
    def joined(cls, parts: Sequence[Plan]) -> Plan:
        """The plan of all parts of a run."""
        return cls(items=tuple(sorted((item for part in parts for item in part.items), key=lambda item: item.key)))

    def to_json(self) -> dict[str, Any]:
        """Counts, and the items in order."""
        return {
            "counts": {
                "total": len(self.items),
                "run": len(self.jobs),
                "skip": len(self.skips),
                "fail": len(self.failures),
            },
            "items": [item.to_json() for item in self.items],
        }


def decide(output: Path, is_ours: bool, stale: str | None, overwrite: bool, kind: str) -> tuple[Action, str]:
    """What happens to an input with this output, and why.

    is_ours: whether sdvae wrote what is there. stale: why that is not what would be written now; None where it is.
    kind: what it is called where it is in the way.
    """
    if not output.exists():
        return "run", "new"
    if output.is_dir():
        return "fail", f"{output} is a folder"
    if is_ours and stale is not None:
        return "run", f"stale: {stale}"
    if overwrite:
        return "run", "overwrite"
    if is_ours:
        return "skip", UP_TO_DATE
    return "fail", f"{output} is there and is no {kind} of sdvae: move it away, or replace it with --overwrite"


def item_of(image: ImageFile, output: Path, action: Action, reason: str) -> Item:
    """What happens to an image."""
    return Item(key=image.key, path=image.path, output=output, action=action, reason=reason, member=image.member)
