# SPDX-License-Identifier: Apache-2.0
"""What a policy may cost: in proportion to its size, whatever it combines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from enforcer_daemon.dataplane.guard_rules import address_rule
from enforcer_daemon.model import Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.policy import PodPolicy, compile_snapshot, decode_network_policy
from enforcer_daemon.policy.objects import Selector
from enforcer_daemon.reasons import Reason

POD = Identity(PodRef("farm", "cow"), (ip_address("10.0.0.1"),), {"app": "cow"}, {}, "node")
PEER = Identity(PodRef("farm", "hen"), (ip_address("10.0.0.2"),), {"app": "hen", "key7": ""}, {}, "node")
GENEROUS_S = 1.0
"""Many times what is needed; the product of peers and ports took longer."""


@pytest.fixture(autouse=True)
def _untraced() -> Iterator[None]:
    """Measure without coverage.py, which takes several times as long as the code."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


def manifest_of(*rules: dict[str, Any], peers: str = "from") -> dict[str, Any]:
    direction = {"from": "ingress", "to": "egress"}[peers]
    spec = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], direction: list(rules)}
    metadata = {"namespace": "farm", "name": "all"}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def compiled(*rules: dict[str, Any], peers: str = "from") -> PodPolicy:
    return compile_snapshot([decode_network_policy(manifest_of(*rules, peers=peers))], 1).pod_policy(POD)


def blocks(count: int) -> list[dict[str, Any]]:
    return [{"ipBlock": {"cidr": f"10.{number >> 7}.{number % 128 * 2}.0/24"}} for number in range(count)]


def ports(count: int) -> list[dict[str, Any]]:
    return [{"port": 1 + 2 * number} for number in range(count)]


def test_many_peers_with_many_ports_are_kept_beside_each_other() -> None:
    peers = [{"podSelector": {"matchLabels": {f"key{number}": ""}}} for number in range(1_000)]
    started = time.process_time()

    policy = compiled({"from": peers, "ports": ports(1_500)})

    assert policy.ingress.evaluate(PEER, PEER.ips[0], 2_999, Protocol.TCP).is_allowed
    assert not policy.ingress.evaluate(PEER, PEER.ips[0], 3_000, Protocol.TCP).is_allowed
    assert time.process_time() - started < GENEROUS_S


def test_many_blocks_with_many_ports_are_one_rule_of_the_kernel() -> None:
    policy = compiled({"to": blocks(500), "ports": ports(500)}, peers="to")

    (rule,) = policy.egress.address_rules()

    assert rule.addresses is not None
    assert rule.spans is not None
    assert (len(rule.addresses.spans), len(rule.spans)) == (500, 500)
    assert len(address_rule(rule, "ip daddr", "ip6 daddr")) < 30 * 1_000


def test_rules_for_the_same_addresses_or_ports_are_united() -> None:
    rules = [{"to": [block], "ports": [{"port": 443}]} for block in blocks(300)]
    rules += [{"ports": [{"port": 53, "endPort": 53 + number}]} for number in range(300)]

    united = compiled(*rules, peers="to").egress.address_rules()

    assert [(rule.addresses is None, rule.spans) for rule in united] == [(False, ((443, 443),)), (True, ((53, 352),))]


def test_a_peer_is_compared_with_the_selectors_once(monkeypatch: Any) -> None:
    strangers = [{"matchExpressions": [{"key": f"k{number}", "operator": "DoesNotExist"}]} for number in range(9)]
    selectors = [*strangers, {"matchLabels": {"app": "hen"}}]
    policy = compiled({"from": [{"podSelector": each} for each in selectors], "ports": [{"port": 80}]})
    asked = []
    matches = Selector.matches

    def count(selector: Selector, labels: Mapping[str, str]) -> bool:
        asked.append(selector)
        return matches(selector, labels)

    monkeypatch.setattr(Selector, "matches", count)
    for port in range(100):
        policy.ingress.evaluate(PEER, PEER.ips[0], port, Protocol.TCP)
    assert len(asked) == 10


def test_remembered_peers_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr("enforcer_daemon.policy.evaluate.MAX_REMEMBERED_PEERS", 2)
    policy = compiled({"from": [{"podSelector": {}}]})
    for number in range(5):
        peer = Identity(PodRef("farm", f"p{number}"), PEER.ips, {}, {}, "node")
        assert policy.ingress.evaluate(peer, PEER.ips[0], 80, Protocol.TCP).is_allowed
    assert len(policy.ingress._rules._groups_of) <= 2


