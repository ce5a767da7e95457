"""`sdvae push`: a VAE folder with its model card to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from sdvae.cli.options import dry_run_option, json_option
from sdvae.cli.output import note, print_json, shown

__all__ = ["push_command"]


@click.command(
    name="push",
    epilog="""\b
Examples:
  sdvae push my-vae me/my-vae --private
  sdvae push my-vae org/their-vae --create-pr --message 'Retrained decoder'""",
)
@click.argument("vae", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Where the repository is made now: for you and your organization alone.")
@click.option("--message", metavar="TEXT", help="Title of the commit.  [default: Upload VAE with sdvae]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@dry_run_option("Check everything on this machine, and upload nothing.")
@json_option
def push_command(
    vae: Path, repo: str, private: bool, message: str | None, create_pr: bool, dry_run: bool, as_json: bool
) -> None:
    """Upload the folder VAE to the repository REPO, "org/name": config.json, weights and README.md.

    The VAE is loaded first and must have a model card (`sdvae card`). Files go as they are, in one commit; nothing
    else in the folder is uploaded. Needs a token that may write: `hf auth login`.
    """
    from sdvae.card.push import push

    report = push(vae, repo, private=private, message=message, create_pr=create_pr, dry_run=dry_run)
    if as_json:
        print_json({"command": "push", "dry_run": dry_run} | report.to_json())
        return
    for file in report.files:
        click.echo(shown(f"{file.name}  {file.size_bytes:,} bytes"))
    if report.not_uploaded:
        note(shown(f"Not uploaded: {', '.join(report.not_uploaded)}"))
    if dry_run:
        click.echo(f"Would push {len(report.files)} files to {report.repo}. Nothing was uploaded.")
    else:
        click.echo(str(report.url))
