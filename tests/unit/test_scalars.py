# SPDX-License-Identifier: Apache-2.0
"""Scalars of YAML against a table that kubectl gave (tests/vectors/yaml)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.scalars import ScalarError, json_number, resolve, resolve_key, resolve_tagged

TABLE: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors/yaml/scalars.json").read_text())
UNSPELLED = ("-",)
"""What YAML takes for something else than a scalar."""
ROWS = [row for row in TABLE if row["scalar"] not in UNSPELLED]


@pytest.mark.parametrize("row", ROWS, ids=[row["scalar"] for row in ROWS])
def test_a_value_is_what_kubectl_makes_of_it(row: dict[str, Any]) -> None:
    if "value" not in row:
        with pytest.raises(ScalarError):
            resolve(row["scalar"])
        return
    found, expected = resolve(row["scalar"]), row["value"]
    if isinstance(expected, int) and abs(expected) >= 2**63:  # kubectl prints these with the precision of a float64
        assert isinstance(found, int)
        assert float(found) == float(expected)
        return
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("row", ROWS, ids=[row["scalar"] for row in ROWS])
def test_a_key_is_what_kubectl_makes_of_it(row: dict[str, Any]) -> None:
    if row["scalar"] != "<<":  # a merge, not a key
        assert resolve_key(row["scalar"]) == row.get("key")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [("str", "80", "80"), ("int", "0x50", 80), ("float", "5", 5), ("bool", "yes", True), ("null", "", None)],
)
def test_a_tag_says_what_a_scalar_is(kind: str, text: str, value: object) -> None:
    assert resolve_tagged(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [("int", "5.5"), ("int", "1e3"), ("int", "x"), ("float", "x"), ("bool", "1"), ("null", "x"), ("binary", "aGk=")],
)
def test_a_scalar_that_contradicts_its_tag_is_refused(kind: str, text: str) -> None:
    with pytest.raises(ScalarError):
        resolve_tagged(kind, text)


def test_a_number_that_json_cannot_carry_is_refused() -> None:
    for number in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ScalarError):
            json_number(number)


def test_a_key_beyond_single_precision_is_infinite() -> None:
    assert (resolve_key("1e300"), resolve_key("-1e300")) == (".inf", "-.inf")


@given(st.text(min_size=1) | st.text("0123456789+-._eExXoObB", min_size=1))
def test_any_text_gives_a_value_or_the_error(text: str) -> None:
    for read in (resolve, resolve_key):
        try:
            read(text)
        except ScalarError:
            assert read is resolve
