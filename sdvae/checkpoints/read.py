"""An autoencoder's weights and configuration from files of any layout, checked, without building a model to run.

Of a whole checkpoint, only the VAE's tensors are read. No file runs code. Left out: loading into a model, and saving;
see `store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.checkpoints import formats
from sdvae.checkpoints.fit import build, check_fields, config_fields, first_not_finite, misfit
from sdvae.checkpoints.formats import CLASS_NAME, CONFIG_NAME, FAMILIES, Found, Kind, Layout
from sdvae.checkpoints.hub import hub_folder, is_hub_id
from sdvae.checkpoints.keys import current_attention_names, from_ldm, infer_fields, linear_attention, tidy
from sdvae.checkpoints.notes import ASSUMED_NOTE, carries_config, from_metadata, notes_of
from sdvae.checkpoints.tensor_files import Readers, open_tensors
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError, NothingThereError
from sdvae.files import aside

__all__ = [
    "BUNDLED_NAME",
    "Checkpoint",
    "bundled_path",
    "config_path_for",
    "locate",
    "read_checkpoint",
    "read_weights",
]

BUNDLED_NAME = "sdvae-mini"

_GROUPS = 32  # of every published autoencoder of this family; no tensor shows it
_SAMPLE_SIZE_PX = 512  # the tile of blended tiling; it does not change the function
_SD, _SDXL = FAMILIES["Stable Diffusion 1 or 2"], FAMILIES["SDXL"]
_ASSUMED = {"scaling_factor": _SD.scaling_factor}  # of a VAE of 4 channels whose files do not say
_STATISTICS = {"edm_mean": "latents_mean", "edm_std": "latents_std"}
_PLAYGROUND = (
    0.5  # scaling_factor of Playground v2.5, whose files hold edm_mean and edm_std; diffusers, single_file_utils
)


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
        return replace(found, config=None) if path.is_file() and _speaks_for_itself(path) else found
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


def _speaks_for_itself(file: Path) -> bool:
    return file.suffix == ".safetensors" and not file.name.startswith(formats.STEM) and carries_config(file)


def _locate_bundled() -> Found:
    path = bundled_path()
    if not (path / CONFIG_NAME).is_file():
        raise MissingWeightsError(
            f"the bundled VAE {BUNDLED_NAME} is not in this installation: looked in {path}. Install the package again, "
            f"or name a VAE: a folder, a file or a hub id"
        )
    return formats.identify(path)


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


def _own_tensors(weights: Path, layout: Layout, readers: Readers) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The VAE's tensors under diffusers' names of today, and remarks. Only these are read."""
    own = [name for name in readers if name.startswith(layout.prefix) and name not in _STATISTICS]
    names, remarks = tidy(name.removeprefix(layout.prefix) for name in own)
    tensors = {new: readers[layout.prefix + name]() for name, new in names.items()}
    if others := len(readers.keys() - _STATISTICS.keys()) - len(own):
        remarks += (f"{others} tensors that do not begin with `{layout.prefix}` are not the VAE's and were not read",)
    try:
        if layout.is_ldm:
            return from_ldm(tensors), remarks
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    current = current_attention_names(tensors)
    return linear_attention({current[name]: tensor for name, tensor in tensors.items()}), remarks


# What the configuration is


def _config_of(path: Path) -> dict[str, Any]:
    config = formats.read_json(path)
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise CheckpointError(f"{path}: describes the class {name}; expected {CLASS_NAME}")
    check_fields(config_fields(config), path)
    return config


