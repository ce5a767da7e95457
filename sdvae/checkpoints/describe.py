"""What a VAE on disk is, as plain data: format, configuration, scale, identity, and which programs take it.

Names, shapes and types come from the headers of safetensors files; the weights are read where they have to be, for the
digest and the check that they load. `sdvae inspect` prints the result.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvae.checkpoints import formats
from sdvae.checkpoints.compat.facts import weight_facts
from sdvae.checkpoints.compat.loaders import LoaderVerdict, loader_verdicts
from sdvae.checkpoints.formats import CLASS_NAME, SCALE_FIELDS, Found, Kind
from sdvae.errors import CheckpointError, some

if TYPE_CHECKING:
    from sdvae.checkpoints.read import Checkpoint

__all__ = ["describe_vae"]


def describe_vae(ref: str | Path) -> dict[str, Any]:
    """Describe a VAE; docs/json-output.md lists the fields.

    ref: a folder, a file, or a hub id whose files are in the hub client's cache; nothing is fetched.
    Returns: `loads` false with a `reason` where the files say what they are, but cannot be used.
    Raises: CheckpointError where there is no VAE at all.
    """
    from sdvae.checkpoints.read import locate

    found = locate(ref, local_files_only=True)
    data: dict[str, Any] = {
        "path": str(ref),
        "kind": str(found.kind),
        "evidence": found.evidence,
        "class_name": _class_name(found),
        "weights": str(found.weights),
        "config_path": None if found.config is None else str(found.config),
    }
    try:
        files = _weights_files(found)
        shapes, dtypes, metadata = _headers(files)
    except CheckpointError as error:
        return data | _unusable(found, str(error))
    own = _own_shapes(shapes, found)
    data |= {
        "files": [_file(path) for path in [*([found.config] if found.config else []), *_listed(found, files)]],
        "size_bytes": sum(path.stat().st_size for path in files),
        "dtypes": dict(Counter(dtypes[name] for name in own)),
        "num_tensors": len(own),
        "num_parameters": sum(math.prod(shape) for shape in own.values()),
    }
    loaded = _load(ref, found, metadata)
    verdicts: tuple[LoaderVerdict, ...] = ()
    if data["class_name"] in (None, CLASS_NAME):
        facts = weight_facts(
            shapes,
            path=str(ref),
            is_folder=found.kind in (Kind.FOLDER, Kind.PIPELINE),
            suffix=found.weights.suffix,
            fields=loaded.get("config") or _config_fields(found),
            has_config=found.config is not None,
            variant=_variant(found),
            dtypes=data["dtypes"],
        )
        verdicts = loader_verdicts(facts)
    if not loaded["loads"]:  # then there is nothing to convert
        verdicts = tuple(replace(verdict, fix=None) for verdict in verdicts)
    return data | loaded | {"loaders": [asdict(verdict) for verdict in verdicts]}


def _unusable(found: Found, reason: str) -> dict[str, Any]:
    """For weights that cannot even be listed."""
    size = found.weights.stat().st_size if found.weights.is_file() else 0
    return {"size_bytes": size, "loads": False, "reason": reason, "loaders": []}


def _load(ref: str | Path, found: Found, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What only the loaded model says."""
    from sdvae.checkpoints.fit import config_fields

    try:
        name = _class_name(found)
        return _load_other(ref) if name not in (None, CLASS_NAME) else _load_kl(ref, metadata)
    except CheckpointError as error:
        return {"loads": False, "reason": str(error), "config": config_fields(_config(found))}


