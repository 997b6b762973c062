# SPDX-License-Identifier: Apache-2.0
"""Decoding of NetworkPolicy, Namespace and Pod: what is refused, with which field, and what is accepted."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from enforcer_daemon.errors import PolicyError
from enforcer_daemon.model import NamedPort, PodRef, Protocol
from enforcer_daemon.policy import InvalidObjectError, decode_namespace, decode_network_policy, decode_pod
from enforcer_daemon.policy.objects import IPBlock, Operator, PortName, PortRange, Requirement, Rule, Selector
from enforcer_daemon.policy.syntax import parse_cidr

VECTORS = Path(__file__).parents[2] / "vectors" / "policy"
REFUSED = yaml.safe_load((VECTORS / "refused.yaml").read_text(encoding="utf-8"))


def manifest(spec: object, **metadata: object) -> dict[str, Any]:
    """Return a NetworkPolicy manifest."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "farm", **metadata},
        "spec": spec,
    }


@pytest.mark.parametrize("vector", REFUSED, ids=[next(iter(v["faults"])) or "document" for v in REFUSED])
def test_a_fault_is_refused_at_its_field(vector: dict[str, Any]) -> None:
    tree = vector["manifest"] if "manifest" in vector else manifest(vector["spec"])

    with pytest.raises(InvalidObjectError) as refusal:
        decode_network_policy(tree)

    problems = {problem.field: problem.message for problem in refusal.value.problems}
    for field, message in vector["faults"].items():
        assert problems[field].startswith(message)


def test_all_problems_are_told_at_once_and_the_first_is_the_errors_own() -> None:
    tree = manifest({"policyTypes": ["In"], "ingress": [{"ports": [{"port": 0}]}]}, name="P")

    with pytest.raises(PolicyError) as refusal:
        decode_network_policy(tree)

    assert isinstance(refusal.value, InvalidObjectError)
    assert [p.field for p in refusal.value.problems] == [
        "metadata.name", "spec.ingress[0].ports[0].port", "spec.policyTypes[0]",
    ]  # fmt: skip
    assert refusal.value.field == "metadata.name"
    assert str(refusal.value).count("; ") == 2


def test_a_whole_policy_is_read_into_values() -> None:
    spec = {
        "podSelector": {"matchLabels": {"b": "2", "a": "1"}},
        "ingress": [
            {
                "from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                "ports": [{"port": "web"}, {"protocol": "UDP", "port": 53, "endPort": 54}, {"protocol": "SCTP"}],
            }
        ],
    }

    policy = decode_network_policy(manifest(spec))

    assert (policy.namespace, policy.name, policy.egress) == ("farm", "p", None)
    assert policy.pod_selector == Selector(
        (Requirement("a", Operator.IN, frozenset({"1"})), Requirement("b", Operator.IN, frozenset({"2"})))
    )
    assert policy.ingress == (
        Rule(
            peers=(IPBlock(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),)),),
            ports=(
                PortName(Protocol.TCP, "web"), PortRange(Protocol.UDP, 53, 54), PortRange(Protocol.SCTP),
            ),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "tree",
    [
        manifest(None),
        manifest({"ingress": [{"ports": [{"port": "a"}, {"port": "x-1-y"}, {"port": "a" * 15}]}]}),
        manifest({"podSelector": {"matchLabels": {"example.com/A_b.c": ""}}}),
        manifest({"ingress": [{"from": [{"ipBlock": {"cidr": "::/0", "except": ["2001:DB8::/32"]}}]}]}),
        manifest({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}], "policyTypes": ["Egress"]}),
        manifest({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": [None, "b", "b"]}]}}),
        manifest({}, name=None, generateName="p-"),
        manifest({}, labels={"a": ""}, annotations={"Example.com/X": "any thing"}, uid="u", creationTimestamp="t"),
    ],
)
def test_legal_oddities_are_accepted(tree: dict[str, Any]) -> None:
    assert decode_network_policy(tree).namespace == "farm"


