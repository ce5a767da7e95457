"""Autoencoders on disk and on the hub: load, save, hand over to diffusers, identify by digest.

Loading is strict and runs no code from a file. Saving replaces a whole folder in one step, see `_swap_in`.
Left out: other key layouts. Such files are recognised and named, not converted.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import inspect
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from glob import escape as glob_escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdvae.checkpoints import formats
from sdvae.checkpoints.formats import CONFIG_NAME, WEIGHTS_NAME, Found, Kind
from sdvae.checkpoints.hub import hub_folder, is_hub_id
from sdvae.checkpoints.keys import current_attention_names, fields_from_shapes
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError, OutputExistsError
from sdvae.model.autoencoder import AutoencoderKL

if TYPE_CHECKING:
    import diffusers

__all__ = [
    "BUNDLED_NAME",
    "autoencoder_digest",
    "bundled_path",
    "load_autoencoder",
    "save_autoencoder",
    "to_diffusers",
]

BUNDLED_NAME = "sdvae-mini"

_CLASS_NAME = "AutoencoderKL"
_OWN_FILE = re.compile(r"config\.json|diffusion_pytorch_model[\w.-]*\.(safetensors|bin|json)")
_LEFTOVER_AGE_S = 3600  # no save takes this long: an unfinished one of this age was killed

# Fields that change neither the function nor the latents: the tile size of blended tiling, and advice to pipelines
# about fp16. All others count, the scaling ones because they decide what latents mean.
_NOT_IN_DIGEST = frozenset({"sample_size", "force_upcast"})


def bundled_path() -> Path:
    """Folder of the VAE that comes with the package."""
    return Path(str(package_files("sdvae") / "assets" / BUNDLED_NAME))


def locate(ref: str | Path | None, subfolder: str | None, revision: str | None, local_files_only: bool) -> Found:
    """Find the files that a reference for `load_autoencoder` means, of whatever class the autoencoder is."""
    if ref is None:
        return _locate_bundled()
    path = Path(ref).expanduser()
    if path.exists() or _aside(path).is_dir():
        if revision or (subfolder and path.is_file()):
            option = "revision" if revision else "subfolder"
            raise ConfigError(f"{option} does not apply: '{ref}' is a local {'file' if path.is_file() else 'folder'}")
        return formats.identify(path if path.exists() else _aside(path), subfolder)
    if ref == BUNDLED_NAME:
        return _locate_bundled()
    if is_hub_id(ref):
        return formats.identify(hub_folder(str(ref), subfolder, revision, local_files_only))
    raise MissingWeightsError(
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


def config_path_for(found: Found, config: str | Path | None = None) -> Path:
    """The config.json of an autoencoder: the one given, else the one beside its weights."""
    if config is None:
        if found.config is None:
            raise CheckpointError(
                f"{found.weights}: no configuration: looked for {found.weights.with_name(CONFIG_NAME)}; put the VAE's "
                f"{CONFIG_NAME} there, or pass config= with its path"
            )
        return found.config
    path = Path(config).expanduser()
    for candidate in (path, path / CONFIG_NAME, path / "vae" / CONFIG_NAME):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"config '{config}': neither a file nor a folder with {CONFIG_NAME}")


def _read_config(path: Path) -> dict[str, Any]:
    config = formats.read_json(path)
    if (name := config.get("_class_name", _CLASS_NAME)) != _CLASS_NAME:
        raise CheckpointError(f"{path}: describes the class {name}; expected {_CLASS_NAME}")
    fields = config_fields(config)
    known = list(inspect.signature(AutoencoderKL.__init__).parameters)[1:]
    if unknown := sorted(set(fields) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}."
        raise CheckpointError(
            f"{path}: unknown field `{unknown[0]}`: {hint} A field that is ignored may change what the VAE computes; "
            f"if this one does not, pass config= with a copy that lacks it"
        )
    return fields


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own fields of a config, without diffusers' notes, such as `_class_name`."""
    return {field: value for field, value in config.items() if not field.startswith("_")}


