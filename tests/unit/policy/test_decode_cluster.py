# SPDX-License-Identifier: Apache-2.0
"""Decoding of ClusterNetworkPolicy: what each channel's CRD refuses, and how what is not understood fails closed."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.policy import InvalidObjectError
from enforcer_daemon.policy.cluster_objects import (
    Action,
    AnyonePeer,
    Channel,
    ClusterNetworkPolicy,
    ClusterRule,
    DomainNamesPeer,
    NetworksPeer,
    NodesPeer,
    Subject,
    Tier,
)
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from enforcer_daemon.policy.objects import EVERYTHING, Operator, PodPeer, PortName, PortRange, Requirement, Selector

ALL: dict[str, object] = {"namespaces": {}}
TEAM = {"matchLabels": {"team": "a"}}
TEAM_SELECTOR = Selector((Requirement("team", Operator.IN, frozenset({"a"})),))
ODD_SELECTOR = {"matchExpressions": [{"key": "team", "operator": "Near", "values": ["a"]}]}


def manifest(spec: object, **metadata: object) -> dict[str, Any]:
    """Return a ClusterNetworkPolicy manifest."""
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "p", **metadata},
        "spec": spec,
    }


def spec(**fields: object) -> dict[str, object]:
    """Return a valid spec with these fields instead of its own."""
    return {"tier": "Admin", "priority": 10, "subject": ALL, **fields}


def egress(*peers: object, **fields: object) -> dict[str, object]:
    """Return a spec with one rule of egress to these peers."""
    return spec(egress=[{"action": "Accept", "to": list(peers), **fields}])


def ports(*protocols: object) -> dict[str, object]:
    """Return a spec with one rule of egress for these protocols."""
    return egress(ALL, protocols=list(protocols))


def faults(tree: object, channel: Channel = Channel.STANDARD, *, is_stored: bool = False) -> dict[str, str]:
    """Return the problems of a manifest by field; none if it is accepted."""
    try:
        decode_cluster_policy(tree, channel, is_stored=is_stored)
    except InvalidObjectError as err:
        return {problem.field: problem.message for problem in err.problems}
    return {}


TO = "spec.egress[0].to[0]"
PROTOCOL = "spec.egress[0].protocols[0]"
REFUSED: dict[str, tuple[object, str, str]] = {
    "no tier": ({"priority": 1, "subject": ALL}, "spec.tier", "Required value"),
    "no priority": ({"tier": "Admin", "subject": ALL}, "spec.priority", "Required value"),
    "no subject": ({"tier": "Admin", "priority": 1}, "spec.subject", "Required value"),
    "no object": ([], "spec", 'Invalid value: "array": spec in body must be of type object: "array"'),
    "null": (spec(tier=None), "spec.tier", 'Invalid value: "null": spec.tier in body must be of type string: "null"'),
    "tier": (spec(tier="Top"), "spec.tier", 'Unsupported value: "Top": supported values: "Admin", "Baseline"'),
    "priority below": (
        spec(priority=-1),
        "spec.priority",
        "Invalid value: -1: spec.priority in body should be greater than or equal to 0",
    ),
    "priority above": (
        spec(priority=1001),
        "spec.priority",
        "Invalid value: 1001: spec.priority in body should be less than or equal to 1000",
    ),
    "priority as text": (
        spec(priority="1"),
        "spec.priority",
        'Invalid value: "string": spec.priority in body must be of type integer: "string"',
    ),
    "priority as truth": (
        spec(priority=True),
        "spec.priority",
        'Invalid value: "boolean": spec.priority in body must be of type integer: "boolean"',
    ),
    "two subjects": (
        spec(subject={"namespaces": {}, "pods": {"podSelector": {}}}),
        "spec.subject",
        "Too many: 2: must have at most 1 items",
    ),
    "empty subject": (
        spec(subject={}),
        "spec.subject",
        "Invalid value: {}: spec.subject in body should have at least 1 properties",
    ),
    "pods without selector": (spec(subject={"pods": {}}), "spec.subject.pods.podSelector", "Required value"),
    "unknown field": (spec(egres=[]), "spec.egres", 'unknown field "spec.egres"'),
    "too many rules": (
        spec(egress=[{"action": "Deny", "to": [ALL]}] * 26),
        "spec.egress",
        "Too many: 26: must have at most 25 items",
    ),
    "rules that are no list": (
        spec(egress={}),
        "spec.egress",
        'Invalid value: "object": spec.egress in body must be of type array: "object"',
    ),
    "no action": (spec(egress=[{"to": [ALL]}]), "spec.egress[0].action", "Required value"),
    "action": (
        egress(ALL, action="Allow"),
        "spec.egress[0].action",
        'Unsupported value: "Allow": supported values: "Accept", "Deny", "Pass"',
    ),
    "long name": (
        egress(ALL, name="n" * 101),
        "spec.egress[0].name",
        "Too long: may not be more than 100 bytes",
    ),
    "no peers field": (spec(egress=[{"action": "Deny"}]), "spec.egress[0].to", "Required value"),
    "no peers": (
        egress(),
        "spec.egress[0].to",
        "Invalid value: []: spec.egress[0].to in body should have at least 1 items",
    ),
    "too many peers": (egress(*[ALL] * 26), "spec.egress[0].to", "Too many: 26: must have at most 25 items"),
    "empty peer": (egress({}), TO, f"Invalid value: {{}}: {TO} in body should have at least 1 properties"),
    "null peer": (egress(None), TO, f'Invalid value: "null": {TO} in body must be of type object: "null"'),
    "peer of later versions": (egress({"moons": {}}), f"{TO}.moons", f'unknown field "{TO}.moons"'),
    "networks of ingress": (
        spec(ingress=[{"action": "Deny", "from": [{"networks": ["10.0.0.0/8"]}]}]),
        "spec.ingress[0].from[0].networks",
        'unknown field "spec.ingress[0].from[0].networks"',
    ),
    "nodes": (egress({"nodes": {}}), f"{TO}.nodes", f'unknown field "{TO}.nodes"'),
    "domainNames": (egress({"domainNames": ["a.b"]}), f"{TO}.domainNames", f'unknown field "{TO}.domainNames"'),
    "operator": (
        egress({"namespaces": ODD_SELECTOR}),
        f"{TO}.namespaces.matchExpressions[0].operator",
        'Invalid value: "Near": not a valid selector operator',
    ),
    "null labels": (
        egress({"namespaces": {"matchLabels": None}}),
        f"{TO}.namespaces.matchLabels",
        f'Invalid value: "null": {TO}.namespaces.matchLabels in body must be of type object: "null"',
    ),
    "null selector": (
        egress({"namespaces": None}),
        f"{TO}.namespaces",
        f'Invalid value: "null": {TO}.namespaces in body must be of type object: "null"',
    ),
    "null expression": (
        egress({"namespaces": {"matchExpressions": [None]}}),
        f"{TO}.namespaces.matchExpressions[0]",
        f'Invalid value: "null": {TO}.namespaces.matchExpressions[0] in body must be of type object: "null"',
    ),
    "expression without operator": (
        egress({"namespaces": {"matchExpressions": [{"key": "a"}]}}),
        f"{TO}.namespaces.matchExpressions[0].operator",
        "Required value",
    ),
    "no networks": (
        egress({"networks": []}),
        f"{TO}.networks",
        f"Invalid value: []: {TO}.networks in body should have at least 1 items",
    ),
    "network": (
        egress({"networks": ["10.0.0.0/33"]}),
        f"{TO}.networks[0]",
        'Invalid value: "10.0.0.0/33": Invalid CIDR format provided',
    ),
    "network of another type": (
        egress({"networks": [10]}),
        f"{TO}.networks[0]",
        f'Invalid value: "integer": {TO}.networks[0] in body must be of type string: "integer"',
    ),
    "long network": (
        egress({"networks": ["1" * 44]}),
        f"{TO}.networks[0]",
        "Too long: may not be more than 43 bytes",
    ),
    "network twice": (
        egress({"networks": ["10.0.0.0/8", "10.0.0.0/8"]}),
        f"{TO}.networks[1]",
        'Duplicate value: "10.0.0.0/8"',
    ),
    "no protocols": (
        ports(),
        "spec.egress[0].protocols",
        "Invalid value: []: spec.egress[0].protocols in body should have at least 1 items",
    ),
    "every port of TCP": (
        ports({"tcp": {}}),
        f"{PROTOCOL}.tcp",
        f"Invalid value: {{}}: {PROTOCOL}.tcp in body should have at least 1 properties",
    ),
    "two protocols in one": (
        ports({"tcp": {"destinationPort": {"number": 1}}, "udp": {"destinationPort": {"number": 1}}}),
        PROTOCOL,
        "Too many: 2: must have at most 1 items",
    ),
    "port 0": (
        ports({"udp": {"destinationPort": {"number": 0}}}),
        f"{PROTOCOL}.udp.destinationPort.number",
        f"Invalid value: 0: {PROTOCOL}.udp.destinationPort.number in body should be greater than or equal to 1",
    ),
    "range of one port": (
        ports({"sctp": {"destinationPort": {"range": {"start": 5, "end": 5}}}}),
        f"{PROTOCOL}.sctp.destinationPort.range",
        'Invalid value: "object": Start port must be less than End port',
    ),
    "range without end": (
        ports({"tcp": {"destinationPort": {"range": {"start": 5}}}}),
        f"{PROTOCOL}.tcp.destinationPort.range.end",
        "Required value",
    ),
    "port name": (
        ports({"destinationNamedPort": 80}),
        f"{PROTOCOL}.destinationNamedPort",
        f'Invalid value: "integer": {PROTOCOL}.destinationNamedPort in body must be of type string: "integer"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_is_refused_at_its_field(name: str) -> None:
    tree, field, message = REFUSED[name]

    assert faults(manifest(tree)) == {field: message}


def test_an_object_without_spec_is_refused() -> None:
    tree = manifest({})
    del tree["spec"]

    assert faults(tree) == {"spec": "Required value"}


def test_a_namespace_is_refused_because_the_kind_has_none() -> None:
    assert faults(manifest(spec(), namespace="shop")) == {"metadata.namespace": "Forbidden: not allowed on this type"}


def test_the_kinds_before_it_are_refused() -> None:
    tree = {**manifest(spec()), "apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "AdminNetworkPolicy"}

    assert set(faults(tree)) == {"apiVersion", "kind"}


@pytest.mark.parametrize(
    "text", ["::ffff:10.0.0.0/104", "fe80::%1/64", "010.0.0.0/8", "10.0.0.0/08", "10.0.0.0", "x/8"]
)
def test_what_is_no_cidr_to_the_crd_is_refused(text: str) -> None:
    complaint = f'Invalid value: "{text}": Invalid CIDR format provided'

    assert faults(manifest(egress({"networks": [text]}))) == {f"{TO}.networks[0]": complaint}


@pytest.mark.parametrize("name", ["example.com", "*.example.com", "a_b.example.com.", "[x.^"])
def test_a_domain_name_follows_the_pattern_of_the_crd(name: str) -> None:
    assert not faults(manifest(egress({"domainNames": [name]})), Channel.EXPERIMENTAL)


@pytest.mark.parametrize("name", ["com", "*.com", "a.*.com", "-a.com", "a..com", "a.com\n"])
def test_any_other_domain_name_is_refused(name: str) -> None:
    found = faults(manifest(egress({"domainNames": [name]})), Channel.EXPERIMENTAL)

    assert list(found) == [f"{TO}.domainNames[0]"]


@pytest.mark.parametrize("peer", [{"networks": ["10.0.0.0/8"]}, {"nodes": {}}, {"domainNames": ["a.b"]}])
def test_the_experimental_channel_refuses_port_names_of_addresses(peer: dict[str, object]) -> None:
    tree = manifest(egress(ALL, peer, protocols=[{"destinationNamedPort": "web"}]))

    found = faults(tree, Channel.EXPERIMENTAL)

    assert list(found) == ["spec.egress[0]"]
    assert "cannot be set with namedPorts" in found["spec.egress[0]"]


def test_the_standard_channel_admits_port_names_of_networks() -> None:
    tree = manifest(egress({"networks": ["10.0.0.0/8"]}, protocols=[{"destinationNamedPort": "web"}]))

    assert not faults(tree)


def test_a_whole_policy_is_read_into_values() -> None:
    tree = manifest({
        "tier": "Baseline",
        "priority": 1000,
        "subject": {"pods": {"namespaceSelector": TEAM, "podSelector": {}}},
        "ingress": [{"name": "first", "action": "Pass", "from": [{"pods": {"podSelector": TEAM}}]}],
        "egress": [
            {
                "action": "Deny",
                "to": [{"networks": ["10.1.2.3/8"]}, {"nodes": TEAM}, {"domainNames": ["*.a.b"]}, {"namespaces": TEAM}],
                "protocols": [
                    {"tcp": {"destinationPort": {"number": 80}}},
                    {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
                ],
            },
            {"action": "Accept", "to": [ALL], "protocols": [{"destinationNamedPort": "web"}]},
        ],
    })  # fmt: skip

    policy = decode_cluster_policy(tree, Channel.EXPERIMENTAL)

    denied = (
        NetworksPeer((ip_network("10.0.0.0/8"),)),
        NodesPeer(TEAM_SELECTOR),
        DomainNamesPeer(("*.a.b",)),
        PodPeer(EVERYTHING, TEAM_SELECTOR),
    )
    names = tuple(PortName(protocol, "web") for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP))
    assert policy == ClusterNetworkPolicy(
        name="p",
        tier=Tier.BASELINE,
        priority=1000,
        subject=Subject(TEAM_SELECTOR, EVERYTHING),
        ingress=(ClusterRule(Action.PASS, (PodPeer(TEAM_SELECTOR, EVERYTHING),), name="first"),),
        egress=(
            ClusterRule(
                Action.DENY, denied, (PortRange(Protocol.TCP, 80, 80), PortRange(Protocol.UDP, 1, 65535))
            ),
            ClusterRule(Action.ACCEPT, (PodPeer(EVERYTHING, EVERYTHING),), names),
        ),
    )  # fmt: skip
    assert policy.rules(Direction.INGRESS) == policy.ingress
    assert policy.rules(Direction.EGRESS) == policy.egress


UNKNOWN_PEERS = [{}, {"moons": {}}, {"namespaces": ODD_SELECTOR}, {"networks": ["10.0.0.0/99"]}, None]


@pytest.mark.parametrize("peer", UNKNOWN_PEERS)
def test_a_stored_rule_with_an_unknown_peer_accepts_nobody(peer: object) -> None:
    tree = manifest(egress(ALL, peer, name="open"))

    policy = decode_cluster_policy(tree, is_stored=True)

    assert policy.egress == (ClusterRule(Action.ACCEPT, (), name="open", is_understood=False),)


@pytest.mark.parametrize("action", ["Deny", "Pass"])
@pytest.mark.parametrize("peer", UNKNOWN_PEERS)
def test_a_stored_rule_with_an_unknown_peer_denies_everyone(action: str, peer: object) -> None:
    protocols = [{"tcp": {"destinationPort": {"number": 80}}}]
    tree = manifest(egress(ALL, peer, action=action, protocols=protocols))

    policy = decode_cluster_policy(tree, is_stored=True)

    assert policy.egress == (ClusterRule(Action.DENY, (AnyonePeer(),), is_understood=False),)


@pytest.mark.parametrize(
    "tree",
    [
        spec(subject={}),
        spec(subject={"moons": {}}),
        spec(subject={"namespaces": ODD_SELECTOR}),
        ports({}),
        ports({"icmp": {}}),
    ],
)
def test_a_stored_object_with_unknown_subject_or_protocol_is_refused(tree: object) -> None:
    assert faults(manifest(tree), is_stored=True)


def test_a_selector_of_unlimited_size_is_refused_before_it_is_read() -> None:
    labels = {f"l{number}": "" for number in range(16_385)}

    found = faults(manifest(egress({"pods": {"podSelector": {"matchLabels": labels}}})))

    assert list(found) == [f"{TO}.pods.podSelector.matchLabels"]
    assert found[f"{TO}.pods.podSelector.matchLabels"].startswith("Too many")
