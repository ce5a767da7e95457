"""`sdvae encode`: images -> latent files or shards of them."""

from __future__ import annotations

from typing import Any

import click

from sdvae.cli.execute import plan_or_run
from sdvae.cli.options import (
    announce_vae,
    choice,
    dataset_options,
    encode_options,
    image_options,
    number,
    run_options,
    shard_option,
    tiling_options,
    vae_option,
    write_options,
)
from sdvae.codec.options import ENGINES, EncodeOptions

__all__ = ["encode_command"]


@click.command(
    name="encode",
    epilog="""\b
Examples:
  sdvae encode photos latents
  sdvae encode hf://datasets/owner/name shards --vae my-vae --size 512 --crop center --format webdataset""",
)
@click.argument("images")
@click.argument("out", type=click.Path())
@vae_option
@encode_options
@image_options
@dataset_options
@run_options
@tiling_options
@shard_option
@choice(
    "--engine",
    ENGINES,
    default=EncodeOptions.engine,
    help="ray: workers on the cluster of RAY_ADDRESS, or on this machine.",
)
@number("--ray-workers", help="Workers of --engine ray, each with the VAE.  [default: one per GPU, else per CPU core]")
@write_options
@click.pass_context
def encode_command(
    ctx: click.Context, /, images: str, out: str, vae: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Encode IMAGES into one latent file each, or into shards, in the folder OUT.

    IMAGES is a folder (OUT mirrors its tree), a file, a glob in quotes, or a .txt list; tar shards of images: a .tar, a
    folder of these, or a glob; or a dataset: a .parquet or .arrow file, a folder of these, or hf://datasets/OWNER/NAME.
    Run again, it does what is missing or stale: where the image, the VAE or the options changed. OUT/manifest.jsonl
    lists the latents, with digests.

    --shard, `accelerate launch` and --engine ray divide the work over devices and machines; the docs on scale say how.
    """
    settings = EncodeOptions(**options)
    announce_vae(vae)
    from sdvae.codec.run import EncodeRun

    plan_or_run(ctx, EncodeRun(images, out, vae, settings), dry_run, as_json)
