"""The path of a command is counted as its docstring says."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "path.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("sdvae_tools_path", SCRIPT)
    assert spec and spec.loader
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_path_counts_first_entries_file_by_file(tool: ModuleType) -> None:
    run, read, decode = (tool.Function(f"{name}.py", name, 1) for name in ("run", "read", "decode"))
    helper, write = tool.Function("read.py", "helper", 9), tool.Function("run.py", "write", 9)
    calls = [
        tool.Call(None, run),
        tool.Call(run, read),
        tool.Call(read, helper),  # calls nothing: a detail
        tool.Call(read, decode),
        tool.Call(decode, helper),  # again
        tool.Call(run, read),
        tool.Call(run, write),
        tool.Call(write, read),
        tool.Call(helper, helper),  # itself is no other function
    ]
    assert tool.find_stops(calls) == [
        tool.Stop("run.py", ("run",), False),
        tool.Stop("read.py", ("read",), False),
        tool.Stop("decode.py", ("decode",), False),
        tool.Stop("run.py", ("write",), True),
    ]
    assert tool.count(calls) == tool.Counts(stops=4, files=3, returns=1, functions=5)

    assert tool.find_stops(calls, with_details=True)[1].functions == ("read", "helper")
    assert tool.find_stops([]) == [] and tool.count([]) == tool.Counts(0, 0, 0, 0)


def test_what_a_thread_does_counts_where_it_was_asked(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "network.py").write_text("def forward(): pass\n")
    (tmp_path / "steps.py").write_text("def read(): return [_detail() for _ in range(2)]\ndef _detail(): pass\n")
    (tmp_path / "command.py").write_text(
        "def command(pool, thread, steps, forward):\n"
        "    task = pool.submit(steps.read)\n"
        "    other = thread(target=last)\n"
        "    other.start()\n"
        "    forward()\n"
        "    write()\n"
        "    task.result(), other.join()\n"
        "def write(): (lambda: None)()\n"
        "def last(): pass\n"
    )
    command, steps, network = (load(tmp_path / name) for name in ("command.py", "steps.py", "model/network.py"))
    for kind, method in ((ThreadPoolExecutor, "submit"), (Thread, "start")):
        monkeypatch.setattr(kind, method, getattr(kind, method))  # put back after the test
    recorder = tool.Recorder(tmp_path)
    recorder.follow_threads()
    with ThreadPoolExecutor(1) as pool:
        recorder.follow(command.command)(pool, Thread, steps, network.forward)
    calls = list(tool.flatten(recorder.record))
    names = [(call.caller and call.caller.name, call.function.name) for call in calls]
    assert names == [
        (None, "command"),
        ("command", "read"),
        ("read", "_detail"),
        ("command", "last"),
        ("command", "write"),
    ]
    assert tool.count(calls) == tool.Counts(stops=2, files=2, returns=0, functions=5)


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
