"""`sdvae check`: which number formats hold a VAE's activations, and which programs take its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.options import audit_options, dry_run_option, json_option, overwrite_option
from sdvae.cli.output import note, print_json, print_reasons, print_table, progress, shown
from sdvae.data.sources.files import FileReason
from sdvae.errors import CheckpointError, ImageError, OutputExistsError
from sdvae.precision.options import AuditOptions

if TYPE_CHECKING:
    from sdvae.data.images import Pixels
    from sdvae.data.sources.files import ImageFile
    from sdvae.precision.audit import Audit

__all__ = ["check_command", "choose_files", "read_pixels"]

AUDIT_NAME, CHART_NAME = "audit.json", "audit.svg"
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
SHOWN_LAYERS = 10
_PHOTOS = Path(__file__).parents[1] / "assets" / "photos"


@click.command(
    name="check",
    epilog="""\b
Examples:
  sdvae check runs/mine/vae --out audit
  sdvae check runs/mine/vae photos --size 512 --limit 16 --fail-if-unsafe fp16""",
)
@click.argument("vae")
@click.argument("images", required=False)
@click.option("--out", type=click.Path(path_type=Path), help=f"Folder for {AUDIT_NAME} and {CHART_NAME}, a chart.")
@audit_options
@click.option(
    "--fail-if-unsafe",
    "gates",
    type=click.Choice(list(DTYPES)),
    multiple=True,
    help="Exit code 1 unless the verdict is `safe`; may be repeated.",
)
@overwrite_option("Replace an audit that is in --out.")
@dry_run_option("Print what would be measured and written, and do neither.")
@json_option
@click.pass_context
def check_command(
    ctx: click.Context,
    /,
    vae: str,
    images: str | None,
    out: Path | None,
    gates: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Audit the precision of VAE: the peak of every layer on IMAGES against the limits of fp16 and bf16.

    VAE is a folder, a file or a hub id; IMAGES a folder, a file, a glob in quotes, or a .txt list, by default the
    bundled photographs. Then says which programs take the VAE's files.
    """
    options = AuditOptions(**settings)
    _check_out(out, overwrite)
    files = choose_files(images, options)
    if dry_run:
        _print_dry_run(vae, files, out, as_json)
        return
    import torch

    from sdvae.checkpoints.opened import open_any_vae
    from sdvae.model.device import choose_device
    from sdvae.precision.audit import audit

    subject = open_any_vae(vae, choose_device(options.device), torch.float32)
    failures: list[FileReason] = []
    with progress("check") as on_progress:
        pixels = read_pixels(files, options, failures, on_progress)
        found = audit(subject, pixels, probe_size_px=options.probe_size_px)
    failed = [found.verdict(DTYPES[gate]).sentence for gate in gates if found.verdict(DTYPES[gate]).level != "safe"]
    loaders = _loaders(vae)
    exit_code = 1 if failed else 3 if failures else 0
    data = {
        "command": "check",
        **found.to_json(),
        "size_px": options.size_px,
        "loaders": loaders,
        "out": None if out is None else str(out),
        "failed_gates": failed,
        "failures": [asdict(failure) for failure in failures],
        "exit_code": exit_code,
    }
    if out is not None:
        _write(found, data, out)
    if as_json:
        print_json(data)
    else:
        _print(found, loaders, out)
        print_reasons("Not read", failures)
    for sentence in failed:
        note(f"FAILED: {sentence}")
    ctx.exit(exit_code)


def choose_files(images: str | None, options: AuditOptions) -> list[ImageFile]:
    """The images that an audit measures, of those that are named; of the bundled photographs where none are."""
    from sdvae.data.sources.find import choose_images, find_images

    return choose_images(find_images(_PHOTOS if images is None else images), options.max_images)


