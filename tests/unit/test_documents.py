# SPDX-License-Identifier: Apache-2.0
"""Splitting YAML and JSON into documents as Kubernetes reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.documents import Document, DocumentError, decode_text, read_documents


def only(text: str) -> Document:
    (document,) = read_documents(text, is_json=False)
    return document


def test_documents_have_their_lines_and_empty_ones_are_left_out() -> None:
    documents = read_documents("# nothing\n---\na: 1\n---\n---\nb: 2\n", is_json=False)
    assert [(d.line, d.manifest) for d in documents] == [(3, {"a": 1}), (6, {"b": 2})]


def test_json_documents_may_follow_each_other() -> None:
    documents = read_documents('{"a": 1}\n\n {"b": [2, null]}\n', is_json=True)
    assert [(d.line, d.manifest) for d in documents] == [(1, {"a": 1}), (3, {"b": [2, None]})]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2026-01-01", "2026-01-01"),
        ("12:30:45", "12:30:45"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", 1_000),
        ("010", 8),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("'80'", "80"),
        ("=", "="),
    ],
)
def test_scalars_are_read_as_kubernetes_reads_them(text: str, value: object) -> None:
    found = only(f"a: {text}").manifest
    assert found == {"a": value}
    assert isinstance(found, dict)
    assert type(found["a"]) is type(value)


def test_keys_become_strings() -> None:
    assert only("{1: a, true: b, x: c}").manifest == {"1": "a", "true": "b", "x": "c"}


def test_aliases_and_merges_are_followed() -> None:
    assert only("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: *x").manifest == {
        "a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}, "c": {"k": 1, "l": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: {k: 3, <<: *x}", {"k": 1, "l": 2}),
        ("a: {<<: [*x, *y]}", {"k": 1, "l": 2, "m": 2}),
        ("a: {<<: [*x, *y], k: 3}", {"k": 3, "l": 2, "m": 2}),
        ("a: {'<<': *x}", {"<<": {"k": 1, "l": 2}}),
    ],
)
def test_merges_count_in_the_order_that_kubectl_has(text: str, value: object) -> None:
    found = only(f"x: &x {{k: 1, l: 2}}\ny: &y {{k: 5, m: 2}}\n{text}").manifest
    assert isinstance(found, dict)
    assert found["a"] == value


@pytest.mark.parametrize("break_", ["\n", "\r\n"])
def test_each_document_may_begin_with_a_byte_order_mark(break_: str) -> None:
    text = break_.join(["\ufeffa: 1", "---", "\ufeffb: 2", "--- # c", "\ufeffc: \ufeff3", "\ufeff---", "d: 4", ""])
    documents = read_documents(text, is_json=False)
    assert [(d.line, d.manifest) for d in documents] == [
        (1, {"a": 1}), (3, {"b": 2}), (5, {"c": "\ufeff3"}), (7, {"d": 4})
    ]  # fmt: skip


def test_text_is_utf_8_or_utf_16_with_a_mark() -> None:
    for content in ("\ufeffé".encode(), "é".encode(), "é".encode("utf-16"), "\ufeffé".encode("utf-16-be")):
        assert decode_text(content) == "é"
    for content in ("é".encode("latin-1"), b"\xff\xfea"):
        with pytest.raises(UnicodeDecodeError):
            decode_text(content)


def test_numbers_of_json_are_as_go_writes_them() -> None:
    (document,) = read_documents('{"a": 80.0, "b": 1e3, "c": 1.5, "d": 1e21}', is_json=True)
    assert document.manifest == {"a": 80, "b": 1000, "c": 1.5, "d": 1e21}
    assert isinstance(document.manifest, dict)
    assert [type(value) for value in document.manifest.values()] == [int, int, float, float]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, 'duplicate field "a"'),
        ("a: .inf", 1, "cannot read '.inf'"),
        ("a: !!binary aGk=", 1, "has no meaning here"),
        ("a: !mine x", 1, "has no meaning here"),
        ("a:\n  ~: 1", 2, "field names must be strings"),
        ("? [a]\n: 1", 1, "field names must be strings"),
        ("a: {<<: 7}", 1, "<< merges mappings only"),
        ("a: &a [*a]", 1, "nested more than 100 deep"),
        ("[" * 150 + "]" * 150, 1, "nested more than 100 deep"),
    ],
)
def test_a_document_at_fault_leaves_the_others(text: str, line: int, message: str) -> None:
    faulty, sound = read_documents(text + "\n---\nsound: 1\n", is_json=False)
    assert faulty.error
    assert message in faulty.error
    assert faulty.line == line
    assert sound.manifest == {"sound": 1}


@pytest.mark.parametrize(
    ("text", "is_json", "line"),
    [
        ("a: [1\nb: 2", False, 2),
        ("a: 1\n\tb: 2", False, 2),
        ('{"a": 1,\n "b"}', True, 2),
        ('\n{"a": 1, "a": 2}', True, 2),
        ('{"a": NaN}', True, 1),
        ("a: \x01", False, 1),
    ],
)
def test_text_that_cannot_be_parsed_names_the_line(text: str, is_json: bool, line: int) -> None:
    with pytest.raises(DocumentError) as error:
        read_documents(text, is_json=is_json)
    assert error.value.line == line


def test_a_field_is_found_by_its_path() -> None:
    document = only("spec:\n  rules:\n  - a: 1\n  - from:\n    - x.y/z: 1\n")
    assert document.line_of("spec.rules[1].from[0].x.y/z") == 5
    assert document.line_of("spec.rules[1].from[0].absent") == 5
    assert document.line_of("spec.rules[9]") == 2
    assert document.line_of("metadata.name") == 1
    assert document.line_of("") == 1


@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1"))), st.booleans())
def test_any_text_gives_documents_or_an_error(text: str, is_json: bool) -> None:
    try:
        documents = read_documents(text, is_json=is_json)
    except DocumentError as error:
        documents = []
        line = error.line
    else:
        line = 1
    assert line >= 1
    assert all(document.line >= 1 for document in documents)
