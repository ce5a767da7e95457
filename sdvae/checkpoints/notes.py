"""What sdvae writes beside the weights: notes in config.json, and config and notes in the header of safetensors files.

In config.json the notes are one object under `_sdvae`: diffusers passes over fields that begin with an underscore. In
a header they stand with the whole configuration under the key `sdvae`, so that one file alone says what it is.
Left out: what the notes mean; those who write them say so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdvae.checkpoints.formats import CLASS_NAME, CONFIG_NAME, json_text, read_json
from sdvae.errors import CheckpointError, ConfigError
from sdvae.files import new_folder, write_atomic

__all__ = [
    "ASSUMED_NOTE",
    "HEADER_KEY",
    "NOTES_FIELD",
    "carries_config",
    "config_to_update",
    "from_metadata",
    "header_metadata",
    "notes_of",
    "read_config",
    "update_config",
]

NOTES_FIELD = "_sdvae"
HEADER_KEY = "sdvae"
ASSUMED_NOTE = "assumed"  # names of fields whose values nothing showed; see `read.Checkpoint`
_CONFIG = "config"  # beside the notes in a header, so no note has this name
_SUFFIX = ".safetensors"
_HUB_CACHE = re.compile(r"(models|datasets|spaces)--.+")

# The notes that are known. A file may hold others, of a later version: they are kept as they are.
_TYPES: Mapping[str, tuple[type, type | None]] = {  # of the value, and of its items where it is a list
    "source_digest": (str, None),
    "source": (str, None),
    "license": (str, None),
    "calibration": (dict, None),
    "previous": (list, dict),
    "rewrites": (list, str),
    ASSUMED_NOTE: (list, str),
}


def notes_of(config: Mapping[str, Any], source: str | Path = CONFIG_NAME) -> dict[str, Any]:
    """The notes in a config.json; {} where there are none.

    source: names the file in messages. Raises: CheckpointError for notes that are damaged.
    """
    notes = config.get(NOTES_FIELD, {})
    _check_notes(notes, f"{source}: `{NOTES_FIELD}`")
    return dict(notes)


def header_metadata(fields: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for the header of a safetensors file. Inverse: from_metadata.

    fields: of the configuration; those of diffusers' own (`_class_name`, ...) are left out.
    Raises: CheckpointError for notes of a wrong type; ValueError for a value that JSON does not have.
    """
    _check_notes(notes, "notes")
    data = {_CONFIG: {name: value for name, value in fields.items() if not name.startswith("_")}, **notes}
    # "format": transformers refuses files that do not say which library made them
    return {"format": "pt", HEADER_KEY: json.dumps(data, sort_keys=True, allow_nan=False)}


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the configuration, and notes, of a config.json.

    Raises: CheckpointError for a damaged one, and for that of another class.
    """
    config = read_json(path)
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise CheckpointError(f"{path}: describes the class {name}; expected {CLASS_NAME}")
    return {field: value for field, value in config.items() if not field.startswith("_")}, notes_of(config, path)


def from_metadata(
    metadata: Mapping[str, str] | None, source: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the configuration, and notes, of a header. Inverse: header_metadata.

    source: names the file in messages.
    Returns: ({}, {}) where sdvae did not write the header. Raises: CheckpointError for a damaged one.
    """
    if metadata is None or not _is_ours(metadata):
        return {}, {}
    where = f"{f'{source}: ' if source else ''}`{HEADER_KEY}` in the header"
    try:
        data = json.loads(metadata[HEADER_KEY])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get(_CONFIG), dict):
        raise CheckpointError(f"{where}: expected an object with `{_CONFIG}`, an object itself; found {_brief(data)}")
    fields = data.pop(_CONFIG)
    _check_notes(data, where)
    return fields, data


def carries_config(path: Path) -> bool:
    """Whether a safetensors file has a header that sdvae wrote, whole or damaged.

    Raises: CheckpointError for a file that is none of safetensors.
    """
    return _is_ours(_read_header(path).get("__metadata__") or {})


def _is_ours(metadata: Mapping[str, Any]) -> bool:
    # latent files use the same key, with a format of their own
    return HEADER_KEY in metadata and metadata.get("format") == "pt"


