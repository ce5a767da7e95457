"""Autoencoders on disk and on the hub: load, save, hand over to diffusers.

What files hold is read and checked in `read`; how a folder takes another's place is in `files`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.checkpoints import formats
from sdvae.checkpoints.any_autoencoder import load_other_class
from sdvae.checkpoints.fit import build, config_fields, config_json, first_not_finite, load_weights, misfit
from sdvae.checkpoints.formats import CARD_NAME, CLASS_NAME, CONFIG_NAME, WEIGHTS_NAME, json_text
from sdvae.checkpoints.read import BUNDLED_NAME, bundled_path, locate, read_checkpoint
from sdvae.checkpoints.tensor_files import save_tensors
from sdvae.errors import CheckpointError, ConfigError, some
from sdvae.files import new_folder
from sdvae.model.network import Autoencoder, AutoencoderConfig

if TYPE_CHECKING:
    import diffusers

    from sdvae.model.autoencoder import AutoencoderKL

__all__ = [
    "BUNDLED_NAME",
    "bundled_path",
    "keep_card",
    "load_any_autoencoder",
    "load_autoencoder",
    "load_network",
    "save_autoencoder",
    "to_diffusers",
    "why_no_vae_folder",
]

_OWN_FILE = re.compile(r"README\.md|config\.json|diffusion_pytorch_model[\w.-]*\.(safetensors|bin|json)")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}; weights need a floating-point type such as torch.float32")


def load_autoencoder(
    ref: str | Path | None = None,
    *,
    subfolder: str | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> AutoencoderKL:
    """Load an autoencoder, in eval mode.

    ref: a diffusers folder; a pipeline folder with `vae/`; a weights file with diffusers or LDM keys, bare, prefixed or
        in a whole Stable Diffusion checkpoint; a hub id "org/name", which a local folder of that name hides; None for
        the bundled VAE. Without a config.json, what can be inferred is inferred, see `read_checkpoint`.
    subfolder: where the VAE lies in a folder or hub repository; by default at the top, else in `vae`.
    config: a config.json, or the folder that holds it, to use instead of the one beside the weights.
    revision: branch, tag or commit of a hub repository.
    dtype: of the weights in memory, however they are stored; None is float32.
    local_files_only: take a hub repository from the local cache alone, as HF_HUB_OFFLINE=1 does.
    Raises: MissingWeightsError where there is nothing to load, with each place tried; CheckpointError for damaged,
        misfitting, non-finite or unsafe weights, and for a configuration that does not describe them; ConfigError for
        arguments that do not go together.
    """
    from sdvae.model.autoencoder import AutoencoderKL

    network = load_network(
        ref,
        subfolder=subfolder,
        config=config,
        revision=revision,
        dtype=dtype,
        device=device,
        local_files_only=local_files_only,
    )
    with torch.device("meta"):
        vae: AutoencoderKL = AutoencoderKL(**config_fields(network.config))
    vae.load_state_dict(network.state_dict(), strict=True, assign=True)
    vae.eval()
    return vae


def load_network(
    ref: str | Path | None = None,
    *,
    subfolder: str | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> Autoencoder:
    """As `load_autoencoder`, without diffusers' shell, whose import takes seconds."""
    _check_dtype(dtype)
    checkpoint = read_checkpoint(
        ref, subfolder=subfolder, config=config, revision=revision, local_files_only=local_files_only
    )
    vae = load_weights(checkpoint.network, checkpoint.tensors, dtype=dtype or torch.float32, device=device)
    if name := first_not_finite(vae.state_dict()):  # they were finite in the file
        raise CheckpointError(
            f"{checkpoint.found.weights}: `{name}` has values that are not finite after the cast to {dtype}"
        )
    return vae


