"""Whole files or none, and no leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdvae import files
from sdvae.files import remove_leftovers, write_atomic


def temporary_name(process: int, host: str | None = None, start: str = "00000000") -> str:
    return f".{'a' * 16}-{host or files._host()}-{process}-{start}.sdvae-tmp"


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_atomic(b"old", path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="disk on fire"):
        write_atomic(b"new", path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_atomic(b"data", path)
    assert path.read_bytes() == b"data"


def test_leftovers_of_dead_writers_go_and_all_else_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [temporary_name(dead.pid), temporary_name(os.getpid()), temporary_name(1, host="12345678")]
    kept = [
        temporary_name(os.getppid()),  # another writer that is alive
        temporary_name(os.getpid(), start=files._START),  # this very process
        temporary_name(dead.pid, host="87654321"),  # another host, cannot be asked
        ".hidden.tmp",
        "photo.jpg.safetensors",
    ]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / gone[2], (two_days_ago, two_days_ago))
    assert remove_leftovers([tmp_path, tmp_path / "missing"]) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)
