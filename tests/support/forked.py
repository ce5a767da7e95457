"""Processes of their own for tests that kill, signal or launch, without the seconds that a fresh interpreter takes.

A server process, started once by the first test that needs it, has torch and sdvae imported; each process is forked
from it. The server never computes with torch: a child forked after a pass with several threads would hang.
What is not true to life: modules are imported already. One test per command starts a real interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Forked", "fork", "fork_launched", "fork_sdvae", "run_sdvae"]

_PRELOAD = ["sdvae.cli.main", "sdvae.training.loop", "sdvae.evaluation.runner", "sdvae.codec.run"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


@dataclass
class Forked:
    """A running process: what tests use of `subprocess.Popen`."""

    process: Any
    stdout_path: Path
    stderr_path: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code; minus the number of the signal that ended the process; None while it runs."""
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end. Returns: the exit code."""
        self.communicate(timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end. Returns: what was written to stdout and to stderr."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.stderr_path.read_text()}")
        return self.stdout_path.read_text(encoding="utf-8"), self.stderr_path.read_text(encoding="utf-8")


def fork(function: Callable[..., object], *args: object, folder: Path, env: Mapping[str, str] | None = None) -> Forked:
    """Call a function, which must be importable, in a process of its own; what it prints goes to files in `folder`."""
    number = time.monotonic_ns()
    stdout, stderr = folder / f"{number}.stdout", folder / f"{number}.stderr"
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(env or {})
    process = _context.Process(target=_run, args=(function, args, environment, os.getcwd(), str(stdout), str(stderr)))
    process.start()
    return Forked(process, stdout, stderr)


def fork_sdvae(
    *words: object, folder: Path, env: Mapping[str, str] | None = None, seconds_per_file: float = 0.0
) -> Forked:
    """The command sdvae. seconds_per_file: how much longer it takes to write each file, so that a test that has seen
    the first ones finds it at work, however busy the machine.
    """
    return fork(run_sdvae, [str(word) for word in words], seconds_per_file, folder=folder, env=env)


def fork_launched(
    function: Callable[..., object], *args: object, count: int, folder: Path, env: Mapping[str, str] | None = None
) -> list[Forked]:
    """Several processes that find each other as those of torchrun or `accelerate launch` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
    return [
        fork(function, *args, folder=folder, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(
    function: Callable[..., object], args: Sequence[object], env: Mapping[str, str], cwd: str, stdout: str, stderr: str
) -> None:
    os.environ.update(env)
    os.chdir(cwd)
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    function(*args)


def run_sdvae(words: Sequence[str], seconds_per_file: float = 0.0) -> None:
    """The command in this process, to be given to `fork_launched`."""
    if seconds_per_file:
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(seconds_per_file), fsync(file))[1]  # type: ignore[func-returns-value]
    from sdvae.cli.main import main

    sys.argv = ["sdvae", *words]
    main()
