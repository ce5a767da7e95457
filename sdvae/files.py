"""Whole files and folders or none: atomic writing and replacement, and removal of what a killed run left behind.

Knows names only: what is written, and what may be replaced, is the caller's to say. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from sdvae.errors import CheckpointError, OutputExistsError, some

__all__ = [
    "aside",
    "check_replaceable",
    "new_file",
    "new_folder",
    "put_in_place",
    "remove_leftovers",
    "write_atomic",
]

# .<random>-<host>-<process>-<start of the process>.sdvae-tmp: hidden, of fixed length (so that long names still fit),
# and enough to tell whether its writer is still alive.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})\.sdvae-tmp")
_START = secrets.token_hex(4)  # tells this process from an earlier one that had the same number
_ABANDONED_AFTER_S = 24 * 3600  # no write takes a day; for writers on other hosts that cannot be asked


# -------------------------------------------------------------------------------------------------------------- files


def write_atomic(data: bytes, path: Path) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old content or the new one, never a part.

    The folder is made where missing. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path for what writes files itself; the file takes the target's place when the block ends without error.

    The path has the target's name, in a hidden folder beside it. Killed at any moment, or left by an error, it leaves
    what was there before. Raises: CheckpointError if writing fails.
    """
    target = target.expanduser().resolve()
    with _fresh_folder(target) as folder:
        usual = folder.stat().st_mode & 0o666
        yield folder / target.name
        (folder / target.name).chmod(usual)  # safetensors makes files for the owner alone
        _sync(folder / target.name)
        os.replace(folder / target.name, target)


# ------------------------------------------------------------------------------------------------------------ folders


@contextmanager
def new_folder(target: Path, *, overwrite: bool, is_ours: Callable[[Path], str | None]) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which takes its place in one step when the block ends without error.

    Killed at any moment, or left by an error, it leaves what was there before. Links are followed: the folder that
    `target` points to is replaced. One process at a time may write to a path.
    overwrite: replace a folder that is not empty. is_ours: gets that folder; None, or a phrase that says why it must
    not be replaced, such as "holds more than a VAE: notes.txt".
    Raises: OutputExistsError if something is in the way; CheckpointError if writing fails.
    """
    target = target.expanduser().resolve()
    with _fresh_folder(target) as folder:
        _recover(target)
        check_replaceable(target, overwrite=overwrite, is_ours=is_ours)
        yield folder
        put_in_place(folder, target)


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside a target, which is gone afterwards with what is left in it."""
    fresh = _temporary_beside(target)
    try:
        remove_leftovers([target.parent])
        fresh.mkdir(parents=True)
        yield fresh
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be saved: {error}. What was there before is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange it holds the old folder


def check_replaceable(target: Path, *, overwrite: bool, is_ours: Callable[[Path], str | None]) -> None:
    """Raise OutputExistsError unless `new_folder` may write to `target`; for dry runs and early checks."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{target} is a file; the output is a folder: choose another path")
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in target.iterdir())
    if not names:
        return
    if not overwrite:
        raise OutputExistsError(
            f"{target} exists and holds {some(names)}; choose another path, or give --overwrite (overwrite=True)"
        )
    if reason := is_ours(target):
        raise OutputExistsError(f"{target} would be replaced whole, but {reason}; choose another path")


def put_in_place(fresh: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, so that files in it always belong together.

    Files that are replaced one by one leave, for a moment, new weights with an old config. So folders are swapped:
    - nothing at target, or an empty folder: one rename;
    - Linux, on most file systems: one exchange of the two names, so that target is whole at every moment;
    - elsewhere: the old one is renamed aside, then the new one in. Killed between the two, target is missing, but
      whole under its other name: loading finds it there (`aside`), and the next save moves it back (`_recover`).
    Afterwards `fresh` is gone, or holds what was there before. Raises: OSError.
    """
    _settle(fresh, target)
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        fresh.rename(target)
    elif not _exchange(fresh, target):
        target.rename(aside(target))
        try:
            fresh.rename(target)
        except BaseException:
            aside(target).rename(target)
            raise
        shutil.rmtree(aside(target), ignore_errors=True)
    _sync_folder(target.parent)


def aside(target: Path) -> Path:
    """Where the old folder lies, for a moment, on systems that cannot exchange two names."""
    return target.parent / f".{target.name}.replaced"


def _settle(fresh: Path, target: Path) -> None:
    """Bring everything to the disk, and make weights as readable as what they replace, or as any new file of this user.

    Links and hard links are left alone: what they lead to is someone else's as well, and on the disk already.
    """
    usual = fresh.stat().st_mode & 0o666
    for path in fresh.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            _sync_folder(path)
        elif path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            if path.suffix == ".safetensors":  # made for the owner alone; before version 0.8 for everyone
                old = target / path.relative_to(fresh)
                path.chmod(0o600 | usual & (old.stat().st_mode if old.is_file() else 0o666))
            _sync(path)
    _sync_folder(fresh)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows opens no folders
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # one that was copied may be read-only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step. False where the system or the file system cannot."""
    at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another libc; TypeError on Windows, where None names no library
        return False
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)


# ---------------------------------------------------------------------------------------------------------- leftovers


def _recover(target: Path) -> None:
    """Tidy up after a replacement that was killed between its two renames."""
    if aside(target).is_dir():
        if target.exists():
            shutil.rmtree(aside(target))
        else:
            aside(target).rename(target)


def remove_leftovers(folders: Iterable[Path]) -> int:
    """Delete the temporary files and folders of writers that are gone, in these folders (not below them).

    Returns: how many were deleted. Those of a run that goes on at the same time are left alone.
    """
    count = 0
    for folder in folders:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            leftovers = [Path(entry) for entry in entries if _is_leftover(entry)]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
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


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(8)}-{_host()}-{os.getpid()}-{_START}.sdvae-tmp")


def _host() -> str:
    return sha256(platform.node().encode("utf-8", "surrogateescape")).hexdigest()[:8]
