"""`sdvae train`: a YAML file and overrides to a finished autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdvae.cli.options import dry_run_option, overwrite_option

if TYPE_CHECKING:
    from sdvae.training.config import TrainConfig
    from sdvae.training.plan import TrainPlan

__all__ = ["train_command"]


@click.command(
    "train",
    epilog="""\b
Examples:
  sdvae train configs/sdvae-mini.yaml --set data.path=photos --set run_dir=runs/mine
  sdvae train configs/sdvae-mini.yaml --set data.path=photos --set run_dir=runs/mine --resume""",
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. training.lr=1e-4."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in run_dir, bit for bit.")
@overwrite_option("Start afresh in a run_dir that holds another run, and replace it.")
@dry_run_option("Print the resolved config, what it trains and needs, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_context
def train_command(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train an autoencoder on photographs.

    CONFIG is a YAML file; the recipes in configs/ are a place to start. The run folder (run_dir) receives checkpoints,
    sample pictures, logs and, at the end, the finished autoencoder in run_dir/vae. Ctrl-C and SIGTERM write a
    checkpoint first. On several devices: accelerate launch -m sdvae train CONFIG.
    """
    from sdvae.cli.output import print_json
    from sdvae.config import config_to_dict, read_config
    from sdvae.errors import ConfigError, TrainingInterrupted
    from sdvae.training.config import TrainConfig

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    resolved = read_config(TrainConfig, config, overrides)
    if dry_run:
        from sdvae.training.plan import plan_training

        plan = plan_training(resolved)
        if as_json:
            print_json({"command": "train", "dry_run": True, "config": config_to_dict(resolved), **plan.to_json()})
        else:
            _print_plan(resolved, plan)
        return

    import logging

    from tqdm.contrib.logging import logging_redirect_tqdm

    from sdvae.training.loop import train

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sdvae").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            result = train(resolved, resume=resume, overwrite=overwrite)
    except TrainingInterrupted as error:
        click.echo(f"Interrupted: {error}", err=True)
        ctx.exit(error.exit_code)
    if not result.is_main_process:
        return
    if as_json:
        print_json(
            {
                "command": "train",
                "vae_dir": str(result.vae_dir),
                "steps": result.steps,
                "val_psnr": result.val_psnr,
                "val_lpips": result.val_lpips,
                "best_step": result.best_step,
                "scaling_factor": result.scaling_factor,
            }
        )
    else:
        measured = "" if result.val_psnr is None else f", {result.val_psnr:.2f} dB on the held-out images"
        click.echo(f"{result.vae_dir}: {result.steps} steps{measured}, scaling_factor {result.scaling_factor:g}")


def _print_plan(config: TrainConfig, plan: TrainPlan) -> None:
    """The resolved config as YAML, and what follows from it as YAML comments."""
    from sdvae.config import dump_config

    images = "a stream of images" if plan.num_train_images is None else f"{plan.num_train_images:,} images"
    epochs = "" if plan.epochs is None else f", {plan.epochs:.3g} epochs"
    share = 100 * plan.num_trained_parameters / plan.num_parameters
    click.echo(dump_config(config), nl=False)
    click.echo(f"# data: {images} for training, {plan.num_val_images} for validation")
    click.echo(f"# parameters: {plan.num_trained_parameters:,} trained of {plan.num_parameters:,} ({share:.3g}%)")
    click.echo(f"# steps: {plan.steps:,} of {plan.images_per_step:,} images on {plan.num_processes} device(s){epochs}")
    click.echo(f"# logs: metrics.jsonl{''.join(', ' + name for name in plan.trackers)}")
    click.echo(f"# memory per device, estimated: {plan.memory.total / 1e9:.2f} GB, of these")
    for name, size_bytes in plan.memory.to_json().items():
        if name != "total" and size_bytes:
            click.echo(f"#   {name.removesuffix('_bytes').replace('_', ' ')}: {size_bytes / 1e9:.3g} GB")
    for note in plan.notes:
        click.echo("# " + note.replace("\n", "\n# "))
    click.echo("# Nothing was written.")
