#!/usr/bin/env python3
"""The result of network.py as a table and as a plot.

python tools/bench/show.py result.json --table                              # Markdown, on the screen
python tools/bench/show.py result.json --write-into docs/speed.md           # the same, between its two marker lines
python tools/bench/show.py result.json --plot docs/images/speed.svg         # and speed-dark.svg beside it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from network import BASELINE
from subjects import SUBJECTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN, END = "<!-- table -->", "<!-- /table -->"
TITLES = {
    "diffusers": "diffusers",
    "diffusers-channels-last": "diffusers, channels_last",
    "diffusers-compile": "diffusers, torch.compile",
    "sdvae-plain": "sdvae, plain",
    "sdvae": "sdvae",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
Cells = list[dict[str, Any]]


def groups_of(result: dict[str, Any]) -> dict[tuple[int, str, str, str], Cells]:
    """Cells with at least one round by machine, architecture, device and dtype; in each, encode first, small first."""
    groups: dict[tuple[int, str, str, str], Cells] = {}
    order = {"encode": 0, "decode": 1}
    for cell in sorted(result["cells"], key=lambda each: (order[each["operation"]], each["batch"], each["size_px"])):
        groups.setdefault((cell["machine"], cell["config"], cell["device"], cell["dtype"]), []).append(cell)
    return groups


def subjects_of(cells: Cells) -> list[str]:
    """Those that ran in any of the cells, in the order of `SUBJECTS`."""
    return [name for name in SUBJECTS if any(name in cell["subjects"] for cell in cells)]


def caption(machine: dict[str, Any], cells: Cells) -> str:
    first = cells[0]
    device = machine["gpu"] or machine["cpu"]
    threads = "" if machine["gpu"] else f", {machine['threads']} {_plural('thread', machine['threads'])}"
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    peaks = machine["peaks"][f"{first['device']} {first['dtype']}"]
    rounds = sorted({len(cell["subjects"][BASELINE]["seconds"]) for cell in cells})
    return (
        f"**{device}{threads}, {first['dtype']}, {first['config']}** ({packages}; Python {machine['python']}, "
        f"{machine['system']}). {' to '.join(map(str, sorted({rounds[0], rounds[-1]})))} rounds per cell. Measured on "
        f"this machine: {peaks['flops_per_s'] / 1e9:.0f} GFLOP/s in a matrix product, {peaks['bytes_per_s'] / 1e9:.0f} "
        f"GB/s in a copy."
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def as_markdown(result: dict[str, Any]) -> str:
    """Three tables for each machine, architecture, device and dtype: times, memory, and what else there is to know."""
    parts = []
    for (machine, *_), cells in groups_of(result).items():
        parts += [caption(result["machines"][machine], cells), times_table(cells), memory_table(cells)]
        parts += [first_call_table(cells), work_table(cells)]
        parts += [f"Left out: {reasons}." for reasons in ["; ".join(left_out(cells))] if reasons]
    return "\n\n".join(part for part in parts if part)


def times_table(cells: Cells) -> str:
    names = subjects_of(cells)

    def ratio(found: dict[str, Any]) -> str:
        if found["ratio_min"] == found["ratio_max"] == 1:
            return _seconds(found["median_s"])
        return f"{found['ratio']:.2f} ({found['ratio_min']:.2f}–{found['ratio_max']:.2f})"

    head = [f"{TITLES[BASELINE]}, s", *(f"{TITLES[name]}, x" for name in names if name != BASELINE)]
    return _table(head, cells, lambda cell: _each(cell, names, ratio))


def memory_table(cells: Cells) -> str:
    names = [name for name in subjects_of(cells) if any(_fresh(cell, name) for cell in cells)]

    def memory(found: dict[str, Any]) -> str:
        if not (fresh := found["fresh"]):
            return ""
        if "cuda_peak_bytes" in fresh:
            return f"{fresh['cuda_peak_bytes'] / 1e9:.2f}"
        return f"{fresh['peak_bytes'] / 1e9:.2f} ({(fresh['peak_bytes'] - fresh['resident_bytes']) / 1e9:.2f})"

    head = [f"{TITLES[name]}, GB" for name in names]
    return _table(head, cells, lambda cell: _each(cell, names, memory)) if names else ""


def first_call_table(cells: Cells) -> str:
    names = [name for name in subjects_of(cells) if any(_fresh(cell, name) for cell in cells)]

    def first_call(found: dict[str, Any]) -> str:
        return _seconds(found["fresh"]["first_call_s"]) if found["fresh"] else ""

    head = [f"{TITLES[name]}, first call, s" for name in names]
    return _table(head, cells, lambda cell: _each(cell, names, first_call)) if names else ""


def work_table(cells: Cells) -> str:
    """How far the times are from the least of direct convolution, and the results from diffusers'."""
    shown = [name for name in (BASELINE, "sdvae") if name in subjects_of(cells)]
    others = [name for name in subjects_of(cells) if name != BASELINE]

    def row(cell: dict[str, Any]) -> list[str]:
        largest = max((cell["subjects"][name]["difference"] for name in others if name in cell["subjects"]), default=0)
        ours = cell["subjects"].get("sdvae", {"difference": float("nan")})
        work = cell["work"]
        return [
            f"{work['macs'] / 1e9:.0f}" if work["macs"] > 1e10 else f"{work['macs'] / 1e9:.2f}",
            _seconds(work["direct_s"]),
            *_each(cell, shown, lambda found: f"{100 * found['share_of_direct']:.0f} %"),
            f"{ours['difference']:.0e}",
            f"{largest:.0e}",
            f"{cell['output_scale']:.1f}",
        ]

    head = ["multiply-adds, 1e9", "direct, s", *(f"{TITLES[name]} of direct" for name in shown)]
    return _table([*head, "difference of sdvae", "largest difference", "largest value"], cells, row)


