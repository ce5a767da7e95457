"""`sdvae report`: result.json files to one page; several are put side by side."""

from __future__ import annotations

from pathlib import Path

import click

from sdvae.cli.options import overwrite_option
from sdvae.cli.output import note, shown

__all__ = ["report_command"]


@click.command(
    name="report",
    epilog="""\b
Examples:
  sdvae report report/result.json
  sdvae report mine/result.json theirs/result.json --out both.html""",
)
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: report.html beside the first]")
@overwrite_option("Replace a page that is there.")
def report_command(results: tuple[str, ...], out: Path | None, overwrite: bool) -> None:
    """Render RESULTS, which `sdvae evaluate` wrote as result.json, as one HTML page; no network, no torch.

    Several results are shown side by side. VAEs of different results are compared only where the images and the
    protocol are the same; where they are not, a warning says so.
    """
    from sdvae.errors import OutputExistsError
    from sdvae.evaluation.compare import merge_results
    from sdvae.files import write_atomic
    from sdvae.report.html import render_report
    from sdvae.report.result import load_result

    paths = [Path(name) / "result.json" if Path(name).is_dir() else Path(name) for name in results]
    loaded = [load_result(path) for path in paths]
    target = out or paths[0].with_name("report.html")
    if (out is not None or len(paths) > 1) and target.exists() and not overwrite:
        raise OutputExistsError(f"{target} is there already: choose another --out, or replace it with --overwrite")
    result = loaded[0] if len(loaded) == 1 else merge_results(loaded)
    for warning in result.warnings:
        note(shown(f"Warning: {warning}"))
    write_atomic(render_report(result).encode("utf-8", "surrogateescape"), target)
    click.echo(shown(str(target)))
