"""What `encode` and `decode` do once their run is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.output import print_json, print_plan, print_report, progress

if TYPE_CHECKING:
    from sdvae.codec.launched import Launched
    from sdvae.codec.run import DecodeRun, EncodeRun

__all__ = ["plan_or_run"]


def plan_or_run(
    ctx: click.Context, run: EncodeRun | DecodeRun, launched: Launched, dry_run: bool, as_json: bool
) -> None:
    """Print the plan, or carry it out and print the report; ends the command with the exit code of either.

    Of several processes the main one prints for all, and ends with the exit code of all.
    """
    from sdvae.codec.merging import join_reports
    from sdvae.codec.plan import Plan

    command = ctx.info_name or ""
    if dry_run:
        plans = launched.gather(run.plan)
        if not launched.is_main:
            ctx.exit(0)
        plan = Plan.joined(plans)
        if as_json:
            print_json({"command": command, "dry_run": True, **plan.to_json()})
        else:
            print_plan(plan, command)
        ctx.exit(plan.exit_code)
    with progress(command) as on_progress:
        part = run.run(on_progress if launched.is_main else None)
    reports = launched.gather(part)
    if not launched.is_main:
        ctx.exit(0)
    report = join_reports(reports) if launched.count > 1 else part
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    ctx.exit(report.exit_code)
