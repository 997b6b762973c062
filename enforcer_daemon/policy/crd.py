# SPDX-License-Identifier: Apache-2.0
"""Checks values as the structural schema of a CustomResourceDefinition does, with the API server's messages.

Unlike a built-in type's field, a field of a custom resource may not be null, and lists and objects have size limits.
Source: apiextensions-apiserver and kube-openapi's validation errors of Kubernetes 1.36.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import TypeVar

from enforcer_daemon.policy.reader import Reader, child

E = TypeVar("E", bound=Enum)
_JSON_TYPES: dict[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", tuple: "array", dict: "object",
    type(None): "null",
}  # fmt: skip


class SchemaReader:
    """Reads the fields of one custom resource; notes each problem with the reader, and gives None for such a field."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def struct(
        self, value: object, path: str, fields: Collection[str], required: Collection[str] = ()
    ) -> Mapping[str, object]:
        """Read an object with these fields and no others; a required field that is absent is a problem."""
        if not isinstance(value, Mapping):
            self.wrong_type(path, value, "object")
            return {}
        self.reader.struct(value, path, fields)
        for field in required:
            if field not in value:
                self.reader.refuse(child(path, field), "Required value")
        return value

    def one_of(self, value: object, path: str, fields: Collection[str]) -> tuple[str, object] | None:
        """Read an object that must have exactly one of these fields; return it with its name."""
        found = self.struct(value, path, fields)
        if isinstance(value, Mapping):
            if not found:
                self.reader.invalid(path, {}, [f"{path} in body should have at least 1 properties"])
            elif len(found) > 1:
                self.reader.refuse(path, f"Too many: {len(found)}: must have at most 1 items")
        known = [(name, entry) for name, entry in found.items() if name in fields]
        return known[0] if len(known) == 1 == len(found) else None

    def items(self, value: object, path: str, most: int, least: int = 0) -> list[tuple[str, object]]:
        """Read a list of `least` to `most` entries; return each with its path, and none of a list that is too long."""
        if not isinstance(value, list | tuple):
            self.wrong_type(path, value, "array")
            return []
        if len(value) > most:
            self.reader.refuse(path, f"Too many: {len(value)}: must have at most {most} items")
            return []
        if len(value) < least:
            self.reader.invalid(path, list(value), [f"{path} in body should have at least {least} items"])
        return [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]

    def string_set(self, value: object, path: str, most: int) -> list[tuple[str, str]]:
        """Read a list of 1 to `most` different strings; return each with its path."""
        seen: set[str] = set()
        for entry_path, entry in self.items(value, path, most, least=1):
            text = self.string(entry, entry_path)
            if text in seen:
                self.reader.refuse(entry_path, f'Duplicate value: "{text}"')
            elif text is not None:
                seen.add(text)
        return [(entry_path, entry) for entry_path, entry in self._pairs(value, path) if entry in seen]

    def _pairs(self, value: object, path: str) -> list[tuple[str, str]]:
        entries = value if isinstance(value, list | tuple) else ()
        return [(f"{path}[{index}]", entry) for index, entry in enumerate(entries) if isinstance(entry, str)]

    def string(self, value: object, path: str, longest: int | None = None) -> str | None:
        """Read a string of at most `longest` characters."""
        if not isinstance(value, str):
            self.wrong_type(path, value, "string")
            return None
        if longest is not None and len(value) > longest:
            self.reader.refuse(path, f"Too long: may not be more than {longest} bytes")
            return None
        return value

    def choice(self, value: object, path: str, choices: type[E]) -> E | None:
        """Read one word of a closed set."""
        text = self.string(value, path)
        for member in choices:
            if member.value == text:
                return member
        if text is not None:
            self.reader.unsupported(path, text, [str(member.value) for member in choices])
        return None

    def integer(self, value: object, path: str, least: int, most: int) -> int | None:
        """Read a whole number from `least` to `most`."""
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong_type(path, value, "integer")
            return None
        if value < least:
            self.reader.invalid(path, value, [f"{path} in body should be greater than or equal to {least}"])
        elif value > most:
            self.reader.invalid(path, value, [f"{path} in body should be less than or equal to {most}"])
        else:
            return value
        return None

    def wrong_type(self, path: str, value: object, wanted: str) -> None:
        """Note that a value has another type than its field."""
        found = _JSON_TYPES.get(type(value), type(value).__name__)
        self.reader.invalid(path, found, [f'{path} in body must be of type {wanted}: "{found}"'])
