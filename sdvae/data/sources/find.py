"""Which images the argument of `encode` names: files, members of tars, rows of datasets; and one of them by its key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sdvae.data.sources.dataset_rows import TABLE_SUFFIXES, find_rows, is_table
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.tar import TAR_SUFFIX, find_images_or_tars
from sdvae.errors import ConfigError

__all__ = ["ImagesByKey", "find_inputs"]


def find_inputs(
    images: str | Path, *, split: str | None = None, subset: str | None = None, image_column: str | None = None
) -> Sequence[ImageFile]:
    """The images that a path names.

    images: what `sources.find_images`, `tar_images.find_images_or_tars` or `dataset_rows.find_rows` take; a folder that
        has images is taken for one of images, then one of tars, then one of parquet or arrow files.
    split, subset, image_column: of a dataset. Raises: ConfigError, also where they are given and it is none.
    """
    which = {"split": split, "subset": subset, "image_column": image_column}
    given = {name: value for name, value in which.items() if value is not None}
    if is_table(images):
        return find_rows(images, **given)
    try:
        found = find_images_or_tars(images)
    except ConfigError:
        if not _has_files(images, TABLE_SUFFIXES):
            raise
        return find_rows(images, **given)
    if given:
        raise ConfigError(f"{' and '.join(given)} given, but {images} is not a dataset: leave out what is for datasets")
    return found


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


def _has_files(folder: str | Path, suffixes: tuple[str, ...]) -> bool:
    """Whether `folder` is one, and has such files in it."""
    return any(name.endswith(suffixes) for _, _, names in os.walk(Path(folder).expanduser()) for name in names)
