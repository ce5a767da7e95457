"""Whole files and folders or none, and no leftovers; that swaps of folders are whole is tested where VAEs are saved."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdvae import files
from sdvae.errors import CheckpointError
from sdvae.files import new_file, new_folder, remove_leftovers, write_atomic

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")


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
    (tmp_path / gone[0]).unlink()
    (tmp_path / gone[0]).mkdir()  # of a folder that was not finished
    (tmp_path / gone[0] / "a.bin").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / gone[2], (two_days_ago, two_days_ago))
    assert remove_leftovers([tmp_path, tmp_path / "missing"]) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)


def test_a_file_that_others_write_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"one", b"two"):
        with new_file(path) as fresh:
            assert fresh.name == path.name and fresh.parent.parent == path.parent
            fresh.write_bytes(content)
        assert path.read_bytes() == content
    with pytest.raises(KeyError), new_file(path) as fresh:
        fresh.write_bytes(b"half")
        raise KeyError
    with pytest.raises(CheckpointError, match="cannot be saved"), new_file(path):
        pass  # nothing was written
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"two"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
def test_new_weights_are_as_readable_as_any_new_file_and_nothing_else_is_made_so(tmp_path: Path) -> None:
    plain, private, target = tmp_path / "plain", tmp_path / "private.safetensors", tmp_path / "target"
    plain.touch()
    private.touch(0o600)
    with new_folder(target, overwrite=False, is_ours=lambda existing: None) as folder:
        save_file({"a": torch.zeros(2)}, folder / "new.safetensors")
        os.link(private, folder / "linked.safetensors")
        (folder / "pointed.safetensors").symlink_to(private)
        (folder / "secret.txt").touch(0o600)
    assert mode_of(target / "new.safetensors") == mode_of(plain)
    assert mode_of(private) == mode_of(target / "linked.safetensors") == mode_of(target / "secret.txt") == 0o600


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_weights_are_as_readable_as_those_that_they_replace(tmp_path: Path, mode: int) -> None:
    weights = tmp_path / "target" / "a.safetensors"
    weights.parent.mkdir()
    weights.touch(mode)
    with new_folder(weights.parent, overwrite=True, is_ours=lambda existing: None) as folder:
        save_file({"a": torch.zeros(2)}, folder / weights.name)
    assert weights.stat().st_size and mode_of(weights) == mode
