"""Whether weights and a configuration belong together, and are fit for use; and their identity, the digest of both."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.formats import CLASS_NAME
from sdvae.checkpoints.infer import fields_from_shapes
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.network import Autoencoder, AutoencoderConfig

__all__ = [
    "DEFAULTS",
    "autoencoder_digest",
    "build",
    "check_fields",
    "config_fields",
    "config_json",
    "first_not_finite",
    "full_config",
    "key_problems",
    "load_weights",
    "misfit",
]


# Every field of the configuration with the value that it has where config.json does not say.
DEFAULTS: Mapping[str, Any] = AutoencoderConfig()

# Fields that change neither the function nor the latents: the tile size of blended tiling, and advice to pipelines
# about fp16. All others count, the scaling ones because they decide what latents mean.
_NOT_IN_DIGEST = frozenset({"sample_size", "force_upcast"})


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own fields of a config, without notes such as `_class_name`."""
    return {field: value for field, value in config.items() if not field.startswith("_")}


def config_json(config: AutoencoderConfig) -> dict[str, Any]:
    """What config.json holds for a network, as diffusers writes it, but for the order."""
    return {"_class_name": CLASS_NAME, "_diffusers_version": version("diffusers"), **config}


def check_fields(config: Mapping[str, Any], source: object) -> None:
    """Raise CheckpointError for a field that `AutoencoderConfig` does not have. source: where they are from."""
    known = list(DEFAULTS)
    if unknown := sorted(set(config) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}."
        raise CheckpointError(
            f"{source}: unknown field `{unknown[0]}`: {hint} A field that is ignored may change what the VAE computes; "
            f"if this one does not, pass config= with a copy that lacks it"
        )


def build(config: Mapping[str, Any], source: object) -> Autoencoder:
    """An autoencoder without memory for weights: they come from a file, so drawing random ones first is time lost.

    config: its fields; those that are missing have their defaults. source: where they are from.
    Raises: CheckpointError.
    """
    try:
        with torch.device("meta"):
            return Autoencoder(AutoencoderConfig(**config))
    except (ConfigError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        missing = [f"{name} = {value!r}" for name, value in DEFAULTS.items() if name not in config]
        note = f". Fields that it lacks have their defaults: {', '.join(missing)}" if missing else ""
        raise CheckpointError(f"{source}: no autoencoder can be built from it: {error}{note}") from error


def load_weights(
    vae: Autoencoder,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """Give an autoencoder from `build` its weights. Returns: the same one, in eval mode."""
    # Copied in any case: a weight that stays in a file's memory map is unaligned, and changes if the file does.
    copies = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in tensors.items()}
    vae.load_state_dict(copies, strict=True, assign=True)
    return vae.eval()


def full_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every field as config.json spells it: those given, and the defaults of the others."""
    values = {name: fields.get(name, default) for name, default in DEFAULTS.items()}
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]  # tuples become lists


def key_problems(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps these weights from being a model's, whose own state is given; empty if nothing does."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    counts = {name for name, tensor in state.items() if not tensor.is_floating_point()}  # whole by their nature
    wrong = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {shape}" for name, shape in found.items() if name not in expected],
        "wrongly shaped": [f"{name}, file {found[name]}, model {expected[name]}" for name in wrong],
        "not floating point": [
            f"{name} {t.dtype}" for name, t in tensors.items() if not t.is_floating_point() and name not in counts
        ],
    }
    return "; ".join(f"{len(names)} {problem} ({_first(names)})" for problem, names in problems.items() if names)


def misfit(tensors: Mapping[str, Tensor], given: Mapping[str, Any], vae: Autoencoder) -> str:
    """What keeps these weights from being those of `vae`, built from the fields `given`; empty if nothing does."""
    if not (problems := key_problems(tensors, vae.state_dict())):
        return ""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    causes = []
    for field, value in fields_from_shapes(found).items():
        configured = vae.config[field]
        if (list(configured) if isinstance(configured, tuple) else configured) != value:
            origin = "is" if field in given else "is missing, so it is"
            causes.append(f"{field} {origin} {configured!r}, the weights were made with {value!r}")
    return problems + (f". In the configuration, {'; '.join(causes)}" if causes else "")


def _first(names: list[str]) -> str:
    return "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that has an infinite value or none at all."""
    # The extremes carry inf and nan along, in one pass; isfinite().all() makes copies as large as the tensor.
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # types of 8 bit have no minimum
        if not all(torch.isfinite(extreme) for extreme in values.aminmax()):
            return name
    return None


def autoencoder_digest(vae: Any, config: Mapping[str, Any] | None = None) -> str:
    """Identity of an autoencoder of any class: with equal digests, equal images have equal latents, up to rounding.

    Covers all weights as float32 in the order of their names, and all config fields but `sample_size` and
    `force_upcast`. Independent of device, memory format and storage, as long as the values are the same; a cast to half
    precision changes them, so take the digest before it.
    vae: ours, or a model of diffusers. config: in the place of the configuration that it has. Returns: "sha256:<hex>".
    """
    fields = config_fields(vae.config if config is None else config)
    counting = {field: _plain(value) for field, value in fields.items() if field not in _NOT_IN_DIGEST}
    digest = hashlib.sha256(json.dumps(counting, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        # reshape copies only what lies in another order, such as channels_last
        digest.update(tensor.detach().to(device="cpu", dtype=torch.float32).reshape(-1).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """One form for each config value: 1 is 1.0, and a tuple is a list."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
