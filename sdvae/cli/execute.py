"""What `encode` and `decode` do once their run is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.output import print_json, print_plan, print_report, progress

if TYPE_CHECKING:
    from sdvae.codec.run import DecodeRun, EncodeRun

__all__ = ["plan_or_run"]


def plan_or_run(ctx: click.Context, run: EncodeRun | DecodeRun, dry_run: bool, as_json: bool) -> None:
    """Print the plan, or carry it out and print the report; ends the command with the exit code of either.

    Of several processes the main one prints for all, and ends with the exit code of all.
    """
    command = ctx.info_name or ""
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