def test_a_policy_without_a_namespace_is_in_default() -> None:
    assert decode_network_policy(manifest({}, namespace=None)).namespace == "default"


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.1.5/24", "10.0.1.0/24"),
        ("010.000.001.000/024", "10.0.1.0/24"),
        ("2001:db8::1/64", "2001:db8::/64"),
        ("2001:00db8::/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/90", "::ffc0:0:0/90"),
    ],
)
def test_what_was_stored_before_1_36_is_read_as_then(text: str, network: str) -> None:
    assert parse_cidr(text)[1] != [] or text.startswith("::ffff:0:0")
    found, complaints = parse_cidr(text, mask_host_bits=True)
    assert complaints == []
    assert found == ip_network(network, strict=False)


def test_masking_does_not_accept_what_never_was() -> None:
    for text in ("10.0.0.0", "10.0.0.0/33", "fe80::1%1/64", "", "/8", "10.0.0.0/" + "9" * 5_000):
        assert parse_cidr(text, mask_host_bits=True)[0] is None


def test_a_namespace_always_has_the_label_of_its_name() -> None:
    tree = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "farm", "labels": {"green": "yes"}}}
    assert decode_namespace(tree).labels == {"green": "yes", "kubernetes.io/metadata.name": "farm"}

    tree["metadata"] = {"name": "farm", "labels": {"kubernetes.io/metadata.name": "city"}}
    assert decode_namespace(tree).labels == {"kubernetes.io/metadata.name": "farm"}


def test_a_pods_named_ports_are_those_of_containers_and_sidecars() -> None:
    port = {"containerPort": 80, "name": "web"}
    spec = {
        "serviceAccountName": "milker",
        "nodeName": "n1",
        "containers": [{"name": "c", "image": "i", "ports": [port, {"containerPort": 81}]}],
        "initContainers": [
            {"name": "s", "restartPolicy": "Always", "ports": [{**port, "containerPort": 90, "protocol": "UDP"}]},
            {"name": "i", "ports": [{**port, "containerPort": 91}]},
        ],
    }
    status = {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "phase": "Running"}

    pod = decode_pod(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cow", "labels": {"a": "b"}}, "spec": spec,
         "status": status}
    )  # fmt: skip

    assert pod.ref == PodRef("default", "cow")
    assert (pod.labels, pod.service_account, pod.node) == ({"a": "b"}, "milker", "n1")
    assert pod.named_ports == (NamedPort("web", 80, Protocol.TCP), NamedPort("web", 90, Protocol.UDP))
    assert pod.ips == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    assert (pod.is_on_host_network, pod.is_finished) == (False, False)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": {"containers": [{"ports": [{"name": "web"}]}]}}, "spec.containers[0].ports[0].containerPort"),
        ({"spec": {"containers": [{"ports": [{"containerPort": 0}]}]}}, "spec.containers[0].ports[0].containerPort"),
        (
            {"spec": {"containers": [{"ports": [{"containerPort": 1, "name": "A"}]}]}},
            "spec.containers[0].ports[0].name",
        ),
        (
            {"spec": {"containers": [{"ports": [{"containerPort": 1, "protocol": "tcp"}]}]}},
            "spec.containers[0].ports[0].protocol",
        ),
        ({"spec": {"hostNetwork": "yes"}}, "spec.hostNetwork"),
        ({"status": {"podIP": "10.0.0.256"}}, "status.podIP"),
        ({"metadata": {"name": "cow", "labels": {"a": 1}}}, "metadata.labels.a"),
    ],
)
def test_a_pod_at_fault_is_refused_at_its_field(change: dict[str, Any], field: str) -> None:
    tree = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cow"}, **change}
    with pytest.raises(InvalidObjectError) as refusal:
        decode_pod(tree)
    assert refusal.value.field == field
