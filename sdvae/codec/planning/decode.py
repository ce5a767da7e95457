"""What to decode, and into which image. No torch."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from sdvae.codec.decoded_image import ImageMark, mark_for, read_mark
from sdvae.codec.options import IMAGE_FORMATS, DecodeOptions
from sdvae.codec.planning.names import choose_names, image_names, own_keys
from sdvae.codec.planning.plan import OTHER_VAE, Item, Plan, decide, header_or_error
from sdvae.data.sources.files import reason_without_path
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.header import LATENT_SUFFIX, LatentHeader, VaeRecord

__all__ = ["LatentSource", "find_latents", "plan_decode"]


@dataclass(frozen=True)
class LatentSource:
    """A latent file; `key` is its path below the input folder without ".safetensors"."""

    key: str
    path: Path


def plan_decode(latents: Sequence[LatentSource], out: Path, options: DecodeOptions, vae: VaeRecord) -> Plan:
    """What to decode; of a part of a run, its own latents.

    The output of a.jpg.safetensors is a.png, or a.jpg.png where another image has that name.

    Done is what has an output whose mark names the same latent, the same VAE and the same options.
    Raises: ConfigError where `out` is no folder; LatentFileError where every latent is of another VAE.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the output")
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
            wanted = mark_for(latent.key, header, vae, options.quality)
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
