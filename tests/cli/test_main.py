"""The frame of the command line: light help, exit codes, messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sdvae._version import __version__
from sdvae.cli import main as cli_main
from sdvae.cli.main import cli
from sdvae.errors import ConfigError, ImageError

ROOT = Path(__file__).parents[2]


def test_help_of_every_command_comes_without_torch_and_ends_with_two_examples() -> None:
    script = """
import sys
from click.testing import CliRunner
from sdvae.cli.main import _COMMANDS, cli
for arguments in ([], *([name] for name in _COMMANDS)):
    result = CliRunner().invoke(cli, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    lines = result.output.rstrip().splitlines()
    assert lines[-3].strip() == "Examples:", lines[-3:]
    assert all(line.strip().startswith("sdvae ") for line in lines[-2:]), lines[-2:]
heavy = {"torch", "diffusers", "numpy", "PIL", "safetensors", "transformers"} & set(sys.modules)
assert not heavy, heavy
print("light")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (result.stdout, result.stderr) == ("light\n", "")


def test_python_dash_m_is_the_command_and_reports_wrong_usage_with_2() -> None:
    command = [sys.executable, "-m", "sdvae"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert (version.returncode, version.stdout) == (0, f"sdvae, version {__version__}\n")
    wrong = subprocess.run([*command, "encode", "--stor", "mode"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and "--store" in wrong.stderr


def test_an_unknown_command_is_wrong_usage() -> None:
    result = CliRunner().invoke(cli, ["enkode"])
    assert result.exit_code == 2 and "enkode" in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (ConfigError("size is 0"), 2, "Error: size is 0\n"),
        (ImageError("a.png: truncated"), 1, "Error: a.png: truncated\n"),
        (PermissionError(13, "Permission denied", "out"), 1, "Error: [Errno 13] Permission denied: 'out'\n"),
        (KeyboardInterrupt(), 130, "Interrupted. What is written is whole; the same command continues.\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, exit_code: int, message: str
) -> None:
    result = CliRunner().invoke(_failing(monkeypatch, error), ["encode"])
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, message, "")


def test_an_unexpected_error_is_called_a_bug_and_shows_its_traceback_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = _failing(monkeypatch, ZeroDivisionError("division by zero"))
    result = CliRunner().invoke(group, ["encode"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ZeroDivisionError: division by zero\nThis is a bug in sdvae")
    assert "Traceback" not in result.stderr
    result = CliRunner(env={"SDVAE_DEBUG": "1"}).invoke(group, ["encode"])
    assert "Traceback" in result.stderr and "in fail" in result.stderr


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> click.Group:
    """The real group, with a command that raises."""

    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli_main.CommandGroup, "get_command", lambda self, ctx, name: fail)
    return cli
