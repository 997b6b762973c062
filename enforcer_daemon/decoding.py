# SPDX-License-Identifier: Apache-2.0
"""From YAML to frozen values: groups of camelCase keys become dataclasses, by their fields' types.

Nothing is guessed: an unknown key, one that occurs twice, and a value of another type are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.model import IPAddress, IPNetwork

_MAX_NUMBER = 1e9
"""Seconds of thirty years, and more of anything than is sensible."""


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice: of two values the operator means one, and nobody knows which."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value}: occurs twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_Group = TypeVar("_Group")


def decode_group(group: type[_Group], tree: object, prefix: str) -> _Group:
    """Make a dataclass of a mapping; raise SettingsError, which names the key under `prefix`."""
    if not isinstance(tree, Mapping):
        raise SettingsError(f"{prefix.rstrip('.') or 'the file'}: must be a mapping")
    hints = typing.get_type_hints(group)
    fields = {_camel(f.name): f for f in dataclasses.fields(group)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise SettingsError(f"{prefix}{key}: unknown setting")
    values: dict[str, Any] = {}
    for key, declared in fields.items():
        if key in tree:
            values[declared.name] = _decode_value(hints[declared.name], tree[key], prefix + key)
        elif declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
            raise SettingsError(f"{prefix}{key}: is required")
    return group(**values)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _decode_value(hint: Any, value: object, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return decode_group(hint, value, name + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise SettingsError(f"{name}: must be a list")
        return tuple(_decode_value(typing.get_args(hint)[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return _decode_union(hint, value, name)
    return _decode_scalar(hint, value, name)


def _decode_union(hint: Any, value: object, name: str) -> Any:
    if hint == IPNetwork:
        return _parsed(ipaddress.ip_network, value, name)
    if hint == IPAddress:
        return _parsed(ipaddress.ip_address, value, name)
    (member,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return None if value is None else _decode_value(member, value, name)


def _parsed(parse: Any, value: object, name: str) -> Any:
    if not isinstance(value, str):
        raise SettingsError(f"{name}: must be a string")
    try:
        return parse(value)
    except ValueError as err:
        raise SettingsError(f"{name}: {err}") from err


def _decode_scalar(hint: Any, value: object, name: str) -> Any:
    if hint is Path:
        if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
            raise SettingsError(f"{name}: must be an absolute path")
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.value for member in hint]
        if value not in choices:
            raise SettingsError(f"{name}: must be one of {', '.join(choices)}")
        return hint(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not -_MAX_NUMBER <= value <= _MAX_NUMBER:  # NaN is not, either: it compares with nothing.
            raise SettingsError(f"{name}: must be a finite number")
        return float(value)
    if hint in (int, bool) and type(value) is hint:
        return value
    if hint is str and isinstance(value, str) and value.isprintable():
        return value
    wanted = {int: "a number", float: "a number", bool: "true or false"}
    raise SettingsError(f"{name}: must be {wanted.get(hint, 'a string')}")
