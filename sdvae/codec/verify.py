"""Whether a latent cache is what it says: its files, their digests and values, and a sample of images encoded again.

Any format that `encode` writes, and of kohya-npz also the arrays that only kohya's trainers read. Files are read one
after the other, so memory does not grow with the cache, but for its manifest and its keys. Nothing is written or
repaired.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae, VaeRef
from sdvae.codec.reencoding import Reencoding, StoredLatent, open_recorded_vae, reencode, short_digest
from sdvae.data.images import PREPROCESSING_VERSION
from sdvae.data.sources.files import file_digest, reason_without_path
from sdvae.data.sources.find import ImagesByKey
from sdvae.errors import ConfigError, ImageError, LatentFileError
from sdvae.latents import kohya
from sdvae.latents.header import LatentHeader
from sdvae.latents.kohya_check import trainer_problems
from sdvae.latents.manifest import (
    MANIFEST_NAME,
    CacheSettings,
    Manifest,
    ManifestFile,
    find_part_manifests,
    read_manifest,
)
from sdvae.latents.registry import FORMATS

__all__ = ["Problem", "VerifyReport", "verify_cache"]

OnProgress = Callable[[int, int], None]  # files and re-encodings done, and to do


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


def verify_cache(
    path: str | Path,
    *,
    images: str | Path | None = None,
    vae: VaeRef = None,
    sample: int = 8,
    seed: int = 0,
    device: str = "auto",
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check a latent cache: counts, digests, headers, shapes, values, keys, and that all of it was made alike.

    docs/latent-caches.md says of each format what is compared with what, and what stays open.

    path: the folder. Without a manifest, digests and lost files cannot be checked, and a warning says so.
    images: what was encoded, with `split`, `subset` and `image_column` of a dataset; then `sample` latents, chosen by
        `seed`, are compared with what their images give now on `device`, prepared and computed as recorded; a draw is
        repeated with its seed.
    vae: the VAE that the cache is to be of; None takes, with `images`, the one by the name in the cache.
    Raises: ConfigError where `path` holds no cache, `images` names none, or the VAE that it needs is not where it
        was; LatentFileError where no latent that names the VAE can be read; CheckpointError for a VAE that cannot be
        loaded.
    """
    started = time.perf_counter()
    out = Path(path).expanduser()
    out = out.parent if out.name == MANIFEST_NAME and out.is_file() else out
    check = _Check(out, random.Random(seed), sample if images is not None else 0)
    manifest = check.open_manifest()
    format = manifest.format if manifest else _format_of(out)
    expected = _common_settings(manifest) if manifest else None
    sources = None
    if images is not None:
        sources = ImagesByKey(images, split=split, subset=subset, image_column=image_column)
    loaded = None
    if vae is not None or sources is not None:
        settings = expected or _first_settings(out, format)
        if settings is None:
            raise LatentFileError("the cache does not say which VAE made it, for it holds no latent that can be read")
        loaded = open_recorded_vae(settings, vae, device)

    listed = manifest.files if manifest else {}
    files = FORMATS[format].find_files(out)
    names = sorted({file.relative_to(out).as_posix() for file in files} | set(listed))
    total = len(names) + (min(sample, manifest.num_items) if manifest and sources else 0)
    for done, name in enumerate(names):
        check.file(name, format, listed.get(name), manifest)
        if on_progress:
            on_progress(done + 1, total)
    check.mirrored()
    if loaded is not None:
        check.vae(loaded)
    if sources is not None and loaded is not None:
        for done, chosen in enumerate(check.chosen):
            check.reencode(chosen, sources, loaded)
            if on_progress:
                on_progress(len(names) + done + 1, len(names) + len(check.chosen))
    return VerifyReport(
        cache=str(path),
        format=format,
        has_manifest=manifest is not None,
        num_files=len(files),
        num_items=check.num_items,
        size_bytes=sum(file.stat().st_size for file in files),
        vae=check.settings.vae.name if check.settings else None,
        vae_digest=check.settings.vae.digest if check.settings else None,
        store=check.settings.store if check.settings else None,
        latent_dtype=check.settings.latent_dtype if check.settings else None,
        problems=tuple(check.problems),
        reencoded=tuple(check.reencoded),
        warnings=tuple(check.warnings),
        seconds=time.perf_counter() - started,
    )


# ---------------------------------------------------------------------------------------------------- file by file


