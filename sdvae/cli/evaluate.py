"""`sdvae evaluate`: how good autoencoders are, and whether one is better than a reference."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.options import (
    announce_vae,
    batch_size_option,
    device_option,
    dry_run_option,
    json_option,
    max_images_option,
    overwrite_option,
)
from sdvae.cli.output import print_json, print_result, progress, shown
from sdvae.codec.options import COMPUTE_DTYPES
from sdvae.evaluation.options import STRESS_NAMES, EvaluateOptions, stress_names
from sdvae.evaluation.protocol import METRIC_GROUPS, PRESETS, Protocol, metric_names

if TYPE_CHECKING:
    from sdvae.evaluation.plan import EvaluationPlan

__all__ = ["evaluate_command"]

_STRESS = "cycles,sampling"  # the two that cost no more than some dozens of passes


@click.command(
    name="evaluate",
    epilog="""\b
Examples:
  sdvae evaluate photos --vae runs/mine/vae --reference stabilityai/sd-vae-ft-mse --out report
  sdvae evaluate photos --metrics plain --out report --fail-if 'psnr<24.5'""",
)
@click.argument("images")
@click.option("--out", type=click.Path(), required=True, help="Folder for result.json, per_image.csv and report.html.")
@click.option(
    "--vae", "vaes", metavar="REF", multiple=True, help="A VAE to measure; may be repeated.  [default: the bundled one]"
)
@click.option("--reference", metavar="REF", help="The VAE that the others are compared with, image by image.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="native",
    show_default=True,
    help="Pins everything below down to --background.",
)
@click.option("--size", "size_px", type=int, metavar="N", help="Resize the short side to N px.")
@click.option("--crop", type=click.Choice(["center", "none"]), help="center: cut the resized image to N x N.")
@max_images_option
@click.option("--metrics", metavar="LIST", help=f"Names or groups, with commas. Groups: {', '.join(METRIC_GROUPS)}.")
@click.option("--posterior", type=click.Choice(["mode", "sample"]), help="z that is decoded: the mean, or a draw.")
@click.option("--seed", type=int, help="Of draws, bootstrap and KID.")
@click.option("--dtype", type=click.Choice(COMPUTE_DTYPES), help="Precision of the VAEs.")
@click.option("--tiling", type=click.Choice(["off", "blended"]), help="blended: the VAE's own tiled mode.")
@click.option("--background", metavar="COLOUR", help="Under transparent pixels: a name or #rrggbb.")
@click.option(
    "--stress",
    metavar="LIST",
    help=f"all, none, or of {', '.join(STRESS_NAMES)}.  [default: {_STRESS}; none with --preset quick]",
)
@click.option(
    "--stress-images",
    type=click.IntRange(min=1),
    default=EvaluateOptions.stress_images,
    show_default=True,
    metavar="N",
    help="Images that the stress tests use.",
)
@click.option(
    "--swap-images",
    type=click.IntRange(min=1),
    default=EvaluateOptions.swap_images,
    show_default=True,
    metavar="N",
    help="Images that the swap test against the reference uses.",
)
@click.option(
    "--gallery",
    "gallery_images",
    type=click.IntRange(min=0),
    default=EvaluateOptions.gallery_images,
    show_default=True,
    metavar="N",
    help="Pictures in the report: the worst by each metric, and evenly spaced ones.",
)
@click.option(
    "--fid-stats",
    "fid_statistics",
    type=click.Path(path_type=Path),
    help="rFID against these statistics (.npz with mu and sigma) instead of the originals.",
)
@click.option(
    "--save-fid-stats",
    "save_fid_statistics",
    type=click.Path(path_type=Path),
    help="Write the originals' statistics here.",
)
@click.option(
    "--published",
    type=click.Choice(["coco", "laion", "imagenet", "all"]),
    help="Show published numbers of Stable Diffusion's VAEs beside.",
)
@click.option(
    "--weights",
    "weights_path",
    type=click.Path(path_type=Path),
    help="Folder with the frozen networks' weights.  [default: $SDVAE_WEIGHTS, torch hub's cache, download]",
)
@click.option("--skip-unavailable", is_flag=True, help="Leave out metrics whose package or weights cannot be had.")
@click.option(
    "--fail-if",
    "gates",
    metavar="CONDITION",
    multiple=True,
    help="Exit code 1 where it holds, e.g. 'psnr<24.5', 'delta.lpips>0.005'; may be repeated.",
)
@device_option
@batch_size_option
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Threads that read.  [default: one per core, at most 8]"
)
@overwrite_option("Replace what another evaluation left in --out.")
@dry_run_option("Print the protocol and what would be done, and write nothing.")
@json_option
@click.pass_context
def evaluate_command(
    ctx: click.Context,
    /,
    images: str,
    out: str,
    vaes: tuple[str, ...],
    reference: str | None,
    preset: str,
    metrics: str | None,
    stress: str | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure VAEs on IMAGES, and write a report that opens in any browser.

    IMAGES is a folder, a file, a glob in quotes, or a .txt list; each first subfolder is a slice. Interrupted,
    the same command goes on. On several devices: accelerate launch -m sdvae evaluate ...
    """
    protocol = _protocol(preset, metrics, settings)
    options = EvaluateOptions(stress=stress_names(stress or ("none" if preset == "quick" else _STRESS)), **settings)
    announce_vae(vaes[0] if vaes else None)
    from sdvae.evaluation.plan import plan_evaluation

    plan = plan_evaluation(images, vaes, reference, out, protocol, options)
    if dry_run:
        _print_plan(plan, as_json)
        return
    from sdvae.evaluation.runner import run_evaluation

    with progress("evaluate") as on_progress:
        result = run_evaluation(plan, on_progress)
    if result is None:  # another process of the same launch tells it
        return
    if as_json:
        print_json({"command": "evaluate", "out": out, **result.to_json(large=False)})
    else:
        print_result(result)
        click.echo(shown(f"Report: {Path(out) / 'report.html'}"))
    ctx.exit(result.exit_code)