def load_any_autoencoder(ref: str | Path | None) -> nn.Module:
    """Load an autoencoder of images, of the class that its config.json names: float32, on the CPU, in eval mode.

    ref: as for `load_autoencoder`. An AutoencoderKL comes as ours, any other class as diffusers'.
    Raises: as `load_autoencoder`; CheckpointError for a class that diffusers does not have or that is made for video.
    """
    try:
        return load_network(ref)
    except CheckpointError:
        found = locate(ref)  # a file that says itself that it is an AutoencoderKL has no config here
        config = formats.read_json(found.config) if found.config else {}
        if found.config is None or config.get("_class_name", CLASS_NAME) == CLASS_NAME:
            raise
    return load_other_class(config, found.config, found.weights)


def why_no_vae_folder(folder: Path) -> str | None:
    """Why a folder must not be replaced by a VAE, as a phrase; None where it holds a VAE and nothing else."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if others := [name for name in names if not _OWN_FILE.fullmatch(name)]:
        return f"holds more than a VAE: {some(others)}"
    # The folder of a UNet has files of the same names.
    config = folder / CONFIG_NAME
    if not config.is_file() or formats.read_json(config).get("_class_name") != CLASS_NAME:
        return f"holds no VAE: no {CONFIG_NAME} that names {CLASS_NAME}"
    return None


def _config_to_write(vae: Any) -> dict[str, Any]:
    if isinstance(vae.config, AutoencoderConfig):
        return config_json(vae.config)
    config: dict[str, Any] = json.loads(vae.to_json_string())
    config.pop("_name_or_path", None)  # where this copy came from is no business of those who get the files
    return config | {"_class_name": CLASS_NAME}


def _write(vae: Any, folder: Path, dtype: torch.dtype | None) -> None:
    config = _config_to_write(vae)
    tensors = {name: tensor.detach().to(device="cpu", dtype=dtype) for name, tensor in vae.state_dict().items()}
    if problems := misfit(tensors, config_fields(config), build(config_fields(config), folder)):
        raise CheckpointError(f"the VAE is not saved, for its weights do not fit its configuration: {problems}")
    if name := first_not_finite(tensors):
        raise CheckpointError(f"the VAE is not saved: `{name}` has values that are not finite as {tensors[name].dtype}")
    (folder / CONFIG_NAME).write_text(json_text(config), encoding="utf-8")
    save_tensors(tensors, folder / WEIGHTS_NAME, {"format": "pt"})


def save_autoencoder(
    vae: Autoencoder | diffusers.AutoencoderKL,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Save as a folder that diffusers' AutoencoderKL loads: config.json and diffusion_pytorch_model.safetensors.

    The folder is written beside `path` and swapped in when it is whole: killed at any moment, the save leaves what was
    there before. One process at a time may save to a path.
    dtype: of the stored weights; None keeps each as it is. The VAE in memory does not change.
    overwrite: replace a VAE folder; its model card (README.md) stays. One that holds anything else is never replaced.
    Returns: path.
    Raises: OutputExistsError where something is in the way; CheckpointError for weights that are not finite or do not
        fit their config, and where writing fails.
    """
    _check_dtype(dtype)
    with new_folder(Path(path), overwrite=overwrite, is_ours=why_no_vae_folder) as folder:
        _write(vae, folder, dtype)
        keep_card(Path(path), folder)
    return Path(path)


def keep_card(old: Path, fresh: Path) -> None:
    """Take the model card of a VAE folder along into the one that replaces it: it may hold words of someone's own."""
    if (card := old.expanduser() / CARD_NAME).is_file():
        shutil.copy2(card, fresh / CARD_NAME)


def to_diffusers(vae: Autoencoder) -> diffusers.AutoencoderKL:
    """The same autoencoder as diffusers' own class: a copy of the weights, on their device, in their dtype and mode.

    For everything that saves a whole pipeline, since diffusers loads pipelines only from libraries that it knows.
    """
    ensure_torchvision_importable()
    from diffusers import AutoencoderKL as StockAutoencoderKL

    with torch.device("meta"):
        stock = StockAutoencoderKL(**config_fields(vae.config))
    copies = {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}
    stock.load_state_dict(copies, strict=True, assign=True)
    return stock.train(vae.training)
