"""`sdvae merge`: one manifest of those of the parts of a run."""

from __future__ import annotations

import click

from sdvae.cli.options import json_option
from sdvae.cli.output import print_json, shown

__all__ = ["merge_command"]


@click.command(
    name="merge",
    epilog="""\b
Examples:
  sdvae merge latents
  sdvae merge latents --json""",
)
@click.argument("out", type=click.Path())
@json_option
@click.pass_context
def merge_command(ctx: click.Context, /, out: str, as_json: bool) -> None:
    """Merge the manifests of the parts that `encode --shard` wrote into the folder OUT.

    The last part to end does this by itself; the command is for schedulers, and says which parts are missing. Where
    any is, nothing is merged, and the exit code is 3; so it is where images of a part failed.
    """
    from sdvae.latents.listing import merge_parts

    report = merge_parts(out)
    if as_json:
        print_json(report.to_json())
        ctx.exit(report.exit_code)
    if report.missing:
        click.echo(shown(f"{report.out}: {len(report.missing)} of {report.num_parts} parts have not ended:"))
        for part in report.missing:
            click.echo(f"  --shard {part}")
        click.echo("Nothing was merged. Run them, with their --shard, then this command again.")
    else:
        counts = f"{report.num_parts} parts, {report.num_files} files, {report.num_items} latents"
        click.echo(shown(f"merge: {counts} -> {report.manifest}"))
    for part, num_failed in report.failed.items():
        click.echo(f"Part {part} could not encode {num_failed} images; running it again tries them again.")
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")
    ctx.exit(report.exit_code)
