"""Whether a latent cache is what it says: its files, their digests and values, and a sample of images encoded again.

Any format that `encode` writes. Files are read one after the other, so memory does not grow with the cache, but for its
manifest and its keys. Nothing is written or repaired.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sdvae.codec.cache_files import find_cache_files, read_headers
from sdvae.codec.cache_formats import read_items
from sdvae.codec.latent_header import LatentHeader
from sdvae.codec.loading import LoadedVae, VaeRef, open_vae
from sdvae.codec.manifest import MANIFEST_NAME, CacheSettings, Manifest, ManifestFile, read_manifest
from sdvae.codec.options import CACHE_FORMATS, EncodeOptions
from sdvae.codec.plan import reason_without_path
from sdvae.codec.run import read_pixels
from sdvae.data.images import PREPROCESSING_VERSION, image_to_x
from sdvae.data.sources import file_digest
from sdvae.data.transforms import pad_to_multiple
from sdvae.errors import CheckpointError, ConfigError, ImageError, LatentFileError, MissingWeightsError
from sdvae.model.posterior import DiagonalGaussian, image_generator

__all__ = ["COMPUTE_TOLERANCES", "Problem", "Reencoding", "VerifyReport", "verify_cache"]

# How far two computations of one latent may lie apart, in standard deviations of z: other devices, library versions and
# batch sizes add in another order. Measured with sdvae-mini on six photographs, on a CPU: float16 lies up to 0.011 from
# float32, bfloat16 up to 0.12, so two computations in one of them up to twice that; another image lies 6.7 and more
# away. float32 includes the 11 bits of TF32, as many as those of float16, which torch takes for convolutions on NVIDIA.
COMPUTE_TOLERANCES = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.3}
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}  # of the largest value, by the type in the file
_BRIEF = 19  # characters of a digest: sha256: and 12 digits

OnProgress = Callable[[int, int], None]  # files and re-encodings done, and to do


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it should be."""

    file: str | None  # path below the cache; None where it is the cache as a whole
    key: str | None  # of the latent, where it is one of them
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """One latent beside what its image gives now."""

    file: str
    key: str
    difference: float  # the largest, in standard deviations of z; for logvar in nats or its own standard deviations
    tolerance: float  # of computing and of rounding to the type in the file

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for nan


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
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check a latent cache: counts, digests, headers, shapes, values, keys, and that all of it was made alike.

    path: the folder. Without a manifest, digests and lost files cannot be checked, and a warning says so.
    images: the folder that was encoded; then `sample` latents, chosen by `seed`, are compared with what their images
        give now on `device`, prepared and computed as recorded; a draw is repeated with its seed.
    vae: the VAE that the cache is to be of; None takes, with `images`, the one by the name in the cache.
    Raises: LatentFileError where there is no cache; ConfigError where `images` is no folder, or the VAE that it needs
        is not where it was; CheckpointError for a VAE that cannot be loaded.
    """
    started = time.perf_counter()
    out = Path(path).expanduser()
    out = out.parent if out.name == MANIFEST_NAME and out.is_file() else out
    check = _Check(out, random.Random(seed), sample if images is not None else 0)
    manifest = check.open_manifest()
    format = manifest.format if manifest else _format_of(out)
    expected = _common_settings(manifest) if manifest else None
    root = _image_folder(images)
    loaded = _open_vae(vae, root, expected or _first_settings(out, format), device)

    listed = manifest.by_path if manifest else {}
    files = find_cache_files(out, format)
    names = sorted({file.relative_to(out).as_posix() for file in files} | set(listed))
    total = len(names) + (min(sample, manifest.num_items) if manifest and root else 0)
    for done, name in enumerate(names):
        check.file(name, format, listed.get(name), manifest)
        if on_progress:
            on_progress(done + 1, total)
    if loaded is not None:
        check.vae(loaded)
    if root is not None and loaded is not None:
        for done, chosen in enumerate(check.chosen):
            check.reencode(chosen, root, loaded)
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


@dataclass(frozen=True, eq=False)
class _Item:
    """A latent that was read, kept for the comparison with its image."""

    file: str
    header: LatentHeader
    tensors: Mapping[str, Tensor]


@dataclass
class _Check:
    """The state of a check, and what it found so far."""

    out: Path
    random: random.Random
    sample: int  # how many latents to keep
    problems: list[Problem] = field(default_factory=list)
    reencoded: list[Reencoding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    chosen: list[_Item] = field(default_factory=list)
    settings: CacheSettings | None = None  # those that all latents should have
    num_items: int = 0
    _keys: dict[str, str] = field(default_factory=dict)  # key -> file

    def add(self, file: str | None, reason: str, key: str | None = None) -> None:
        self.problems.append(Problem(file=file, key=key, reason=reason))

    def open_manifest(self) -> Manifest | None:
        """The manifest; None where there is none, or it is damaged, which is a problem."""
        if not (self.out / MANIFEST_NAME).is_file():
            self.warnings.append("no manifest: digests not checked, and lost files not seen")
            return None
        try:
            manifest = read_manifest(self.out)
        except LatentFileError as error:
            self.add(MANIFEST_NAME, reason_without_path(error, self.out / MANIFEST_NAME))
            self.warnings.append("the manifest cannot be read: digests not checked, and lost files not seen")
            return None
        self.settings = _common_settings(manifest)
        for name, count in Counter(file.path for file in manifest.files).items():
            if count > 1:
                self.add(name, f"listed {count} times in the manifest")
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
            for header, tensors in read_items(self.out / name, format):
                self._item(_Item(name, header, tensors), count, listed, manifest)
                count += 1
        except LatentFileError as error:
            reason = reason_without_path(error, self.out / name)
            after = f", after {count} latents that could be read" if count else ""
            return self.add(name, f"{reason}{after}")
        except OSError as error:
            return self.add(name, f"cannot be read: {error.strerror or error}")
        if listed and count != len(listed.items):
            self.add(name, f"holds {count} latents; the manifest says {len(listed.items)}")

    def _item(self, item: _Item, index: int, listed: ManifestFile | None, manifest: Manifest | None) -> None:
        key = item.header.source.key
        if other := self._keys.get(key):
            self.add(item.file, "the key is in it twice" if other == item.file else f"the key is in {other} too", key)
        self._keys[key] = item.file
        settings = CacheSettings.of(item.header)
        self.settings = self.settings or settings
        if reason := _settings_differ(settings, self.settings):
            self.add(item.file, reason, key)
        if listed and index < len(listed.items):
            if reason := _item_differs(item, listed, index):
                self.add(item.file, reason, key)
            known = [manifest.settings[i] for i in listed.settings] if manifest else []
            if settings not in known:
                self.add(item.file, "its header does not say what the manifest says of VAE and options", key)
        self.num_items += 1
        self._choose(item)

    def _choose(self, item: _Item) -> None:
        """Keep a random sample of all that comes, each with the same chance (Vitter 1985, algorithm R)."""
        if len(self.chosen) < self.sample:
            self.chosen.append(item)
        elif self.sample and (place := self.random.randrange(self.num_items)) < self.sample:
            self.chosen[place] = item

    # ------------------------------------------------------------------------------------------------ against images

    def vae(self, loaded: LoadedVae) -> None:
        """Check that the cache is of this VAE."""
        if self.settings and self.settings.vae.digest != loaded.record.digest:
            made, given = self.settings.vae, loaded.record
            self.add(
                None,
                f"made by the VAE '{made.name}' ({made.digest[:_BRIEF]}), not by '{given.name}' "
                f"({given.digest[:_BRIEF]})",
            )

    def reencode(self, item: _Item, root: Path, loaded: LoadedVae) -> None:
        """Compare a latent with what its image gives now."""
        source = item.header.source
        path = root / source.key
        if not path.is_file():
            return self.add(item.file, f"its image is not in {root}", source.key)
        try:
            if file_digest(path) != source.digest:
                return self.add(item.file, "stale: the image changed since it was encoded", source.key)
            if item.header.vae.digest != loaded.record.digest:
                return  # said once, of the whole cache
            if item.header.preprocessing.version != PREPROCESSING_VERSION:
                return self._warn_once(
                    f"not encoded again: prepared by version {item.header.preprocessing.version} of sdvae's image "
                    f"reading; this is version {PREPROCESSING_VERSION}"
                )
            found = _compare(item, encode_again(path, item.header, loaded))
        except (ImageError, ConfigError, OSError) as error:
            return self.add(item.file, f"its image cannot be encoded: {reason_without_path(error, path)}", source.key)
        if isinstance(found, str):
            return self.add(item.file, found, source.key)
        self.reencoded.append(found)
        if not found.ok:
            self.add(
                item.file,
                f"its image gives another latent: {found.difference:.3g} standard deviations apart; "
                f"{found.tolerance:.3g} are rounding",
                source.key,
            )

    def _warn_once(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _bytes_differ(path: Path, listed: ManifestFile) -> str | None:
    size = path.stat().st_size
    if size != listed.size_bytes:
        return f"has {size} bytes; the manifest says {listed.size_bytes}"
    if (digest := file_digest(path)) != listed.digest:
        return f"its bytes changed: {digest[:_BRIEF]}; the manifest says {listed.digest[:_BRIEF]}"
    return None


def _item_differs(item: _Item, listed: ManifestFile, index: int) -> str | None:
    """What the manifest says otherwise of a latent."""
    source, entry = item.header.source, listed.items[index]
    if source.key != entry.key:
        return f"the manifest has {entry.key!r} here"
    found = (source.digest, source.width, source.height, tuple(next(iter(item.tensors.values())).shape))
    said = (entry.source_digest, entry.source_width, entry.source_height, entry.shape)
    names = ("source_digest", "source_width", "source_height", "shape")
    wrong = [f"{name} {a}, in the manifest {b}" for name, a, b in zip(names, found, said, strict=True) if a != b]
    return "; ".join(wrong) or None


def _settings_differ(found: CacheSettings, expected: CacheSettings) -> str | None:
    """What decides the latents differently from the rest of the cache; what the VAE was called does not count."""
    found = replace(found, vae=replace(found.vae, name=expected.vae.name))
    if found.vae.digest != expected.vae.digest:
        return f"made by another VAE than the rest: {found.vae.digest[:_BRIEF]}, not {expected.vae.digest[:_BRIEF]}"
    differing = [name for name in CacheSettings.__dataclass_fields__ if getattr(found, name) != getattr(expected, name)]
    return f"made with other settings than the rest: {', '.join(differing)}" if differing else None


def _common_settings(manifest: Manifest) -> CacheSettings | None:
    """The settings of the most files; the first of those that tie."""
    counts = Counter(index for file in manifest.files for index in file.settings)
    if not counts:
        return manifest.settings[0] if manifest.settings else None
    return manifest.settings[max(sorted(counts), key=lambda index: counts[index])]


def _format_of(out: Path) -> str:
    """The format of a folder without a manifest, by the files that lie in it."""
    for format in CACHE_FORMATS:
        if out.is_dir() and next(_readable(out, format), None) is not None:
            return format
    what = "no such folder" if not out.exists() else "a file" if out.is_file() else "no latents in it"
    raise LatentFileError(f"{out}: no latent cache ({what}); expected a folder that `sdvae encode` wrote")


def _readable(out: Path, format: str) -> Iterator[LatentHeader]:
    for path in find_cache_files(out, format):
        try:
            yield from read_headers(path, format)
        except (LatentFileError, ConfigError):
            continue


def _first_settings(out: Path, format: str) -> CacheSettings | None:
    header = next(_readable(out, format), None)
    return None if header is None else CacheSettings.of(header)


# ------------------------------------------------------------------------------------------------------ image by image


def _image_folder(images: str | Path | None) -> Path | None:
    if images is None:
        return None
    root = Path(images).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{images}: expected the folder of images that was encoded")
    return root


def _open_vae(vae: VaeRef, root: Path | None, settings: CacheSettings | None, device: str) -> LoadedVae | None:
    """The VAE to compare with; None where nothing asks for one."""
    if vae is None and root is None:
        return None
    if settings is None:
        raise LatentFileError("the cache does not say which VAE made it, for it holds no latent that can be read")
    options = EncodeOptions(device=device, dtype=settings.vae.dtype)
    if vae is not None:
        return open_vae(vae, options)
    record = settings.vae
    try:
        loaded = open_vae(record.name, options)
    except (MissingWeightsError, ConfigError) as error:
        raise ConfigError(
            f"the VAE '{record.name}' ({record.digest[:_BRIEF]}) that made the cache is not found from here: give it "
            "with --vae"
        ) from error
    if loaded.record.digest != record.digest:
        raise CheckpointError(
            f"'{record.name}' is no longer the VAE that made the cache ({record.digest[:_BRIEF]}, now "
            f"{loaded.record.digest[:_BRIEF]}): give the right one with --vae"
        )
    return loaded


def encode_again(path: Path, header: LatentHeader, loaded: LoadedVae) -> DiagonalGaussian:
    """The posterior of an image, prepared as a latent's header says; (1, C, h, w), float32, on the CPU.

    Raises: ImageError.
    """
    done = header.preprocessing
    options = EncodeOptions(
        size=done.size,
        crop=done.crop,
        background=done.background,
        max_pixels=max(1, header.source.width * header.source.height),  # it was accepted once
    )
    pixels = read_pixels(path, options).pixels
    x, _ = pad_to_multiple(image_to_x(pixels), loaded.record.spatial_compression_ratio)
    batch = x[None].to(loaded.device, loaded.dtype).to(memory_format=loaded.memory_format)  # (1, 3, H, W)
    with torch.inference_mode():
        moments = loaded.model.encode(batch).latent_dist.parameters
    return DiagonalGaussian(moments.float().cpu())


def _compare(item: _Item, posterior: DiagonalGaussian) -> Reencoding | str:
    """The latent in the file beside the posterior of its image; a reason where they cannot be compared."""
    header = item.header
    if header.store == "moments":
        expected = {"mean": posterior.mean, "logvar": posterior.logvar}
    elif header.store == "mode":
        expected = {"z": posterior.mode()}
    else:
        expected = {"z": posterior.sample(image_generator(header.seed or 0, header.source.key))}
    if found := next((t.shape for name, t in item.tensors.items() if t.shape != expected[name].shape[1:]), None):
        return f"its image gives the shape {tuple(posterior.mean.shape[1:])}, the file has {tuple(found)}"
    if not all(tensor.isfinite().all() for tensor in expected.values()):
        return f"its image gives values that are not finite in {header.vae.dtype} on this device"
    z_std = (posterior.mean.var(correction=0) + posterior.var.mean()).sqrt()
    worst = (-1.0, 0.0)
    for name, tensor in item.tensors.items():
        reference = expected[name][0]
        # logvar may be the same everywhere, so its own spread alone is no measure
        unit = reference.std(correction=0).clamp(min=1.0) if name == "logvar" else z_std
        rounding = _ROUNDING[header.latent_dtype] * reference.abs().max()
        difference = ((tensor.float() - reference).abs().max() / unit).item()
        tolerance = COMPUTE_TOLERANCES[header.vae.dtype] + (rounding / unit).item()
        worst = max(worst, (difference, tolerance), key=lambda pair: pair[0] / max(pair[1], 1e-12))
    return Reencoding(file=item.file, key=header.source.key, difference=worst[0], tolerance=worst[1])


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
