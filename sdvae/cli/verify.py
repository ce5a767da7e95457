"""`sdvae verify`: whether a latent cache is what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.options import dataset_options, device_option, json_option, number
from sdvae.cli.output import print_first, print_json, progress, shown
from sdvae.errors import ConfigError

if TYPE_CHECKING:
    from sdvae.codec.verify import VerifyReport

__all__ = ["verify_command"]

_SAMPLE = 8


@click.command(
    name="verify",
    epilog="""\b
Examples:
  sdvae verify latents
  sdvae verify latents --images photos --sample 32 --json""",
)
@click.argument("cache", type=click.Path())
@click.option("--images", metavar="IMAGES", help="What was encoded, as for `encode`: encode a sample again.")
@dataset_options
@click.option("--vae", metavar="REF", help="The VAE that CACHE is to be of.  [default: the one that it names]")
@number("--sample", help=f"Images to encode again.  [default: {_SAMPLE}]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of the sample.")
@device_option
@json_option
@click.pass_context
def verify_command(
    ctx: click.Context,
    /,
    cache: str,
    images: str | None,
    vae: str | None,
    sample: int | None,
    seed: int,
    device: str,
    as_json: bool,
    **dataset: str | None,
) -> None:
    """Check the latent cache CACHE, a folder that `encode` wrote in any format.

    Each file is compared with the manifest (lost, added, changed), read, and searched for values that are not finite;
    shapes, keys, the VAE and the settings must agree. With --images, some latents are computed again and compared.
    Nothing is written. Problems are listed, and the exit code is then 3.
    """
    if sample is not None and images is None:
        raise ConfigError("--sample says how many images to encode again: give these with --images as well")
    if images is None and (given := [name for name, value in dataset.items() if value is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} is of the dataset that was encoded: give --images as well")
    from sdvae.codec.verify import verify_cache

    with progress("verify") as on_progress:
        report = verify_cache(
            cache,
            images=images,
            vae=vae,
            sample=sample or _SAMPLE,
            seed=seed,
            device=device,
            **dataset,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    ctx.exit(report.exit_code)


def _print(report: VerifyReport) -> None:
    size = f"{report.size_bytes / 1e6:.3g} MB"
    click.echo(shown(f"{report.cache}: {report.format}, {report.num_files} files, {report.num_items} latents, {size}"))
    if report.vae_digest:
        stored = f"{report.store} in {report.latent_dtype}"
        click.echo(shown(f"of the VAE {report.vae} ({report.vae_digest[:19]}), {stored}"))
    for warning in report.warnings:
        click.echo(f"Warning: {warning}")
    if report.reencoded:
        worst = max(report.reencoded, key=lambda each: each.difference / each.tolerance)
        equal = sum(each.ok for each in report.reencoded)
        click.echo(
            f"encoded again: {equal} of {len(report.reencoded)} alike, at most {worst.difference:.2g} standard "
            f"deviations of z apart (up to {worst.tolerance:.2g} is rounding)"
        )
    if not report.problems:
        click.echo("No problems found.")
        return
    click.echo(f"{len(report.problems)} problem{'s' if len(report.problems) != 1 else ''}:")
    print_first(": ".join(filter(None, (each.file, each.key, each.reason))) for each in report.problems)
