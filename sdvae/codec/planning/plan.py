"""Decides what a run has to do: files and options in, a list of jobs, skips and refusals with reasons out. No torch.

`run.py` carries a plan out and `--dry-run` prints it. Nothing is written here.
"""

from __future__ import annotations

import glob
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sdvae.codec.decoded_image import ImageMark, read_mark
from sdvae.codec.options import IMAGE_FORMATS, DecodeOptions, EncodeOptions, RunOptions
from sdvae.data.images import EncodedImage
from sdvae.data.sources.files import IMAGE_SUFFIXES, ImageFile, Member, reason_without_path
from sdvae.errors import ConfigError, ImageError, LatentFileError
from sdvae.latents import kohya
from sdvae.latents.header import LATENT_SUFFIX, LatentHeader, Preprocessing, VaeRecord, read_header
from sdvae.latents.parts import WHOLE, Part
from sdvae.latents.registry import FORMATS, check_output_folder, part_of_shard

__all__ = ["Item", "LatentSource", "Plan", "find_latents", "plan_decode", "plan_encode", "why_no_bucket"]

UP_TO_DATE = "up to date"
OTHER_VAE = "made by another VAE"


Action = Literal["run", "skip", "fail"]


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


@dataclass(frozen=True)
class LatentSource:
    """A latent file; `key` is its path below the input folder without ".safetensors"."""

    key: str
    path: Path


def plan_encode(
    images: Sequence[ImageFile], out: Path, options: EncodeOptions, preprocessing: Preprocessing, vae: VaeRecord
) -> Plan:
    """What to encode, and into which file; of a part of a run, its own images and no others.

    images: all, also for a part: two images may want one name, and which one has it must not depend on the part.
    Done is what has a latent that was made from the same bytes, by the same VAE, with the same options.
    Raises: ConfigError where `out` is no folder, holds latents of another format, or other shards of the same one.
    """
    check_output_folder(out, options.format, options.overwrite)

    def why_other(header: LatentHeader, key: str) -> str | None:
        return _why_settings_differ(header, key, options, preprocessing, vae)

    def why_stale(header: LatentHeader, image: ImageFile) -> str | None:
        return why_other(header, image.key) or _why_source_differs(header, image)

    if FORMATS[options.format].is_sharded:
        shards = _read_shards(out, options.format, options.part)
        _check_others(shards, images, out, why_other)
        return _plan_shards(images, out, shards, options, why_stale)
    if options.format == "kohya-npz":
        return _plan_kohya(images, out, options, why_stale)
    return _plan_latent_files(images, out, options, why_stale)


def _item(image: ImageFile, output: Path, action: Action, reason: str) -> Item:
    return Item(key=image.key, path=image.path, output=output, action=action, reason=reason, member=image.member)


WhyStale = Callable[[LatentHeader, ImageFile], str | None]