def test_remembered_groups_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr("enforcer_daemon.policy.evaluate.MAX_REMEMBERED_GROUPS", 3)
    peers = [{"podSelector": {"matchLabels": {"app": "hen"}}}, {"podSelector": {}}]
    policy = compiled({"from": peers})
    for number in range(5):
        peer = Identity(PodRef("farm", f"p{number}"), PEER.ips, {"app": "hen"}, {}, "node")
        assert policy.ingress.evaluate(peer, PEER.ips[0], 80, Protocol.TCP).is_allowed
        assert sum(map(len, policy.ingress._rules._groups_of.values())) <= 3


def test_rules_beyond_the_kernels_limit_are_none_and_are_named() -> None:
    rules = [{"to": [block], "ports": [{"port": 1 + number}]} for number, block in enumerate(blocks(257))]
    policy = compiled(*rules, peers="to")

    assert policy.egress.address_rules() == ()
    assert policy.egress.problem == (
        "egress by address: 257 rules with 771 ranges, more than the limit of 256 rules or 65536 ranges: nothing is "
        "allowed by address; policies: farm/all"
    )
    assert policy.ingress.problem == ""
    assert len(compiled(*rules[:256], peers="to").egress.address_rules()) == 256


def test_spans_beyond_the_kernels_limit_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enforcer_daemon.policy.limits.MAX_KERNEL_SPANS", 20)
    assert compiled({"to": blocks(20)}, peers="to").egress.address_rules() == ()
    assert len(compiled({"to": blocks(19)}, peers="to").egress.address_rules()) == 1


def test_a_namespace_with_too_many_policies_is_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enforcer_daemon.policy.limits.MAX_NAMESPACE_BYTES", 150)
    metadata = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    manifests = [
        {**metadata, "metadata": {"namespace": "farm", "name": name}, "spec": {"podSelector": {}, "ingress": [{}]}}
        for name in "ab"
    ]
    decoded = [decode_network_policy(manifest) for manifest in manifests]

    assert (
        compile_snapshot(decoded[:1], 1)
        .pod_policy(POD)
        .ingress.evaluate(PEER, PEER.ips[0], 80, Protocol.TCP)
        .is_allowed
    )
    closed = compile_snapshot(decoded, 1).pod_policy(POD)

    assert not closed.ingress.evaluate(PEER, PEER.ips[0], 80, Protocol.TCP).is_allowed
    assert not closed.egress.evaluate(PEER, PEER.ips[0], 80, Protocol.TCP).is_allowed


def test_egress_by_address_beyond_the_limit_is_denied_where_it_is_evaluated() -> None:
    """The guard lets none of it leave the node; the pod's own enforcer says why."""
    rules = [{"to": [block], "ports": [{"port": 1 + number}]} for number, block in enumerate(blocks(257))]
    allowed = ip_address("10.0.0.1")
    evaluated = [
        compiled(*rules[:most], peers="to").egress.evaluate(None, allowed, 1, Protocol.TCP) for most in (256, 257)
    ]
    assert [(decision.is_allowed, decision.reason) for decision in evaluated] == [
        (True, Reason.POLICY),
        (False, Reason.UNIDENTIFIED_PEER),
    ]


def test_pods_that_name_ports_otherwise_do_not_share_a_limit() -> None:
    """One policy, two pods: only the one whose names make too many rules exceeds the limit."""
    named = [{"from": [block], "ports": [{"port": f"p{number}"}]} for number, block in enumerate(blocks(257))]
    snapshot = compile_snapshot([decode_network_policy(manifest_of(*named))], 1)
    names = tuple(NamedPort(f"p{number}", 1 + number, Protocol.TCP) for number in range(257))
    many = snapshot.pod_policy(replace(POD, named_ports=names))
    assert many.ingress.problem != ""
    assert snapshot.pod_policy(POD).ingress.problem == ""


def test_a_limit_is_decided_once_for_each_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon asks every second, and one set of rules remembers few namings."""
    named = [{"from": [block], "ports": [{"port": "web"}]} for block in blocks(2)]
    snapshot = compile_snapshot([decode_network_policy(manifest_of(*named))], 1)
    pods = [replace(POD, named_ports=(NamedPort("web", 1 + number, Protocol.TCP),)) for number in range(40)]
    policies = [snapshot.pod_policy(pod) for pod in pods]
    decided = []

    def decide(*arguments: object) -> str:
        decided.append(arguments)
        return ""

    monkeypatch.setattr("enforcer_daemon.policy.evaluate.address_rules_problem", decide)
    for _ in range(3):
        assert [policy.ingress.problem for policy in policies] == [""] * 40
    assert len(decided) == 40
