"""What to encode for kohya's trainers, which look for a file by the stem and the size of its image. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.files import folded, own_keys, with_rivals
from sdvae.codec.planning.plan import Action, Item, Plan, WhyStale, decide, item_of
from sdvae.data.images import EncodedImage
from sdvae.data.sources.files import ImageFile, reason_without_path
from sdvae.errors import ImageError, LatentFileError
from sdvae.latents import kohya

__all__ = ["plan_kohya", "why_no_bucket"]


def plan_kohya(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Plan:
    """A plan of latents for kohya's trainers."""
    keys = [image.key for image in images]
    own = own_keys(keys, options)
    looked_at = set(with_rivals(keys, own, lambda key: (str(PurePosixPath(key).with_suffix("")),)))
    items = _kohya_items([image for image in images if image.key in looked_at], out, options, why_stale)
    return Plan(items=tuple(item for item in items if item.key in own))


def _kohya_items(images: Sequence[ImageFile], out: Path, options: EncodeOptions, why_stale: WhyStale) -> Iterator[Item]:
    """The name has the stem and the size of the image, as kohya's trainers look for it; only one image can have it."""
    owners: dict[str, str] = {}
    for image in images:

        def item(output: Path, action: Action, reason: str, image: ImageFile = image) -> Item:
            return item_of(image, output, action, reason)

        try:
            size = EncodedImage(str(image.path), image.content()).size()
        except ImageError as error:
            yield item(out / image.key, "fail", reason_without_path(error, image.path))
            continue
        name = kohya.file_name(image.key, size, options.trainer_suffix)
        output, older = out / name, out / PurePosixPath(image.key).with_suffix(".npz")
        if reason := why_no_bucket(*_encoded_size(*size, options)):
            yield item(output, "fail", reason)
        elif (owner := owners.setdefault(folded(name), image.key)) != image.key:
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
    return decide(output, found is not None, stale, options.overwrite, "latent file")
