"""What `encode` and `decode` do once their run is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.output import print_json, print_plan, print_report, progress

if TYPE_CHECKING:
    from sdvae.codec.run import DecodeRun, EncodeRun
    from sdvae.processes import Processes

__all__ = ["plan_or_run"]


def plan_or_run(
    ctx: click.Context, run: EncodeRun | DecodeRun, processes: Processes, dry_run: bool, as_json: bool
) -> None:
    """Print the plan, or carry it out and print the report; ends the command with the exit code of either.

    Of several processes the main one prints for all, and ends with the exit code of all.
    """
    from sdvae.codec.planning.plan import Plan
    from sdvae.codec.reports import join_reports

    command = ctx.info_name or ""
    if dry_run:
        plan = Plan.joined(processes.gather(run.plan))
        if not processes.is_main:
            ctx.exit(0)
        if as_json:
            print_json({"command": command, "dry_run": True, **plan.to_json()})
        else:
            print_plan(plan, command)
        ctx.exit(plan.exit_code)
    with progress(command) as on_progress:
        part = run.run(on_progress if processes.is_main else None)
    report = join_reports(processes.gather(part))
    if not processes.is_main:
        ctx.exit(0)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    ctx.exit(report.exit_code)
