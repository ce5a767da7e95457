"""`sdvae inspect`: what a VAE, a latent file, a latent cache or a run folder is."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from sdvae.cli.options import json_option
from sdvae.cli.output import print_fields, print_json, shown
from sdvae.errors import ConfigError

__all__ = ["inspect_command"]

_MAX_COLUMNS = 120
_TAKES = 4  # columns of "yes" and "no"


@click.command(
    name="inspect",
    epilog="""\b
Examples:
  sdvae inspect sdvae-mini
  sdvae inspect latents/photo.jpg.safetensors --json""",
)
@click.argument("path")
@json_option
def inspect_command(path: str, as_json: bool) -> None:
    """Say what PATH is: a VAE, a latent file, a latent cache or a training run.

    A VAE is a folder, a pipeline folder, a file of any layout, or a hub id that has been downloaded; "sdvae-mini"
    stands for the bundled one. Of a VAE it also says which programs take it as it is, and what would help the others.
    """
    data = _describe(path)
    if as_json:
        print_json(data)
    elif "loaders" in data:
        _print_vae(data)
    else:
        print_fields(data)


def _describe(ref: str) -> dict[str, Any]:
    from sdvae.checkpoints.describe import describe_vae
    from sdvae.checkpoints.hub import is_hub_id
    from sdvae.checkpoints.read import BUNDLED_NAME
    from sdvae.latents.header import is_latent_file
    from sdvae.latents.manifest import MANIFEST_NAME

    path = Path(ref).expanduser()
    if not path.exists():
        if ref == BUNDLED_NAME or is_hub_id(ref):
            return describe_vae(ref)
        raise ConfigError(f"{ref} does not exist; expected a VAE, a latent file, a latent cache or a run folder")
    if path.is_file() and is_latent_file(path):
        return _describe_latent(path)
    if path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file():
        return _describe_cache(path)
    if (path / "config.yaml").is_file() and (path / "environment.json").is_file():
        return _describe_run(path)
    return describe_vae(ref)


# -------------------------------------------------------------------------------------------------- latents and runs


def _describe_latent(path: Path) -> dict[str, Any]:
    from sdvae.latents.safetensors import LatentFile

    file = LatentFile.read(path)
    tensors = {**file.tensors, "latents": file.latents()}
    return {
        "path": str(path),
        "kind": "latent file",
        "size_bytes": path.stat().st_size,
        "tensors": {name: _statistics(tensor) for name, tensor in tensors.items()},
        **file.header.to_json(),
    }


def _statistics(tensor: Any) -> dict[str, Any]:
    values = tensor.double()
    return {
        "shape": list(tensor.shape),  # (C, h, w)
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


def _describe_cache(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from sdvae.latents.manifest import read_manifest

    manifest = read_manifest(path)
    settings = [asdict(each) for each in manifest.settings.values()]
    files = manifest.files.values()
    return {
        "path": str(path),
        "kind": "latent cache",
        "format": manifest.format,
        "num_files": manifest.num_files,
        "num_items": manifest.num_items,
        "size_bytes": sum(file.size_bytes for file in files),
        "shapes": [list(shape) for shape in sorted({item.shape for file in files for item in file.items})],
        **(settings[0] if len(settings) == 1 else {"mixed_settings": settings}),
        "sdvae_version": manifest.sdvae_version,
    }


def _describe_run(path: Path) -> dict[str, Any]:
    from sdvae.checkpoints.describe import describe_vae

    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    checkpoints = sorted(found.name for found in (path / "checkpoints").glob("step-*") if found.suffix != ".partial")
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return {
        "path": str(path),
        "kind": "training run",
        "checkpoints": checkpoints,
        "last_metrics": _merged(lines),
        "vae": describe_vae(path / "vae") if (path / "vae").is_dir() else None,
        "environment": environment,
    }


def _merged(lines: list[str]) -> dict[str, Any]:
    """The newest value of each quantity in a metrics log; a last line that is being written does not count."""
    newest: dict[str, Any] = {}
    for line in lines:
        try:
            newest |= json.loads(line)
        except ValueError:
            continue
    return newest


# ----------------------------------------------------------------------------------------------------------- one VAE


def _print_vae(data: Mapping[str, Any]) -> None:
    """What `describe_vae` says, for reading."""
    _field("path", data["path"])
    _field("kind", f"{data['kind']} ({data['evidence']})")
    if data["class_name"]:
        _field("class", data["class_name"])
    if "num_tensors" in data:
        dtypes = ", ".join(
            dtype if len(data["dtypes"]) == 1 else f"{count} {dtype}" for dtype, count in data["dtypes"].items()
        )
        size = _size(data["size_bytes"])
        _field("weights", f"{data['num_tensors']} tensors, {data['num_parameters']:,} parameters, {dtypes}, {size}")
    if not data["loads"]:
        _field("loads", f"no: {data['reason']}")
    else:
        _field("digest", data["digest"])
    if scale := data.get("scale"):
        own = ", ".join(
            f"{name} {_short(value)}" for name, value in scale.items() if name != "from" and value is not None
        )
        _field("scale", f"{own} ({scale['from']})")
    if data.get("config"):
        _section("config", {name: _short(value) for name, value in sorted(data["config"].items())})
    if data.get("notes"):
        _section("notes", {name: _short(value) for name, value in data["notes"].items()})
    for remark in data.get("remarks", ()):
        _field("remark", remark)
    if data.get("files"):
        click.echo("files:")
        width = max(len(file["name"]) for file in data["files"])
        for file in data["files"]:
            click.echo(shown(f"  {file['name']:{width}}  {_size(file['size_bytes']):>8}  sha256:{file['sha256']}"))
    if data["loaders"]:
        _print_loaders(data["loaders"])


def _print_loaders(verdicts: list[Mapping[str, Any]]) -> None:
    """Programs of the same verdict are one row: names, answer, and what there is to say, each in its column."""
    click.echo("programs that take it as it is:")
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    for verdict in verdicts:
        lines = [f"{reason}." for reason in verdict["reasons"]]
        if verdict["takes"]:
            lines.insert(0, f"Scale from {verdict['scale_from']}.")
        key = ("yes" if verdict["takes"] else "no", _sentences(lines), verdict["fix"])
        groups.setdefault(key, []).append(verdict["loader"])
    width = 1 + max(len(verdict["loader"]) for verdict in verdicts)  # of a name and the comma behind it
    columns = min(_MAX_COLUMNS, shutil.get_terminal_size((_MAX_COLUMNS, 1)).columns)
    indent = width + 3 + _TAKES
    for (answer, text, fix), names in groups.items():
        left = _names(names, width)
        right = textwrap.wrap(shown(text), max(columns - indent, 40), break_long_words=False, break_on_hyphens=False)
        for index, (name, line) in enumerate(zip_longest(left, right, fillvalue="")):
            click.echo(f"  {name:{width}} {answer if index == 0 else '':{_TAKES}}{line}".rstrip())
        if fix:
            click.echo(f"{'':{indent}}$ {shown(fix)}")  # never wrapped, for it is to be pasted


def _names(names: list[str], width: int) -> list[str]:
    """Names with commas between them, as many in a line as fit."""
    lines = [""]
    for name in [*(f"{name}," for name in names[:-1]), names[-1]]:
        joined = f"{lines[-1]} {name}".lstrip()
        lines[-1:] = [joined] if len(joined) <= width else [lines[-1], name]
    return lines


def _sentences(lines: list[str]) -> str:
    return " ".join(line[:1].upper() + line[1:] if not line.startswith(("quant_", "post_")) else line for line in lines)


def _field(name: str, text: str) -> None:
    click.echo(f"{name}: {shown(text)}")


def _section(title: str, fields: Mapping[str, str]) -> None:
    click.echo(f"{title}:")
    for name, text in fields.items():
        click.echo(shown(f"  {name}: {text}"))


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        if len(value) > 2 and isinstance(value[0], str) and len(set(value)) == 1:
            return f"{len(value)} x {value[0]}"
        return ", ".join(map(_short, value)) or "none"
    if isinstance(value, Mapping):
        return json.dumps(value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} B"
