"""Autoencoders of other classes than ours, so that they can be measured beside it: diffusers' own code runs them.

As strict as `store`: every weight is in the file and fits, and no file runs code. Left out: saving, and the layouts of
other programs.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.checkpoints.fit import config_fields, first_not_finite, key_problems
from sdvae.checkpoints.keys import current_attention_names
from sdvae.checkpoints.read import read_weights
from sdvae.errors import CheckpointError

__all__ = ["load_other_class"]


def load_other_class(config: Mapping[str, Any], config_path: Path, weights: Path) -> nn.Module:
    """Load an autoencoder of images, of the class that its config.json names: float32, on the CPU, in eval mode.

    Raises: CheckpointError for a class that diffusers does not have or that is made for video, for a configuration that
        does not describe it, and for damaged, misfitting, non-finite or unsafe weights.
    """
    model = _build(_class(str(config["_class_name"]), config_path), config, config_path)
    stored = read_weights(weights)
    names = current_attention_names(stored)
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    if problems := key_problems(tensors, model.state_dict()):
        raise CheckpointError(f"{weights}: the weights do not fit {config_path}: {problems}")
    if bad := first_not_finite(tensors):
        raise CheckpointError(f"{weights}: `{bad}` has values that are not finite")
    model.load_state_dict(tensors, strict=True)  # copied into the model's own float32, whatever the file has
    return model.eval()


def _class(name: str, config_path: Path) -> type[nn.Module]:
    ensure_torchvision_importable()
    import diffusers
    from diffusers.models import autoencoders

    found = getattr(autoencoders, name, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    known = [each for each in dir(autoencoders) if inspect.isclass(getattr(autoencoders, each))]
    near = difflib.get_close_matches(name, known, n=1)
    raise CheckpointError(
        f"{config_path}: describes the class {name}, which is no autoencoder of diffusers {diffusers.__version__}"
        + (f"; did you mean {near[0]}?" if near else "; a newer diffusers may have it")
    )


def _build(kind: type[nn.Module], config: Mapping[str, Any], config_path: Path) -> nn.Module:
    fields = config_fields(config)
    arguments = set(inspect.signature(kind.__init__).parameters)
    try:
        with torch.random.fork_rng(devices=[]):  # what loads weights must not move the caller's random numbers
            model: Any = kind(**{field: value for field, value in fields.items() if field in arguments})
    except Exception as error:  # each class has its own ways to refuse
        raise CheckpointError(f"{config_path}: no {kind.__name__} can be built from it: {error}") from error
    # Some classes write more into their config than they take, so the built model says what is known.
    if unknown := sorted(set(fields) - set(model.config)):
        raise CheckpointError(
            f"{config_path}: unknown field `{unknown[0]}` of {kind.__name__}: a field that is ignored may change what "
            f"the model computes; a newer diffusers may know it, or take it out of a copy of the folder"
        )
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        raise CheckpointError(
            f"{config_path}: {kind.__name__} is made for video, (B, 3, frames, H, W); expected an autoencoder of images"
        )
    return model  # type: ignore[no-any-return]
