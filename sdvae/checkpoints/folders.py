"""A folder that appears whole or not at all, and takes an older one's place in one step.

Knows folders and names only: what may be replaced is the caller's to say.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape as glob_escape
from pathlib import Path

from safetensors import SafetensorError

from sdvae.checkpoints.formats import some
from sdvae.errors import CheckpointError, OutputExistsError

__all__ = ["aside", "check_replaceable", "new_folder"]

_LEFTOVER_AGE_S = 3600  # no save takes this long: an unfinished one of this age was killed


@contextmanager
def new_folder(target: Path, *, overwrite: bool, is_ours: Callable[[Path], str | None]) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which takes its place in one step when the block ends without error.

    Killed at any moment, or left by an error, it leaves what was there before. Links are followed: the folder that
    `target` points to is replaced. One process at a time may write to a path.
    overwrite: replace a folder that is not empty. is_ours: gets that folder; None, or a phrase that says why it must
    not be replaced, such as "holds more than a VAE: notes.txt".
    Raises: OutputExistsError where something is in the way; CheckpointError where writing fails.
    """
    target = target.expanduser().resolve()
    fresh = target.parent / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"
    try:
        _recover(target)
        check_replaceable(target, overwrite=overwrite, is_ours=is_ours)
        fresh.mkdir(parents=True)
        yield fresh
        _settle(fresh, target)
        _swap_in(fresh, target)
    except (OSError, SafetensorError) as error:
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
            if path.suffix == ".safetensors":  # whose writer makes files for the owner alone
                old = target / path.relative_to(fresh)
                path.chmod(path.stat().st_mode | usual & (old.stat().st_mode if old.is_file() else 0o666))
            _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # one that was copied may be read-only
    _sync_folder(fresh)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows opens no folders
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(fresh: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, so that weights and config always belong together.

    Files that are replaced one by one leave, for a moment, new weights with an old config. So folders are swapped:
    - nothing at target, or an empty folder: one rename;
    - Linux, on most file systems: one exchange of the two names, so that target is whole at every moment;
    - elsewhere: the old one is renamed aside, then the new one in. Killed between the two, target is missing, but
      whole under its other name: loading finds it there (`aside`), and the next save moves it back (`_recover`).
    """
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


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step. False where the system or the file system cannot."""
    at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another libc; TypeError on Windows, where None names no library
        return False
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)


def _recover(target: Path) -> None:
    """Tidy up after saves to this path that were killed."""
    if not target.parent.is_dir():
        return
    if aside(target).is_dir():
        if target.exists():
            shutil.rmtree(aside(target))
        else:
            aside(target).rename(target)
    for entry in target.parent.glob(f".{glob_escape(target.name)}.saving-*"):
        if time.time() - entry.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(entry, ignore_errors=True)