def left_out(cells: Cells) -> list[str]:
    """Subject, cells and reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for name, reason in cell["left_out"].items():
            where.setdefault((name, reason), []).append(f"{cell['operation']} {cell['size_px']} px x {cell['batch']}")
    return [
        f"{TITLES[name]} {'everywhere' if len(places) == len(cells) else 'in ' + ', '.join(places)} ({reason})"
        for (name, reason), places in where.items()
    ]


def _fresh(cell: dict[str, Any], name: str) -> Any:
    return cell["subjects"].get(name, {}).get("fresh")


def _each(cell: dict[str, Any], names: Iterable[str], text: Any) -> list[str]:
    return [text(cell["subjects"][name]) if name in cell["subjects"] else "" for name in names]


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(head: Sequence[str], cells: Cells, row: Any) -> str:
    lines = ["| | px | batch | " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) + 2)]
    for cell in cells:
        lines.append(f"| {cell['operation']} | {cell['size_px']} | {cell['batch']} | " + " | ".join(row(cell)) + " |")
    return "\n".join(lines)


def write_into(path: Path, table: str) -> None:
    """Replace what stands between the marker lines."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path}: expected a line {BEGIN} and after it a line {END}, between which the table goes")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


# Okabe and Ito's palette, which colour-blind readers tell apart; darker or lighter where the background asks for it
COLOURS = {
    "diffusers": ("#59636e", "#9198a1"),
    "diffusers-channels-last": ("#0072b2", "#56b4e9"),
    "diffusers-compile": ("#b36b00", "#e69f00"),
    "sdvae-plain": ("#a3477f", "#e596c4"),
    "sdvae": ("#c1272d", "#ff6b6b"),
    "onnxruntime": ("#00795a", "#2ecc9b"),
    "openvino": ("#6a5acd", "#a79bff"),
}
MARKERS = {
    "diffusers-channels-last": "s",
    "diffusers-compile": "^",
    "sdvae-plain": "D",
    "sdvae": "o",
    "onnxruntime": "v",
    "openvino": "P",
}
THEMES = {"": ("#ffffff", "#1f2328", "#d1d9e0"), "-dark": ("#0d1117", "#f0f6fc", "#3d444d")}  # of GitHub's pages


def plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Ratios over sizes: a row per operation, a column per setting and batch. Returns: the files, one per theme."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "sdvae"  # names within the file stay the same from run to run
    return [
        _plot(result, path.with_name(f"{path.stem}{suffix}{path.suffix}"), dark=bool(suffix), theme=theme)
        for suffix, theme in THEMES.items()
    ]