def _check_notes(notes: object, where: str) -> None:
    if not isinstance(notes, Mapping):
        raise CheckpointError(f"{where}: expected an object, found {type(notes).__name__}")
    if _CONFIG in notes:
        raise CheckpointError(f"{where}: a note cannot have the name `{_CONFIG}`")
    for name, (kind, item_kind) in _TYPES.items():
        if name not in notes:
            continue
        value = notes[name]
        if not isinstance(value, kind):
            raise CheckpointError(f"{where}: `{name}` is {_brief(value)}; expected {kind.__name__}")
        if item_kind is not None and not all(isinstance(item, item_kind) for item in notes[name]):
            raise CheckpointError(f"{where}: `{name}` is {_brief(value)}; expected a list of {item_kind.__name__}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def config_to_update(ref: str | Path) -> Path:
    """The config.json that `update_config` would write, of a VAE folder or of a pipeline folder with `vae/`.

    Raises: ConfigError for what is not to be changed: a file, a hub id, the hub's cache, a folder that is not ours to
        write; it says what to do instead.
    """
    folder, remedy = Path(ref).expanduser(), f"make a folder of your own first: sdvae convert {ref} DIR"
    if not folder.is_dir():
        what = "a single file" if folder.exists() else "no folder on this machine"
        raise ConfigError(f"{ref} is {what}, and a calibration is written into a folder's {CONFIG_NAME}; {remedy}")
    folder = folder.resolve()
    if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise ConfigError(f"{ref}: no {CONFIG_NAME} in it or in its folder vae/; {remedy}")
    if any(_HUB_CACHE.fullmatch(part) for part in config.parts):
        raise ConfigError(f"{ref} lies in the cache of the hub, whose files others count on; {remedy}")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: no permission to write here; {remedy}")
    return config


def update_config(folder: str | Path, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Set fields and notes of a VAE folder, or of the VAE in a pipeline folder; all others stay as they are.

    Fields that are set here are no longer noted as `assumed`. Weights files whose header carries the configuration say
    the same afterwards: their tensors are copied bit by bit under a new header. Then there is more than one file to
    replace, so the folder is, in one step (`new_folder`), and no moment shows a header that contradicts config.json.
    Otherwise config.json alone is replaced, in one step too.
    Raises: ConfigError as `config_to_update`; CheckpointError for damaged files, and where writing fails.
    """
    config_path = config_to_update(folder)
    config = read_json(config_path)
    merged_notes = notes_of(config, config_path) | dict(notes)
    assumed = [name for name in merged_notes.pop(ASSUMED_NOTE, ()) if name not in fields]
    merged_notes |= {ASSUMED_NOTE: assumed} if assumed else {}
    config |= {**fields, NOTES_FIELD: merged_notes}
    metadata = header_metadata(config, merged_notes)
    text = json_text(config)
    carriers = _carriers(config_path.parent)
    try:
        if carriers:
            _replace_folder(config_path, text, carriers, metadata)
        else:
            mode = config_path.stat().st_mode
            write_atomic(text.encode(), config_path)
            config_path.chmod(mode)
    except OSError as error:
        raise CheckpointError(
            f"{config_path}: cannot be written: {error}. What was there before is unchanged"
        ) from error


def _carriers(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> header of the safetensors files in a folder that carry the configuration."""
    headers = {path.name: _read_header(path) for path in sorted(folder.glob(f"*{_SUFFIX}")) if path.is_file()}
    return {name: header for name, header in headers.items() if _is_ours(header.get("__metadata__") or {})}


def _replace_folder(
    config_path: Path, text: str, carriers: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]
) -> None:
    folder = config_path.parent
    # Everything that is there comes along, whatever it is, so nothing can be lost by the replacement.
    with new_folder(folder, overwrite=True, is_ours=lambda existing: None) as fresh:
        changed = [folder / CONFIG_NAME, *(folder / name for name in carriers)]
        _copy_tree(folder, fresh, leave_out=changed)
        (fresh / CONFIG_NAME).write_text(text, encoding="utf-8")
        for name, header in carriers.items():
            _write_with_header(folder / name, header, metadata, fresh / name)
        for path in changed:
            shutil.copymode(path, fresh / path.name)


def _copy_tree(source: Path, target: Path, leave_out: Iterable[Path]) -> None:
    """The same files in another folder of the same file system: by hard links, where it has them."""
    left_out = {path.name for path in leave_out}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return left_out & set(names) if Path(folder) == source else set()

    # symbolic links stay links: both folders have the same parent, so relative ones lead to the same place
    shutil.copytree(source, target, symlinks=True, ignore=ignore, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _read_header(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError for a file that is none of safetensors."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_header_bytes(file.read(8), path)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise CheckpointError(f"{path}: its header cannot be read: expected objects, found {_brief(header)}")
    return header


def _header_bytes(start: bytes, path: Path) -> int:
    count = int.from_bytes(start, "little")
    if len(start) < 8 or count > path.stat().st_size - 8:
        raise ValueError("the file is shorter than its header")
    return count


def _write_with_header(source: Path, header: Mapping[str, Any], metadata: Mapping[str, str], target: Path) -> None:
    """Copy a safetensors file bit by bit, with new metadata over those that it has."""
    text = json.dumps({**header, "__metadata__": {**(header.get("__metadata__") or {}), **metadata}}).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(8 + int.from_bytes(old.read(8), "little"))
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, 16 * 2**20)
        new.flush()
        os.fsync(new.fileno())
