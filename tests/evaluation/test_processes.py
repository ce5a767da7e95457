"""One process needs no launcher. Several are tested with whole evaluations, in test_runner.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sdvae.errors import ConfigError
from sdvae.evaluation.processes import Processes, join_processes


@pytest.mark.parametrize("world_size", [None, "1"])
def test_alone_a_process_is_the_main_one_and_waits_for_nobody(
    world_size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import of it fails now
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("RANK", "0")
    alone = join_processes("cpu")
    assert alone == Processes(0, 1, torch.device("cpu")) and alone.is_main
    alone.wait()


def test_only_the_first_process_is_the_main_one() -> None:
    assert [Processes(rank, 3, torch.device("cpu")).is_main for rank in range(3)] == [True, False, False]


def test_a_device_that_is_not_there_is_refused() -> None:
    missing = next(name for name, there in (("mps", torch.backends.mps.is_available()), ("cuda", False)) if not there)
    with pytest.raises(ConfigError, match=f"device '{missing}' is not available"):
        join_processes(missing)


@pytest.mark.slow
def test_a_launcher_with_several_processes_is_joined() -> None:
    code = (
        "from sdvae.evaluation.processes import join_processes\n"
        "found = join_processes('cpu')\n"
        "found.wait()\n"
        "print(f'{found.rank} of {found.count} on {found.device.type}\\n', end='', flush=True)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    found = subprocess.run([*launcher, sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert sorted(found.stdout.split("\n"))[-2:] == ["0 of 2 on cpu", "1 of 2 on cpu"]
