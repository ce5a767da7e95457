"""Keeps the manifest of a cache true at every moment of a run, and that of a part while other parts go on.

A run of the whole folder has OUT/manifest.jsonl. A part has a manifest of its own and never changes another's; while
parts are at work there is no OUT/manifest.jsonl, since none of them could keep it true. merging.py makes it of theirs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from sdvae.codec.cache_files import find_cache_files, part_of_shard, read_headers
from sdvae.codec.options import SHARDED_FORMATS
from sdvae.codec.plan import Plan
from sdvae.errors import LatentFileError
from sdvae.latents.header import LatentHeader
from sdvae.latents.kohya import without_size
from sdvae.latents.manifest import (
    MANIFEST_NAME,
    CacheSettings,
    Manifest,
    ManifestFile,
    ManifestItem,
    PartState,
    find_part_manifests,
    read_manifest,
    write_manifest,
)
from sdvae.latents.parts import Part
from sdvae.latents.registry import read_items

__all__ = [
    "WITHDRAWN_NAME",
    "CacheListing",
    "ListedFile",
    "list_file",
    "list_files",
    "read_lines",
    "shape_of",
    "to_manifest",
    "withdraw",
]

# What OUT/manifest.jsonl is called once a part begins to write. No reader takes its lines for true; they save reading
# a file whose size and time are still those that they say.
WITHDRAWN_NAME = "manifest.withdrawn.jsonl"


@dataclass(frozen=True)
class ListedFile:
    """A line of a manifest."""

    file: ManifestFile  # its `settings` are empty: which numbers they have is known when all files are
    settings: tuple[CacheSettings, ...]


class CacheListing:
    """The manifest of one run: `begin` before anything is written, `close` when the run ends."""

    def __init__(self, out: Path, format: str, part: Part | None) -> None:
        self.out = out
        self.format = format
        self.part = part
        self._lines: dict[str, ListedFile] = {}  # what manifests say of files, by path
        self._outputs: frozenset[Path] = frozenset()  # of the plan

    def begin(self, plan: Plan) -> None:
        """Take from the manifest what this run will replace: a killed run leaves no line that is not true.

        Raises: OSError.
        """
        self._outputs = frozenset(item.output for item in plan.items if item.action != "fail")
        replaced = {self._relative(job.output) for job in plan.jobs}
        if self.part is None:
            self._begin_whole(replaced)
        else:
            self._begin_part(self.part, replaced)

    def _begin_whole(self, replaced: set[str]) -> None:
        parts = list(find_part_manifests(self.out).values())
        self._lines = read_lines([self.out / WITHDRAWN_NAME, *parts, self.out / MANIFEST_NAME])
        if parts:  # from here on the whole folder is this run's
            self._lines = {path: line for path, line in self._lines.items() if is_as_listed(self.out, line)}
        if replaced or parts:
            self._write({path: line for path, line in self._lines.items() if path not in replaced}, state=None)
        for path in (*parts, self.out / WITHDRAWN_NAME):
            path.unlink(missing_ok=True)

    def _begin_part(self, part: Part, replaced: set[str]) -> None:
        manifests = find_part_manifests(self.out)
        others = [path for other, path in manifests.items() if other.count != part.count]
        if part in manifests:
            self._lines = read_lines([manifests[part]])
        else:
            self._lines = read_lines([self.out / WITHDRAWN_NAME, *others, self.out / MANIFEST_NAME])
        for path in others:  # of a run that was divided otherwise: what they list is no longer theirs
            path.unlink(missing_ok=True)
        if replaced:
            own = {self._relative(path) for path in self._own_files()}
            kept = {path: line for path, line in self._lines.items() if path in own - replaced}
            self._write(kept, PartState(index=part.index, count=part.count, complete=False, num_failed=0))
            withdraw(self.out)  # after the line above, which tells whoever merges now that it is too early

    def close(self, written: Mapping[str, ListedFile], *, complete: bool, num_failed: int) -> Path:
        """Write the manifest of all files of this format that are there, of this run or not; of a part, of its own.

        complete: whether the run came to its end. num_failed: images that have no latent for it.
        Raises: OSError.
        """
        if self.format == "kohya-npz":
            self._delete_renamed(written)
        listed = list_files(self.out, self._own_files(), self.format, {**self._lines, **written})
        state = None
        if self.part:
            state = PartState(index=self.part.index, count=self.part.count, complete=complete, num_failed=num_failed)
        return self._write(listed, state)

    def _own_files(self) -> list[Path]:
        """The files that this run's manifest lists: all, or those of its part."""
        if self.part is None:
            return find_cache_files(self.out, self.format)
        if self.format in SHARDED_FORMATS:
            return [path for path in find_cache_files(self.out, self.format) if part_of_shard(path) == self.part]
        return sorted(path for path in self._outputs if path.is_file())

    def _delete_renamed(self, written: Mapping[str, ListedFile]) -> None:
        """Delete what an earlier run wrote for an image that has another size now, and so another name."""
        now = {without_size(path): line for path, line in written.items()}
        for path in find_cache_files(self.out, self.format) if now else ():
            line = now.get(without_size(self._relative(path)))
            if line is None or line.file.path == self._relative(path):
                continue
            with contextlib.suppress(LatentFileError):  # of others
                if read_headers(path, self.format)[0].source.key == line.file.items[0].key:
                    path.unlink(missing_ok=True)

    def _write(self, listed: Mapping[str, ListedFile], state: PartState | None) -> Path:
        return write_manifest(to_manifest(listed, self.format, state), self.out)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def withdraw(out: Path) -> None:
    """Take OUT/manifest.jsonl away, where it is there. Raises: OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(out / MANIFEST_NAME, out / WITHDRAWN_NAME)


def read_lines(manifests: Iterable[Path]) -> dict[str, ListedFile]:
    """The lines of some manifests, by path; later ones win. Those that are not there, or damaged, have none."""
    lines = {}
    for path in manifests:
        try:
            manifest = read_manifest(path)
        except LatentFileError:  # none, or one that the plan found replaceable
            continue
        for file in manifest.files:
            lines[file.path] = ListedFile(file, tuple(manifest.settings[index] for index in file.settings))
    return lines


def list_files(out: Path, paths: Sequence[Path], format: str, known: Mapping[str, ListedFile]) -> dict[str, ListedFile]:
    """A line for each file. Those whose size and time are as a known line says are not read again.

    Files of others are left out: the next plan says so where one is in the way. Raises: OSError.
    """
    listed = {}
    for path in paths:
        relative = path.relative_to(out).as_posix()
        line = known.get(relative)
        if line is None or not is_as_listed(out, line):
            try:
                items = [(header, shape_of(tensors)) for header, tensors in read_items(path, format)]
            except LatentFileError:
                continue
            line = list_file(out, path, path.read_bytes(), items)
        listed[relative] = line
    return listed


def is_as_listed(out: Path, line: ListedFile) -> bool:
    """Whether a file has the size and the time that its line says: a quick sign that the line is true."""
    try:
        status = (out / line.file.path).stat()
    except OSError:
        return False
    return (line.file.size_bytes, line.file.mtime_ns) == (status.st_size, status.st_mtime_ns)


def list_file(out: Path, path: Path, data: bytes, items: Sequence[tuple[LatentHeader, tuple[int, ...]]]) -> ListedFile:
    """The line of a file that holds `data`. items: of each latent its header and the shape of its tensors."""
    file = ManifestFile(
        path=path.relative_to(out).as_posix(),
        digest=f"sha256:{sha256(data).hexdigest()}",
        size_bytes=len(data),
        mtime_ns=path.stat().st_mtime_ns,
        settings=(),
        items=tuple(
            ManifestItem(
                key=header.source.key,
                source_digest=header.source.digest,
                source_width=header.source.width,
                source_height=header.source.height,
                shape=shape,
            )
            for header, shape in items
        ),
    )
    return ListedFile(file, tuple({CacheSettings.of(header): None for header, _ in items}))


def to_manifest(listed: Mapping[str, ListedFile], format: str, part: PartState | None = None) -> Manifest:
    """The manifest of these lines."""
    numbers: dict[CacheSettings, int] = {}  # without the VAE's name: a path and a hub id may mean the same
    settings: list[CacheSettings] = []
    files = []
    for path in sorted(listed):
        indices = set()
        for found in listed[path].settings:
            nameless = replace(found, vae=replace(found.vae, name=""))
            if nameless not in numbers:
                numbers[nameless] = len(settings)
                settings.append(found)
            indices.add(numbers[nameless])
        files.append(replace(listed[path].file, settings=tuple(sorted(indices))))
    return Manifest(format=format, settings=tuple(settings), files=tuple(files), part=part)


def shape_of(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape that all tensors of a latent have, (C, h, w)."""
    return tuple(next(iter(tensors.values())).shape)