def read_pixels(
    files: Sequence[ImageFile],
    options: AuditOptions,
    failures: list[FileReason],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Pixels]:
    """Central squares of the images, (H, W, 3), uint8; those that cannot be read go into `failures`.

    Raises: ImageError where none can be read.
    """
    from sdvae.evaluation.images import prepare
    from sdvae.evaluation.protocol import Protocol

    protocol, count = Protocol(preset="audit", size_px=options.size_px, crop="center"), 0
    for index, file in enumerate(files):
        try:
            pixels = prepare(index, file, protocol).pixels
        except ImageError as error:
            failures.append(FileReason.of(file.key, file.path, error))
            continue
        yield pixels
        count += 1
        on_progress(index + 1, len(files))
    if not count:
        raise ImageError(f"none of the {len(files)} images can be read, {files[0].key}: {failures[0].reason}")


def _check_out(out: Path | None, overwrite: bool) -> None:
    if out is None or overwrite:
        return
    if there := [name for name in (AUDIT_NAME, CHART_NAME) if (out / name).exists()]:
        raise OutputExistsError(f"{out / there[0]} is there already: choose another --out, or give --overwrite")


def _print_dry_run(vae: str, files: Sequence[ImageFile], out: Path | None, as_json: bool) -> None:
    outputs = [] if out is None else [str(out / AUDIT_NAME), str(out / CHART_NAME)]
    keys = [shown(file.key) for file in files]
    if as_json:
        print_json({"command": "check", "dry_run": True, "vae": vae, "images": keys, "outputs": outputs})
        return
    click.echo(shown(f"Would measure {vae} on {', '.join(keys)}"))
    for output in outputs:
        click.echo(shown(f"Would write {output}"))
    click.echo("Nothing was written.")


def _loaders(vae: str) -> list[dict[str, Any]]:
    from sdvae.checkpoints.describe import describe_vae

    try:
        loaders: list[dict[str, Any]] = describe_vae(vae)["loaders"]
    except CheckpointError:  # it is loaded already, so what is left is no VAE file of its own
        return []
    return loaders


def _write(found: Audit, data: dict[str, Any], out: Path) -> None:
    from sdvae.files import write_atomic
    from sdvae.precision.chart import audit_chart

    write_atomic(audit_chart(found).encode("utf-8", "replace"), out / CHART_NAME)
    write_atomic(json.dumps(data, indent=2, allow_nan=False).encode(), out / AUDIT_NAME)


def _print(found: Audit, loaders: Sequence[dict[str, Any]], out: Path | None) -> None:
    from sdvae.precision.number_formats import headroom_bits

    images = f"{found.num_images} image{'s' if found.num_images != 1 else ''}"
    click.echo(shown(f"{found.vae}: {found.class_name}, {len(found.layers)} layers, {images}, on {found.device}"))
    for verdict in found.verdicts:
        click.echo(verdict.sentence)
    for sentence in filter(None, [found.upcast, *found.hazards]):
        click.echo(f"Note: {sentence}")
    click.echo("")
    rows = [
        (layer.name, layer.kind, f"{layer.peak:.4g}", f"{layer.percentile:.4g}", _bits(layer.peak, headroom_bits))
        for layer in found.tightest(SHOWN_LAYERS)
    ]
    print_table(("largest magnitudes", "kind", "peak", "99.99 %", "bits to fp16's limit"), rows)
    if loaders:
        click.echo("\nPrograms that take the files as they are:")
    groups: dict[str, list[str]] = {}
    for loader in loaders:
        groups.setdefault(f"{'yes' if loader['takes'] else 'no '}  {{}}{_reason(loader)}", []).append(loader["loader"])
    for line, names in groups.items():
        click.echo(shown("  " + line.replace("{}", ", ".join(names), 1)))
    if out is not None:
        click.echo(shown(f"\nChart: {out / CHART_NAME}"))


def _bits(peak: float, headroom_bits: Callable[[float, str], float]) -> str:
    bits = headroom_bits(peak, "float16")
    return f"{bits:.1f}" if bits >= 0 else f"overflows by {-bits:.1f}"


def _reason(loader: dict[str, Any]) -> str:
    words = ": " + "; ".join(loader["reasons"]) if loader["reasons"] and not loader["takes"] else ""
    return words + (f" -> {loader['fix']}" if loader["fix"] and not loader["takes"] else "")
