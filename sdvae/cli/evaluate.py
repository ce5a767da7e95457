"""`sdvae evaluate`: how good autoencoders are, and whether one is better than a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.options import (
    announce_vae,
    batch_size_option,
    choice,
    device_option,
    dry_run_option,
    json_option,
    number,
    overwrite_option,
    protocol_options,
    take,
)
from sdvae.cli.output import print_json, print_result, progress, shown
from sdvae.evaluation.options import STRESS_NAMES, EvaluateOptions, stress_names
from sdvae.evaluation.protocol import PRESETS, Protocol, metric_names

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
@choice("--preset", list(PRESETS), default="native", help="Pins everything below down to --background.")
@protocol_options
@click.option(
    "--stress",
    metavar="LIST",
    help=f"all, none, or of {', '.join(STRESS_NAMES)}.  [default: {_STRESS}; none with --preset quick]",
)
@number("--stress-images", help="Images that the stress tests use.", default=EvaluateOptions.stress_images)
@number(
    "--swap-images", help="Images that the swap test against the reference uses.", default=EvaluateOptions.swap_images
)
@number(
    "--gallery",
    "gallery_images",
    help="Pictures in the report: the worst by each metric, and evenly spaced ones.",
    default=EvaluateOptions.gallery_images,
    least=0,
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
@choice(
    "--published",
    ["coco", "laion", "imagenet", "all"],
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
@number("--workers", help="Threads that read.  [default: one per core, at most 8]")
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
    **given: Any,
) -> None:
    """Measure VAEs on IMAGES, and write a report that opens in any browser.

    IMAGES is a folder, a file, a glob in quotes, or a .txt list; each first subfolder is a slice. Interrupted,
    the same command goes on. On several devices: accelerate launch -m sdvae evaluate ...
    """
    settings = take(EvaluateOptions, given)
    protocol = _protocol(preset, metrics=None if metrics is None else metric_names(metrics), **given)
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


def _protocol(preset: str, **given: Any) -> Protocol:
    """The preset with what was given besides; None: not given."""
    protocol = PRESETS[preset]
    changed = {name: value for name, value in given.items() if value not in (None, getattr(protocol, name))}
    return replace(protocol, preset=f"{preset} changed", **changed) if changed else protocol


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
