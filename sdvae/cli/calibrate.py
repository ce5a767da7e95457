"""`sdvae calibrate`: the scale of a VAE's latents over a folder of images, with standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.options import dry_run_option, image_options, json_option, max_images_option, run_options
from sdvae.cli.output import note, print_json, print_reasons, print_table, progress, shown
from sdvae.errors import ConfigError

if TYPE_CHECKING:
    from sdvae.calibration.result import Calibration
    from sdvae.calibration.write import Written
    from sdvae.metrics.moments import Estimate

__all__ = ["calibrate_command"]


@click.command(
    name="calibrate",
    epilog="""\b
Examples:
  sdvae calibrate my-vae photos
  sdvae calibrate my-vae photos --size 512 --crop center --write""",
)
@click.argument("vae")
@click.argument("images")
@click.option("--write", is_flag=True, help="Put scaling_factor into the VAE's config.json; the old one is kept there.")
@click.option("--shift", is_flag=True, help="With --write: shift_factor as well, which SD and SDXL pipelines ignore.")
@click.option(
    "--per-channel",
    is_flag=True,
    help="With --write: latents_mean and latents_std as well, for SDXL text-to-image; SD pipelines ignore them.",
)
@max_images_option
@image_options
@run_options
@dry_run_option("Print what would be measured and written, and do nothing.")
@json_option
@click.pass_context
def calibrate_command(
    ctx: click.Context,
    /,
    vae: str,
    images: str,
    write: bool,
    shift: bool,
    per_channel: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure which scaling_factor gives the latents of VAE a variance of 1 over IMAGES.

    VAE is a folder, a file or a hub id. IMAGES is a folder, a file, a glob in quotes, or a .txt list. Says how
    certain each number is, and whether the difference to the present value matters. Without --write nothing changes.
    """
    if (shift or per_channel) and not write:
        raise ConfigError(f"{'--shift' if shift else '--per-channel'} says what to write: give --write as well")
    from sdvae.calibration.measure import CalibrateOptions, calibrate
    from sdvae.calibration.write import check_writable, write_calibration

    settings = CalibrateOptions(**options)  # before anything is looked up
    config_path = str(check_writable(vae, per_channel=per_channel, shift=shift)) if write else None
    if dry_run:
        _print_dry_run(vae, images, options, config_path, as_json)
        return
    with progress("calibrate") as on_progress:
        found = calibrate(vae, images, settings, on_progress=on_progress)
    written = write_calibration(vae, found, per_channel=per_channel, shift=shift) if write else None
    if as_json:
        data = {"command": "calibrate", **found.to_json(), "written": None if written is None else vars(written)}
        print_json(data)
    else:
        _print(found)
        if written is not None:
            _print_written(written)
    ctx.exit(found.exit_code)


def _print_dry_run(vae: str, images: str, options: dict[str, Any], config_path: str | None, as_json: bool) -> None:
    from sdvae.checkpoints.read import locate
    from sdvae.data.sources.find import choose_images, find_images

    locate(vae)
    found = find_images(images)
    chosen = choose_images(found, options["max_images"])
    if as_json:
        print_json(
            {
                "command": "calibrate",
                "dry_run": True,
                "vae": vae,
                "source": images,
                "num_found": len(found),
                "num_images": len(chosen),
                "config_path": config_path,
            }
        )
        return
    click.echo(shown(f"Would encode {len(chosen)} of {len(found)} images in {images} with {vae}."))
    if config_path is not None:
        click.echo(shown(f"Would then set the scale in {config_path}."))
    click.echo("Nothing was written.")


def _print(found: Calibration) -> None:
    click.echo(
        shown(
            f"{found.num_images} of {found.num_found} images in {found.source}, {found.num_positions:,} latent "
            f"positions, {found.class_name} {found.vae}"
        )
    )
    present = found.present
    rows = [
        ("scaling_factor", *_cells(found.scaling_factor), f"{present.scaling_factor:.6g}"),
        ("shift_factor", *_cells(found.shift_factor), _number(present.shift_factor)),
    ]
    if found.scaling_factor_of_modes is not None:
        rows.append(("scaling_factor of modes alone", *_cells(found.scaling_factor_of_modes), ""))
    rows.append(("std of the latents at present", *_cells(present.std), "aim: 1"))
    rows.append(("mean of the latents at present", *_cells(present.mean), "aim: 0"))
    print_table(("", "value", "standard error", "present"), rows)
    click.echo()
    channels = [
        (str(index), *_cells(each.mean), *_cells(each.std), f"{each.relative_std.value:.4g}")
        for index, each in enumerate(found.channels)
    ]
    print_table(("channel", "mean of z", "error", "std of z", "error", "x scaling_factor"), channels)
    click.echo()
    for sentence in found.judgement:
        click.echo(f"{sentence[0].upper()}{sentence[1:]}.")
    for warning in found.warnings:
        note(f"Warning: {warning}")
    print_reasons("Failed", found.failures)


def _cells(estimate: Estimate) -> tuple[str, str]:
    error = estimate.standard_error
    return f"{estimate.value:.6g}", "unknown" if error is None else f"{error:.2g}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _print_written(written: Written) -> None:
    if not written.changed:
        click.echo(shown(f"Unchanged: {written.config_path} says the same already."))
        return
    for name, value in written.after.items():
        click.echo(f"{name}: {written.before[name]} -> {value}")
    click.echo(shown(f"Written to {written.config_path}; what was there is kept in it, under _sdvae: previous."))
    if written.before != written.after:
        click.echo(
            "The VAE's digest changes with its scale: latent files made before count as those of another VAE, and "
            "carry the old scale. Their z is the same as ever; `sdvae encode` makes them anew."
        )
