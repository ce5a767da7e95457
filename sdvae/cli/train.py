"""`sdvae train`: a YAML file and overrides to a finished autoencoder."""

from __future__ import annotations

import click

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
@click.option("--overwrite", is_flag=True, help="Start afresh in a run_dir that holds another run, and replace it.")
@click.option("--dry-run", is_flag=True, help="Print the resolved config and the images found, and stop.")
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
    """Train an autoencoder on a folder of photographs.

    CONFIG is a YAML file; the recipes in configs/ are a place to start. The run folder (run_dir) receives checkpoints,
    sample pictures, logs and, at the end, the finished autoencoder in run_dir/vae.
    """
    import json

    from sdvae.config import config_to_dict, dump_config, read_config
    from sdvae.errors import ConfigError
    from sdvae.training.config import TrainConfig

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    resolved = read_config(TrainConfig, config, overrides)
    if dry_run:
        from sdvae.training.data import split_images

        train_paths, val_paths = split_images(resolved.data)
        counts = {"num_train_images": len(train_paths), "num_val_images": len(val_paths)}
        if as_json:
            click.echo(json.dumps({"config": config_to_dict(resolved), **counts}, indent=2))
        else:
            click.echo(dump_config(resolved), nl=False)
            click.echo(f"# images: {len(train_paths)} for training, {len(val_paths)} held out")
        return

    import logging

    from sdvae.training.loop import train

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sdvae").setLevel(logging.INFO)
    try:
        result = train(resolved, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. The newest checkpoint in {resolved.run_dir} is whole; --resume goes on.", err=True)
        ctx.exit(130)
    if not result.is_main_process:
        return
    if as_json:
        values = {
            "vae_dir": str(result.vae_dir),
            "steps": result.steps,
            "val_psnr": result.val_psnr,
            "scaling_factor": result.scaling_factor,
        }
        click.echo(json.dumps(values, indent=2))
    else:
        measured = "" if result.val_psnr is None else f", {result.val_psnr:.2f} dB on the held-out images"
        click.echo(f"{result.vae_dir}: {result.steps} steps{measured}, scaling_factor {result.scaling_factor:g}")
