"""What `encode` and `decode` do once their run is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.output import print_json, print_plan, print_report, progress

if TYPE_CHECKING:
    from sdvae.codec.run import DecodeRun, EncodeRun

__all__ = ["plan_or_run"]


def plan_or_run(ctx: click.Context, run: EncodeRun | DecodeRun, dry_run: bool, as_json: bool) -> None:
    """Print the plan, or carry it out and print the report; ends the command with the exit code of either."""
    command = ctx.info_name or ""
    if dry_run:
        if as_json:
            print_json({"command": command, "dry_run": True, **run.plan.to_json()})
        else:
            print_plan(run.plan, command)
        ctx.exit(run.plan.exit_code)
    with progress(command) as on_progress:
        report = run.run(on_progress)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    ctx.exit(report.exit_code)
