"""What commands print: results on stdout as text or JSON, progress on stderr where that is a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from sdvae.codec.planning.plan import Plan
    from sdvae.codec.reports import CodecReport
    from sdvae.data.sources.files import FileReason

__all__ = [
    "note",
    "print_fields",
    "print_first",
    "print_json",
    "print_plan",
    "print_reasons",
    "print_report",
    "print_table",
    "progress",
    "shown",
]

_SHOWN = 20  # of a list of files in text; JSON has all


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout. ASCII only, so that any terminal and any file name will do."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A line on stderr, where it does not mix with results."""
    click.echo(text, err=True)


def shown(text: str) -> str:
    """A file name that may hold bytes which are no UTF-8, printable."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns: the first to the left, the others, which hold numbers, to the right."""
    lines = [list(header), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        click.echo("  ".join(cells).rstrip())


def print_fields(data: Mapping[str, Any], indent: str = "") -> None:
    """Nested fields, one a line: `name: value`."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            click.echo(f"{indent}{name}:")
            print_fields(value, indent + "  ")
        elif isinstance(value, (list, tuple)):
            click.echo(f"{indent}{name}: {', '.join(shown(str(item)) for item in value) or 'none'}")
        else:
            click.echo(f"{indent}{name}: {'none' if value is None else shown(str(value))}")


def print_plan(plan: Plan, verb: str) -> None:
    """Every item of a plan in its order, and the counts."""
    for item in plan.items:
        click.echo(shown(f"{item.action:4}  {item.path} -> {item.output}  ({item.reason})"))
    click.echo(
        f"Would {verb} {len(plan.jobs)}, skip {len(plan.skips)}, fail {len(plan.failures)}. Nothing was written."
    )


def print_report(report: CodecReport) -> None:
    """Counts and rates of a run, then what failed and what is worth knowing."""
    counts = (
        f"{report.command}: {report.done} done, {report.skipped} up to date, {report.failed} failed -> {report.out}"
    )
    click.echo(shown(counts))
    if report.done:
        rates = f"{report.images_per_s:.3g} images/s, {report.megapixels_per_s:.3g} megapixels/s"
        click.echo(f"{report.seconds:.1f} s, {rates}, on {report.device} in {report.dtype}")
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")
    print_reasons("Notes", report.notes)
    print_reasons("Failed", report.failures)


def print_reasons(title: str, reasons: Sequence[FileReason]) -> None:
    """File names with what there is to say about them; nothing where the list is empty."""
    if not reasons:
        return
    click.echo(f"{title}:")
    print_first(f"{about.source}: {about.reason}" for about in reasons)


def print_first(lines: Iterable[str]) -> None:
    """The first lines of a list, and how many more there are."""
    lines = list(lines)
    for line in lines[:_SHOWN]:
        click.echo(shown(f"  {line}"))
    if len(lines) > _SHOWN:
        click.echo(f"  and {len(lines) - _SHOWN} more (--json lists all)")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time left; silent where stderr is no terminal.

    Yields: a function that takes how many are finished and how many there are.
    """
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def show(finished: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=title, unit="image", disable=None)  # None: silent without a terminal
        bar.update(finished - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
