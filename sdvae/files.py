"""Whole files or none: atomic writing, and removal of what a killed run left behind. Standard library only."""

from __future__ import annotations

import os
import platform
import re
import secrets
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

__all__ = ["remove_leftovers", "write_atomic"]

# .<output>-<host>-<process>-<start of the process>.sdvae-tmp: hidden, of fixed length (so that long names still fit),
# and enough to tell whether its writer is still alive.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})\.sdvae-tmp")
_START = secrets.token_hex(4)  # tells this process from an earlier one that had the same number
_ABANDONED_AFTER_S = 24 * 3600  # no write takes a day; for writers on other hosts that cannot be asked


def write_atomic(data: bytes, path: Path) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old content or the new one, never a part.

    The folder is made where missing. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{_short(path.name, 16)}-{_host()}-{os.getpid()}-{_START}.sdvae-tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folders: Iterable[Path]) -> int:
    """Delete the temporary files of writers that are gone, in these folders (not below them).

    Returns: how many were deleted. Files of a run that goes on at the same time are left alone.
    """
    count = 0
    for folder in folders:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            leftovers = [entry.path for entry in entries if _is_leftover(entry)]
        for path in leftovers:
            Path(path).unlink(missing_ok=True)
            count += 1
    return count


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    if (match := _TEMPORARY.fullmatch(entry.name)) is None:
        return False
    host, process, start = match[1], int(match[2]), match[3]
    if host == _host() and os.name != "nt":  # on Windows, asking a process by signal would end it
        return start != _START if process == os.getpid() else not _is_alive(process)
    try:
        return time.time() - entry.stat().st_mtime > _ABANDONED_AFTER_S
    except FileNotFoundError:  # its writer was just done
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to someone else
        return True
    return True


def _host() -> str:
    return _short(platform.node(), 8)


def _short(text: str, length: int) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]
