"""One process needs no launcher; several meet, wait for each other for as long as it takes, and share their results."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_launched
from jobs import meet_twice

from sdvae.errors import ConfigError
from sdvae.processes import Processes, is_main_process, join_processes


@pytest.mark.parametrize("world_size", [None, "1"])
def test_alone_a_process_is_the_main_one_and_waits_for_nobody(
    world_size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("RANK", "0")
    alone = join_processes("cpu")
    assert alone == Processes(0, 1) and alone.is_main and is_main_process()
    with alone.main_first():
        pass
    assert alone.gather("mine") == ["mine"]


def test_only_the_first_process_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Processes(rank, 3).is_main for rank in range(3)] == [True, False, False]
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


def test_processes_meet_more_than_once_and_each_has_the_results_of_all(tmp_path: Path) -> None:
    for rank, process in enumerate(fork_launched(meet_twice, count=2, folder=tmp_path)):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert output == f"{rank} 2 ['from 0', 'from 1']\n" * 2


def test_a_process_waits_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **arguments: seen.update(arguments))
    join_processes("cpu")
    assert seen["timeout"] > timedelta(days=7) and seen["backend"] == "gloo"


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but the processes do not find each other.*MASTER_ADDR"):
        join_processes("cpu")
