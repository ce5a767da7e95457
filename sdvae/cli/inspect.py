"""`sdvae inspect`: what a VAE, a latent file or a run folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdvae.cli.options import json_option
from sdvae.cli.output import print_fields, print_json
from sdvae.errors import CheckpointError, ConfigError

__all__ = ["inspect_command"]


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
    """Say what PATH is: a VAE, a latent file or a training run.

    A VAE is a folder, a pipeline folder or a file; "sdvae-mini" stands for the bundled one.
    """
    data = _describe(_locate(path))
    if as_json:
        print_json(data)
    else:
        print_fields(data)


def _locate(path: str) -> Path:
    from sdvae.checkpoints.store import BUNDLED_NAME, bundled_path

    found = Path(path).expanduser()
    if found.exists():
        return found
    if path == BUNDLED_NAME:
        return bundled_path()
    raise ConfigError(f"{path} does not exist; expected a VAE, a latent file or a run folder")


def _describe(path: Path) -> dict[str, Any]:
    from sdvae.codec.latent_header import is_latent_file

    if path.is_file() and is_latent_file(path):
        return _describe_latent(path)
    if (path / "config.yaml").is_file() and (path / "environment.json").is_file():
        return _describe_run(path)
    return _describe_vae(path)


def _describe_latent(path: Path) -> dict[str, Any]:
    from sdvae.codec.latent_file import LatentFile

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


def _describe_vae(path: Path) -> dict[str, Any]:
    from sdvae.checkpoints.formats import identify
    from sdvae.checkpoints.store import autoencoder_digest, load_autoencoder

    found = identify(path)
    data = {
        "path": str(path),
        "kind": str(found.kind),
        "evidence": found.evidence,
        "weights": str(found.weights),
        "size_bytes": found.weights.stat().st_size,
        "stored_dtypes": _stored_dtypes(found.weights),
    }
    try:
        vae = load_autoencoder(path)
    except CheckpointError as error:
        return data | {"loads": False, "reason": str(error)}
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return data | {
        "loads": True,
        "digest": autoencoder_digest(vae),
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "spatial_compression_ratio": vae.spatial_compression_ratio,
        "config": config,
    }


def _stored_dtypes(weights: Path) -> list[str] | None:
    """Number formats in a safetensors file, as its header calls them (F32, BF16); None for other files."""
    from safetensors import SafetensorError, safe_open

    if weights.suffix != ".safetensors":
        return None
    try:
        with safe_open(weights, framework="numpy") as file:
            return sorted({file.get_slice(name).get_dtype() for name in file.keys()})
    except SafetensorError:
        return None


def _describe_run(path: Path) -> dict[str, Any]:
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    checkpoints = sorted(found.name for found in (path / "checkpoints").glob("step-*") if found.suffix != ".partial")
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return {
        "path": str(path),
        "kind": "training run",
        "checkpoints": checkpoints,
        "last_metrics": _merged(lines),
        "vae": _describe_vae(path / "vae") if (path / "vae").is_dir() else None,
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
