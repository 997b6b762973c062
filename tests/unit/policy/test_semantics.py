# SPDX-License-Identifier: Apache-2.0
"""The semantics of NetworkPolicy, case by case: the project's own vectors, and the shared cases where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from enforcer_daemon.policy import InvalidObjectError, decode_network_policy
from triremectl.cases import decode_case

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "conformance"
SHARED_CLUSTER_CASES = ROOT.parent / "shared" / "cnp" / "cases.jsonl.gz"
DOCUMENTS = list(
    yaml.safe_load_all((ROOT / "tests" / "vectors" / "policy" / "semantics.yaml").read_text(encoding="utf-8"))
)
needs_shared_cases = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared cases are not beside this checkout")

PODS = [
    {
        "namespace": "farm", "name": "cow", "ip": "10.1.0.1", "labels": {"kind": "cow", "age": "3"}, "node": "n1",
        "containerPorts": [{"name": "milk", "port": 8080}, {"name": "moo", "port": 7000, "protocol": "UDP"}],
    },
    {
        "namespace": "farm", "name": "hen", "ip": "10.1.0.2", "labels": {"kind": "hen"}, "node": "n2",
        "containerPorts": [{"name": "egg", "port": 8080}, {"name": "milk", "port": 9090}],
    },
    {
        "namespace": "city", "name": "cat", "ip": "10.1.0.3", "labels": {"kind": "cat", "name": ""}, "node": "n1",
        "containerPorts": [{"name": "purr", "port": 8080}],
    },
    {"namespace": "city", "name": "dog", "ip": "10.1.0.4", "labels": {"kind": "dog", "age": "3"}, "node": "n2"},
    {"namespace": "city", "name": "cat6", "ip": "fd01::3", "labels": {"kind": "cat6"}},
    {"namespace": "city", "name": "hawk", "ip": "192.168.0.11", "labels": {"kind": "hawk"}, "node": "n1",
     "hostNetwork": True},
]  # fmt: skip
NODES = [{"name": "n1", "ip": "192.168.0.11"}, {"name": "n2", "ip": "192.168.0.12"}]


def _policy(name: str, spec: object) -> dict[str, Any]:
    namespace, _, policy = name.partition("/")
    metadata = {"namespace": namespace, "name": policy}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _probe(text: str) -> dict[str, Any]:
    source, destination, port, expected, *denied_by = text.split()
    number, _, protocol = port.partition("/")
    probe = {"from": source, "to": destination, "port": int(number) if number.isdigit() else number}
    return {
        **probe,
        "protocol": protocol or "TCP",
        "expected": expected,
        "denied_by": denied_by[0] if denied_by else None,
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document["name"] for document in DOCUMENTS])
def test_own_case(document: dict[str, Any]) -> None:
    case = decode_case({
        "name": document["name"],
        "requires": document.get("requires"),
        "namespaces": [{"name": "farm", "labels": {"green": "yes"}}],
        "pods": PODS,
        "nodes": NODES,
        "policies": [_policy(name, spec) for name, spec in document["policies"].items()],
        "probes": [_probe(text) for text in document["probes"]],
    })  # fmt: skip

    found = [(str(p), v.verdict, v.denied_by) for p in case.probes for v in [case.cluster.evaluate(p)]]

    assert found == [(str(p), p.expected, p.denied_by) for p in case.probes]


@needs_shared_cases
def test_all_shared_cases_have_the_expected_verdicts() -> None:
    wrong, count = [], 0
    with gzip.open(SHARED / "cases.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            case = decode_case(json.loads(line))
            for probe in case.probes:
                count += 1
                verdict = case.cluster.evaluate(probe)
                if (verdict.verdict, verdict.denied_by) != (probe.expected, probe.denied_by):
                    wrong.append((case.name, str(probe), verdict))
    assert wrong == []
    assert count > 30_000


needs_shared_cluster_cases = pytest.mark.skipif(
    not SHARED_CLUSTER_CASES.is_file(), reason="the shared cases are not beside this checkout"
)


@needs_shared_cluster_cases
def test_all_shared_cases_of_cluster_policies_have_the_expected_verdicts() -> None:
    wrong, count = [], 0
    with gzip.open(SHARED_CLUSTER_CASES, "rt", encoding="utf-8") as lines:
        for line in lines:
            case = decode_case(json.loads(line))
            for probe in case.probes:
                count += 1
                verdict = case.cluster.evaluate(probe)
                if (verdict.verdict, verdict.denied_by) != (probe.expected, probe.denied_by):
                    wrong.append((case.name, str(probe), verdict))
    assert wrong == []
    assert count == 188


@needs_shared_cluster_cases
def test_no_pod_gains_by_hiding_in_the_shared_cases() -> None:
    gained, count = [], 0
    with gzip.open(SHARED_CLUSTER_CASES, "rt", encoding="utf-8") as lines:
        for line in lines:
            case = decode_case(json.loads(line))
            for probe in case.probes:
                shown, hidden = (case.cluster.evaluate(probe, hides_peers=hides) for hides in (False, True))
                for end, other in ((shown.egress, hidden.egress), (shown.ingress, hidden.ingress)):
                    count += not other.is_allowed
                    if other.is_allowed and not end.is_allowed:
                        gained.append((case.name, str(probe), end, other))
    assert gained == []
    assert count > 100


@needs_shared_cases
def test_all_shared_bad_policies_are_refused_at_the_right_field() -> None:
    for line in (SHARED / "bad_policies.jsonl").read_text(encoding="utf-8").splitlines():
        bad = json.loads(line)
        with pytest.raises(InvalidObjectError) as refusal:
            decode_network_policy(bad["manifest"])
        fields = {problem.field for problem in refusal.value.problems}
        if bad["stage"] == "validation":
            assert {reason.split(": ")[0] for reason in bad["reason"].split("; spec")} & fields, bad["name"]
        if bad["accepted_before_1_36"]:
            assert decode_network_policy(bad["manifest"], mask_host_bits=True).name == "p"
