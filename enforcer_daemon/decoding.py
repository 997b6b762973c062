# SPDX-License-Identifier: Apache-2.0
"""From a parsed document to a frozen value: pydantic checks types and ranges, this module words what is wrong.

Nothing is guessed: an unknown key and a value of another type are errors that name the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from enforcer_daemon.errors import SettingsError

_MAX_DEPTH = 32
_MAX_NUMBER = 2**63 - 1
_MESSAGES = {
    "bool_type": "must be true or false",
    "dataclass_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be a number",
    "missing": "is required",
    "predicate_failed": "must be an absolute path",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "unexpected_keyword_argument": "unknown setting",
}
"""By pydantic's types of errors; paths alone have a predicate."""
_LIMITS = {
    "greater_than": ("gt", "must be more than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than_equal": ("le", "must be at most"),
}

_Value = TypeVar("_Value")


def decode(adapter: TypeAdapter[_Value], tree: object) -> _Value:
    """Turn a parsed document into a value; raise SettingsError that names every key at fault."""
    if fault := next(_not_json(tree, "", 0), ""):
        raise SettingsError(fault)
    try:
        # As JSON, in which a path, a network or an enumeration is a string; pydantic converts nothing else.
        return adapter.validate_json(json.dumps(tree))
    except ValidationError as err:
        raise SettingsError("; ".join(_faults(err.errors(include_url=False)))) from err


def _not_json(value: object, path: str, depth: int) -> Iterator[str]:
    """Yield what is no value of JSON, or cannot be printed."""
    name = path or "the file"
    if depth > _MAX_DEPTH:
        yield f"{name}: nested more than {_MAX_DEPTH} deep"
        return
    match value:
        case Mapping():
            for key, item in value.items():
                if not isinstance(key, str) or not key.isprintable():
                    yield f"{name}: has a key that is no string, or not printable"
                else:
                    yield from _not_json(item, f"{path}.{key}" if path else key, depth + 1)
        case list():
            for index, item in enumerate(value):
                yield from _not_json(item, f"{path}[{index}]", depth + 1)
        case _:
            if fault := _scalar_fault(value):
                yield f"{name}: {fault}"


def _scalar_fault(value: object) -> str:
    match value:
        case str():
            return "" if value.isprintable() else "must be a string without control characters"
        case None | bool():
            return ""
        case int() | float():
            return "" if -_MAX_NUMBER <= value <= _MAX_NUMBER else "must be a finite number"  # NaN is neither.
        case _:
            return "must be a string"


def _faults(errors: list[ErrorDetails]) -> list[str]:
    messages: dict[str, str] = {}
    for error in errors:
        # The last part of a union's error says which member was tried: here IPv4, then IPv6.
        is_union = str(error["loc"][-1:]).startswith("('lax-or-strict[")
        path = _path(error["loc"][:-1] if is_union else error["loc"])
        if path not in messages or ":" in str(error["input"]):
            messages[path] = f"{path}: {_message(error)}"
    return list(messages.values())


def _path(parts: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or "the file"


def _message(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return f"{words} {context[key]:.15g}"
    if kind == "enum":
        return "must be one of " + str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind == "value_error":
        return str(context["error"])
    return _MESSAGES.get(kind, str(error["msg"]))
