"""Plans with a file for each input: latent files of images, and images of latent files. No torch.

Names first: no two outputs have one name, and an input always has the same one.
"""

from __future__ import annotations

import glob
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path, PurePosixPath

from sdvae.codec.decoded_image import ImageMark, read_mark
from sdvae.codec.options import IMAGE_FORMATS, DecodeOptions, EncodeOptions, RunOptions
from sdvae.codec.planning.plan import OTHER_VAE, Item, Plan, WhyStale, decide, item_of
from sdvae.data.sources.files import IMAGE_SUFFIXES, ImageFile, reason_without_path
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.header import LATENT_SUFFIX, LatentHeader, VaeRecord, read_header
from sdvae.latents.parts import WHOLE

__all__ = [
    "LatentSource",
    "choose_names",
    "find_latents",
    "folded",
    "image_names",
    "latent_names",
    "own_keys",
    "plan_decode",
    "plan_latent_files",
    "with_rivals",
]


def plan_latent_files(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Plan:
    """A latent file for each image.

    Each file that is there is opened once, and only what the plan needs is kept of it: folders may be large.
    """
    own = own_keys([image.key for image in images], options)
    own_images = {image.key: image for image in images if image.key in own}
    owners: dict[str, str | None] = {}  # by name of a latent file: the key of its image; None: no file, or not ours
    stale: dict[str, str | None] = {}  # by name, of those that their own image may have

    def owner(name: str) -> str | None:
        if name not in owners:
            header = header_or_error(out / name)
            owners[name] = header.source.key if isinstance(header, LatentHeader) else None
            if isinstance(header, LatentHeader) and (image := own_images.get(header.source.key)):
                stale[name] = why_stale(header, image)
        return owners[name]

    names = choose_names([image.key for image in images], own, latent_names, owner)
    items = []
    for image in own_images.values():
        name, reason = names[image.key], None
        if is_ours := (owned_by := owner(name)) is not None:
            if owned_by == image.key:
                reason = stale[name]
            elif isinstance(header := header_or_error(out / name), LatentHeader):  # seen from another folder
                reason = why_stale(header, image)
        action, why = decide(out / name, is_ours, reason, options.overwrite, "latent file")
        items.append(item_of(image, out / name, action, why))
    return Plan(items=tuple(items))


@dataclass(frozen=True)
class LatentSource:
    """A latent file; `key` is its path below the input folder without ".safetensors"."""

    key: str
    path: Path


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


def plan_decode(latents: Sequence[LatentSource], out: Path, options: DecodeOptions, vae: VaeRecord) -> Plan:
    """What to decode; of a part of a run, its own latents.

    The output of a.jpg.safetensors is a.png, or a.jpg.png where another image has that name.

    Done is what has an output whose mark names the same latent, the same VAE and the same options.
    Raises: ConfigError where `out` is no folder; LatentFileError where every latent is of another VAE.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the output")
    marked = partial(ImageMark, vae_digest=vae.digest, dtype=vae.computation, quality=options.quality)
    candidates = partial(image_names, suffix=IMAGE_FORMATS[options.format])

    @cache
    def mark_of(name: str) -> ImageMark | None:
        return read_mark(out / name)

    def owner(name: str) -> str | None:
        mark = mark_of(name)
        return None if mark is None else mark.key

    own = own_keys([latent.key for latent in latents], options)
    names = choose_names([latent.key for latent in latents], own, candidates, owner)
    items, refused = [], []
    for latent in (latent for latent in latents if latent.key in own):
        output = out / names[latent.key]
        header = header_or_error(latent.path)
        if isinstance(header, LatentHeader):
            mark = mark_of(names[latent.key])
            wanted = marked(key=latent.key, latent_digest=header.latent_digest)
            stale = None if mark is None else _why_image_is_stale(mark, wanted)
            action, reason = decide(output, mark is not None, stale, options.overwrite, "decoded image")
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


def header_or_error(path: Path) -> LatentHeader | LatentFileError | None:
    """The header; None where there is no file; the error where it is no latent file."""
    if not path.exists():
        return None
    try:
        return read_header(path)
    except LatentFileError as error:
        return error


def _why_image_is_stale(found: ImageMark, wanted: ImageMark) -> str | None:
    if found.latent_digest != wanted.latent_digest:
        return "the latent changed"
    if found.vae_digest != wanted.vae_digest:
        return "decoded by another VAE"
    if found.dtype != wanted.dtype:
        return f"computed in {found.dtype}"
    return None if found.quality == wanted.quality else "other quality"


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part of a glob that has a wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _brief(digest: str) -> str:
    return digest[:19]  # sha256: and 12 digits


# --------------------------------------------------------------------------------------------------------------- names


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
