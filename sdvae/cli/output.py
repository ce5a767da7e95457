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
    from sdvae.report.result import EvaluationResult

__all__ = [
    "note",
    "print_fields",
    "print_first",
    "print_json",
    "print_plan",
    "print_reasons",
    "print_report",
    "print_result",
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


def print_result(result: EvaluationResult) -> None:
    """The summary as a table, comparisons in words, then what went wrong."""
    metrics: Sequence[Mapping[str, Any]] = result.metrics
    arrows = {"higher": "higher is better", "lower": "lower is better"}
    rows = []
    for metric in metrics:
        cells = [_cell(vae["summary"].get(metric["name"]), metric["decimals"]) for vae in result.vaes]
        goal = arrows.get(metric["better"]) or f"best: {metric['target']:g}"
        rows.append((f"{metric['title']} {metric['unit']}".strip(), *cells, goal))
    marks = [f"{vae['id']} (reference)" if vae["role"] == "reference" else vae["id"] for vae in result.vaes]
    print_table((f"{result.dataset['num_images']} images", *marks, ""), rows)
    for comparison in result.comparisons:
        for line in _comparison_lines(comparison, metrics):
            click.echo(shown(line))
    for skipped in result.skipped_metrics:
        note(f"left out: {skipped['name']}: {skipped['reason']}")
    for warning in result.warnings:
        note(shown(f"Warning: {warning}"))
    for failed in result.dataset["unreadable"]:
        note(shown(f"not read: {failed['key']}: {failed['reason']}"))
    for gate in result.gates:
        click.echo(shown(f"{'passed' if gate['passed'] else 'FAILED'}: {gate['expression']}: {gate['reason']}"))


def _cell(summary: Mapping[str, Any] | None, decimals: int) -> str:
    if summary is None or (value := summary.get("mean", summary.get("value"))) is None:
        return "n/a"
    if summary.get("low") is None or summary.get("high") is None:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} [{summary['low']:.{decimals}f}, {summary['high']:.{decimals}f}]"


def _comparison_lines(comparison: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{comparison['vae']} against {comparison['reference']}:"]
    for metric in metrics:
        if (found := comparison["metrics"].get(metric["name"])) is None or found.get("delta") is None:
            continue
        digits = metric["decimals"]
        line = f"  {metric['title']}: {found['delta']:+.{digits}f}"
        if found.get("low") is not None:
            line += f" [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}], {found['verdict']}"
            line += f", better on {found['won']:.0%} of the images"
        lines.append(line)
    swap = comparison["swap"]
    lines.append(f"  swap: {swap['sentence'] if 'sentence' in swap else 'not tested: ' + swap['skipped']}")
    return lines
