"""Fills frozen dataclasses from YAML and key=value pairs, strictly: errors name unknown keys and wrong values."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from tasks.catalogue import parse_yaml
from tasks.errors import shown

LARGEST = {int: 2**64 - 1, float: 3.4e38}  # the largest seed, and the largest float32

Tree = dict[str, Any]


class ConfigError(ValueError):
    """A configuration is wrong; the message names the file, the key and what was expected."""


def read_yaml(path: Path) -> Tree:
    """Returns the keys and values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds anything but keys and values.
    """
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.absolute()}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    return data


def assigned(assignments: Sequence[str]) -> Tree:
    """Returns the tree of keys and values that "dotted.key=value" strings describe.

    Raises:
        ConfigError: a string is not of that form, or sets a key below another that already has a value.
    """
    tree: Tree = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key or not text:
            raise ConfigError(f"{assignment!r}: expected key=value")
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read the value {shown(text)}") from error
        _put(tree, key.split("."), value if _as_typed(value, text.strip()) else text)
    return tree


def _as_typed(value: Any, text: str) -> bool:
    """Whether YAML has read a text as it is written; 007 is 7 to YAML, and 1:30 is 90, which no name means."""
    if isinstance(value, int) and not isinstance(value, bool):
        return re.fullmatch(r"-?(0|[1-9]\d*)", text) is not None
    return not isinstance(value, (float, date)) or str(value) == text


def merge(into: Tree, source: Mapping[str, Any], cls: type, origin: str = "") -> None:
    """Adds a tree of keys to another, checking every key and type against a dataclass.

    Args:
        into: the tree that is changed.
        source: the tree that is added; its values win. A key may be dotted, as on the command line.
        cls: the dataclass whose keys and types the tree must have.
        origin: the file of the source, for errors.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    _merge(into, source, cls, f"{origin}: " if origin else "", "", dotted_keys(cls))


def construct(cls: Any, tree: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds a dataclass from a tree of keys.

    Raises:
        ConfigError: a value is out of range; the message begins with `prefix` and the key.
    """
    kinds = typing.get_type_hints(cls)
    values = {
        key: construct(kinds[key], value, f"{prefix}{key}.") if dataclasses.is_dataclass(kinds[key]) else value
        for key, value in tree.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def dotted_keys(cls: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields of a dataclass and of nested dataclasses."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += dotted_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]
    return keys


def _parse(text: str) -> Any:
    """Returns the value of a YAML text; raises yaml.YAMLError if the text is not YAML."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # the loader raises other errors for bad dates, numbers or tags, and deep nesting
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _put(tree: Tree, keys: list[str], value: Any) -> None:
    """Sets a nested key; keys within a value that is a mapping are added to those that are there."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} already has a value")
    old = tree.get(keys[-1])
    tree[keys[-1]] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value


def _merge(into: Tree, source: Mapping[str, Any], cls: type, origin: str, prefix: str, known: Sequence[str]) -> None:
    kinds = typing.get_type_hints(cls)
    for key, value in source.items():
        section, _, rest = key.partition(".") if isinstance(key, str) else (key, "", "")
        if rest:  # a dotted key
            _merge(into, {section: {rest: value}}, cls, origin, prefix, known)
            continue
        name = f"{prefix}{key}" if isinstance(key, str) else shown(key)
        if key not in kinds:
            near = [k for k in known if k.split(".")[-1] == key] or get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; keys are {', '.join(kinds)}"
            raise ConfigError(f"{origin}unknown key {name!r}{hint}")
        kind = kinds[key]
        if not dataclasses.is_dataclass(kind):
            into[key] = _coerce(value, kind, f"{origin}{name}")
        elif isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value, typing.cast(type, kind), origin, f"{name}.", known)
        else:
            first = dataclasses.fields(kind)[0].name
            raise ConfigError(f"{origin}{name} is {shown(value)}; expected keys such as {name}.{first}")


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """Returns `value` as `kind`, or raises an error; 1e-5 is text to YAML but a number here."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    options = typing.get_args(kind) if union else (kind,)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(f"{where} is {shown(value)}; it holds a character that is not text")
    for option, largest in LARGEST.items():
        if option in options and _exceeds(value, largest):
            raise ConfigError(f"{where} is {shown(value)}; expected at most {largest:.3g}")
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is type(None) and value is None:
            return None
        if option in (bool, str) and isinstance(value, option):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and not isinstance(value, bool) and _is_number(value):
            return float(value)
    if str in options and not isinstance(value, (bool, dict, list, type(None))):  # off is false to YAML, not "off"
        return str(value)
    raise ConfigError(f"{where} is {shown(value)}; expected {_kind_name(options)}")


def _exceeds(value: Any, largest: float) -> bool:
    if isinstance(value, int):
        return abs(value) > largest
    return _is_number(value) and abs(float(value)) > largest


def _is_number(value: Any) -> bool:
    try:
        return float(value) - float(value) == 0  # neither NaN nor infinite
    except (TypeError, ValueError, OverflowError):
        return False


def _kind_name(options: Sequence[Any]) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return " or ".join(names.get(o) or f"one of {', '.join(map(str, typing.get_args(o)))}" for o in options)
