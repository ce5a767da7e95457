"""Keeps the manifest of a cache true at every moment of a run, and joins those of the parts of a run.

A run of the whole folder, part 1 of 1, has OUT/manifest.jsonl. Each part has a manifest of its own and never changes
another's; while parts are at work there is no OUT/manifest.jsonl, since none of them could keep it true. When all have
come to their end, it is put together from theirs. Until then manifest.withdrawn.jsonl keeps its lines: no reader takes
them for true, but files that still have the size and the time of their line need not be read again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdvae.errors import ConfigError, LatentFileError, SdvaeError
from sdvae.latents.kohya import without_size
from sdvae.latents.manifest import (
    MANIFEST_NAME,
    Manifest,
    PartState,
    find_part_manifests,
    manifest_name,
    read_lines,
    read_state,
)
from sdvae.latents.parts import WHOLE, Part
from sdvae.latents.registry import FORMATS, part_of_shard

__all__ = ["CacheListing", "MergeReport", "merge_finished_parts", "merge_parts"]

_WITHDRAWN_NAME = "manifest.withdrawn.jsonl"


class CacheListing:
    """The manifest of one run: `begin` before anything is written, `close` when the run ends."""

    def __init__(self, out: Path, format: str, part: Part = WHOLE) -> None:
        self.out = out
        self.format = format
        self.part = part
        self._known = Manifest(format=format)  # what manifests say of files
        self._outputs: frozenset[Path] = frozenset()

    def begin(self, outputs: Iterable[Path], replaced: Iterable[Path]) -> None:
        """Take from the manifest what this run will replace: a killed run leaves no line that is not true.

        outputs: of the whole plan; replaced: those that are written now. Raises: OSError.
        """
        self._outputs = frozenset(outputs)
        lost = {self._relative(path) for path in replaced}
        manifests = find_part_manifests(self.out)
        own, withdrawn = self.out / manifest_name(self.part), self.out / _WITHDRAWN_NAME
        # From here on the lines of runs that were divided otherwise are this run's; those of parts beside it are not.
        others = [path for part, path in manifests.items() if part.count != self.part.count]
        known = [own] if own.is_file() and not others else [withdrawn, *others, own, self.out / MANIFEST_NAME]
        self._known = read_lines(dict.fromkeys(known))
        self._known.format = self.format
        if lost or others:
            kept = [
                path for path, line in self._known.files.items() if path not in lost and self._is_own(self.out / path)
            ]
            kept_lines = self._known.only(path for path in kept if self._known.files[path].is_unchanged(self.out))
            kept_lines.state = self._state(complete=False)
            kept_lines.write(self.out)
        if lost and self.part != WHOLE:
            # after the line above, which tells whoever joins the parts now that it is too early
            _withdraw(self.out)
        for path in (*others, withdrawn) if self.part == WHOLE else others:
            path.unlink(missing_ok=True)

    def close(self, written: Manifest, *, complete: bool, num_failed: int) -> Path:
        """Write the manifest of all files of this format that are there, of this run or not; of a part, of its own.

        complete: whether the run came to its end. num_failed: images that have no latent because they failed.
        Raises: OSError.
        """
        if self.format == "kohya-npz":
            self._delete_renamed(written)
        self._known.update(written)
        listed = list_files(self.out, self._own_files(), self._known)
        listed.state = self._state(complete, num_failed)
        return listed.write(self.out)

    def _own_files(self) -> list[Path]:
        """The files that this run's manifest lists: all, or those of its part."""
        if self.part == WHOLE or FORMATS[self.format].is_sharded:
            return [path for path in FORMATS[self.format].find_files(self.out) if self._is_own(path)]
        return sorted(path for path in self._outputs if path.is_file())  # the whole folder may be many times as large

    def _is_own(self, path: Path) -> bool:
        if self.part == WHOLE:
            return True
        return part_of_shard(path) == self.part if FORMATS[self.format].is_sharded else path in self._outputs

    def _delete_renamed(self, written: Manifest) -> None:
        """Delete what an earlier run wrote for an image that has another size now, and so another name."""
        now = {without_size(path): file for path, file in written.files.items()}
        for path in FORMATS[self.format].find_files(self.out) if now else ():
            file = now.get(without_size(self._relative(path)))
            if file is None or file.path == self._relative(path):
                continue
            with contextlib.suppress(LatentFileError):  # of others
                if FORMATS[self.format].read_headers(path)[0].source.key == file.items[0].key:
                    path.unlink(missing_ok=True)

    def _state(self, complete: bool, num_failed: int = 0) -> PartState:
        return PartState(index=self.part.index, count=self.part.count, complete=complete, num_failed=num_failed)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def _withdraw(out: Path) -> None:
    """Take OUT/manifest.jsonl away, if it is there. Raises: OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(out / MANIFEST_NAME, out / _WITHDRAWN_NAME)


def list_files(out: Path, paths: Sequence[Path], known: Manifest) -> Manifest:
    """A line for each file. Those whose size and time are as a known line says are not read again.

    Files of others are left out: the next plan says so if one is in the way. Raises: OSError.
    """
    for path in paths:
        relative = path.relative_to(out).as_posix()
        if (line := known.files.get(relative)) and line.is_unchanged(out):
            continue
        with contextlib.suppress(LatentFileError):
            latents = FORMATS[known.format].read_items(path)
            items = [(header, tuple(next(iter(tensors.values())).shape)) for header, tensors in latents]
            known.add(out, path, path.read_bytes(), items)
            continue
        known.files.pop(relative, None)
    return known.only([path.relative_to(out).as_posix() for path in paths])


# ----------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What became of the parts of a run."""

    out: str
    format: str
    num_parts: int
    missing: tuple[str, ...]  # parts such as "3/8" that did not begin or did not end; then nothing was merged
    failed: dict[str, int]  # part -> images that it could not encode
    num_files: int
    num_items: int
    manifest: str | None  # path; None if parts are missing
    warnings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: merged, nothing failed; 3: parts are missing, or some images of a part failed."""
        return 3 if self.missing or self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return {"command": "merge"} | asdict(self) | {"exit_code": self.exit_code}


def merge_parts(path: str | Path) -> MergeReport:
    """Join the manifests of the parts that encoded into a folder, if all of them have come to their end.

    As after a run of the whole, OUT/manifest.jsonl then lists every latent file of the folder. The parts' own
    manifests stay: with them a part that runs again need not read its files, and the others need not run again.
    Raises: ConfigError if there is no manifest of a part, or those of runs that were divided differently;
    LatentFileError if one is damaged; OSError.
    """
    out = Path(path).expanduser()
    manifests = find_part_manifests(out)
    if not manifests:
        raise ConfigError(
            f"{out}: no manifest of a part; expected {manifest_name(Part(1, 2))} and so on, as "
            "`sdvae encode --shard` writes them"
        )
    found = {part: read_state(path) for part, path in manifests.items()}
    counts = sorted({part.count for part in manifests})
    formats = sorted({state[0] for state in found.values() if state})
    if len(counts) > 1 or len(formats) > 1:
        differing = f"{' and '.join(map(str, counts))} parts" if len(counts) > 1 else " and ".join(formats)
        raise ConfigError(f"{out} holds manifests of different runs ({differing}): delete those of the old one")
    states, missing = _states(out, counts[0])
    joined, warnings = Manifest(format=formats[0]), []
    merged = None
    if not missing:
        joined = read_lines([out / _WITHDRAWN_NAME, *manifests.values()])
        joined.format = formats[0]
        joined = list_files(out, FORMATS[formats[0]].find_files(out), joined)
        merged = joined.write(out)
        states, missing = _states(out, counts[0])
        if missing:  # a part began to write again meanwhile, perhaps before the manifest was there
            _withdraw(out)
            joined, merged = Manifest(format=formats[0]), None
        else:
            (out / _WITHDRAWN_NAME).unlink(missing_ok=True)
            if len(joined.settings) > 1 and FORMATS[joined.format].is_sharded:
                warnings.append("the parts have shards of different settings or VAEs: encode all with the same ones")
    return MergeReport(
        out=str(out),
        format=formats[0],
        num_parts=len(states) + len(missing),
        missing=missing,
        failed={str(state.part): state.num_failed for state in states if state.num_failed},
        num_files=joined.num_files,
        num_items=joined.num_items,
        manifest=None if merged is None else str(merged),
        warnings=tuple(warnings),
    )


def merge_finished_parts(out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Merge if all parts have come to their end, as the last of them does.

    Returns: OUT/manifest.jsonl, also if it was there already, or None while parts are missing; and warnings, also
    of what keeps the parts from being merged: what this one has encoded is complete all the same.
    """
    warnings: tuple[str, ...] = ()
    if not (out / MANIFEST_NAME).is_file():
        try:
            warnings = merge_parts(out).warnings
        except (SdvaeError, OSError) as error:
            warnings = (f"the parts could not be merged: {error}",)
    return (out / MANIFEST_NAME if (out / MANIFEST_NAME).is_file() else None), warnings


def _states(out: Path, count: int) -> tuple[list[PartState], tuple[str, ...]]:
    """What the parts say of themselves, and which of them did not begin or did not end."""
    states, missing = [], []
    for part in Part(1, count).all():
        found = read_state(out / manifest_name(part))
        if found is not None and found[1].complete:
            states.append(found[1])
        else:
            missing.append(str(part))
    return states, tuple(missing)
