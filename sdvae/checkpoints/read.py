"""An autoencoder's weights and configuration from files of any layout, checked, and the network that has them.

Of a whole checkpoint, only the VAE's tensors are read. No file runs code. Left out: diffusers' shell, and saving; see
`store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints import formats
from sdvae.checkpoints.fit import build, check_dtype, check_fields, first_not_finite, load_weights, misfit
from sdvae.checkpoints.formats import CLASS_NAME, CONFIG_NAME, Found, Kind
from sdvae.checkpoints.hub import hub_folder, is_hub_id
from sdvae.checkpoints.infer import inferred, still_assumed
from sdvae.checkpoints.keys import vae_tensors
from sdvae.checkpoints.notes import carries_config, from_metadata, read_config
from sdvae.checkpoints.tensor_files import open_tensors
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError, NothingThereError
from sdvae.files import aside
from sdvae.model.network import Autoencoder

__all__ = [
    "BUNDLED_NAME",
    "Checkpoint",
    "bundled_path",
    "config_path_for",
    "load_network",
    "locate",
    "public_name",
    "read_checkpoint",
    "read_weights",
]

BUNDLED_NAME = "sdvae-mini"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An autoencoder as its files have it: the weights fit the configuration, and are finite."""

    found: Found
    tensors: dict[
        str, Tensor
    ]  # under diffusers' names of today, in the dtype of the file; of safetensors, lazily mapped
    fields: dict[str, Any]  # of AutoencoderKL.__init__
    notes: dict[str, Any]  # what sdvae wrote beside them; see `notes`
    remarks: tuple[str, ...]  # sentences about what was inferred, assumed or dropped
    assumed: tuple[str, ...]  # the fields that change the latents and that nothing shows; a rewrite must not trust them
    network: Autoencoder  # built from the fields, without memory for weights; see `fit.load_weights`


# Where the files lie


def bundled_path() -> Path:
    """Folder of the VAE that comes with the package."""
    return Path(str(package_files("sdvae") / "assets" / BUNDLED_NAME))


def locate(
    ref: str | Path | None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> Found:
    """Find the files that a reference for `load_autoencoder` means, of whatever class the autoencoder is.

    A single file that sdvae wrote says itself what it is: a config.json beside it is another's, so none is found. The
    name that diffusers gives the weights of a folder makes it a part of that folder, whose config.json counts.
    Raises: NothingThereError for a path at which nothing lies; MissingWeightsError for a hub id that cannot be had;
        CheckpointError for what holds no VAE; ConfigError for arguments that do not go together.
    """
    if ref is None:
        return _locate_bundled()
    path = Path(ref).expanduser()
    if path.exists() or aside(path).is_dir():
        unfit = {"revision": revision, **({"subfolder": subfolder, "variant": variant} if path.is_file() else {})}
        if option := next((name for name, value in unfit.items() if value), None):
            raise ConfigError(f"{option} does not apply: '{ref}' is a local {'file' if path.is_file() else 'folder'}")
        found = formats.identify(path if path.exists() else aside(path), subfolder, variant)
        is_alone = path.is_file() and path.suffix == ".safetensors" and not path.name.startswith(formats.STEM)
        return replace(found, config=None) if is_alone and carries_config(path) else found
    if ref == BUNDLED_NAME:
        return _locate_bundled()
    if is_hub_id(ref):
        if variant:
            raise ConfigError(
                f"variant does not apply: '{ref}' is a hub id, of which the plain weights are taken, or the only "
                f"variant; for another, pass the path of a downloaded folder"
            )
        return formats.identify(hub_folder(str(ref), subfolder, revision, local_files_only))
    raise NothingThereError(
        f"no VAE at '{ref}': {path.absolute()} does not exist. Pass an existing folder or weights file, or a hub id "
        f"'org/name'; a path is never looked up on the hub"
    )


def _locate_bundled() -> Found:
    path = bundled_path()
    if not (path / CONFIG_NAME).is_file():
        raise MissingWeightsError(
            f"the bundled VAE {BUNDLED_NAME} is not in this installation: looked in {path}. Install the package again, "
            f"or name a VAE: a folder, a file or a hub id"
        )
    return formats.identify(path)


def public_name(ref: str | Path | None) -> str:
    """What a VAE is called, without the folders of this machine."""
    if ref is None:
        return BUNDLED_NAME
    path = Path(ref).expanduser()
    return str(ref) if not path.exists() and is_hub_id(ref) else path.resolve().name


def config_path_for(found: Found, config: str | Path | None = None) -> Path | None:
    """The config.json of an autoencoder: the one given, else the one that `locate` found, if there is one."""
    if config is None:
        return found.config
    path = Path(config).expanduser()
    for candidate in (path, path / CONFIG_NAME, path / "vae" / CONFIG_NAME):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"config '{config}': neither a file nor a folder with {CONFIG_NAME}")