@dataclass
class _Check:
    """The state of a check, and what it found so far."""

    out: Path
    random: random.Random
    sample: int  # how many latents to keep
    problems: list[Problem] = field(default_factory=list)
    reencoded: list[Reencoding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    chosen: list[StoredLatent] = field(default_factory=list)
    settings: CacheSettings | None = None  # those that all latents should have
    num_items: int = 0
    num_mirrored: int = 0  # with `latents_flipped`
    _keys: dict[tuple[str, str], str] = field(default_factory=dict)  # key, and where it may be again -> file

    def add(self, file: str | None, reason: str, key: str | None = None) -> None:
        self.problems.append(Problem(file=file, key=key, reason=reason))

    def open_manifest(self) -> Manifest | None:
        """The manifest; None where there is none, or it is damaged, which is a problem."""
        if not (self.out / MANIFEST_NAME).is_file():
            parts = "its parts are not merged: sdvae merge; " if find_part_manifests(self.out) else ""
            self.warnings.append(f"no manifest: {parts}digests not checked, and lost files not seen")
            return None
        try:
            manifest = read_manifest(self.out)
        except LatentFileError as error:
            self.add(MANIFEST_NAME, reason_without_path(error, self.out / MANIFEST_NAME))
            self.warnings.append("the manifest cannot be read: digests not checked, and lost files not seen")
            return None
        self.settings = _common_settings(manifest)
        return manifest

    def file(self, name: str, format: str, listed: ManifestFile | None, manifest: Manifest | None) -> None:
        """Check one file, by its bytes and by what it holds."""
        path = self.out / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return self.add(name, "the manifest names a file outside the cache")
        if not path.is_file():
            return self.add(name, "in the manifest, but not in the folder")
        if manifest and listed is None:
            self.add(name, "not in the manifest: put here by something else, or by a run that did not end")
        if listed and (reason := _bytes_differ(path, listed)):
            self.add(name, reason)
        self._items(name, format, listed, manifest)

    def _items(self, name: str, format: str, listed: ManifestFile | None, manifest: Manifest | None) -> None:
        count = 0
        try:
            for header, tensors in FORMATS[format].read_items(self.out / name):
                more = self._for_trainers(name, header) if format == "kohya-npz" else {}
                self._item(StoredLatent(name, header, {**tensors, **more}), count, listed, manifest)
                count += 1
        except LatentFileError as error:
            reason = reason_without_path(error, self.out / name)
            after = f", after {count} latents that could be read" if count else ""
            return self.add(name, f"{reason}{after}")
        except OSError as error:
            return self.add(name, f"cannot be read: {error.strerror or error}")
        if listed and count != len(listed.items):
            self.add(name, f"holds {count} latents; the manifest says {len(listed.items)}")

    def _for_trainers(self, name: str, header: LatentHeader) -> dict[str, Tensor]:
        """Check what kohya's trainers read. Returns: the latents among it. Raises: LatentFileError."""
        _, arrays = kohya.read_all(self.out / name)
        for reason in trainer_problems(name, header, arrays):
            self.add(name, reason, header.source.key)
        self.num_mirrored += "latents_flipped" in arrays
        return {each: torch.from_numpy(arrays[each]) for each in ("latents", "latents_flipped") if each in arrays}

    def mirrored(self) -> None:
        """Say where some files have the mirrored image and some have not; call it when all were read."""
        if 0 < self.num_mirrored < self.num_items:
            self.warnings.append(f"latents_flipped is in {self.num_mirrored} of {self.num_items} files: not in all")

    def _item(self, item: StoredLatent, index: int, listed: ManifestFile | None, manifest: Manifest | None) -> None:
        key = item.header.source.key
        # Files for the SD and for the SDXL trainers may lie side by side, and those of a run of a folder in the folder.
        place = kohya.without_size(item.file) if kohya.is_file_name(item.file) else ""
        if other := self._keys.get((key, place)):
            self.add(item.file, "the key is in it twice" if other == item.file else f"the key is in {other} too", key)
        self._keys[key, place] = item.file
        settings = CacheSettings.of(item.header)
        self.settings = self.settings or settings
        if reason := _settings_differ(item.header, self.settings):
            self.add(item.file, reason, key)
        if listed and index < len(listed.items):
            if reason := _item_differs(item, listed, index):
                self.add(item.file, reason, key)
            if settings.digest not in listed.settings:
                self.add(item.file, "its header does not say what the manifest says of VAE and options", key)
        self.num_items += 1
        self._choose(item)

    def _choose(self, item: StoredLatent) -> None:
        """Keep a random sample of all that comes, each with the same chance (Vitter 1985, algorithm R)."""
        if len(self.chosen) < self.sample:
            self.chosen.append(item)
        elif self.sample and (place := self.random.randrange(self.num_items)) < self.sample:
            self.chosen[place] = item

    # ------------------------------------------------------------------------------------------------ against images

    def vae(self, loaded: OpenedVae) -> None:
        """Check that the cache is of this VAE."""
        if self.settings and self.settings.vae.digest != loaded.digest:
            made = self.settings.vae
            self.add(
                None,
                f"made by the VAE '{made.name}' ({short_digest(made.digest)}), not by '{loaded.name}' "
                f"({short_digest(loaded.digest)})",
            )

    def reencode(self, item: StoredLatent, images: ImagesByKey, loaded: OpenedVae) -> None:
        """Compare a latent with what its image gives now."""
        source = item.header.source
        image = images.find(source.key)
        if image is None:
            return self.add(item.file, f"its image is not in {images.name}", source.key)
        try:
            if image.digest() != source.digest:
                return self.add(item.file, "stale: the image changed since it was encoded", source.key)
            if item.header.vae.digest != loaded.digest:
                return  # said once, of the whole cache
            if item.header.preprocessing.version != PREPROCESSING_VERSION:
                return self._warn_once(
                    f"not encoded again: prepared by version {item.header.preprocessing.version} of sdvae's image "
                    f"reading; this is version {PREPROCESSING_VERSION}"
                )
            found, worst = reencode(item, image, loaded)
        except LatentFileError as error:
            return self.add(item.file, str(error), source.key)
        except (ImageError, ConfigError, OSError) as error:
            reason = reason_without_path(error, image.path)
            return self.add(item.file, f"its image cannot be encoded: {reason}", source.key)
        self.reencoded.append(found)
        if not found.ok:
            self.add(
                item.file,
                f"its image gives another latent: {worst} is {found.difference:.3g} standard deviations off; "
                f"{found.tolerance:.3g} are rounding",
                source.key,
            )

    def _warn_once(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _format_of(out: Path) -> str:
    """The format of a folder without a manifest, by the files in it. Raises: ConfigError where there are none."""
    for format in FORMATS:
        if out.is_dir() and next(_readable(out, format), None) is not None:
            return format
    what = "no such folder" if not out.exists() else "a file" if out.is_file() else "no latents in it"
    raise ConfigError(f"{out}: no latent cache ({what}); expected a folder that `sdvae encode` wrote")


def _readable(out: Path, format: str) -> Iterator[LatentHeader]:
    for path in FORMATS[format].find_files(out):
        try:
            yield from FORMATS[format].read_headers(path)
        except (LatentFileError, ConfigError):
            continue


def _first_settings(out: Path, format: str) -> CacheSettings | None:
    header = next(_readable(out, format), None)
    return None if header is None else CacheSettings.of(header)


# ------------------------------------------------------------------------------------------------- comparisons


def _bytes_differ(path: Path, listed: ManifestFile) -> str | None:
    """By size, then by digest; None where they are those of the manifest. Raises: OSError."""
    size = path.stat().st_size
    if size != listed.size_bytes:
        return f"has {size} bytes; the manifest says {listed.size_bytes}"
    if (digest := file_digest(path)) != listed.digest:
        return f"its bytes changed: {short_digest(digest)}; the manifest says {short_digest(listed.digest)}"
    return None


def _item_differs(item: StoredLatent, listed: ManifestFile, index: int) -> str | None:
    """What the manifest says otherwise of a latent."""
    source, entry = item.header.source, listed.items[index]
    if source.key != entry.key:
        return f"the manifest has {entry.key!r} here"
    found = (source.digest, source.width, source.height, tuple(next(iter(item.tensors.values())).shape))
    said = (entry.source_digest, entry.source_width, entry.source_height, entry.shape)
    names = ("source_digest", "source_width", "source_height", "shape")
    wrong = [f"{name} {a}, in the manifest {b}" for name, a, b in zip(names, found, said, strict=True) if a != b]
    return "; ".join(wrong) or None


def _settings_differ(header: LatentHeader, expected: CacheSettings) -> str | None:
    """What decides a latent differently from the rest of the cache; what the VAE was called does not count."""
    found = CacheSettings.of(header)
    found = replace(found, vae=replace(found.vae, name=expected.vae.name))
    if not found.preprocessing.differs_for(header.source, expected.preprocessing):
        found = replace(found, preprocessing=expected.preprocessing)
    if found.vae.digest != expected.vae.digest:
        digests = [short_digest(settings.vae.digest) for settings in (found, expected)]
        return f"made by another VAE than the rest: {digests[0]}, not {digests[1]}"
    differing = [name for name in CacheSettings.__dataclass_fields__ if getattr(found, name) != getattr(expected, name)]
    return f"made with other settings than the rest: {', '.join(differing)}" if differing else None


def _common_settings(manifest: Manifest) -> CacheSettings | None:
    """The settings of the most files; the first of those that tie."""
    counts = Counter(digest for file in manifest.files.values() for digest in file.settings)
    return manifest.settings[max(counts, key=lambda digest: counts[digest])] if counts else None


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
