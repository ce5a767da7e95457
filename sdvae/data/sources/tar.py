"""Images in tar files on disk, such as the shards of webdataset, as `find.find_images` gives those in folders.

An image is found by where it lies in its tar, so that any of them can be read at any time, in any process. Training
reads tars in order instead, also from behind URLs (shards.py). Standard library only.
"""

from __future__ import annotations

import glob
import os
import tarfile
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from sdvae.data.sources.files import IMAGE_SUFFIXES, FileBytes, ImageFile, os_reason
from sdvae.errors import ConfigError, ImageError

__all__ = ["TAR_SUFFIX", "TarMember", "find_in_tars", "is_tar"]

TAR_SUFFIX = ".tar"


@dataclass(frozen=True)
class TarMember:
    """Where a file lies in an uncompressed tar (`files.Member`)."""

    tar: Path
    offset: int  # bytes
    size_bytes: int

    def has_stamp(self, size_bytes: int, mtime_ns: int) -> bool:
        return (self.size_bytes, self.tar.stat().st_mtime_ns) == (size_bytes, mtime_ns)

    def read(self, name: str) -> FileBytes:
        try:
            mtime_ns = self.tar.stat().st_mtime_ns
        except OSError as error:
            raise ImageError(f"{name}: {os_reason(error)}") from error
        return FileBytes(data=self.content(name), size_bytes=self.size_bytes, mtime_ns=mtime_ns)

    def content(self, name: str) -> bytes:
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size_bytes)
        except OSError as error:
            raise ImageError(f"{name}: {os_reason(error)}") from error
        if len(data) < self.size_bytes:
            raise ImageError(f"{name}: the tar is shorter than it was when it was listed")
        return data

    def absolute(self) -> TarMember:
        return replace(self, tar=self.tar.absolute())


def is_tar(path: Path) -> bool:
    """Whether a path is a tar file, or a glob of tar files."""
    return path.suffix.lower() == TAR_SUFFIX and (os.path.isfile(path) or glob.has_magic(str(path)))


def find_in_tars(path: Path) -> list[ImageFile]:
    """The images in a tar file, in all that match a glob, or in those of a folder.

    The key of an image is the path of its tar below the folder or the fixed part of the glob, then its name in the tar:
    000012.tar/cat.jpg. Returns: sorted by key.
    Raises: ConfigError where nothing is found, a tar is cut off or compressed, or a name leads out of it.
    """
    if os.path.isdir(path):
        root, found = path, [tar for tar in path.rglob(f"*{TAR_SUFFIX}") if tar.is_file()]
    elif os.path.isfile(path):
        root, found = path.parent, [path]
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    tars = {tar.relative_to(root).as_posix(): tar for tar in found}
    images = [image for name, tar in tars.items() if not name.startswith(".") for image in _images_of(tar, name)]
    if not images:
        raise ConfigError(f"{path}: no image found in {len(tars)} tar files")
    return sorted(images, key=lambda image: image.key)


def _images_of(tar_path: Path, name: str) -> list[ImageFile]:
    """The images of one tar; of two with the same name the later one, as where it is unpacked."""
    images = {}
    try:
        _check_end(tar_path)
        with tarfile.open(tar_path, "r:") as tar:
            for entry in tar:
                inner = PurePosixPath(entry.name)
                if not entry.isreg() or inner.suffix.lower() not in IMAGE_SUFFIXES or inner.name.startswith("."):
                    continue
                if inner.is_absolute() or ".." in inner.parts:
                    raise ConfigError(f"{tar_path}: holds {entry.name!r}, a name that leads out of it")
                member = TarMember(tar_path, entry.offset_data, entry.size)
                images[inner] = ImageFile(f"{name}/{inner}", tar_path / inner, member)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(
            f"{tar_path}: cannot be read as an uncompressed tar ({error}): fetch or pack it again, or move it away"
        ) from error
    return list(images.values())


def _check_end(path: Path) -> None:
    """A tar that was cut off between two members passes for a shorter one, but for its missing end mark."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
        if size < 2 * tarfile.BLOCKSIZE or any(file.read()):
            raise tarfile.ReadError("cut off: it has no end mark")
