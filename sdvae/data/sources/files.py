"""Which image files a folder, a file name, a glob or a text list names, and the digests of files.

Standard library only: the command line lists and counts files before torch is loaded. Nothing here opens a picture;
`images.read_image` does.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdvae.errors import ConfigError, ImageError

__all__ = [
    "FileBytes",
    "FileReason",
    "IMAGE_SUFFIXES",
    "ImageFile",
    "Member",
    "choose_images",
    "file_digest",
    "find_images",
    "os_reason",
    "read_regular",
    "reason_without_path",
    "refuse_unless_file",
]

# Names that mean a picture. HEIC and JPEG XL are among them although Pillow alone reads neither: a picture that
# cannot be read is to be reported, not passed over in silence. Camera raw files are not: they lie beside the JPEG of
# the same photograph, and what Pillow finds in one is its thumbnail.
IMAGE_SUFFIXES: frozenset[str] = frozenset(
    ".apng .avif .bmp .dds .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg .jxl .mpo .pbm .pcx .pfm .pgm .png"
    " .pnm .ppm .qoi .rgb .sgi .tga .tif .tiff .webp".split()
)


@dataclass(frozen=True, kw_only=True, eq=False)
class FileBytes:
    """The bytes of a file, read once."""

    data: bytes
    size_bytes: int  # with mtime_ns: a quick sign that the file is unchanged, before its bytes are read again
    mtime_ns: int

    @property
    def digest(self) -> str:
        """As `file_digest`."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


class Member(Protocol):
    """Where an image lies in a larger file, such as a tar. Can be pickled and hashed."""

    def has_stamp(self, size_bytes: int, mtime_ns: int) -> bool:
        """Whether it seems unchanged since it had this stamp, without reading it. Raises: OSError."""
        ...

    def read(self, name: str) -> FileBytes:
        """The image file's bytes, read once. Raises: ImageError, which begins with `name`."""
        ...

    def content(self, name: str) -> Path | bytes:
        """The image file's bytes, or where they are. Raises: ImageError, which begins with `name`."""
        ...

    def absolute(self) -> Member:
        """The same one, for a process with another working directory."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image on disk. It may turn out to be unreadable: only its name has been looked at."""

    key: str  # posix path relative to the root of the search, with suffix; unique in its list
    path: Path  # where to open it; for lists and messages only where it is a member
    member: Member | None = None  # where it is part of a larger file

    def has_stamp(self, size_bytes: int, mtime_ns: int) -> bool:
        """Whether it seems unchanged since it was read and had this size and time. Raises: OSError, ImageError."""
        if self.member:
            return self.member.has_stamp(size_bytes, mtime_ns)
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) == (size_bytes, mtime_ns)

    def read(self) -> FileBytes:
        """Its bytes, with what tells them from others. Raises: ImageError."""
        if self.member:
            return self.member.read(str(self.path))
        try:
            status = self.path.stat()  # before the bytes: a change while they are read shows in the next run
        except OSError as error:
            raise ImageError(f"{self.path}: {os_reason(error)}") from error
        return FileBytes(data=read_regular(self.path), size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    def content(self) -> Path | bytes:
        """The file, or of a member its bytes. Raises: ImageError."""
        return self.member.content(str(self.path)) if self.member else self.path

    def digest(self) -> str:
        """Of its bytes, as `file_digest`. Raises: ImageError."""
        content = self.content()
        if isinstance(content, Path):
            return file_digest(content)
        return f"sha256:{hashlib.sha256(content).hexdigest()}"


def refuse_unless_file(path: Path) -> None:
    """Raises: ImageError for what is no regular file with something in it: a pipe would make open() wait for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path}: {os_reason(error)}") from error
    except ValueError as error:  # a zero character in the name
        raise ImageError(f"{path}: no such file") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path}: is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: is not a regular file")
    if status.st_size == 0:
        raise ImageError(f"{path}: is empty (0 bytes)")


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises: ImageError."""
    refuse_unless_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {os_reason(error)}") from error


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


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes: "sha256:" and 64 hexadecimal digits.

    Raises: ImageError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise ImageError(f"{path}: {os_reason(error)}") from error


def os_reason(error: OSError) -> str:
    """Why the operating system refused, in plain words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    if isinstance(error, PermissionError):
        return "permission denied"
    return f"cannot be read ({error.strerror or error})"


def reason_without_path(error: Exception, path: Path) -> str:
    """An error's message without the path before it, for lists that name the file anyway."""
    if isinstance(error, OSError):
        return os_reason(error)
    return (str(error) or type(error).__name__).removeprefix(f"{path}: ")


@dataclass(frozen=True, kw_only=True)
class FileReason:
    """Something to say about one input file."""

    key: str  # path below the input folder, with "/"
    source: str
    reason: str

    @classmethod
    def of(cls, key: str, path: Path, error: Exception | str) -> FileReason:
        """Why a file failed, or a note about it."""
        reason = error if isinstance(error, str) else reason_without_path(error, path)
        return cls(key=key, source=str(path), reason=reason)


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


def choose_images(files: Sequence[ImageFile], max_images: int | None) -> list[ImageFile]:
    """At most `max_images` of the files, evenly spaced, so that each subfolder keeps its share."""
    if max_images is None or max_images >= len(files):
        return list(files)
    return [files[index * len(files) // max_images] for index in range(max_images)]