def _protocol(preset: str, metrics: str | None, settings: dict[str, Any]) -> Protocol:
    """The preset with what was given besides; takes its options out of `settings`."""
    names = {field.name for field in fields(Protocol)} - {field.name for field in fields(EvaluateOptions)}
    given = {name: value for name in names & settings.keys() if (value := settings.pop(name)) is not None}
    if metrics is not None:
        given["metrics"] = metric_names(metrics)
    changed = {name: value for name, value in given.items() if value != getattr(PRESETS[preset], name)}
    if not changed:
        return PRESETS[preset]
    return replace(PRESETS[preset], preset=f"{preset} changed", **changed)


def _print_plan(plan: EvaluationPlan, as_json: bool) -> None:
    from sdvae.errors import SdvaeError
    from sdvae.evaluation.protocol import SET_METRICS
    from sdvae.features.inception import find_inception_weights
    from sdvae.metrics.table import IMAGE_METRICS

    weights, given = {}, plan.options.weights_path
    for name in plan.protocol.metrics:
        try:
            path = find_inception_weights(given) if name in SET_METRICS else IMAGE_METRICS[name].find_weights(given)
        except SdvaeError as error:
            weights[name] = f"not at hand: {str(error).splitlines()[0]}"
        else:
            if path is not None:
                weights[name] = str(path)
    if as_json:
        print_json({"command": "evaluate", "dry_run": True, **plan.to_json(), "weights": weights})
        return
    click.echo(shown(f"{len(plan.files)} of {plan.num_found} images in {plan.source} -> {plan.out}"))
    for entrant in plan.entrants:
        click.echo(shown(f"{entrant.role}: {entrant.id} ({entrant.ref or 'bundled'})"))
    for name, value in plan.protocol.to_json().items():
        click.echo(f"  {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, place in weights.items():
        click.echo(shown(f"weights for {name}: {place}"))
    for name, reason in plan.skipped_metrics:
        click.echo(f"left out: {name}: {reason}")
    click.echo("Nothing was written.")