def _load_kl(ref: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    from sdvae.checkpoints.fit import autoencoder_digest, config_fields
    from sdvae.checkpoints.read import read_checkpoint

    checkpoint = read_checkpoint(ref, local_files_only=True)
    vae = checkpoint.network
    vae.load_state_dict(checkpoint.tensors, strict=True, assign=True)  # mapped files: read tensor by tensor below
    config = _plain(config_fields(vae.config))
    return {
        "kind": str(checkpoint.found.kind),
        "evidence": checkpoint.found.evidence,
        "class_name": CLASS_NAME,
        "loads": True,
        "digest": autoencoder_digest(vae),
        "spatial_compression_ratio": vae.spatial_compression_ratio,
        "config": config,
        "scale": {field: config[field] for field in SCALE_FIELDS} | {"from": _scale_origin(checkpoint, metadata)},
        "notes": checkpoint.notes,
        "remarks": list(checkpoint.remarks),
    }


def _scale_origin(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> str:
    from sdvae.checkpoints.notes import from_metadata

    if "scaling_factor" in checkpoint.assumed:
        return "assumed, see remarks"
    if config := checkpoint.found.config:
        is_said = "scaling_factor" in formats.read_json(config)
        return "config.json" if is_said else "the default, which config.json does not change"
    return "the file's header" if "scaling_factor" in from_metadata(metadata)[0] else "the file's other tensors"


def _load_other(ref: str | Path) -> dict[str, Any]:
    from sdvae.checkpoints.fit import autoencoder_digest, config_fields
    from sdvae.checkpoints.store import load_any_autoencoder

    model: Any = load_any_autoencoder(ref)
    remark = "no AutoencoderKL: it can be measured with `sdvae evaluate`; the other commands need an AutoencoderKL"
    config = _plain(config_fields(model.config))
    return {"loads": True, "digest": autoencoder_digest(model), "config": config, "notes": {}, "remarks": [remark]}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields as JSON has them."""
    data: dict[str, Any] = json.loads(json.dumps(config))
    return data


def _config(found: Found) -> dict[str, Any]:
    try:
        return formats.read_json(found.config) if found.config else {}
    except CheckpointError:
        return {}


def _config_fields(found: Found) -> dict[str, Any] | None:
    return _config(found) or None


def _class_name(found: Found) -> str | None:
    name = _config(found).get("_class_name")
    if name is None and found.kind is Kind.TINY:
        return "AutoencoderTiny"
    return None if name is None else str(name)


def _weights_files(found: Found) -> list[Path]:
    if found.weights.suffix != ".json":
        return [found.weights]
    names = sorted(set(formats.shard_names(found.weights).values()))
    files = [found.weights.with_name(name) for name in names]
    if lacking := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{found.weights}: names files that are not there: {some(lacking, 3)}")
    return files


def _listed(found: Found, files: list[Path]) -> list[Path]:
    return files if found.weights in files else [found.weights, *files]


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": digest}


def _headers(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Name -> shape and name -> type of all weights, and the metadata of one safetensors file."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix in formats.PICKLE_SUFFIXES:
            from sdvae.checkpoints.read import read_weights

            for name, tensor in read_weights(file).items():
                shapes[name], dtypes[name] = tuple(tensor.shape), _SHORT.get(str(tensor.dtype), str(tensor.dtype))
            continue
        from safetensors import safe_open

        shapes |= formats.read_shapes(file)  # first, for it explains damage better than the library
        with safe_open(file, framework="numpy") as opened:
            dtypes |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
            metadata = opened.metadata() or {}
    return shapes, dtypes, metadata


# As a safetensors header writes them.
_SHORT = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}


def _own_shapes(shapes: Mapping[str, tuple[int, ...]], found: Found) -> Mapping[str, tuple[int, ...]]:
    """Those of the VAE among the weights, under the names in the file."""
    facts = weight_facts(shapes, path="", is_folder=False, suffix=found.weights.suffix)
    if facts.prefix is None or facts.naming is None:
        return shapes
    return {facts.prefix + name: shape for name, shape in facts.own.items()}


def _variant(found: Found) -> str | None:
    """fp16 of diffusion_pytorch_model.fp16.safetensors; None of the plain name, or of a file that has another."""
    stem = formats.WEIGHTS_NAME.partition(".")[0]
    parts = found.weights.name.removesuffix(".json").split(".")
    if parts[0] != stem or found.kind not in (Kind.FOLDER, Kind.PIPELINE):
        return None
    known = {"safetensors", "bin", "index"}
    return next((part for part in parts[1:] if part not in known), None)
