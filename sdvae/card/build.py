"""The model card of a VAE folder: README.md with the front matter that the hub reads.

Every number and name comes from the VAE's files, the folder of its training run, or an evaluation or audit of exactly
this VAE.
What none of them holds is left out, and named as missing. Folders of this machine are not published: of a path, the
card has the last name. Left out: uploading (`card/push.py`), and pictures.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdvae._version import __version__
from sdvae.card.push import REPO_PLACEHOLDER
from sdvae.card.result import AuditRecord, entry_of, hub_results, precision_of, view_of
from sdvae.card.run_record import RunRecord
from sdvae.card.text import cell
from sdvae.checkpoints.describe import describe_vae
from sdvae.checkpoints.formats import CARD_NAME, CONFIG_NAME, SCALE_FIELDS
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.files import write_atomic
from sdvae.report.result import EvaluationResult
from sdvae.report.text import count, plain

__all__ = ["Card", "build_card", "write_card"]

Row = dict[str, Any]

_TAGS = ["autoencoder", "vae", "sdvae"]
_MARK = re.compile(r"<!-- Written by sdvae card.*?; text (?P<text>[0-9a-f]{16}) -->\n\Z")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors headers say it


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model card, and what it says is missing."""

    text: str
    missing: tuple[str, ...]


def build_card(
    vae: str | Path,
    *,
    run: str | Path | None = None,
    result: EvaluationResult | None = None,
    audit: AuditRecord | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> Card:
    """Compose the model card of a VAE folder.

    run: the folder of the training run that made it. result: an evaluation that measured it. audit: of its precision.
    license: as the hub names it; None: what the VAE's notes record. repo: "org/name", for the commands in the card;
    None: a placeholder.
    Raises: CheckpointError for a VAE that does not load; ConfigError for a run, result or audit of another VAE.
    """
    path = Path(vae).expanduser()
    facts = _describe(path)
    entry = None if result is None else entry_of(result, facts["digest"])
    if audit is not None:
        audit.check_digest(facts["digest"])
    run_facts = None if run is None else RunRecord(Path(run).expanduser(), path, facts)
    chosen_license = license or facts["notes"].get("license")
    missing = tuple(_missing(facts, run_facts, entry, audit, chosen_license))
    title = repo.rpartition("/")[2] if repo else _title(path.resolve())
    body = (
        _environment()
        .get_template("card.md")
        .render(
            title=title,
            repo=repo or REPO_PLACEHOLDER,
            ratio=facts["spatial_compression_ratio"],
            config=facts["config"],
            variant=_variant(facts),
            to_latents=_to_latents(facts["config"]),
            network=list(_network(facts)),
            scale=[(name, plain(facts["config"][name])) for name in SCALE_FIELDS],
            scale_origin=_scale_origin(facts, run_facts),
            history=list(_history(facts["notes"])),
            training=None if run_facts is None else run_facts.view(),
            evaluation=None if result is None or entry is None else view_of(result, entry),
            precision=None if entry is None else precision_of(entry),
            audit=audit,
            loaders=[_loader(verdict) for verdict in facts["loaders"]],
            limits=list(_limits(facts)),
            missing=missing,
        )
    )
    front = _front_matter(title, chosen_license, result, entry)
    return Card(text=_marked(f"---\n{front}\n---\n\n{body.strip()}\n", facts["digest"]), missing=missing)


def write_card(folder: str | Path, card: Card, *, overwrite: bool = False, dry_run: bool = False) -> tuple[Path, str]:
    """Write README.md into the VAE's folder, in one step.

    overwrite: also replace a README.md that sdvae did not write, or that was changed since.
    Returns: its path, and `new`, `replaced` or `up to date`. Raises: OutputExistsError.
    """
    path = Path(folder).expanduser() / CARD_NAME
    status = "new"
    if path.exists():
        present = path.read_text(encoding="utf-8", errors="replace")
        status = "up to date" if present == card.text else "replaced"
        if status == "replaced" and not overwrite and (reason := _not_ours(present)):
            raise OutputExistsError(f"{path} {reason}; replace it with --overwrite, or keep a copy under another name")
    if not dry_run and status != "up to date":
        write_atomic(card.text.encode(), path)
    return path, status


def _marked(text: str, digest: str) -> str:
    """The text with a comment behind it that tells a generated card, its VAE, and whether it was changed since."""
    return f"{text}\n<!-- Written by sdvae card, {__version__}; vae {digest}; text {_text_digest(text)} -->\n"


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _not_ours(text: str) -> str | None:
    match = _MARK.search(text)
    if match is None:
        return "was not written by sdvae card"
    return None if _text_digest(text[: match.start()]) == match["text"] else "was changed since sdvae card wrote it"


# The VAE


def _describe(path: Path) -> Row:
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{path} is no folder of a VAE with its {CONFIG_NAME}; make one first: sdvae convert {path} DIR"
        )
    facts = describe_vae(path)
    if facts["class_name"] != "AutoencoderKL":
        raise ConfigError(f"{path} holds a {facts['class_name']}; cards are written for AutoencoderKL")
    if not facts["loads"]:
        raise CheckpointError(f"{path}: no card is written for a VAE that does not load: {facts['reason']}")
    return facts


