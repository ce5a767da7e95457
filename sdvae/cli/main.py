"""The command `sdvae`: finds subcommands when they are called, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 finished with some items failed, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import traceback
from types import FrameType
from typing import Any

import click

from sdvae._version import __version__
from sdvae.errors import SdvaeError

__all__ = ["cli", "main"]

INTERRUPTED = 130

# Each is a function <name>_command in a module <name>. Modules are imported when called or listed, and import
# torch inside the function alone, so that help comes at once.
_COMMANDS = (
    *("encode", "decode", "reconstruct", "inspect", "train", "calibrate", "evaluate", "report", "convert", "check"),
    *("fix-fp16", "verify", "merge", "card", "push"),
)


class CommandGroup(click.Group):
    """Imports subcommands late and reports what they raise."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"sdvae.cli.{module}"), f"{module}_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted. What is written is whole; the same command continues.", err=True)
            ctx.exit(INTERRUPTED)
        except SdvaeError as error:
            raise _message(str(error), error.exit_code) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: click ends quietly
                raise
            raise _message(str(error), 1) from error
        except Exception as error:
            hint = f"This is a bug in sdvae {__version__}; SDVAE_DEBUG=1 shows where."
            raise _message(f"{type(error).__name__}: {error}\n{hint}", 1) from error


class CommandError(click.ClickException):
    """An error message with an exit code of its own."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it for the class, and reads it here


def _message(text: str, exit_code: int) -> click.ClickException:
    """An exception that click prints as "Error: text" on stderr; with SDVAE_DEBUG=1 the traceback stands before it."""
    if os.environ.get("SDVAE_DEBUG") == "1":
        click.echo(traceback.format_exc(), err=True)
    return CommandError(text, exit_code)


@click.group(
    name="sdvae",
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  sdvae reconstruct
  sdvae encode photos latents""",
)
@click.version_option(__version__, prog_name="sdvae")
def cli() -> None:
    """Train, measure, export and use Stable-Diffusion-style image autoencoders (KL-VAEs)."""


def main() -> None:
    """Entry point of the console script: the group, with Ctrl-C under control."""
    signal.signal(signal.SIGINT, _interrupt)
    cli(prog_name="sdvae")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends the run cleanly; a second one at once, which loses nothing: outputs appear whole or not."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    raise KeyboardInterrupt
