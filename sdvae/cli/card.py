"""`sdvae card`: the model card of a VAE folder, from what was recorded and measured."""

from __future__ import annotations

from pathlib import Path

import click

from sdvae.cli.check import AUDIT_NAME
from sdvae.cli.options import dry_run_option, json_option, overwrite_option
from sdvae.cli.output import note, print_json, shown

__all__ = ["card_command"]


@click.command(
    name="card",
    epilog="""\b
Examples:
  sdvae card my-vae --license apache-2.0 --dry-run
  sdvae card runs/mine/vae --run runs/mine --evaluation report/result.json --audit audit --repo me/my-vae""",
)
@click.argument("vae", type=click.Path(path_type=Path))
@click.option("--run", type=click.Path(path_type=Path), metavar="DIR", help="The run folder of `sdvae train`.")
@click.option("--evaluation", type=click.Path(path_type=Path), metavar="FILE", help="result.json of `sdvae evaluate`.")
@click.option("--audit", type=click.Path(path_type=Path), metavar="FILE", help=f"{AUDIT_NAME} of `sdvae check --out`.")
@click.option("--license", metavar="ID", help="As the hub names it.  [default: what the VAE's config.json records]")
@click.option("--repo", metavar="ID", help="Where it will be on the hub, for the commands in the card.")
@overwrite_option("Replace a README.md that was written or changed by hand.")
@dry_run_option("Print the card, and write nothing.")
@json_option
def card_command(
    vae: Path,
    run: Path | None,
    evaluation: Path | None,
    audit: Path | None,
    license: str | None,
    repo: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write README.md, the model card, into the folder VAE.

    Everything in it comes from the VAE's files, the run folder, the evaluation and the audit; what none of them holds
    is named as not measured or not recorded. A run, an evaluation or an audit of another VAE is refused.
    """
    from sdvae.card.build import build_card, write_card
    from sdvae.card.result import load_audit
    from sdvae.report.result import load_result

    result = (
        None if evaluation is None else load_result(evaluation / "result.json" if evaluation.is_dir() else evaluation)
    )
    record = None if audit is None else load_audit(audit / AUDIT_NAME if audit.is_dir() else audit)
    card = build_card(vae, run=run, result=result, audit=record, license=license, repo=repo)
    path, status = write_card(vae, card, overwrite=overwrite, dry_run=dry_run)
    if as_json:
        data = {"path": str(path), "status": status, "missing": list(card.missing), "text": card.text}
        print_json({"command": "card", "dry_run": dry_run} | data)
        return
    if dry_run:
        click.echo(card.text, nl=False)
    else:
        click.echo(shown(f"{path}: {status}"))
    for line in card.missing:
        note(f"Missing: {line}")
    if dry_run:
        note(shown(f"Would write it to {path} ({status}). Nothing was written."))
