"""Makes one manifest of those of all parts of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdvae.codec.cache_files import find_cache_files
from sdvae.codec.listing import WITHDRAWN_NAME, list_files, read_lines, to_manifest, withdraw
from sdvae.codec.options import SHARDED_FORMATS
from sdvae.errors import ConfigError, SdvaeError
from sdvae.latents.manifest import (
    MANIFEST_NAME,
    PartState,
    find_part_manifests,
    manifest_format,
    part_manifest_name,
    read_part_state,
    write_manifest,
)
from sdvae.latents.parts import Part

__all__ = ["MergeReport", "merge_finished_parts", "merge_parts"]


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
    manifest: str | None  # path; None where parts are missing
    warnings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: merged, nothing failed; 3: parts are missing, or some images of a part failed."""
        return 3 if self.missing or self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return {"command": "merge"} | asdict(self) | {"exit_code": self.exit_code}


def merge_parts(path: str | Path) -> MergeReport:
    """Merge the manifests of the parts that encoded into a folder, where all of them have come to their end.

    As after a run of the whole, OUT/manifest.jsonl then lists every latent file of the folder. The parts' own
    manifests stay: with them a part that runs again need not read its files, and the others need not run again.
    Raises: ConfigError where there is no manifest of a part, or those of runs that were divided differently;
    LatentFileError where one is damaged; OSError.
    """
    out = Path(path).expanduser()
    parts = find_part_manifests(out)
    if not parts:
        raise ConfigError(
            f"{out}: no manifest of a part; expected {part_manifest_name(Part(1, 2))} and so on, as "
            "`sdvae encode --shard` writes them"
        )
    counts = sorted({part.count for part in parts})
    formats = sorted({format for format in map(manifest_format, parts.values()) if format})
    if len(counts) > 1 or len(formats) > 1:
        differing = f"{' and '.join(map(str, counts))} parts" if len(counts) > 1 else " and ".join(formats)
        raise ConfigError(f"{out} holds manifests of different runs ({differing}): delete those of the old one")
    states, missing = _states(out, counts[0])
    if missing:
        return _report(out, formats[0], states, missing)
    known = read_lines([out / WITHDRAWN_NAME, *parts.values()])
    manifest = to_manifest(list_files(out, find_cache_files(out, formats[0]), formats[0], known), formats[0])
    merged = write_manifest(manifest, out)
    states, missing = _states(out, counts[0])
    if missing:  # a part began to write again meanwhile, and perhaps looked for the manifest before it was there
        withdraw(out)
        return _report(out, formats[0], states, missing)
    (out / WITHDRAWN_NAME).unlink(missing_ok=True)
    warnings = []
    if len(manifest.settings) > 1 and manifest.format in SHARDED_FORMATS:
        warnings.append("the parts have shards of different settings or VAEs: encode all with the same ones")
    return _report(out, formats[0], states, (), merged, manifest.num_files, manifest.num_items, tuple(warnings))


def merge_finished_parts(out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Merge where all parts have come to their end, as the last of them does.

    Returns: OUT/manifest.jsonl, also where it is there already, or None while parts are missing; and warnings, also
    of what keeps the parts from being merged: what this one has encoded is whole all the same.
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
        state = read_part_state(out / part_manifest_name(part))
        if state is not None and state.complete:
            states.append(state)
        else:
            missing.append(str(part))
    return states, tuple(missing)


def _report(
    out: Path,
    format: str,
    states: list[PartState],
    missing: tuple[str, ...],
    manifest: Path | None = None,
    num_files: int = 0,
    num_items: int = 0,
    warnings: tuple[str, ...] = (),
) -> MergeReport:
    return MergeReport(
        out=str(out),
        format=format,
        num_parts=len(states) + len(missing),
        missing=missing,
        failed={str(state.part): state.num_failed for state in states if state.num_failed},
        num_files=num_files,
        num_items=num_items,
        manifest=None if manifest is None else str(manifest),
        warnings=warnings,
    )
