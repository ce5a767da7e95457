"""An image file: its bytes, read once, its digest, and what to say when it cannot be read.

Standard library only. Which files there are is found in `find`; what is in a picture, in `images`.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdvae.errors import ImageError

__all__ = [
    "FileBytes",
    "FileReason",
    "IMAGE_SUFFIXES",
    "ImageFile",
    "Member",
    "file_digest",
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
