"""`sdvae convert`: a VAE in another layout, type or scale, or inside a copy of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.checkpoints.convert.options import DTYPES, MAX_SHARD_SIZE, TARGETS, ConvertOptions
from sdvae.checkpoints.keys import PREFIXES
from sdvae.cli.options import choice, write_options
from sdvae.cli.output import note, print_json, print_table, shown

if TYPE_CHECKING:
    from sdvae.checkpoints.convert.run import ConvertReport
    from sdvae.checkpoints.convert.verify import Verification

__all__ = ["convert_command"]


@click.command(
    name="convert",
    epilog="""\b
Examples:
  sdvae convert runs/mine/vae mine.safetensors --to ldm --fold-scale 0.18215
  sdvae convert mine.safetensors pipeline-new --into pipeline""",
)
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@choice(
    "--to",
    TARGETS,
    default=ConvertOptions.to,
    help="diffusers and onnx: a folder. ldm: one file, as ComfyUI, A1111, Forge and kohya's trainers read it.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="PIPELINE",
    help="Write DST as a copy of this pipeline folder, with SRC as its VAE.",
)
@choice("--dtype", DTYPES, help="Type of the weights.  [default: as they are]")
@click.option("--variant", metavar="NAME", help="diffusers: the weights' file is named with it, such as fp16.")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help=f"diffusers: split larger weights into files of this size, such as {MAX_SHARD_SIZE}.",
)
@choice("--prefix", PREFIXES[1:], help="ldm: put this before each name.  [default: bare names]")
@click.option(
    "--fold-scale",
    type=float,
    metavar="S",
    help="Rewrite the weights so that scaling_factor S gives the latents that SRC gives with its own.",
)
@click.option("--fold-shift", type=float, metavar="T", help="The same for shift_factor.  [default: none]")
@click.option("--add-quant-convs", is_flag=True, help="Where SRC has no quant_conv, fold into new ones.")
@click.option(
    "--images", type=click.Path(path_type=Path), help="Photographs to measure the fold on.  [default: the bundled ones]"
)
@click.option("--scaling-factor", type=float, metavar="S", help="Of SRC, where it does not say.")
@click.option("--shift-factor", type=float, metavar="T", help="Of SRC, where it does not say.")
@click.option("--config", type=click.Path(path_type=Path), help="config.json for SRC, in place of the one beside it.")
@click.option("--source-variant", metavar="NAME", help="Which weights of the folder SRC, such as fp16.")
@click.option("--license", metavar="ID", help="Record this license, such as apache-2.0.  [default: what SRC records]")
@click.option(
    "--verify/--no-verify",
    default=ConvertOptions.verify,
    show_default=True,
    help="Read the result back and compare it with SRC before it takes its place.",
)
@write_options
@click.pass_context
def convert_command(ctx: click.Context, /, src: str, dst: Path, as_json: bool, **options: Any) -> None:
    """Write the VAE SRC to DST in another layout, type or scale.

    SRC is a folder, a file, a hub id, or "sdvae-mini", in any layout that `sdvae inspect` names. Conversions without
    --dtype and --fold-scale keep every bit. DST appears when it is whole and checked; run again, it is up to date.
    """
    options["prefix"] = options["prefix"] or ""
    chosen = ConvertOptions(**options)
    from sdvae.checkpoints.convert.run import convert

    report = convert(src, dst, chosen)
    if as_json:
        print_json(report.to_json() | {"dry_run": chosen.dry_run})
    else:
        _print_report(report, chosen)
    ctx.exit(report.exit_code)


_READERS_OF_FOLDERS = ("diffusers from_pretrained", "SD.Next", "kohya sd-scripts")
_STATUS = {
    "written": "Written.",
    "up to date": "Up to date: nothing was written.",
    "new": "Would write it. Nothing was written.",
    "replace": "Would replace what is there. Nothing was written.",
}


def _print_report(report: ConvertReport, chosen: ConvertOptions) -> None:
    config = report.config
    widths = config["block_out_channels"]
    scale = f"scaling_factor {config['scaling_factor']}"
    scale += f", shift_factor {config['shift_factor']}" if config["shift_factor"] else ""
    scale += ", latents_mean and latents_std" if config["latents_mean"] else ""
    files = f", weights in {report.num_shards} file{'s' * (report.num_shards > 1)}" if chosen.max_shard_size else ""
    copied = f", with {report.num_copied_files} files of the pipeline" if report.num_copied_files else ""
    facts: list[tuple[str, str]] = [
        (
            "source",
            f"{report.source}: {report.source_kind} ({report.source_evidence}), {_listed(report.source_dtypes)}",
        ),
        ("digest", report.source_digest),
        ("result", f"{report.target}: {report.to}, {_listed(report.dtypes)}, {_size(report.num_bytes)}{files}{copied}"),
        (
            "network",
            f"channels {_listed(widths)}; layers_per_block {config['layers_per_block']}; {config['latent_channels']} "
            f"latent channels; 1/{2 ** (len(widths) - 1)} of the size",
        ),
        ("scale", scale),
        *([("license", chosen.license)] if chosen.license else []),
        *(("rewrite", rewrite) for rewrite in report.rewrites),
    ]
    for name, value in facts:
        click.echo(shown(f"{name:8}  {value}"))
    if fold := report.fold:
        click.echo(
            f"fold      exact on photographs, in float32: latents to {fold.latents_error:.2g}, image to "
            f"{fold.recon_error:.2g}, std to {fold.std_error:.2g} of itself; logvar {fold.logvar_min:.1f} to "
            f"{fold.logvar_max:.1f}"
        )
    if report.verification:
        _print_verification(report.verification, chosen)
    if report.onnx:
        error, tolerance = report.onnx["max_relative_error"], report.onnx["tolerance"]
        click.echo(
            f"onnx      opset {report.onnx['opset']}; off torch by {error:.2g} of the range at most, of {tolerance:g}"
        )
    _print_loaders(report)
    for remark in report.remarks:
        note(shown(f"Note: {remark}"))
    for warning in report.warnings:
        note(shown(f"Warning: {warning}"))
    click.echo(_STATUS[report.status])


def _print_verification(verification: Verification, chosen: ConvertOptions) -> None:
    names = "; names and shapes are those of the original program" if verification.names_checked else ""
    bits = "equal to the source bit for bit" if verification.identical else "as they were to be written, bit for bit"
    if chosen.to == "onnx":  # its proof is the run in onnxruntime, below
        click.echo(f"verified  {verification.num_tensors} weights as they went into the export: {bits}")
        return
    click.echo(f"verified  {verification.num_tensors} weights read back: {bits}{names}")
    rows = [
        (comparison.name, f"{comparison.max_abs_error:.3g}", f"{comparison.rms:.3g}", f"{comparison.tolerance:.2g}")
        for comparison in verification.comparisons
    ]
    print_table(("against the source", "max error", "rms", "allowed"), rows)


def _print_loaders(report: ConvertReport) -> None:
    takers = [verdict for verdict in report.loaders if verdict.takes]
    if report.loaders:
        click.echo(f"taken by  {_listed(verdict.loader for verdict in takers) or 'no program known here'}")
    others = [verdict.loader for verdict in takers if verdict.fix and "--fold-scale" in verdict.fix]
    if others:
        click.echo(f"scale     {_listed(others)} apply that of their own model, not this VAE's: fold it, --fold-scale")
    refusals: dict[str, list[str]] = {}
    for verdict in report.loaders:
        if not verdict.takes and (report.to == "ldm" or verdict.loader in _READERS_OF_FOLDERS):
            refusals.setdefault("; ".join(verdict.reasons), []).append(verdict.loader)
    for reasons, names in refusals.items():
        click.echo(shown(f"not by    {_listed(names)}: {reasons}"))


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
