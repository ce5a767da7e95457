"""Modes of the files in a folder that was swapped in; that swaps are whole is tested where folders are saved."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdvae.checkpoints.folders import new_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_weights_are_as_readable_as_those_that_they_replace(tmp_path: Path, mode: int) -> None:
    weights = tmp_path / "target" / "a.safetensors"
    weights.parent.mkdir()
    weights.touch(mode)
    with new_folder(weights.parent, overwrite=True, is_ours=lambda existing: None) as folder:
        save_file({"a": torch.zeros(2)}, folder / weights.name)
    assert weights.stat().st_size and mode_of(weights) == mode
