"""What a check of a latent cache found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sdvae.codec.reencoding import Reencoding

__all__ = ["Problem", "VerifyReport"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it should be."""

    file: str | None  # path below the cache; None where it is the cache as a whole
    key: str | None  # of the latent, where it is one of them
    reason: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found."""

    cache: str
    format: str
    has_manifest: bool
    num_files: int  # in the folder
    num_items: int  # that could be read
    size_bytes: int
    vae: str | None  # of the first latent, as it was called when the cache was made
    vae_digest: str | None
    store: str | None
    latent_dtype: str | None
    problems: tuple[Problem, ...]
    reencoded: tuple[Reencoding, ...]
    warnings: tuple[str, ...]  # what could not be checked
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: all is right; 3: there are problems."""
        return 3 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        reencoded = [asdict(each) | {"ok": each.ok, "difference": _finite(each.difference)} for each in self.reencoded]
        data = {"command": "verify"} | asdict(self) | {"reencoded": reencoded}
        return data | {"num_problems": len(self.problems), "exit_code": self.exit_code}


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
