"""What commands that run a VAE do alike: say which one serves; and of `encode` and `decode`, all that they do."""

from __future__ import annotations

import click

from sdvae.cli.output import note, print_json, print_plan, print_report, progress
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.processes import is_main_process

__all__ = ["announce_vae", "plan_or_run"]


def plan_or_run(
    ctx: click.Context,
    inputs: str,
    out: str,
    vae: str | None,
    options: EncodeOptions | DecodeOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print the plan, or carry it out and print the report; ends the command with the exit code of either.

    Of several processes the main one prints for all, and ends with the exit code of all.
    """
    announce_vae(vae)
    from sdvae.codec.run import DecodeRun, EncodeRun

    command = ctx.info_name or ""
    run: EncodeRun | DecodeRun
    if isinstance(options, EncodeOptions):
        run = EncodeRun(inputs, out, vae, options)
    else:
        run = DecodeRun(inputs, out, vae, options)
    if dry_run:
        plan = run.plan_of_all()
        if run.processes.is_main and as_json:
            print_json({"command": command, "dry_run": True, **plan.to_json()})
        elif run.processes.is_main:
            print_plan(plan, command)
        exit_code = plan.exit_code
    else:
        with progress(command) as on_progress:
            report = run.run(on_progress)
        if run.processes.is_main and as_json:
            print_json(report.to_json())
        elif run.processes.is_main:
            print_report(report)
        exit_code = report.exit_code
    ctx.exit(exit_code if run.processes.is_main else 0)


def announce_vae(vae: str | None) -> None:
    """Say on stderr which VAE serves where none was given; of several processes one says it."""
    if vae is None and is_main_process():
        from sdvae.checkpoints.read import BUNDLED_NAME

        note(f"No --vae given: using the bundled {BUNDLED_NAME}.")
