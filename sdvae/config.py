"""YAML <-> frozen dataclasses: read, override, explain what is wrong, dump. No torch.

The dataclasses live beside the components that read them. Order of precedence: defaults < YAML < overrides.
Plain values only: a YAML file names no classes and runs no code.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sdvae.errors import ConfigError

__all__ = ["apply_overrides", "config_from_dict", "config_to_dict", "dump_config", "read_config"]

T = TypeVar("T")


def read_config(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """A `cls` from a YAML file and `key=value` overrides such as `training.lr=1e-4`.

    Raises: ConfigError, naming the file and the dotted key.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected sections of keys and values")
    try:
        return config_from_dict(cls, apply_overrides(data, overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `data` with each `dotted.key=value` set; values are read as YAML (`null`, `[1, 2]`, `1e-4`)."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, name = key.strip().split(".")
        if not equals or not name:
            raise ConfigError(f"the override '{override}' is not of the form key=value, e.g. training.lr=1e-4")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"the override '{override}' goes into '{section}', which is a value and not a section"
                )
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            target[name] = text
    return result


def config_from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from nested plain values.

    Raises: ConfigError for an unknown key (with the nearest known one), a missing key or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{where}{key}'; {_suggest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"'{where}{name}' is missing; set it in the file or with --set {where}{name}=...")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in data.items()})


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values (dict, list, str, numbers, None), ready for YAML or JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def dump_config(config: Any) -> str:
    """YAML text that `read_config` turns back into an equal object."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def _suggest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; what YAML leaves ambiguous (1e-4 is a string there) is settled by the type."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _convert(next(arm for arm in typing.get_args(hint) if arm is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"'{where}' is {value!r}; expected one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{where}' is {value!r}; expected a section of keys and values")
        return config_from_dict(typing.cast(type, hint), value, where=f"{where}.")
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"'{where}' is {value!r}; expected a list")
        return tuple(_convert(item, part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{where}' is {value!r}; expected a section of keys and values")
        return dict(value)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any or (hint is bool and isinstance(value, bool)):
        return value
    if hint is str and isinstance(value, (str, Path)):
        return str(value)
    try:
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint is int and not isinstance(value, bool) and (isinstance(value, int) or int(value) == float(value)):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"'{where}' is {value!r}; expected {getattr(hint, '__name__', hint)}")
