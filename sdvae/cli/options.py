"""The options of commands, each declared once, in the groups that become one options object.

A command hands what it gets on as `**options` to the dataclass of the group, which has the defaults and choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from sdvae.cli.output import note
from sdvae.codec.options import (
    COMPUTE_DTYPES,
    CROPS,
    DEFAULT_SHARD_SIZE,
    DEVICES,
    LATENT_DTYPES,
    STORES,
    TILINGS,
    EncodeOptions,
    RunOptions,
)
from sdvae.evaluation.protocol import METRIC_GROUPS
from sdvae.latents.formats import CACHE_FORMATS, DEFAULT_KOHYA_SUFFIX, KOHYA_SUFFIXES
from sdvae.precision.options import AuditOptions
from sdvae.processes import is_main_process

__all__ = [
    "announce_vae",
    "audit_options",
    "batch_size_option",
    "choice",
    "dataset_options",
    "device_option",
    "dry_run_option",
    "encode_options",
    "image_options",
    "json_option",
    "max_images_option",
    "number",
    "overwrite_option",
    "protocol_options",
    "run_options",
    "shard_option",
    "take",
    "tiling_options",
    "vae_option",
    "write_options",
]

F = TypeVar("F", bound=Callable[..., Any])

_GROUPS = ", ".join(METRIC_GROUPS)


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, listed by the help in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def choice(name: str, choices: Sequence[str], *, help: str, default: str | None = None) -> Callable[[F], F]:
    """One of a few names."""
    return click.option(name, type=click.Choice(choices), default=default, show_default=True, help=help)


def number(*names: str, help: str, metavar: str = "N", default: int | None = None, least: int = 1) -> Callable[[F], F]:
    """A whole number."""
    kind = click.IntRange(min=least)
    return click.option(*names, type=kind, metavar=metavar, default=default, show_default=True, help=help)


def overwrite_option(help: str) -> Callable[[F], F]:
    """help: what is replaced."""
    return click.option("--overwrite", is_flag=True, help=help)


def dry_run_option(help: str) -> Callable[[F], F]:
    """help: what is printed, and what is not done."""
    return click.option("--dry-run", is_flag=True, help=help)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

vae_option = click.option(
    "--vae", metavar="REF", help="The VAE: a folder, a file or a hub id.  [default: the bundled one]"
)

device_option = choice("--device", DEVICES, default=RunOptions.device, help="auto: cuda, mps, cpu.")

batch_size_option = number(
    "--batch-size", help="Images of one size that go through the VAE together.  [default: what suits the device]"
)

max_images_option = number("--max-images", help="Take N images, evenly spaced over the sorted names.")

run_options = _together(
    device_option,
    choice("--dtype", COMPUTE_DTYPES, default=RunOptions.dtype, help="Precision of the computation."),
    batch_size_option,
    number("--workers", help="Threads that read, and as many that write.  [default: one per core, at most 8]"),
)

tiling_options = _together(
    choice(
        "--tiling",
        TILINGS,
        default=RunOptions.tiling,
        help="exact: in strips, with the result of one pass; auto: where one pass does not fit into memory; blended: "
        "diffusers' tiles, approximate.",
    ),
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="For auto and exact, e.g. 4GB: of the process, on a GPU of its tensors.  [default: what is free]",
    ),
    number("--tile-size", metavar="PX", help="Of blended tiles.  [default: the VAE's]"),
    click.option(
        "--tile-overlap", type=click.FloatRange(0, 1, max_open=True), metavar="SHARE", help="Of them.  [default: 0.25]"
    ),
)

encode_options = _together(
    choice(
        "--format",
        CACHE_FORMATS,
        default=EncodeOptions.format,
        help="safetensors and kohya-npz: a file for each image; webdataset and parquet: shards.",
    ),
    number("--shard-size", help=f"webdataset and parquet: images in a shard.  [default: {DEFAULT_SHARD_SIZE}]"),
    choice(
        "--kohya-suffix",
        KOHYA_SUFFIXES,
        help=f"kohya-npz: which of kohya's trainers is to read the files.  [default: {DEFAULT_KOHYA_SUFFIX}]",
    ),
    click.option("--flip", is_flag=True, help="kohya-npz: encode the mirrored image too, for flip_aug."),
    choice(
        "--store",
        STORES,
        default=EncodeOptions.store,
        help="moments: mean and logvar of the posterior; mode: z = mean; sample: one draw of z.",
    ),
    click.option(
        "--seed",
        type=int,
        default=EncodeOptions.seed,
        show_default=True,
        help="Of the draw of --store sample and of kohya-npz.",
    ),
    choice("--latent-dtype", LATENT_DTYPES, default=EncodeOptions.latent_dtype, help="Precision in the file."),
)

image_options = _together(
    number("--size", help="Resize the short side to N px first."),
    choice("--crop", CROPS, default=EncodeOptions.crop, help="center: cut the resized image to N x N."),
    click.option(
        "--background",
        metavar="COLOUR",
        default=EncodeOptions.background,
        show_default=True,
        help="Under transparent pixels: a name or #rrggbb.",
    ),
    number("--max-pixels", help="Refuse larger images.  [default: 134217728]"),
)

protocol_options = _together(  # without defaults: what is not given is the preset's
    click.option("--size", "size_px", type=int, metavar="N", help="Resize the short side to N px."),
    choice("--crop", ["center", "none"], help="center: cut the resized image to N x N."),
    max_images_option,
    click.option(
        "--metrics", metavar="LIST", help=f"Names or groups, with commas. Groups: {', '.join(METRIC_GROUPS)}."
    ),
    choice("--posterior", ["mode", "sample"], help="z that is decoded: the mean, or a draw."),
    click.option("--seed", type=int, help="Of draws, bootstrap and KID."),
    choice("--dtype", COMPUTE_DTYPES, help="Precision of the VAEs."),
    choice("--tiling", ["off", "blended"], help="blended: the VAE's own tiled mode."),
    click.option("--background", metavar="COLOUR", help="Under transparent pixels: a name or #rrggbb."),
)

audit_options = _together(
    number(
        "--size", "size_px", help="Images are cut to central squares of N px.", default=AuditOptions.size_px, least=8
    ),
    number(
        "--limit",
        "max_images",
        default=AuditOptions.max_images,
        help="Take N images, evenly spaced over the sorted names.",
    ),
    number(
        "--probe-size",
        "probe_size_px",
        help="Of two images that are really computed in fp16; CPUs are slow at it.",
        default=AuditOptions.probe_size_px,
        least=8,
    ),
    device_option,
)

dataset_options = _together(
    click.option("--split", metavar="NAME", help="Of a dataset.  [default: train]"),
    click.option("--subset", metavar="NAME", help="Of a dataset that has several configurations."),
    click.option("--image-column", metavar="NAME", help="Of a dataset.  [default: image]"),
)

shard_option = click.option(
    "--shard",
    metavar="I/N",
    help="Only the I-th of N parts of the input; the parts share the folder.  [default: all]",
)

write_options = _together(
    overwrite_option("Do again what is done; replace files that sdvae did not write."),
    dry_run_option("Print what would be done, and write nothing."),
    json_option,
)


def take(kind: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of what a command was given, what is a field of this dataclass; it is taken out, for a command that has two."""
    return {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}


def announce_vae(vae: str | None) -> None:
    """Say on stderr which VAE serves where none was given; of several processes one says it."""
    if vae is None and is_main_process():
        from sdvae.checkpoints.store import BUNDLED_NAME

        note(f"No --vae given: using the bundled {BUNDLED_NAME}.")