def _title(folder: Path) -> str:
    """The folder's name; that of the run for the folders that a run makes."""
    return folder.parent.name if folder.name in ("vae", "vae-best") and folder.parent.name else folder.name


def _variant(facts: Row) -> str | None:
    """As in diffusion_pytorch_model.<variant>.safetensors, where there are no plain weights."""
    match = re.fullmatch(r"diffusion_pytorch_model\.([^.]+)\.safetensors", Path(facts["weights"]).name)
    return match[1] if match else None


def _to_latents(config: Row) -> str:
    z = "(z - vae.config.shift_factor)" if config["shift_factor"] else "z"
    return f"{z} * vae.config.scaling_factor"


def _network(facts: Row) -> Iterator[tuple[str, str]]:
    config = facts["config"]
    yield "compression of each side", str(facts["spatial_compression_ratio"])
    for field in ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "act_fn"):
        yield f"`{field}`", plain(config[field])
    yield "attention in the middle", plain(config["mid_block_add_attention"])
    yield "quant_conv, post_quant_conv", f"{plain(config['use_quant_conv'])}, {plain(config['use_post_quant_conv'])}"
    yield "parameters", count(facts["num_parameters"])
    yield (
        "stored as",
        f"{', '.join(_DTYPES.get(name, name) for name in facts['dtypes'])}, {facts['size_bytes'] / 1e6:.1f} MB",
    )
    yield "digest", f"`{facts['digest']}`"


def _scale_origin(facts: Row, run: RunRecord | None) -> str:
    if calibration := facts["notes"].get("calibration"):
        errors = calibration.get("standard_errors", {})
        uncertain = [f"{name} {plain(value)}" for name, value in errors.items() if value is not None]
        measured = ", ".join(f"`{name}`" for name in errors) or "`scaling_factor`"
        sentence = f"Measured by `sdvae calibrate`: {measured}, over {count(calibration.get('num_images'))} images"
        return sentence + (f"; standard errors: {'; '.join(uncertain)}." if uncertain else ".")
    if run is not None and (images := run.calibrated_on):
        return (
            f"`scaling_factor` was measured at the end of training, from draws of z of {count(images)} training crops."
        )
    return "Where these numbers come from is not recorded."


def _history(notes: Row) -> Iterator[str]:
    if source := notes.get("source"):
        yield f"Made from {source}" + (f" (`{notes['source_digest']}`)" if "source_digest" in notes else "")
    elif "source_digest" in notes:
        yield f"Made from the VAE `{notes['source_digest']}`"
    yield from notes.get("rewrites", ())


def _loader(verdict: Row) -> Row:
    return {
        "name": verdict["loader"],
        "takes": verdict["takes"],
        "scale_from": verdict["scale_from"],
        "reasons": "; ".join(verdict["reasons"]),
    }


def _limits(facts: Row) -> Iterator[str]:
    ratio = facts["spatial_compression_ratio"]
    yield (
        "A diffusion model fits the latents that it was trained on. Whether those of another autoencoder are alike is "
        "what the swap test of `sdvae evaluate --reference` measures."
    )
    if ratio > 1:
        yield (
            f"diffusers' `encode` drops what a side has beyond a multiple of {ratio} pixels. `sdvae encode` pads, and "
            f"`sdvae decode` crops back."
        )
    yield "A reconstruction is not the original: detail that the latent does not hold is lost."
    if facts["config"]["force_upcast"]:
        yield "`force_upcast` is set: pipelines that read it compute this autoencoder in float32."


def _missing(
    facts: Row, run: RunRecord | None, entry: Row | None, audit: AuditRecord | None, license: str | None
) -> Iterator[str]:
    if license is None:
        yield "license: not stated"
    if run is None:
        yield "training: not recorded"
    if not facts["notes"].get("calibration") and not (run is not None and run.calibrated_on):
        yield "scale: where scaling_factor comes from is not recorded"
    if entry is None:
        yield "quality: not measured"
    if audit is None and (entry is None or not precision_of(entry)):
        yield "float16 and bfloat16: not measured; `sdvae check VAE --out DIR` does that, `--audit DIR` adds it"


# Front matter and text


def _front_matter(title: str, license: str | None, result: EvaluationResult | None, entry: Row | None) -> str:
    from huggingface_hub import ModelCardData

    results = [] if result is None or entry is None else list(hub_results(result, entry))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        tags=list(_TAGS),
        model_name=title if results else None,  # the hub shows results under a name
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _images(number: int) -> str:
    return f"{count(number)} image{'s' if number != 1 else ''}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sdvae.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "count": count, "images": _images}
    return environment