# What the files hold


def read_weights(weights: Path) -> dict[str, Tensor]:
    """All weights of a file, or of the files that an index names, under the names that they have there."""
    return {name: read() for name, read in open_tensors(weights)[0].items()}


# The whole


def read_checkpoint(
    ref: str | Path | None,
    *,
    subfolder: str | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    fields: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Read an autoencoder of any layout: keys of diffusers or LDM, bare or prefixed, alone or in a whole checkpoint.

    ref, subfolder, config, revision, local_files_only: as for `load_autoencoder`. A single file that sdvae wrote has
        the fields in its header. Where there is no config.json either, they are inferred from the tensors, or assumed
        where that is safe; remarks say so.
    fields: take the place of what the files say, such as {"scaling_factor": 0.3611}; they are never `assumed`.
    variant: which of a folder's weights, such as "fp16"; None is the plain one, or the only one.
    Raises: MissingWeightsError where there is nothing to read; CheckpointError for files that are damaged, unsafe, not
        finite, no AutoencoderKL, or that leave two readings open; ConfigError for arguments that do not go together.
    """
    found = locate(ref, subfolder=subfolder, revision=revision, local_files_only=local_files_only, variant=variant)
    readers, metadata = open_tensors(found.weights)
    layout = formats.layout_of(readers, found.weights)
    if layout.kind in (Kind.TINY, Kind.OTHER):
        raise CheckpointError(
            f"{found.weights}: this is a {layout.kind} ({layout.evidence}); expected the weights of an {CLASS_NAME}, "
            f"with diffusers or LDM keys"
        )
    kind = layout.kind if found.kind is Kind.PICKLE else found.kind
    found = replace(found, kind=kind, evidence=layout.evidence, prefix=layout.prefix)

    given = dict(fields or {})
    check_fields(given, "fields")
    if config_path := config_path_for(found, config):
        said, notes = read_config(config_path)
        check_fields(said, config_path)
    else:
        said, notes = from_metadata(metadata, found.weights)
        check_fields(said, f"{found.weights}: its header")
    known = said | given
    still, told = still_assumed(notes, known, given)

    tensors, remarks = vae_tensors(readers, layout, found.weights)
    assumed: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    if config_path is None:
        try:
            known, assumed, more = inferred(tensors, known, readers)
        except CheckpointError as error:
            raise CheckpointError(f"{found.weights}: {error}") from error
    network = build(known, config_path or found.weights)
    if problems := misfit(tensors, known, network):
        raise CheckpointError(f"{found.weights}: the weights do not fit {config_path or 'each other'}: {problems}")
    if name := first_not_finite(tensors):
        raise CheckpointError(f"{found.weights}: `{name}` has values that are not finite")
    return Checkpoint(
        found=found,
        tensors=tensors,
        fields=known,
        notes=notes,
        remarks=remarks + more + told,
        assumed=assumed + still,
        network=network,
    )


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
    """As `store.load_autoencoder`, without diffusers' shell, whose import takes seconds."""
    check_dtype(dtype)
    checkpoint = read_checkpoint(
        ref, subfolder=subfolder, config=config, revision=revision, local_files_only=local_files_only
    )
    vae = load_weights(checkpoint.network, checkpoint.tensors, dtype=dtype or torch.float32, device=device)
    if name := first_not_finite(vae.state_dict()):  # they were finite in the file
        raise CheckpointError(
            f"{checkpoint.found.weights}: `{name}` has values that are not finite after the cast to {dtype}"
        )
    return vae
