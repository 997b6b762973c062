# SPDX-License-Identifier: Apache-2.0
"""Manifests as kubectl reads and prints them: each scalar in each place of a policy, and whole objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from enforcer_daemon.sources.manifests import Entry, decode_file

VECTORS = Path(__file__).parents[2] / "vectors" / "yaml"
SCALARS = [row for row in json.loads((VECTORS / "scalars.json").read_text()) if row["scalar"] not in ("-", "<<")]
HOLE = "HOLE"
PLACES = {
    "apiVersion": "{apiVersion: HOLE, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelector: {}}}",
    "kind": "{apiVersion: networking.k8s.io/v1, kind: HOLE, metadata: {name: a}, spec: {podSelector: {}}}",
    **{
        name: f"{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{{metadata}}}, spec: {{{spec}}}}}"
        for name, (metadata, spec) in {
            "name": ("name: HOLE", "podSelector: {}"),
            "namespace": ("name: a, namespace: HOLE", "podSelector: {}"),
            "annotation": ("name: a, annotations: {a: HOLE}", "podSelector: {}"),
            "label": ("name: a, labels: {a: HOLE}", "podSelector: {}"),
            "label key": ("name: a, labels: {? HOLE : a}", "podSelector: {}"),
            "matchLabels": ("name: a", "podSelector: {matchLabels: {a: HOLE}}"),
            "matchLabels key": ("name: a", "podSelector: {matchLabels: {? HOLE : a}}"),
            "expression key": ("name: a", "podSelector: {matchExpressions: [{key: HOLE, operator: Exists}]}"),
            "operator": ("name: a", "podSelector: {matchExpressions: [{key: a, operator: HOLE}]}"),
            "values": ("name: a", "podSelector: {matchExpressions: [{key: a, operator: In, values: [HOLE]}]}"),
            "policyTypes": ("name: a", "podSelector: {}, policyTypes: [HOLE]"),
            "port": ("name: a", "podSelector: {}, ingress: [{ports: [{port: HOLE}]}]"),
            "endPort": ("name: a", "podSelector: {}, ingress: [{ports: [{port: 1, endPort: HOLE}]}]"),
            "protocol": ("name: a", "podSelector: {}, ingress: [{ports: [{protocol: HOLE}]}]"),
            "cidr": ("name: a", "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: HOLE}}]}]"),
            "except": ("name: a", "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [HOLE]}}]}]"),
            "field": ("name: a", "podSelector: {}, ? HOLE : a"),
        }.items()
    },
}


def entries(name: str, text: str) -> list[Any]:
    file = decode_file(name, text.encode())
    assert file.problem is None, file.problem
    return [summary(entry) for entry in file.entries]


def summary(entry: Entry) -> Any:
    return entry.key, entry.object, [(problem.field, problem.message) for problem in entry.problems]


def as_json(place: str, row: dict[str, Any]) -> str:
    """The same place as JSON, with what kubectl makes of the scalar."""
    tree = yaml.load(PLACES[place], yaml.BaseLoader)  # noqa: S506 - every scalar stays text
    tree = json.loads(json.dumps(tree).replace(': "1"', ": 1"))
    text = json.dumps(tree)
    if "? HOLE" in PLACES[place]:
        return text.replace(f'"{HOLE}"', json.dumps(row["key"]))
    return text.replace(f'"{HOLE}"', json.dumps(row["value"]))


@pytest.mark.parametrize("place", PLACES)
def test_a_scalar_is_in_every_place_what_kubectl_makes_of_it(place: str) -> None:
    tried = 0
    for row in SCALARS:
        if ("key" if "? HOLE" in PLACES[place] else "value") not in row or any(c in row["scalar"] for c in ",²"):
            continue
        found = entries("a.yaml", PLACES[place].replace(HOLE, row["scalar"]))
        if abs(row["value"]) < 2**63 if isinstance(row.get("value"), int | float) else True:
            assert found == entries("a.json", as_json(place, row)), row["scalar"]
        tried += 1
    assert tried > 200


def policy(spec: str, metadata: str = "name: a, namespace: shop") -> bytes:
    text = f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{{metadata}}}\nspec: {{{spec}}}\n"
    return text.encode()


@pytest.mark.parametrize("label", ["81111e1", "08", "y", "1.10", "no", "0x1F", "1_0"])
def test_an_unquoted_label_that_the_api_server_refuses_is_refused(label: str) -> None:
    (entry,) = decode_file("a.yaml", policy(f"podSelector: {{matchLabels: {{commit: {label}}}}}")).entries
    assert entry.object is None
    assert entry.problems[0].field.startswith("spec.podSelector.matchLabels")


@pytest.mark.parametrize(("port", "number"), [("1e3", 1000), ("0o120", 80), ("80.0", 80), ("0120", 80), ("8_0", 80)])
def test_a_port_is_the_number_that_kubectl_makes_of_it(port: str, number: int) -> None:
    (entry,) = decode_file("a.yaml", policy(f"podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]")).entries
    (other,) = decode_file("a.yaml", policy(f"podSelector: {{}}, ingress: [{{ports: [{{port: {number}}}]}}]")).entries
    assert entry.object is not None
    assert entry.object == other.object


def test_files_of_windows_and_joined_files_are_read() -> None:
    a, b = policy("podSelector: {}").decode(), policy("podSelector: {}", "name: b").decode()
    for content in (f"\ufeff{a}---\n\ufeff{b}".encode(), f"{a}---\r\n{b}".replace("\n", "\r\n").encode("utf-16")):
        assert [entry.object is not None for entry in decode_file("a.yaml", content).entries] == [True, True]


PRINTED = sorted((VECTORS / "printed").glob("*.yaml"))


@pytest.mark.parametrize("path", PRINTED, ids=[path.stem for path in PRINTED])
def test_what_kubectl_prints_can_be_read(path: Path) -> None:
    file = decode_file(path.name, path.read_bytes())
    assert file.problem is None
    assert [problem for entry in file.entries for problem in entry.problems] == []
    assert len(file.entries) == 3
