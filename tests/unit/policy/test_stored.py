# SPDX-License-Identifier: Apache-2.0
"""Objects that an API server accepted once and still has: read as it read them then, and warned of.

Sources: pkg/apis/networking/validation/validation.go of Kubernetes 1.8, 1.15 and 1.36 (ValidateIPBlock, whose exception
had only to begin within its block; ValidationOptionsForNetworking), k8s.io/utils/net ParseCIDRSloppy, and
ValidateLabelSelectorRequirement of apimachinery, which did not check the values of expressions before 1.22.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from enforcer_daemon.kube.resources import NETWORK_POLICIES
from enforcer_daemon.kube.table import Entry, Table, read_entry
from enforcer_daemon.model import Identity, PodRef, Protocol
from enforcer_daemon.policy import InvalidObjectError, compile_snapshot, decode_network_policy
from enforcer_daemon.policy.objects import NetworkPolicy


def stored(spec: dict[str, Any]) -> Entry[NetworkPolicy]:
    manifest = {"metadata": {"name": "p", "namespace": "x"}, "spec": {"podSelector": {}, **spec}}
    entry = read_entry(NETWORK_POLICIES, manifest, {})
    assert isinstance(entry, Entry)
    return cast(Entry[NetworkPolicy], entry)


def block(cidr: str, *excepts: str) -> dict[str, Any]:
    return {"ingress": [{"from": [{"ipBlock": {"cidr": cidr, **({"except": list(excepts)} if excepts else {})}}]}]}


def value(entry: Entry[NetworkPolicy]) -> NetworkPolicy:
    assert entry.value is not None
    return entry.value


def allows(entry: Entry[NetworkPolicy], address: str) -> bool:
    policy = compile_snapshot([value(entry)], 1).pod_policy(Identity(PodRef("x", "a"), (), {}, {}, "n"))
    assert policy.ingress.is_isolated
    return policy.ingress.evaluate(None, ip_address(address), 80, Protocol.TCP).is_allowed


@pytest.mark.parametrize(
    ("spec", "inside", "outside"),
    [
        (block("10.0.0.5/8"), ["10.0.0.0", "10.255.0.1"], ["11.0.0.1"]),
        (block("010.000.001.000/024"), ["10.0.1.9"], ["10.0.2.9", "8.0.1.9"]),
        (block("10.0.0.0/08"), ["10.9.9.9"], ["11.0.0.1"]),
        (block("::ffff:10.0.0.0/104"), ["10.1.2.3"], ["11.0.0.1", "::1"]),
        (block("2001:db8::1/64"), ["2001:db8::2"], ["2001:db8:1::2"]),
        (block("2001:00db8::/32"), ["2001:db8::2"], ["2001:db9::2"]),
        (block("10.0.0.5/8", "10.1.0.9/16"), ["10.2.0.1"], ["10.1.0.1"]),
        (block("10.0.0.0/8", "10.0.0.0/8"), [], ["10.0.0.1", "10.9.9.9"]),
        (block("10.0.0.0/8", "10.0.0.0/7"), [], ["10.0.0.1", "11.0.0.1"]),
        (block("0.0.0.0/0", "0.0.0.0/0"), [], ["10.0.0.1"]),
        (block("10.0.0.0/8", "192.0.2.0/24"), ["10.0.0.1"], ["192.0.2.1"]),
        (block("10.0.0.0/8", "2001:db8::/32"), ["10.0.0.1"], ["2001:db8::1"]),
    ],
)
def test_a_stored_block_means_what_it_meant(spec: dict[str, Any], inside: list[str], outside: list[str]) -> None:
    entry = stored(spec)
    assert entry.problems == ()
    assert [address for address in inside if not allows(entry, address)] == []
    assert [address for address in outside if allows(entry, address)] == []


@pytest.mark.parametrize("values", [["not a label"], ["-x"], ["x" * 64], ["fine", "a/b"]])
def test_values_of_a_stored_expression_need_not_be_labels(values: list[str]) -> None:
    expression = {"key": "app", "operator": "In", "values": values}
    entry = stored({"podSelector": {"matchExpressions": [expression]}})
    assert entry.problems == ()
    assert value(entry).pod_selector.requirements[0].values == frozenset(values)
    assert [warning.has_earlier for warning in entry.warnings] == [None]


def test_what_is_read_as_in_older_versions_is_warned_of_by_field() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    table.put(stored(block("10.0.0.5/8", "10.1.0.9/16")))
    assert [warning.field for warning in table.warnings()] == [
        "spec.ingress[0].from[0].ipBlock.cidr",
        "spec.ingress[0].from[0].ipBlock.except[0]",
    ]
    assert "beyond the prefix length" in str(table.warnings()[0])
    assert table.problems() == ()
    table.put(stored(block("10.0.0.0/8")))
    assert table.warnings() == ()


@pytest.mark.parametrize(
    "spec",
    [
        block("10.0.0.0"),
        block("10.0.0.0/33"),
        block("fe80::1%eth0/64"),
        block("10.0.0.0/8", "nonsense"),
        {"podSelector": {"matchExpressions": [{"key": "a b", "operator": "Exists"}]}},
        {"podSelector": {"matchLabels": {"app": "not a label"}}},
        {"ingress": [{"ports": [{"port": 0}]}]},
        {"ingress": [{"ports": [{"port": "80"}]}]},
        {"ingress": [{"ports": [{"endPort": 90}]}]},
        {"ingress": [{"ports": [{"port": 90, "endPort": 80}]}]},
        {"ingress": [{"ports": [{"protocol": ""}]}]},
        {"ingress": [{"from": [{}]}]},
        {"policyTypes": ["Sideways"]},
        {"policyTypes": ["Ingress", "Egress", "Ingress"]},
        {"unknownField": {}},
        {"ingress": [{"unknownField": {}}]},
    ],
)
def test_what_no_api_server_ever_accepted_isolates(spec: dict[str, Any]) -> None:
    """A field that is not known here may come from a later version, and restrict."""
    entry = stored({"ingress": [{}], **spec})
    assert entry.problems
    assert value(entry).ingress == ()


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"podSelector": None, "ingress": None, "egress": [None]},
        {"policyTypes": ["Ingress", "Ingress"]},
        {"policyTypes": []},
        {"ingress": [{"from": [{"podSelector": {}, "namespaceSelector": {}}]}]},
        {"ingress": [{"ports": [{}, {"protocol": "SCTP"}, {"port": 80, "endPort": 80}]}]},
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": []}]}},
    ],
)
def test_odd_forms_that_are_valid_still_are_read_without_a_word(spec: dict[str, Any]) -> None:
    entry = stored(spec)
    assert (entry.problems, entry.warnings) == ((), ())


def test_manifests_in_files_are_read_as_a_new_object_would_be() -> None:
    tree = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x"},
        "spec": {"podSelector": {}, **block("10.0.0.5/8")},
    }
    with pytest.raises(InvalidObjectError):
        decode_network_policy(tree)
    read = decode_network_policy(tree, mask_host_bits=True)
    assert read.ingress is not None
    assert read.ingress[0].peers[0].network == ip_network("10.0.0.0/8")  # type: ignore[union-attr]
