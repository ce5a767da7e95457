"""`sdvae fix-fp16`: a VAE that overflows in float16, rewritten so that it does not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.check import choose_files, read_pixels
from sdvae.cli.options import audit_options, choice, dry_run_option, json_option, overwrite_option
from sdvae.cli.output import print_json, print_reasons, print_table, progress, shown
from sdvae.codec.options import COMPUTE_DTYPES
from sdvae.data.sources.files import FileReason
from sdvae.errors import ConfigError
from sdvae.precision.options import FixOptions

if TYPE_CHECKING:
    from sdvae.precision.audit import Audit
    from sdvae.precision.fix import Fix

__all__ = ["fix_fp16_command"]


@click.command(
    name="fix-fp16",
    epilog="""\b
Examples:
  sdvae fix-fp16 my-vae my-vae-fp16
  sdvae fix-fp16 my-vae my-vae-fp16 photos --headroom 3 --dtype float16""",
)
@click.argument("vae")
@click.argument("dst", type=click.Path(path_type=Path))
@click.argument("images", required=False)
@click.option(
    "--headroom",
    "headroom_bits",
    type=click.FloatRange(min=0, max=8),
    default=FixOptions.headroom_bits,
    show_default=True,
    metavar="BITS",
    help="Of every layer below fp16's limit; 2 bits leave room for values four times as large.",
)
@choice("--dtype", COMPUTE_DTYPES, help="Of the stored weights.  [default: as in VAE]")
@audit_options
@click.option("--force", is_flag=True, help="Write a copy even where nothing is to fix.")
@overwrite_option("Replace a VAE that is in DST.")
@dry_run_option("Measure, and print what would be done, but write nothing.")
@json_option
@click.pass_context
def fix_fp16_command(
    ctx: click.Context,
    /,
    vae: str,
    dst: Path,
    images: str | None,
    force: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Rewrite VAE so that its activations fit into fp16, and write it to DST as a diffusers folder.

    Powers of two make the residual stream smaller, and the norms cancel them: the function stays the same, which is
    measured on IMAGES (by default the bundled photographs) before anything is written. Nothing is trained.
    """
    options = FixOptions(**settings)
    from sdvae.checkpoints.store import why_no_vae_folder
    from sdvae.files import check_replaceable

    may_be_done = dst.is_dir() and not overwrite and why_no_vae_folder(dst) is None
    if not may_be_done:
        check_replaceable(dst, overwrite=overwrite, is_ours=why_no_vae_folder)
    files = choose_files(images, options)
    from sdvae.checkpoints.read import read_checkpoint
    from sdvae.precision.fix import fix_fp16

    checkpoint = read_checkpoint(vae)
    if checkpoint.found.weights.resolve().is_relative_to(dst.resolve()):
        raise ConfigError(f"{dst} holds the VAE itself: choose another DST")
    failures: list[FileReason] = []
    with progress("read") as on_progress:
        pixels = list(read_pixels(files, options, failures, on_progress))
    fix = fix_fp16(checkpoint, pixels, options, name=vae)
    is_done = may_be_done and fix.is_in(dst)
    if may_be_done and not is_done:
        check_replaceable(dst, overwrite=overwrite, is_ours=why_no_vae_folder)
    writes = (fix.needed or force) and not dry_run and not is_done
    if writes:
        fix.save(dst, overwrite=overwrite)
    exit_code = 3 if failures else 0
    if as_json:
        data = {
            "command": "fix-fp16",
            "dry_run": dry_run,
            "vae": vae,
            "out": str(dst),
            "written": writes,
            "up_to_date": is_done,
            **fix.to_json(),
            "remarks": list(checkpoint.remarks),
            "failures": [asdict(failure) for failure in failures],
            "exit_code": exit_code,
        }
        print_json(data)
    else:
        _print(fix, dst, writes, dry_run, force, is_done)
        print_reasons("Not read", failures)
    ctx.exit(exit_code)


def _print(fix: Fix, dst: Path, written: bool, dry_run: bool, force: bool, is_done: bool) -> None:
    if not fix.needed:
        peak = fix.before.tightest(1)[0].peak
        click.echo(f"Nothing to fix: every layer has {fix.headroom_bits:g} bits of headroom or more, peak {peak:.4g}.")
    else:
        _print_numbers(fix)
    if written:
        upcast = "; force_upcast is false now" if fix.fields.get("force_upcast") is False else ""
        click.echo(shown(f"{'Written' if fix.needed else 'A copy was written'} to {dst}{upcast}."))
    elif is_done:
        click.echo(shown(f"{dst} is up to date. Nothing was written."))
    elif dry_run and (fix.needed or force):
        click.echo(shown(f"Would write {dst}. Nothing was written."))
    else:
        click.echo("Nothing was written; --force writes a copy.")


def _print_numbers(fix: Fix) -> None:
    for name, exponent in fix.scale.changes.items():
        click.echo(f"{name}: scaled by 2^{exponent}")
    rows = [
        ("largest magnitude", *(f"{found.tightest(1)[0].peak:.4g}" for found in (fix.before, fix.after))),
        ("fp16: difference of z", *(_of_probe(found, "z_error") for found in (fix.before, fix.after))),
        ("fp16: largest difference of x", *(_of_probe(found, "max_difference") for found in (fix.before, fix.after))),
        ("fp16: dB against fp32", *(_of_probe(found, "psnr_against_fp32") for found in (fix.before, fix.after))),
        ("weights below fp16's normal range", f"{fix.underflow_before:.2%}", f"{fix.underflow_after:.2%}"),
    ]
    print_table(("", "before", "after"), rows)
    click.echo(
        f"Function in fp32: encoder changed by {fix.encoder_change:.2g}, decoder by {fix.decoder_change:.2g} of its "
        f"output's range; through epsilon by at most {fix.epsilon_effect:.2g} in {fix.epsilon_norm}"
    )
    click.echo(fix.after.verdict("float16").sentence)


def _of_probe(found: Audit, name: str) -> str:
    probe = found.probes[0]
    value = getattr(probe, name)
    return f"{value:.4g}" if value is not None else ("not tried" if probe.error else "NaN")
