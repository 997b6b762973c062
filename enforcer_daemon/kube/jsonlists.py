# SPDX-License-Identifier: Apache-2.0
"""Reads a large JSON object member by member, and one of its lists entry by entry, so that one at a time is in memory.

Parsed, JSON takes ten to twenty times as much memory as its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_DECODER = json.JSONDecoder()
_WHITESPACE = re.compile(r"[ \t\n\r]*")


def members(text: str, list_name: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object, in their order; of the list of this name each entry by itself.

    Raises ValueError if it is no JSON object.
    """
    at = _expect(text, 0, "{")
    if text[at : at + 1] == "}":
        _end(text, at + 1)
        return
    while True:
        name, at = _DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError(f"a name is expected at {at}")
        at = _expect(text, at, ":")
        if name == list_name and text[at : at + 1] == "[":
            at = _space(text, at + 1)
            while text[at : at + 1] != "]":
                entry, at = _DECODER.raw_decode(text, at)
                yield name, entry
                at = _next(text, at, "]")
            at = _space(text, at + 1)
        else:
            value, at = _DECODER.raw_decode(text, at)
            yield name, value
        at = _next(text, at, "}")
        if text[at : at + 1] == "}":
            _end(text, at + 1)
            return


def _space(text: str, at: int) -> int:
    found = _WHITESPACE.match(text, at)
    return at if found is None else found.end()


def _expect(text: str, at: int, mark: str) -> int:
    at = _space(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"{mark} is expected at {at}")
    return _space(text, at + 1)


def _next(text: str, at: int, end: str) -> int:
    """Go past a comma, or stay at the end."""
    at = _space(text, at)
    if text[at : at + 1] == end:
        return at
    at = _expect(text, at, ",")
    if text[at : at + 1] == end:
        raise ValueError(f"nothing follows the comma before {at}")
    return at


def _end(text: str, at: int) -> None:
    if _space(text, at) != len(text):
        raise ValueError(f"more follows at {at}")