def _plan_latent_files(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Plan:
    """The output of photos/a.jpg is a.jpg.safetensors, so that a.png beside it has its own."""

    def owner(name: str) -> str | None:
        header = _header_or_error(out / name)
        return header.source.key if isinstance(header, LatentHeader) else None

    own = _own_keys([image.key for image in images], options)
    names = _choose_names(_with_rivals([image.key for image in images], own, _latent_names), _latent_names, owner)
    items = []
    for image in (image for image in images if image.key in own):
        output = out / names[image.key]
        found = _header_or_error(output)
        stale = why_stale(found, image) if isinstance(found, LatentHeader) else None
        action, reason = _decide(output, isinstance(found, LatentHeader), stale, options.overwrite, "latent file")
        items.append(_item(image, output, action, reason))
    return Plan(items=tuple(items))


def _plan_kohya(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Plan:
    keys = [image.key for image in images]
    own = _own_keys(keys, options)
    looked_at = set(_with_rivals(keys, own, lambda key: (str(PurePosixPath(key).with_suffix("")),)))
    items = _kohya_items([image for image in images if image.key in looked_at], out, options, why_stale)
    return Plan(items=tuple(item for item in items if item.key in own))


def _kohya_items(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Iterator[Item]:
    """The name has the stem and the size of the image, as kohya's trainers look for it; only one image can have it."""
    owners: dict[str, str] = {}
    for image in images:

        def item(output: Path, action: Action, reason: str, image: ImageFile = image) -> Item:
            return _item(image, output, action, reason)

        try:
            size = EncodedImage(str(image.path), image.content()).size()
        except ImageError as error:
            yield item(out / image.key, "fail", reason_without_path(error, image.path))
            continue
        name = kohya.file_name(image.key, size, options.trainer_suffix)
        output, older = out / name, out / PurePosixPath(image.key).with_suffix(".npz")
        if reason := why_no_bucket(*_encoded_size(*size, options)):
            yield item(output, "fail", reason)
        elif (owner := owners.setdefault(_folded(name), image.key)) != image.key:
            yield item(output, "fail", f"kohya's trainers would take the latents of {owner} for it: rename one of them")
        elif older.exists():
            yield item(output, "fail", f"{older} is there, which kohya's trainers would read instead: delete it")
        else:
            yield item(output, *_decide_kohya(output, image, options, why_stale))


def why_no_bucket(width: int, height: int) -> str | None:
    """Why kohya's trainers cannot take an image that is encoded at this size, px; None where they can."""
    if width % kohya.RATIO == height % kohya.RATIO == 0:
        return None
    return (
        f"would be encoded at {width} x {height} px, but kohya's buckets are multiples of {kohya.RATIO} px: give "
        "--size and --crop center, or prepare the images in the buckets' sizes"
    )


def _encoded_size(width: int, height: int, options: EncodeOptions) -> tuple[int, int]:
    """The size that an image of this size has after resizing and cropping; EXIF, which may swap both, is not read."""
    if options.size is None:
        return width, height
    if options.crop == "center":
        return options.size, options.size
    short, size = min(width, height), options.size
    return max(size, round(width * size / short)), max(size, round(height * size / short))  # as `resize_and_crop`


def _decide_kohya(output: Path, image: ImageFile, options: EncodeOptions, why_stale: WhyStale) -> tuple[Action, str]:
    try:
        found = kohya.read_header(output) if output.exists() else None
        stale = why_stale(found, image) if found else None
        if found and not stale and options.flip and not kohya.has_flipped(output):
            stale = "without the mirrored image"
    except LatentFileError:
        found, stale = None, None
    return _decide(output, found is not None, stale, options.overwrite, "latent file")


Shards = Mapping[Path, Sequence[LatentHeader]]


def _plan_shards(
    images: Sequence[ImageFile], out: Path, shards: Shards, options: EncodeOptions, why_stale: WhyStale
) -> Plan:
    """An image stays in the shard that has it; others fill the shards that have room, in order, and then new ones.

    Raises: ConfigError where a part would have to change a shard that is not its own.
    """
    held = {header.source.key: (path, header) for path, headers in shards.items() for header in headers}
    places = _free_places(out, shards, options)
    own = _own_keys([image.key for image in images], options)
    items = []
    for image in (image for image in images if image.key in own):
        output, header = held.get(image.key) or (next(places), None)
        stale = why_stale(header, image) if header else None
        new: tuple[Action, str] = ("run", "new")
        action, reason = _decide(output, True, stale, options.overwrite, "shard") if header else new
        if action == "run" and not _may_write(output, options):
            raise ConfigError(
                f"{image.key!r} is to be encoded again ({reason}), but it is in {output}, which part {options.shard} "
                "may not change: encode without --shard, with the parts of that time, or into another folder"
            )
        items.append(_item(image, output, action, reason))
    return Plan(items=tuple(items))


def _read_shards(out: Path, format: str, part: Part) -> dict[Path, list[LatentHeader]]:
    """The headers of all shards in a folder, without those that the other parts of a run may be writing now.

    Raises: ConfigError for a shard that cannot be read, or a key in two.
    """
    shards: dict[Path, list[LatentHeader]] = {}
    places: dict[str, Path] = {}
    for path in FORMATS[format].find_files(out):
        owner = part_of_shard(path)
        if owner != part and owner.count == part.count:
            continue
        try:
            shards[path] = FORMATS[format].read_headers(path)
        except LatentFileError as error:
            raise ConfigError(f"{error}; move it away, and the same command encodes its images again") from error
        for header in shards[path]:
            if (other := places.setdefault(header.source.key, path)) != path:
                raise ConfigError(f"{header.source.key!r} is in {other} and in {path}: delete one of them")
    return shards


def _check_others(
    shards: Shards, images: Sequence[ImageFile], out: Path, why_other: Callable[[LatentHeader, str], str | None]
) -> None:
    """Shards of one folder are read together, so they may not mix what different settings made.

    Raises: ConfigError where latents of images that are not given were made with other settings.
    """
    given = {image.key for image in images}
    for header in (header for headers in shards.values() for header in headers):
        key = header.source.key
        if key not in given and (reason := why_other(header, key)):
            raise ConfigError(
                f"{out} holds latents of images that are not given now, such as {key!r}, and with other settings "
                f"({reason}): encode into another folder, or give all images"
            )


def _free_places(out: Path, shards: Shards, options: EncodeOptions) -> Iterator[Path]:
    """Where new images go, one after the other."""
    for path, headers in shards.items():
        if _may_write(path, options):
            yield from [path] * (options.images_per_shard - len(headers))
    taken = {path.name for path in shards}
    for number in count():
        if (name := FORMATS[options.format].shard_name(number, options.part)) not in taken:
            yield from [out / name] * options.images_per_shard


def _may_write(shard: Path, options: EncodeOptions) -> bool:
    """A part writes its own shards only; the others may be written at the same time. The whole writes all."""
    return options.part in (WHOLE, part_of_shard(shard))


def plan_decode(latents: Sequence[LatentSource], out: Path, options: DecodeOptions, vae: VaeRecord) -> Plan:
    """What to decode; of a part of a run, its own latents.

    The output of a.jpg.safetensors is a.png, or a.jpg.png where another image has that name.

    Done is what has an output whose mark names the same latent, the same VAE and the same options.
    Raises: ConfigError where `out` is no folder; LatentFileError where every latent is of another VAE.
    """
    _check_folder(out)
    suffix = IMAGE_FORMATS[options.format]

    def owner(name: str) -> str | None:
        mark = read_mark(out / name)
        return None if mark is None else mark.key

    def candidates(key: str) -> Sequence[str]:
        return _image_names(key, suffix)

    own = _own_keys([latent.key for latent in latents], options)
    names = _choose_names(_with_rivals([latent.key for latent in latents], own, candidates), candidates, owner)
    items, refused = [], []
    for latent in (latent for latent in latents if latent.key in own):
        output = out / names[latent.key]
        header = _header_or_error(latent.path)
        if isinstance(header, LatentHeader):
            mark = read_mark(output)
            stale = None if mark is None else _why_image_is_stale(mark, mark_for(latent.key, header, options, vae))
            action, reason = _decide(output, mark is not None, stale, options.overwrite, "decoded image")
            if header.vae.digest != vae.digest and not options.allow_other_vae:
                action, reason = "fail", f"{OTHER_VAE}: '{header.vae.name}' ({_brief(header.vae.digest)})"
                refused.append(header)
        else:
            action, reason = "fail", reason_without_path(header, latent.path) if header else "the file is gone"
        items.append(Item(key=latent.key, path=latent.path, output=output, action=action, reason=reason))
    if refused and len(refused) == len(items):
        raise LatentFileError(
            f"these latents were made by the VAE '{refused[0].vae.name}' ({_brief(refused[0].vae.digest)}), but this "
            f"is '{vae.name}' ({_brief(vae.digest)}): give the right one with --vae, or decode all the same with "
            "--allow-other-vae (allow_other_vae=True)"
        )
    return Plan(items=tuple(items))


def mark_for(key: str, header: LatentHeader, options: DecodeOptions, vae: VaeRecord) -> ImageMark:
    """The mark of the image that this latent decodes to."""
    return ImageMark(
        key=key,
        latent_digest=header.latent_digest,
        vae_digest=vae.digest,
        dtype=vae.computation,
        quality=options.quality,
    )


def find_latents(spec: str | Path) -> list[LatentSource]:
    """The latent files that `spec` names: a folder (with all below it, hidden ones left out), one file, or a glob.

    Returns: sorted by key. Raises: ConfigError where nothing is found.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        root, paths = path, list(path.rglob("*" + LATENT_SUFFIX))
    elif path.is_file():
        return [LatentSource(path.name.removesuffix(LATENT_SUFFIX), path)]
    else:
        root = _fixed_part(path)
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]
        paths = [path for path in paths if path.suffix == LATENT_SUFFIX]
    found = []
    for path in paths:
        relative = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.append(LatentSource(relative.as_posix().removesuffix(LATENT_SUFFIX), path))
    if not found:
        raise ConfigError(
            f"{spec}: no latent files found; expected a folder, a file or a glob of *{LATENT_SUFFIX} files"
        )
    return sorted(found, key=lambda latent: latent.key)


def _decide(output: Path, is_ours: bool, stale: str | None, overwrite: bool, kind: str) -> tuple[Action, str]:
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


def _why_settings_differ(
    header: LatentHeader, key: str, options: EncodeOptions, preprocessing: Preprocessing, vae: VaeRecord
) -> str | None:
    if header.vae.digest != vae.digest:
        return f"{OTHER_VAE}: '{header.vae.name}'"
    if header.vae.computation != vae.computation:
        return f"computed in {header.vae.computation}"
    if (header.vae.latents_mean, header.vae.latents_std) != (vae.latents_mean, vae.latents_std):
        return "written without the VAE's latents_mean and latents_std"  # equal digests: by an sdvae that left them out
    if header.preprocessing.differs_for(header.source, preprocessing):
        return "other preprocessing"
    if header.store != options.store or header.latent_dtype != options.latent_dtype:
        return f"stored as {header.store} in {header.latent_dtype}"
    if options.draws and (header.seed, header.source.key) != (options.seed, key):
        return "sampled with another seed"
    return None


def _why_source_differs(header: LatentHeader, image: ImageFile) -> str | None:
    try:
        if image.has_stamp(header.source.size_bytes, header.source.mtime_ns):
            return None
        return None if image.digest() == header.source.digest else "the source changed"
    except (OSError, ImageError):
        return "the source cannot be read"  # the run then says why


def _why_image_is_stale(found: ImageMark, wanted: ImageMark) -> str | None:
    if found.latent_digest != wanted.latent_digest:
        return "the latent changed"
    if found.vae_digest != wanted.vae_digest:
        return "decoded by another VAE"
    if found.dtype != wanted.dtype:
        return f"computed in {found.dtype}"
    return None if found.quality == wanted.quality else "other quality"


def _header_or_error(path: Path) -> LatentHeader | LatentFileError | None:
    """The header; None where there is no file; the error where it is no latent file."""
    if not path.exists():
        return None
    try:
        return read_header(path)
    except LatentFileError as error:
        return error


def _own_keys(keys: Sequence[str], options: RunOptions) -> frozenset[str]:
    """Those that belong to this part of a run; all of the whole."""
    part = options.part
    return frozenset(keys if part == WHOLE else (key for key in keys if part.has(key)))


def _with_rivals(
    keys: Sequence[str], own: Collection[str], candidates: Callable[[str], Sequence[str]]
) -> Sequence[str]:
    """The keys that decide the names of `own`: these, and in turn all that share a candidate with one of them.

    So a part of a run gives the names that the whole would, and looks at few files of the other parts.
    """
    if len(own) == len(keys):
        return keys
    wanted_by: dict[str, list[str]] = {}
    for key in keys:
        for name in candidates(key):
            wanted_by.setdefault(_folded(name), []).append(key)
    found, waiting = set(own), list(own)
    while waiting:
        for name in candidates(waiting.pop()):
            rivals = [key for key in wanted_by[_folded(name)] if key not in found]
            found.update(rivals)
            waiting += rivals
    return [key for key in keys if key in found]


def _choose_names(
    keys: Sequence[str], candidates: Callable[[str], Sequence[str]], owner: Callable[[str], str | None]
) -> dict[str, str]:
    """An output name for each key, no two alike even where case or Unicode form do not count.

    A name on disk stays with the key that has it, so files that are added later never rename an output. After that
    the keys choose in their order, each the first of its candidates that is free.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        for name in candidates(key):
            if owner(name) == key and _folded(name) not in taken:
                names[key] = name
                taken.add(_folded(name))
                break
    for key in keys:
        if key not in names:
            free = [name for name in candidates(key) if _folded(name) not in taken and _may_have(key, owner(name))]
            names[key] = free[0] if free else candidates(key)[-1]
            taken.add(_folded(names[key]))
    return names


def _may_have(key: str, owner: str | None) -> bool:
    """Whether the output of `owner` is this key's too: the same file, seen from a higher or a lower folder."""
    return owner is None or owner == key or owner.endswith("/" + key) or key.endswith("/" + owner)


def _latent_names(key: str) -> tuple[str, ...]:
    path = PurePosixPath(key)
    return key + LATENT_SUFFIX, f"{path.with_suffix('')}~{_hash(key)}{path.suffix}{LATENT_SUFFIX}"


def _image_names(key: str, suffix: str) -> tuple[str, ...]:
    path = PurePosixPath(key)
    stem = str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else key
    return stem + suffix, key + suffix, f"{stem}~{_hash(key)}{suffix}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _hash(key: str) -> str:
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part of a glob that has a wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the output")


def _brief(digest: str) -> str:
    return digest[:19]  # sha256: and 12 digits
