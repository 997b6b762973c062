# SPDX-License-Identifier: Apache-2.0
"""Reads fields of a Kubernetes object into typed values, and collects every problem with its field's path.

The rules are those of the API server's decoder with strict field validation: null is the same as absent, a null entry
of a list is an empty one, numbers are not strings, and unknown fields are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from enforcer_daemon.errors import PolicyError

MAX_PROBLEMS = 1_000
"""Of one object that are looked for; whoever mends so many finds the others next."""
MAX_MESSAGE = 2_048
"""Characters of one problem; the value that it quotes may be as large as the object."""
_INT32 = range(-(2**31), 2**31)
_JSON_TYPES: dict[type, str] = {
    str: "string", bool: "bool", int: "number", float: "number", list: "array", tuple: "array", dict: "object",
}  # fmt: skip


class InvalidObjectError(PolicyError):
    """An object with one or more problems; `field` and `message` are those of the first."""

    def __init__(self, problems: Sequence[PolicyError]) -> None:
        super().__init__(problems[0].field, problems[0].message)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "; ".join(f"{problem.field}: {problem.message}" for problem in self.problems)


class Reader:
    """The problems of one object, and the ways to read its fields. A field that is at fault reads as absent."""

    def __init__(self, *, is_stored: bool = False) -> None:
        self.problems: list[PolicyError] = []
        self.is_stored = is_stored
        """Whether the object is one that an API server has: what earlier versions accepted is then read as they did."""

    def finish(self) -> None:
        """Raise InvalidObjectError if anything was wrong."""
        if self.problems:
            raise InvalidObjectError(self.problems)

    def refuse(self, path: str, message: str) -> None:
        """Note a problem in the API server's form; raise InvalidObjectError if there are too many already."""
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        self.problems.append(PolicyError(path, message))
        if len(self.problems) >= MAX_PROBLEMS:
            raise InvalidObjectError(self.problems)

    def invalid(self, path: str, value: object, complaints: Iterable[str]) -> bool:
        """Note each complaint about a value; tell whether there was any."""
        found = False
        for complaint in complaints:
            self.refuse(path, f"Invalid value: {_quoted(value)}: {complaint}")
            found = True
        return found

    def unsupported(self, path: str, value: str, supported: Iterable[str]) -> None:
        """Note a value that is none of a closed set."""
        choices = ", ".join(_quoted(choice) for choice in supported)
        self.refuse(path, f"Unsupported value: {_quoted(value)}: supported values: {choices}")

    def struct(self, value: object, path: str, fields: Collection[str] | None = None) -> Mapping[str, object]:
        """Read an object with these fields and no others; without `fields`, with any."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._wrong_type(path, value, "object")
            return {}
        for key in value:
            if not isinstance(key, str):
                self.refuse(child(path, str(key)), "field names must be strings")
            elif fields is not None and key not in fields:
                self.refuse(child(path, key), f'unknown field "{child(path, key)}"')
        return value

    def sequence(self, value: object, path: str) -> list[tuple[str, object]]:
        """Read a list; give each entry with its path."""
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self._wrong_type(path, value, "array")
            return []
        return [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]

    def string(self, value: object, path: str) -> str | None:
        """Read a string; None if it is something else, which is then noted."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        self._wrong_type(path, value, "string")
        return None

    def integer(self, value: object, path: str) -> int | None:
        """Read a 32-bit integer; None if absent, or if it is something else, which is then noted."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value not in _INT32:
            self._wrong_type(path, value, "32-bit integer")
            return None
        return value

    def boolean(self, value: object, path: str) -> bool:
        """Read true or false; absent is false."""
        if value is None or isinstance(value, bool):
            return bool(value)
        self._wrong_type(path, value, "bool")
        return False

    def string_map(self, value: object, path: str) -> dict[str, str]:
        """Read a map of strings, such as labels."""
        entries = self.struct(value, path)
        result = {}
        for key, entry in entries.items():
            text = self.string(entry, child(path, str(key)))
            if text is not None and isinstance(key, str):
                result[key] = text
        return result

    def _wrong_type(self, path: str, value: object, wanted: str) -> None:
        shown = f" {value}" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        self.refuse(path, f"cannot unmarshal {_JSON_TYPES.get(type(value), type(value).__name__)}{shown} into {wanted}")


def child(path: str, name: str) -> str:
    """Return the path of a field of the object at `path`."""
    return f"{path}.{name}" if path else name


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