def read_weights(found: Found, kinds: Collection[Kind] = (Kind.FILE, Kind.OTHER)) -> dict[str, Tensor]:
    """All weights, under the names in use today. Those of safetensors files are read from disk only when touched.

    kinds: the layouts of keys that are let through. OTHER is among them: the comparison of keys says more about it.
    """
    tensors = _read_shards(found.weights) if found.weights.suffix == ".json" else _read_file(found.weights)
    kind, evidence = formats.kind_of_keys(tensors)
    if kind not in kinds:
        raise CheckpointError(
            f"{found.weights}: this is a {kind} ({evidence}); only diffusers keys are loaded. For the files of Stable "
            f"Diffusion, diffusers converts: AutoencoderKL.from_single_file(FILE, config=DIR).save_pretrained(OUT)"
        )
    names = current_attention_names(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    files = formats.shard_names(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        shard = _read_file(index.with_name(file))
        if strays := [name for name in shard if files.get(name) != file]:
            raise CheckpointError(f"{index}: {file} holds weights that the index does not place there: {strays[0]}")
        tensors |= shard
    if lacking := sorted(files.keys() - tensors.keys()):
        raise CheckpointError(
            f"{index}: {len(lacking)} weights are not in the files that it names: {formats.some(lacking, 3)}"
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: named by the index beside it, but not there; copy or download it again")
    if path.suffix in formats.PICKLE_SUFFIXES:
        return _read_pickle(path)
    formats.read_shapes(path)  # explains damage better than the library
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: refused, for it is damaged or holds more than tensors and could run code "
            f"({type(error).__name__}). If you trust its source, open it and save its state dict as .safetensors"
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(tensor, Tensor) for tensor in data.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, or one under `state_dict`; found {_contents(data)}")
    return dict(data)


def _contents(data: object) -> str:
    if not isinstance(data, Mapping):
        return f"one {type(data).__name__}"
    return "a dict with " + formats.some([f"{name}: {type(value).__name__}" for name, value in data.items()], 3)


def _build(fields: Mapping[str, Any], source: Path) -> AutoencoderKL:
    """An autoencoder without memory for weights: they come from a file, so drawing random ones first is time lost."""
    try:
        with torch.device("meta"):
            vae: AutoencoderKL = AutoencoderKL(**fields)
            return vae
    except (ConfigError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        parameters = list(inspect.signature(AutoencoderKL.__init__).parameters.values())[1:]
        missing = [f"{p.name} = {p.default!r}" for p in parameters if p.name not in fields]
        note = f". Fields that it lacks have their defaults: {', '.join(missing)}" if missing else ""
        raise CheckpointError(f"{source}: no autoencoder can be built from it: {error}{note}") from error


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


def _misfit(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], vae: AutoencoderKL) -> str:
    """What keeps these weights from being those of `vae`, built from `fields`; empty if nothing does."""
    if not (problems := key_problems(tensors, vae.state_dict())):
        return ""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    causes = []
    for field, value in fields_from_shapes(found).items():
        configured = vae.config[field]
        if (list(configured) if isinstance(configured, tuple) else configured) != value:
            origin = "is" if field in fields else "is missing, so it is"
            causes.append(f"{field} {origin} {configured!r}, the weights were made with {value!r}")
    return problems + (f". In the configuration, {'; '.join(causes)}" if causes else "")


def _first(names: list[str]) -> str:
    return "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that has an infinite value or none at all."""
    # The extremes carry inf and nan along, in one pass; isfinite().all() makes copies as large as the tensor.
    for name, tensor in tensors.items():
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            return name
    return None


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

    ref: a diffusers folder; a pipeline folder with `vae/`; a weights file with diffusers keys and its config.json
        beside it; a hub id "org/name", which a local folder of that name hides; None for the bundled VAE.
    subfolder: where the VAE lies in a folder or hub repository; by default at the top, else in `vae`.
    config: a config.json, or the folder that holds it, to use instead of the one beside the weights.
    revision: branch, tag or commit of a hub repository.
    dtype: of the weights in memory, however they are stored; None is float32.
    local_files_only: take a hub repository from the local cache alone, as HF_HUB_OFFLINE=1 does.
    Raises: MissingWeightsError where there is nothing to load, with each place tried; CheckpointError for damaged,
        misfitting, non-finite or unsafe weights, and for a configuration that does not describe them; ConfigError for
        arguments that do not go together.
    """
    _check_dtype(dtype)
    found = locate(ref, subfolder, revision, local_files_only)
    stored = read_weights(found)
    config_path = config_path_for(found, config)
    fields = _read_config(config_path)
    vae = _build(fields, config_path)
    if misfit := _misfit(stored, fields, vae):
        raise CheckpointError(f"{found.weights}: the weights do not fit {config_path}: {misfit}")
    # Copied in any case: a weight that stays in the file's memory map is unaligned, and changes if the file does.
    tensors = {name: t.to(device=device, dtype=dtype or torch.float32, copy=True) for name, t in stored.items()}
    if name := first_not_finite(tensors):
        cause = "" if first_not_finite({name: stored[name].float()}) else f" after the cast to {dtype}"
        raise CheckpointError(f"{found.weights}: `{name}` has values that are not finite{cause}")
    vae.load_state_dict(tensors, strict=True, assign=True)
    vae.eval()
    return vae


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{target} is a file; a VAE is saved as a folder: choose another path")
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in target.iterdir())
    if not names:
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists and holds {formats.some(names)}; choose another path, or overwrite")
    if others := [name for name in names if not _OWN_FILE.fullmatch(name)]:
        raise OutputExistsError(
            f"{target} would be replaced whole, but holds more than a VAE: {formats.some(others)}; choose another "
            f"path, or move these away"
        )
    # The folder of a UNet has files of the same names.
    config = target / CONFIG_NAME
    if not config.is_file() or formats.read_json(config).get("_class_name") != _CLASS_NAME:
        raise OutputExistsError(
            f"{target} would be replaced whole, but holds no VAE: no {CONFIG_NAME} that names {_CLASS_NAME}; choose "
            f"another path"
        )


def _write(vae: Any, folder: Path, dtype: torch.dtype | None) -> None:
    config = json.loads(vae.to_json_string()) | {"_class_name": _CLASS_NAME}
    config.pop("_name_or_path", None)  # where this copy came from is no business of those who get the files
    tensors = {n: t.detach().to(device="cpu", dtype=dtype).contiguous() for n, t in vae.state_dict().items()}
    if misfit := _misfit(tensors, config_fields(config), _build(config_fields(config), folder)):
        raise CheckpointError(f"the VAE is not saved, for its weights do not fit its configuration: {misfit}")
    if name := first_not_finite(tensors):
        raise CheckpointError(f"the VAE is not saved: `{name}` has values that are not finite as {tensors[name].dtype}")
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    # safetensors makes files for the owner alone; those who may read the config may read the weights
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)
    for file in folder.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap_in(fresh: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, so that weights and config always belong together.

    Files that are replaced one by one leave, for a moment, new weights with an old config. So folders are swapped:
    - nothing at target, or an empty folder: one rename;
    - Linux, on most file systems: one exchange of the two names, so that target is whole at every moment;
    - elsewhere: the old one is renamed aside, then the new one in. Killed between the two, target is missing, but
      whole under its other name: loading finds it there (`locate`), and the next save moves it back (`_recover`).
    """
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        fresh.rename(target)
    elif not _exchange(fresh, target):
        target.rename(_aside(target))
        try:
            fresh.rename(target)
        except BaseException:
            _aside(target).rename(target)
            raise
        shutil.rmtree(_aside(target), ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step. False where the system or the file system cannot."""
    at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another libc; TypeError on Windows, where None names no library
        return False
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _recover(target: Path) -> None:
    """Tidy up after saves to this path that were killed."""
    if not target.parent.is_dir():
        return
    if _aside(target).is_dir():
        if target.exists():
            shutil.rmtree(_aside(target))
        else:
            _aside(target).rename(target)
    for entry in target.parent.glob(f".{glob_escape(target.name)}.saving-*"):
        if time.time() - entry.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(entry, ignore_errors=True)


def save_autoencoder(
    vae: AutoencoderKL | diffusers.AutoencoderKL,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Save as a folder that diffusers' AutoencoderKL loads: config.json and diffusion_pytorch_model.safetensors.

    The folder is written beside `path` and swapped in when it is whole: killed at any moment, the save leaves what was
    there before. One process at a time may save to a path.
    dtype: of the stored weights; None keeps each as it is. The VAE in memory does not change.
    overwrite: replace a VAE folder. A folder that holds anything else is never replaced.
    Returns: path.
    Raises: OutputExistsError where something is in the way; CheckpointError for weights that are not finite or do not
        fit their config, and where writing fails.
    """
    _check_dtype(dtype)
    target = Path(path).expanduser().resolve()
    fresh = target.parent / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"
    try:
        _recover(target)
        _check_target(target, overwrite)
        fresh.mkdir(parents=True)
        _write(vae, fresh, dtype)
        _swap_in(fresh, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be saved: {error}. What was there before is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange it holds the old VAE
    return Path(path)


def to_diffusers(vae: AutoencoderKL) -> diffusers.AutoencoderKL:
    """The same autoencoder as diffusers' own class: a copy of the weights, on their device, in their dtype and mode.

    For everything that saves a whole pipeline, since diffusers loads pipelines only from libraries that it knows.
    """
    from diffusers import AutoencoderKL as StockAutoencoderKL

    with torch.device("meta"):
        stock = StockAutoencoderKL(**config_fields(vae.config))
    copies = {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}
    stock.load_state_dict(copies, strict=True, assign=True)
    return stock.train(vae.training)


def autoencoder_digest(vae: diffusers.ModelMixin) -> str:
    """Identity of an autoencoder of any class: with equal digests, equal images have equal latents, up to rounding.

    Covers all weights as float32 in the order of their names, and all config fields but `sample_size` and
    `force_upcast`. Independent of device, memory format and storage, as long as the values are the same; a cast to half
    precision changes them, so take the digest before it.
    Returns: "sha256:<hex>".
    """
    config = {field: _plain(value) for field, value in config_fields(vae.config).items() if field not in _NOT_IN_DIGEST}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
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