def _inferred(
    tensors: Mapping[str, Tensor], known: Mapping[str, Any], statistics: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """All fields, of which `known` are taken as they are; names of those that are assumed; remarks about the others."""
    shown = infer_fields({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    fields = shown | dict(known)
    remarks: list[str] = []
    assumed: tuple[str, ...] = ()
    if inferred := [field for field in shown if field not in known]:
        remarks.append(f"no {CONFIG_NAME}: {', '.join(inferred)} inferred from the tensors")
    if "norm_num_groups" not in known:
        widths = fields["block_out_channels"]
        if bad := [width for width in widths if width % _GROUPS]:
            raise CheckpointError(
                f"norm_num_groups cannot be seen in the tensors, and the usual {_GROUPS} does not divide the widths "
                f"{bad}: put the VAE's {CONFIG_NAME} beside the file, or pass config= with its path"
            )
        fields["norm_num_groups"] = _GROUPS
        remarks.append(f"norm_num_groups assumed to be {_GROUPS}, as in all published VAEs of this kind")
    if "sample_size" not in known:
        fields["sample_size"] = _SAMPLE_SIZE_PX
        remarks.append(f"sample_size set to {_SAMPLE_SIZE_PX} px; it is the tile of blended tiling only")
    if "scaling_factor" not in known:
        scale, assumed, remark = _scale(fields, statistics, layout)
        fields = scale | fields
        remarks.append(remark)
    return fields, assumed, tuple(remarks)


def _scale(
    fields: Mapping[str, Any], statistics: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """The scaling fields of a VAE whose files do not name them; which are assumed; a sentence on their origin."""
    channels = fields["latent_channels"]
    if statistics:
        means = {_STATISTICS[name]: tensor.float().flatten().tolist() for name, tensor in statistics.items()}
        return (
            means | {"scaling_factor": _PLAYGROUND},
            (),
            (
                f"latents_mean and latents_std from {' and '.join(_STATISTICS)}; scaling_factor {_PLAYGROUND}, that of "
                f"Playground v2.5, which has such tensors"
            ),
        )
    family = FAMILIES.get(layout.family or "")
    if family and family.latent_channels == channels:
        scale = {"scaling_factor": family.scaling_factor, "shift_factor": family.shift_factor}
        shift = f", shift_factor {family.shift_factor}" if family.shift_factor else ""
        return (
            scale,
            (),
            f"scaling_factor {family.scaling_factor}{shift}: this is a whole checkpoint of {layout.family}",
        )
    if channels == 4:
        return (
            dict(_ASSUMED),
            tuple(_ASSUMED),
            (
                f"scaling_factor assumed to be {_SD.scaling_factor}, that of Stable Diffusion 1 and 2; SDXL's is "
                f"{_SDXL.scaling_factor}, and the file does not say which is meant"
            ),
        )
    readings = "; ".join(
        f"{name} has scaling_factor {f.scaling_factor}, shift_factor {f.shift_factor}"
        for name, f in FAMILIES.items()
        if f.latent_channels == channels
    )
    raise CheckpointError(
        f"nothing says how these latents of {channels} channels are scaled: "
        + (f"{readings}. " if readings else f"no known diffusion model has latents of {channels} channels. ")
        + f"Put the VAE's {CONFIG_NAME} beside the file, pass config= with its path, or say it: "
        f'fields={{"scaling_factor": ..., "shift_factor": ...}} (convert has --scaling-factor and --shift-factor)'
    )


def _still_assumed(
    notes: Mapping[str, Any], known: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields that an earlier conversion assumed and that nobody has said since, and remarks about them."""
    names = tuple(
        name
        for name, value in _ASSUMED.items()
        if name in notes.get(ASSUMED_NOTE, ()) and name not in given and known.get(name) == value
    )
    return names, tuple(
        f"{name} {known[name]}, that of Stable Diffusion 1 and 2, was assumed when these files were written; SDXL's is "
        f"{_SDXL.scaling_factor}, and nothing says which is meant"
        for name in names
    )


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
    tensors, remarks = _own_tensors(found.weights, layout, readers)

    fields = dict(fields or {})
    check_fields(fields, "fields")
    if config_path := config_path_for(found, config):
        written = _config_of(config_path)
        known, notes = config_fields(written) | fields, notes_of(written, config_path)
        assumed, more = _still_assumed(notes, known, fields)
    else:
        try:
            said, notes = from_metadata(metadata)
            check_fields(said, "its header")
            statistics = {name: readers[name]() for name in _STATISTICS if name in readers}
            known, assumed, more = _inferred(tensors, said | fields, statistics, layout)
        except CheckpointError as error:
            raise CheckpointError(f"{found.weights}: {error}") from error
        still, told = _still_assumed(notes, said | fields, fields)
        assumed, more = assumed + still, more + told
    remarks += more
    if problems := misfit(tensors, known, build(known, config_path or found.weights)):
        raise CheckpointError(f"{found.weights}: the weights do not fit {config_path or 'each other'}: {problems}")
    if name := first_not_finite(tensors):
        raise CheckpointError(f"{found.weights}: `{name}` has values that are not finite")
    return Checkpoint(found=found, tensors=tensors, fields=known, notes=notes, remarks=remarks, assumed=assumed)
