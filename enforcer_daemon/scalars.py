# SPDX-License-Identifier: Apache-2.0
"""What a scalar of YAML means to kubectl: the values of go-yaml v2, in the form in which JSON carries them. Pure.

kubectl, Helm and the API server read YAML by sigs.k8s.io/yaml: go-yaml v2 resolves each scalar, and the result becomes
JSON, where a number without a fraction is an integer. So an unquoted `81111e1` is the number 811110, `08` is 8, `y` is
true, and `port: 80.0` is port 80. Source: gopkg.in/yaml.v2 resolve.go, sigs.k8s.io/yaml convertToJSONableObject.
"""

from __future__ import annotations

import re
import struct

Scalar = str | int | float | bool | None

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
}
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_RADIX = {"x": 16, "b": 2, "o": 8}
_LEAST_INTEGER, _GREATEST_INTEGER = -(2**63), 2**64 - 1
_EXPONENT_FROM = 1e21
"""encoding/json writes larger numbers with an exponent: no field of integers takes them."""

_EXPONENT_IN_NAME = 6
"""strconv writes a key from 1e+06 on with an exponent."""


class ScalarError(ValueError):
    """A scalar that JSON cannot carry, or that its explicit tag contradicts."""


def resolve(text: str) -> Scalar:
    """Return what a plain scalar means; raise ScalarError for infinity and NaN, which JSON does not have."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _NOT_FINITE.fullmatch(text):
        raise ScalarError(text)
    if text[0] == ".":
        return _float(text) if _FLOAT.fullmatch(text) else text
    digits = text.replace("_", "")
    if _INTEGER.fullmatch(digits) and (number := _integer(digits)) is not None:
        return number
    return _float(digits, text) if _FLOAT.fullmatch(digits) else text


def resolve_tagged(kind: str, text: str) -> Scalar:
    """Return what a scalar with the tag `!!kind` means; raise ScalarError if it is not of that kind."""
    if kind in ("str", "timestamp"):
        return text
    value = resolve(text)
    is_bool = isinstance(value, bool)
    fits = {
        "null": value is None,
        "bool": is_bool,
        "int": isinstance(value, int) and not is_bool and bool(_INTEGER.fullmatch(text.replace("_", ""))),
        "float": isinstance(value, int | float) and not is_bool,
    }
    if not fits.get(kind, False):
        raise ScalarError(text)
    return value


def json_number(number: float) -> int | float:
    """Return a number as Go reads it back from its JSON: without a fraction it is an integer.

    Raise ScalarError if no float64 holds it.
    """
    if number != number or abs(number) == float("inf"):
        raise ScalarError(str(number))
    return int(number) if number.is_integer() and abs(number) < _EXPONENT_FROM else number


def field_name(value: Scalar) -> str | None:
    """Return the name that a key stands for, None if it stands for none."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_name(value)
    if isinstance(value, int) and value > 2**63 - 1:
        return None
    return None if value is None else str(value)


def resolve_key(text: str) -> str | None:
    """Return the name that a plain key stands for: of a number with a fraction or an exponent, its single precision."""
    if _NOT_FINITE.fullmatch(text):
        return text.lower().removeprefix("+")
    digits = text.replace("_", "")
    is_integer = bool(_INTEGER.fullmatch(digits)) and _integer(digits) is not None
    value = resolve(text)
    if isinstance(value, int) and not isinstance(value, bool) and not is_integer:
        return _float_name(float(digits))
    return field_name(value)


def _integer(digits: str) -> int | None:
    """Return the integer, None if 64 bits do not hold it."""
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits.removeprefix("+"))
    if len(digits) > 1 and digits[0] == "0":
        radix = _RADIX.get(digits[1].lower(), 8)
        number = int(digits[1:] if digits[1].isdigit() else digits[2:], radix)
    else:
        number = int(digits) if len(digits) < 30 else _GREATEST_INTEGER + 1
    number *= sign
    return number if _LEAST_INTEGER <= number <= _GREATEST_INTEGER else None


def _float(digits: str, text: str | None = None) -> int | float | str:
    """Return the number; the text if no float64 holds it."""
    number = float(digits)
    return (text or digits) if abs(number) == float("inf") else json_number(number)


def _float_name(number: float) -> str:
    """Return strconv.FormatFloat(number, 'g', -1, 32)."""
    try:
        single = struct.pack("<f", number)
    except OverflowError:
        return "-.inf" if number < 0 else ".inf"
    (number,) = struct.unpack("<f", single)
    precision = next(p for p in range(9) if struct.pack("<f", float(f"{number:.{p}e}")) == single)
    mantissa, _, exponent = f"{number:.{precision}e}".partition("e")
    if number and (int(exponent) < -4 or int(exponent) >= _EXPONENT_IN_NAME):
        return f"{mantissa}e{exponent}"
    return f"{number:.{max(precision - int(exponent), 0)}f}"