def setting_name(machine: dict[str, Any], config: str, dtype: str) -> str:
    return f"{machine['gpu'] or machine['cpu']}\n{config}, {dtype}"


def _plot(result: dict[str, Any], path: Path, *, dark: bool, theme: tuple[str, str, str]) -> Path:
    from matplotlib import pyplot

    columns = [
        (setting_name(result["machines"][machine], config, dtype), batch, [c for c in cells if c["batch"] == batch])
        for (machine, config, _, dtype), cells in groups_of(result).items()
        for batch in sorted({cell["batch"] for cell in cells})
    ]
    operations = [name for name in ("encode", "decode") if any(c["operation"] == name for c in result["cells"])]
    background, ink, grid = theme
    rc = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": grid}
    with pyplot.rc_context(rc | {"font.size": 11, "font.family": "DejaVu Sans"}):
        figure, axes = pyplot.subplots(
            len(operations),
            len(columns),
            figsize=(1.2 + 3.6 * len(columns), 1.5 + 2.6 * len(operations)),
            sharey=True,
            squeeze=False,
            facecolor=background,
            layout="constrained",
        )
        for row, operation in zip(axes, operations, strict=True):
            for axis, (setting, batch, cells) in zip(row, columns, strict=True):
                own = [cell for cell in cells if cell["operation"] == operation]
                _draw(axis, own, dark=dark, grid=grid, ink=ink)
                axis.set_facecolor(background)
                title = f"{operation}, batch {batch}"
                is_headed = row is axes[0] and len({each[0] for each in columns}) > 1
                axis.set_title(f"{setting}\n{title}" if is_headed else title, fontsize=12, loc="left")
            row[0].set_ylabel("times as fast as diffusers")
        for axis in axes[-1]:
            axis.set_xlabel("side of the image, px")
        handles = {
            line.get_label(): line for axis in axes.flat for line in axis.get_lines() if line.get_label()[0] != "_"
        }
        names = [name for name in TITLES.values() if name in handles]
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside upper center",
            ncols=min(3 if len(columns) < 3 else 6, len(names)),
            frameon=False,
        )
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, facecolor=background, dpi=160, metadata=metadata)
        pyplot.close(figure)
    return path


def _draw(axis: Axes, cells: Cells, *, dark: bool, grid: str, ink: str) -> None:
    """One panel. Sizes stand at equal distances; subjects side by side, so that their ranges do not hide each other."""
    sizes = sorted({cell["size_px"] for cell in cells})
    names = [name for name in subjects_of(cells) if name != BASELINE]
    axis.axhline(1, color=ink, linewidth=1.2, linestyle=(0, (4, 3)), label="_one")
    for index, name in enumerate(names):
        found = {cell["size_px"]: cell["subjects"][name] for cell in cells if name in cell["subjects"]}
        offset = 0.07 * (index - (len(names) - 1) / 2)
        x = [sizes.index(size) + offset for size in found]
        y = [each["ratio"] for each in found.values()]
        colour, is_ours = COLOURS[name][dark], name == "sdvae"
        low = [each["ratio_min"] for each in found.values()]
        high = [each["ratio_max"] for each in found.values()]
        axis.vlines(x, low, high, color=colour, linewidth=1.6, alpha=0.55)
        axis.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[name],
            markersize=7 if is_ours else 5.5,
            linewidth=2.6 if is_ours else 1.4,
            zorder=4 if is_ours else 3,
            label=TITLES[name],
        )
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set_xlim(-0.4, len(sizes) - 0.6)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON of network.py")
    parser.add_argument("--table", action="store_true", help="print it as Markdown")
    parser.add_argument("--write-into", type=Path, metavar="PAGE", help=f"put it between {BEGIN} and {END} there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG or PNG; another for dark pages goes beside it")
    arguments = parser.parse_args(words)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    if not result["cells"]:
        parser.error(f"{arguments.result} has no cell")
    if arguments.table:
        print(as_markdown(result))
    if arguments.write_into:
        write_into(arguments.write_into, as_markdown(result))
    if arguments.plot:
        for path in plot(result, arguments.plot):
            print(path)


if __name__ == "__main__":
    main()
