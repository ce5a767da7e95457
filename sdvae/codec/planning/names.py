"""Which name the output of each input has: none twice, and always the same one. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from pathlib import PurePosixPath

from sdvae.codec.options import RunOptions
from sdvae.data.sources.files import IMAGE_SUFFIXES
from sdvae.latents.header import LATENT_SUFFIX
from sdvae.latents.parts import WHOLE

__all__ = ["choose_names", "folded", "image_names", "latent_names", "own_keys", "with_rivals"]


def own_keys(keys: Sequence[str], options: RunOptions) -> frozenset[str]:
    """Those that belong to this part of a run; all of the whole."""
    part = options.part
    return frozenset(keys if part == WHOLE else (key for key in keys if part.has(key)))


def latent_names(key: str) -> tuple[str, ...]:
    """Those that the latent file of an image may have: a.jpg.safetensors, so that a.png beside a.jpg has its own."""
    path = PurePosixPath(key)
    return key + LATENT_SUFFIX, f"{path.with_suffix('')}~{_hash(key)}{path.suffix}{LATENT_SUFFIX}"


def image_names(key: str, suffix: str) -> tuple[str, ...]:
    """Those that the image of a latent may have: a.png for a.jpg, or a.jpg.png where another image has that name."""
    path = PurePosixPath(key)
    stem = str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else key
    return stem + suffix, key + suffix, f"{stem}~{_hash(key)}{suffix}"


def with_rivals(keys: Sequence[str], own: Collection[str], candidates: Callable[[str], Sequence[str]]) -> Sequence[str]:
    """The keys that decide the names of `own`: these, and in turn all that share a candidate with one of them.

    So a part of a run gives the names that the whole would, and looks at few files of the other parts.
    """
    if len(own) == len(keys):
        return keys
    wanted_by: dict[str, list[str]] = {}
    for key in keys:
        for name in candidates(key):
            wanted_by.setdefault(folded(name), []).append(key)
    found, waiting = set(own), list(own)
    while waiting:
        for name in candidates(waiting.pop()):
            rivals = [key for key in wanted_by[folded(name)] if key not in found]
            found.update(rivals)
            waiting += rivals
    return [key for key in keys if key in found]


def choose_names(
    keys: Sequence[str],
    own: Collection[str],
    candidates: Callable[[str], Sequence[str]],
    owner: Callable[[str], str | None],
) -> dict[str, str]:
    """An output name for each of `own`, no two alike even where case or Unicode form do not count.

    keys: of the whole run. candidates: the names that a key may have, best first. owner: the key that the output of a
    name on disk belongs to; None where there is none.

    A name on disk stays with the key that has it, so files that are added later never rename an output. After that
    the keys choose in their order, each the first of its candidates that is free.
    """
    keys = with_rivals(keys, own, candidates)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        for name in candidates(key):
            if owner(name) == key and folded(name) not in taken:
                names[key] = name
                taken.add(folded(name))
                break
    for key in keys:
        if key not in names:
            free = [name for name in candidates(key) if folded(name) not in taken and _may_have(key, owner(name))]
            names[key] = free[0] if free else candidates(key)[-1]
            taken.add(folded(names[key]))
    return names


def _may_have(key: str, owner: str | None) -> bool:
    """Whether the output of `owner` is this key's too: the same file, seen from a higher or a lower folder."""
    return owner is None or owner == key or owner.endswith("/" + key) or key.endswith("/" + owner)


def folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _hash(key: str) -> str:
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]
