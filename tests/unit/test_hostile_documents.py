# SPDX-License-Identifier: Apache-2.0
"""Files that are made to hurt: each ends as a problem of that file, soon, and with the process alive."""

from __future__ import annotations

import time

import pytest

from enforcer_daemon.documents import DocumentError, read_documents
from enforcer_daemon.sources.manifests import decode_file

POLICY = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a}
spec:
  podSelector: {}
"""
HEXADECIMAL = "0x" + "f" * 5_000
ALIASES = "\n".join(f"  b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))
BOMB = f"""metadata:
  a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
{ALIASES}
spec: {{policyTypes: [*a11, *a11, *a11]}}
"""
HOSTILE = {
    "brackets": ("a.yaml", "[" * 200_000, "nested more than 100 deep"),
    "braces": ("a.yaml", "{a: " * 100_000, "nested more than 100 deep"),
    "lists in one line": ("a.yaml", "- " * 100_000 + "a", "nested more than 100 deep"),
    "lists in many lines": ("a.yaml", "".join(" " * n + "-\n" for n in range(1_000)), "nested more than 100 deep"),
    "deep JSON": ("a.json", "[" * 150 + "]" * 150, "nested more than 100 deep"),
    "deeper JSON": ("a.json", "[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
    "a value for everything": ("a.yaml", BOMB, "aliases repeat more than 100000 values"),
    "a great port": ("a.yaml", POLICY + f"  ingress: [{{ports: [{{port: {HEXADECIMAL}}}]}}]", 'Invalid value: "0xff'),
    "a great kind": ("a.yaml", f"kind: {HEXADECIMAL}", "is not read here"),
    "a great float": ("a.json", '{"kind": 1e999}', "cannot read 1e999"),
    "half of a character": ("a.json", '{"metadata": {"name": "\\ud800"}}', "half of a surrogate pair"),
    "half of a name": ("a.json", '[{"\\udc00": 1}]', "half of a surrogate pair"),
}


@pytest.mark.parametrize(("name", "text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_a_problem(name: str, text: str, message: str) -> None:
    begin = time.thread_time()
    file = decode_file(name, text.encode())
    problems = [file.problem] if file.problem is not None else [p for entry in file.entries for p in entry.problems]
    assert problems
    assert message in problems[0].message
    assert time.thread_time() - begin < 5.0


def test_a_file_of_many_bombs_is_read_as_soon_as_one() -> None:
    bomb = "- &a [" + "1, " * 1_000 + "]\n" + "- *a\n" * 90
    begin = time.thread_time()
    documents = read_documents("---\n".join([bomb] * 30), is_json=False)
    assert [bool(document.error) for document in documents] == [False] + [True] * 29
    assert time.thread_time() - begin < 5.0


def test_as_many_levels_as_are_allowed_can_be_read() -> None:
    for name, text in (("yaml", "[" * 101 + "]" * 101), ("json", "[" * 101 + "]" * 101)):
        assert len(read_documents(" " * 600 + text, is_json=name == "json")) == 1
    (document,) = read_documents("[" * 102 + "]" * 102, is_json=False)
    assert document.error == "nested more than 100 deep"
    with pytest.raises(DocumentError, match="nested more than 100 deep"):
        read_documents("[" * 102 + "]" * 102, is_json=True)


def test_whole_characters_beyond_the_first_plane_are_read() -> None:
    (document,) = read_documents('["\\ud83d\\ude00"]', is_json=True)
    assert document.manifest == ["\N{GRINNING FACE}"]


def test_a_thousand_problems_of_one_object_are_told_in_part() -> None:
    (entry,) = decode_file("a.yaml", (POLICY + "".join(f"  k{n}: 1\n" for n in range(1_000))).encode()).entries
    assert len(entry.problems) == 100


def test_the_lines_of_many_json_documents_are_counted() -> None:
    file = decode_file("a.json", b"{}\n{\n}\n\n[]")
    assert [entry.line for entry in file.entries] == [1, 2, 5]


def test_many_merges_take_no_longer_than_they_are() -> None:
    begin = time.thread_time()
    (document,) = read_documents("b: {" + ", ".join(f"<<: {{k{n}: {n}}}" for n in range(20_000)) + "}", is_json=False)
    assert isinstance(document.manifest, dict)
    assert len(document.manifest["b"]) == 20_000
    assert time.thread_time() - begin < 5.0
