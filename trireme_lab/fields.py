# SPDX-License-Identifier: Apache-2.0
"""Reading a YAML tree field by field: every fault is a ScenarioError that begins with the field's path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from trireme_lab.errors import ScenarioError

T = TypeVar("T")
_REQUIRED = object()


class Fields:
    """The fields of one mapping. Leaving its `with` block checks that every field was read: others are unknown."""

    def __init__(self, tree: object, path: str = "") -> None:
        if not isinstance(tree, Mapping):
            raise ScenarioError(f"{path or 'the scenario'}: must be a mapping")
        self._tree = dict(tree)
        self._path = path

    def __enter__(self) -> Fields:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._tree:
            raise ScenarioError(f"{self.path(next(iter(self._tree)))}: unknown field")

    def path(self, key: object) -> str:
        """Return the full path of a field."""
        return f"{self._path}.{key}" if self._path else str(key)

    def take(self, key: str, parse: Callable[[object, str], T], default: object = _REQUIRED) -> T:
        """Read a field by `parse(value, path)`; `default`, where given, is parsed in place of a missing field."""
        value = self._tree.pop(key, default)
        if value is _REQUIRED:
            raise ScenarioError(f"{self.path(key)}: is required")
        return parse(value, self.path(key))

    def has(self, key: str) -> bool:
        return key in self._tree


def text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise ScenarioError(f"{path}: must be text")
    return value


def name(value: object, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise ScenarioError(f"{path}: must be a name")
    return value


def flag(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        raise ScenarioError(f"{path}: must be true or false")
    return value


def seconds(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ScenarioError(f"{path}: must be a number of seconds")
    return float(value)


def port_number(value: object, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65_535:
        raise ScenarioError(f"{path}: must be a port number")
    return value


def mapping(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ScenarioError(f"{path}: must be a mapping")
    return value


def labels(value: object, path: str) -> Mapping[str, str]:
    for key, item in mapping(value, path).items():
        if not isinstance(key, str) or not isinstance(item, str):
            raise ScenarioError(f"{path}.{key}: labels are text (put quotes around numbers and yes/no)")
    return dict(value)  # type: ignore[call-overload,no-any-return]  # checked above


def list_of(parse: Callable[[object, str], T]) -> Callable[[object, str], tuple[T, ...]]:
    """Return a parser for lists whose items `parse` reads."""

    def parse_list(value: object, path: str) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise ScenarioError(f"{path}: must be a list")
        return tuple(parse(item, f"{path}[{index}]") for index, item in enumerate(value))

    return parse_list


def parsed_by(parse: Callable[[str], T]) -> Callable[[object, str], T]:
    """Return a parser for text that `parse` turns into a value or refuses by ValueError."""

    def parse_text(value: object, path: str) -> T:
        try:
            return parse(text(value, path))
        except ValueError as err:
            raise ScenarioError(f"{path}: {err}") from err

    return parse_text


def one_of(choices: Mapping[str, T]) -> Callable[[object, str], T]:
    """Return a parser for one of a closed set of words."""

    def parse_choice(value: object, path: str) -> T:
        if not isinstance(value, str) or value not in choices:
            raise ScenarioError(f"{path}: must be one of {', '.join(choices)}")
        return choices[value]

    return parse_choice
