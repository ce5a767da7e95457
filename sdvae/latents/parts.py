"""A part of a run that is divided over processes or machines: which images are its own, and how its files are called.

To which part an image belongs follows from its key and the number of parts alone, not from its place in a list. So
parts that start at different times, while the folder still grows, do not take an image twice or leave one out, and
images that are added later move none of the others to another part. The price is that the parts are not of exactly
one size: n images in k parts give n / k, give or take its square root. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

from sdvae.errors import ConfigError

__all__ = ["WHOLE", "Part"]

_TEXT = re.compile(r"(\d+)/(\d+)")
_NAME = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True, order=True)
class Part:
    """One of `count` parts; `index` counts from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ConfigError(f"shard is '{self}'; expected i/n with i from 1 to n, such as 1/8 for the first of eight")

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that "2/8" means. Raises: ConfigError."""
        if (match := _TEXT.fullmatch(text)) is None:
            raise ConfigError(f"shard is '{text}'; expected i/n with i from 1 to n, such as 1/8 for the first of eight")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_name(cls, name: str) -> Part | None:
        """The inverse of `name`; None where it is the name of no part."""
        match = _NAME.fullmatch(name)
        part = cls(int(match[1]), int(match[2])) if match and 1 <= int(match[1]) <= int(match[2]) else None
        return part if part and part.name == name else None

    @property
    def name(self) -> str:
        """For the names of files, in the order of the parts: 02-of-16."""
        return f"{self.index:0{len(str(self.count))}}-of-{self.count}"

    def has(self, key: str) -> bool:
        """Whether an image belongs to this part."""
        digest = sha256(key.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def all(self) -> list[Part]:
        """This part and the others, in order."""
        return [Part(index, self.count) for index in range(1, self.count + 1)]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Part(1, 1)
