"""`sdvae decode`: latent files -> images."""

from __future__ import annotations

from typing import Any

import click

from sdvae.cli.execute import plan_or_run
from sdvae.cli.options import announce_vae, choice, run_options, shard_option, tiling_options, vae_option, write_options
from sdvae.codec.options import IMAGE_FORMATS, DecodeOptions

__all__ = ["decode_command"]


@click.command(
    name="decode",
    epilog="""\b
Examples:
  sdvae decode latents images
  sdvae decode latents images --vae my-vae --format jpg --quality 90""",
)
@click.argument("latents")
@click.argument("out", type=click.Path())
@vae_option
@choice(
    "--format",
    list(IMAGE_FORMATS),
    default=DecodeOptions.format,
    help="png and webp keep every pixel; webp with --quality does not.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), metavar="N", help="Of jpg and webp.  [default: jpg 95, webp lossless]"
)
@click.option("--allow-other-vae", is_flag=True, help="Decode latents that another VAE made, too.")
@run_options
@tiling_options
@shard_option
@write_options
@click.pass_context
def decode_command(
    ctx: click.Context, /, latents: str, out: str, vae: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Decode LATENTS into one image each, in the folder OUT.

    LATENTS is a folder of latent files (OUT mirrors its tree), one file, or a glob in quotes. Images have the size and
    the name of their source. Run again, it does what is missing or stale.
    """
    settings = DecodeOptions(**options)
    announce_vae(vae)
    from sdvae.codec.run import DecodeRun

    plan_or_run(ctx, DecodeRun(latents, out, vae, settings), dry_run, as_json)
