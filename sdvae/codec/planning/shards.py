"""What to encode into which shard. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.files import own_keys
from sdvae.codec.planning.plan import Action, Plan, WhyStale, decide, item_of
from sdvae.data.sources.files import ImageFile
from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.header import LatentHeader
from sdvae.latents.parts import WHOLE, Part
from sdvae.latents.registry import FORMATS, part_of_shard

__all__ = ["plan_shards"]

Shards = Mapping[Path, Sequence[LatentHeader]]


def plan_shards(
    images: Sequence[ImageFile],
    out: Path,
    options: EncodeOptions,
    why_other: Callable[[LatentHeader, str], str | None],
    why_stale: WhyStale,
) -> Plan:
    """An image stays in the shard that has it; others fill the shards that have room, in order, and then new ones.

    why_other: why a latent was made with other settings. why_stale: the same, or why its image is another one.
    Raises: ConfigError where a shard cannot be read or does not go with the others, or a part would have to change one
    that is not its own.
    """
    shards = _read_shards(out, options.format, options.part)
    _check_others(shards, images, out, why_other)
    held = {header.source.key: (path, header) for path, headers in shards.items() for header in headers}
    places = _free_places(out, shards, options)
    own = own_keys([image.key for image in images], options)
    items = []
    for image in (image for image in images if image.key in own):
        output, header = held.get(image.key) or (next(places), None)
        stale = why_stale(header, image) if header else None
        new: tuple[Action, str] = ("run", "new")
        action, reason = decide(output, True, stale, options.overwrite, "shard") if header else new
        if action == "run" and not _may_write(output, options):
            raise ConfigError(
                f"{image.key!r} is to be encoded again ({reason}), but it is in {output}, which part {options.shard} "
                "may not change: encode without --shard, with the parts of that time, or into another folder"
            )
        items.append(item_of(image, output, action, reason))
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
