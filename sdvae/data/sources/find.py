"""Which images a path names: files, members of tars, rows of datasets; and one of them by its key.

Nothing here opens a picture; `images.read_image` does. No torch: the command line lists and counts files without it.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdvae.data.sources.dataset_rows import TABLE_SUFFIXES, find_rows, is_table
from sdvae.data.sources.files import IMAGE_SUFFIXES, ImageFile, os_reason
from sdvae.data.sources.tar import TAR_SUFFIX, find_in_tars, is_tar
from sdvae.errors import ConfigError

__all__ = ["ImagesByKey", "choose_images", "find_images", "find_inputs"]


def find_inputs(
    images: str | Path, *, split: str | None = None, subset: str | None = None, image_column: str | None = None
) -> Sequence[ImageFile]:
    """The images that a path names.

    images: what `find_images`, `tar.find_in_tars` or `dataset_rows.find_rows` take; a folder that has images is taken
        for one of images, then one of tars, then one of parquet or arrow files.
    split, subset, image_column: of a dataset. Raises: ConfigError, also where they are given and it is none.
    """
    which = {"split": split, "subset": subset, "image_column": image_column}
    given = {name: value for name, value in which.items() if value is not None}
    if is_table(images):
        return find_rows(images, **given)
    path = Path(images).expanduser()
    try:
        found = find_in_tars(path) if is_tar(path) else _find_images_or_tars(path)
    except ConfigError:
        if not _has_files(path, TABLE_SUFFIXES):
            raise
        return find_rows(images, **given)
    if given:
        raise ConfigError(f"{' and '.join(given)} given, but {images} is not a dataset: leave out what is for datasets")
    return found


def _find_images_or_tars(path: Path) -> list[ImageFile]:
    try:
        return find_images(path)
    except ConfigError:
        if not _has_files(path, (TAR_SUFFIX,)):
            raise
        return find_in_tars(path)


def find_images(spec: str | Path) -> list[ImageFile]:
    """The images that `spec` names, sorted by key (by code point: the same on every file system).

    - A folder: every file in it and its subfolders whose suffix is known (IMAGE_SUFFIXES, in any case). Hidden files
      and folders are left out. Links are followed, but not to a folder that holds the link.
    - A file: itself, whatever its suffix.
    - A glob, where nothing has that very name: the files that match and have a known suffix, none of them hidden.
      `**` stands for any number of folders. Keys are relative to the part before the first wildcard.
    - A .txt list: one path a line, relative to the folder of the list; empty lines and lines that begin with # do not
      count. The key of a file outside that folder is its name, with -2, -3, ... where that is taken. A listed file
      need not exist: whoever reads it says so.

    Raises: ConfigError where nothing is found, or a folder cannot be listed.
    """
    path = Path(spec).expanduser()
    if os.path.isdir(path):  # not path.is_dir(), which raises where the way there is barred
        images = _matching(path, ("**", "*"))
        expected = f"files in it and its subfolders, hidden ones left out, that end in {_known_suffixes()}"
    elif path.suffix.lower() == ".txt" and os.path.isfile(path):
        images = _listed(path)
        expected = "one path a line"
    elif os.path.exists(path):
        return [ImageFile(path.name, path)]
    elif any(_is_wild(part) for part in path.parts):
        first = next(i for i, part in enumerate(path.parts) if _is_wild(part))
        images = _matching(Path(*path.parts[:first]), path.parts[first:])
        expected = f"files that match and end in {_known_suffixes()}"
    else:
        raise ConfigError(
            f"{path}: no such file or folder, or no permission to look; "
            "images are a folder, a file, a glob or a .txt list"
        )
    if not images:
        raise ConfigError(f"{path}: no image found; looked for {expected}")
    return sorted(images, key=lambda image: image.key)


def choose_images(files: Sequence[ImageFile], max_images: int | None) -> list[ImageFile]:
    """At most `max_images` of the files, evenly spaced, so that each subfolder keeps its share."""
    if max_images is None or max_images >= len(files):
        return list(files)
    return [files[index * len(files) // max_images] for index in range(max_images)]


class ImagesByKey:
    """Finds the images that `find_inputs` finds by their keys; a folder of images is not listed for it.

    Raises: ConfigError, for a folder only where it holds tars or a dataset.
    """

    def __init__(self, images: str | Path, **dataset: str | None) -> None:
        self.name = str(images)
        self._root = Path(images).expanduser()
        self._listed: dict[str, ImageFile] = {}
        if not self._root.is_dir() or any(dataset.values()) or _has_files(self._root, (TAR_SUFFIX, *TABLE_SUFFIXES)):
            self._listed = {image.key: image for image in find_inputs(images, **dataset)}

    def find(self, key: str) -> ImageFile | None:
        """The image with this key; None where there is none."""
        path = self._root / key
        return ImageFile(key, path) if path.is_file() else self._listed.get(key)


def _has_files(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether `folder` is one, and has such files in it."""
    return any(name.endswith(suffixes) for _, _, names in os.walk(folder) for name in names)


def _known_suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


def _is_wild(part: str) -> bool:
    return any(character in part for character in "*?[")


def _matching(root: Path, pattern: Sequence[str]) -> list[ImageFile]:
    """The image files below `root` whose relative path matches `pattern`, component by component."""
    depth = None if "**" in pattern else len(pattern)
    images = []
    for path in _walk(root, depth) if os.path.isdir(root) else ():
        relative = path.relative_to(root)
        if path.suffix.lower() in IMAGE_SUFFIXES and _matches(relative.parts, pattern):
            images.append(ImageFile(relative.as_posix(), path))
    return images


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _walk(folder: Path, depth: int | None, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All that is no folder, down to `depth` levels (None: all), hidden names left out.

    `above` holds device and inode of the folders on the way here: a link back to one of them is not followed.
    (glob.glob and os.walk follow such links until the system stops them, 40 rounds later.)
    """
    try:
        status = folder.stat()
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: this folder cannot be listed ({error.strerror})") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if not os.path.isdir(path):  # also false for a link that leads nowhere: that one is reported when it is read
            yield path
        elif depth is None or depth > 1:
            yield from _walk(path, None if depth is None else depth - 1, (*above, here))


def _listed(list_path: Path) -> list[ImageFile]:
    folder = list_path.parent
    try:
        # utf-8-sig: Windows editors begin a file with a byte order mark. surrogateescape: names need not be UTF-8.
        lines = list_path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ConfigError(f"{list_path}: {os_reason(error)}") from error
    names = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    root = Path(os.path.abspath(folder))
    by_place = {Path(os.path.abspath(folder / name)): folder / name for name in names}  # a file listed twice: once
    images: dict[str, ImageFile] = {}
    # Files inside the list's folder come first: their keys are fixed, the others make way.
    for place in sorted(by_place, key=lambda place: (not place.is_relative_to(root), place)):
        plain = place.relative_to(root) if place.is_relative_to(root) else Path(place.name)
        key, number = plain.as_posix(), 2
        while key in images:
            key, number = plain.with_stem(f"{plain.stem}-{number}").as_posix(), number + 1
        images[key] = ImageFile(key, by_place[place])
    return list(images.values())
