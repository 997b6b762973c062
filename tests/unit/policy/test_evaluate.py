# SPDX-License-Identifier: Apache-2.0
"""What a pod's policy answers: decisions and their rules, what could be, what holds by address, trust domains."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from enforcer_daemon.model import Decision, Direction, Identity, NamedPort, PodRef, Protocol, RuleRef
from enforcer_daemon.policy import AddressRule, PodPolicy, compile_snapshot, decode_network_policy
from enforcer_daemon.policy.objects import TRUST_DOMAIN_LABEL
from enforcer_daemon.reasons import Reason

OUTSIDE = ip_address("203.0.113.9")
COW = Identity(
    PodRef("farm", "cow"), (ip_address("10.1.0.1"),), {"kind": "cow"}, {"kubernetes.io/metadata.name": "farm"}, "n1",
    named_ports=(NamedPort("milk", 8080, Protocol.TCP), NamedPort("dairy", 8080, Protocol.TCP)),
)  # fmt: skip
HEN = Identity(
    PodRef("farm", "hen"), (ip_address("10.1.0.2"),), {"kind": "hen"}, {"kubernetes.io/metadata.name": "farm"}, "n1",
    named_ports=(NamedPort("milk", 9090, Protocol.TCP),),
)  # fmt: skip
HEN_ADDRESS = HEN.ips[0]


def policy_of(identity: Identity, **specs: dict[str, Any] | None) -> PodPolicy:
    """Return what policies of namespace farm, by name and spec, say of a pod."""
    manifests = [
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "farm"},
         "spec": spec}
        for name, spec in specs.items()
    ]  # fmt: skip
    return compile_snapshot([decode_network_policy(manifest) for manifest in manifests], 1).pod_policy(identity)


def test_without_policies_everything_is_allowed() -> None:
    policy = policy_of(COW)
    assert not policy.ingress.is_isolated
    assert policy.ingress.evaluate(None, OUTSIDE, None, None) == Decision(True, Reason.NOT_ISOLATED, Direction.INGRESS)
    assert policy.egress.could_allow(None, None, None)
    assert policy.egress.address_rules() == (AddressRule(),)


def test_an_allowance_names_one_rule_and_its_explanation_all() -> None:
    rules = [{"ports": [{"port": 1}]}, {"from": [{"podSelector": {}}]}]
    ingress = policy_of(COW, a={"ingress": rules}, b={"ingress": [{}]}).ingress
    question = (HEN, HEN_ADDRESS, 80, Protocol.TCP)

    assert ingress.evaluate(*question) == Decision(True, Reason.POLICY, Direction.INGRESS, (RuleRef("farm", "a", 1),))
    assert ingress.explain(*question).rules == (RuleRef("farm", "a", 1), RuleRef("farm", "b", 0))


def test_a_denial_names_the_policies_that_isolate() -> None:
    spec = {"policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {"matchLabels": {"kind": "cat"}}}]}]}
    egress = policy_of(COW, b=spec, a={"policyTypes": ["Egress"]}, c={"policyTypes": ["Ingress"]}).egress
    names = (RuleRef("farm", "a"), RuleRef("farm", "b"))

    assert egress.isolating == names
    assert egress.evaluate(HEN, HEN_ADDRESS, 80, Protocol.TCP) == Decision(
        False, Reason.EGRESS_DENIED, Direction.EGRESS, names
    )
    assert egress.explain(HEN, HEN_ADDRESS, 80, Protocol.TCP).rules == names


def test_an_address_without_an_identity_is_denied_as_such() -> None:
    ingress = policy_of(COW, a={"ingress": [{"from": [{"podSelector": {}}]}]}).ingress
    assert ingress.evaluate(HEN, HEN_ADDRESS, 80, Protocol.TCP).is_allowed
    assert ingress.evaluate(None, HEN_ADDRESS, 80, Protocol.TCP).reason is Reason.UNIDENTIFIED_PEER


def test_a_protocol_without_ports_needs_a_rule_without_ports() -> None:
    ingress = policy_of(COW, a={"ingress": [{"ports": [{"protocol": "TCP"}, {"protocol": "UDP"}]}]}).ingress
    assert not ingress.evaluate(HEN, HEN_ADDRESS, None, None).is_allowed
    assert policy_of(COW, a={"ingress": [{}]}).ingress.evaluate(HEN, HEN_ADDRESS, None, None).is_allowed


def test_a_port_may_have_several_names() -> None:
    for name in ("milk", "dairy"):
        ingress = policy_of(COW, a={"ingress": [{"ports": [{"port": name}]}]}).ingress
        assert ingress.evaluate(None, OUTSIDE, 8080, Protocol.TCP).is_allowed
        assert not ingress.evaluate(None, OUTSIDE, 9090, Protocol.TCP).is_allowed


class TestTrustDomains:
    """Selectors are about the own trust domain, unless they name another."""

    FOREIGN = replace(HEN, trust_domain="other.example")

    def _may(self, peer: Identity, entry: dict[str, Any]) -> bool:
        ingress = policy_of(COW, a={"ingress": [{"from": [entry]}]}).ingress
        return ingress.evaluate(peer, HEN_ADDRESS, 80, Protocol.TCP).is_allowed

    @pytest.mark.parametrize("entry", [{"podSelector": {}}, {"namespaceSelector": {}}])
    def test_a_foreign_pod_is_in_no_selector(self, entry: dict[str, Any]) -> None:
        assert self._may(HEN, entry)
        assert not self._may(self.FOREIGN, entry)

    def test_a_foreign_pod_is_matched_by_its_trust_domain(self) -> None:
        entry = {"namespaceSelector": {"matchLabels": {TRUST_DOMAIN_LABEL: "other.example"}}}
        assert self._may(self.FOREIGN, entry)
        assert not self._may(HEN, entry)

    def test_existence_of_the_label_means_any_trust_domain(self) -> None:
        entry = {"namespaceSelector": {"matchExpressions": [{"key": TRUST_DOMAIN_LABEL, "operator": "Exists"}]}}
        assert self._may(self.FOREIGN, entry)
        assert self._may(HEN, entry)

    def test_a_claimed_label_counts_for_nothing(self) -> None:
        liar = replace(self.FOREIGN, namespace_labels={TRUST_DOMAIN_LABEL: "cluster.local"})
        assert not self._may(liar, {"namespaceSelector": {"matchLabels": {TRUST_DOMAIN_LABEL: "cluster.local"}}})
        assert not self._may(liar, {"namespaceSelector": {}})

    def test_a_foreign_pod_is_still_an_address_and_anyone(self) -> None:
        assert self._may(self.FOREIGN, {"ipBlock": {"cidr": "10.1.0.0/16"}})
        assert (
            policy_of(COW, a={"ingress": [{}]}).ingress.evaluate(self.FOREIGN, HEN_ADDRESS, 1, Protocol.TCP).is_allowed
        )


class TestCouldAllow:
    """Before the peer is known, only what no identity could mend is refused."""

    def _could(self, rule: dict[str, Any], address: str | None, port: int | None) -> bool:
        egress = policy_of(COW, a={"policyTypes": ["Egress"], "egress": [rule]}).egress
        return egress.could_allow(None if address is None else ip_address(address), port, Protocol.TCP)

    def test_a_selector_could_match_anywhere_on_its_ports(self) -> None:
        rule = {"to": [{"podSelector": {}}], "ports": [{"port": 80}]}
        assert self._could(rule, "203.0.113.9", 80)
        assert self._could(rule, "203.0.113.9", None)
        assert not self._could(rule, "203.0.113.9", 81)

    def test_a_service_may_stand_for_any_address_and_port_but_not_for_another_protocol(self) -> None:
        assert self._could({"to": [{"podSelector": {}}], "ports": [{"port": 80}]}, None, 443)
        assert self._could({"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 80}]}, None, 443)
        assert not self._could({"ports": [{"port": 80, "protocol": "UDP"}]}, None, 80)

    def test_any_pod_may_call_any_port_by_a_name(self) -> None:
        assert self._could({"ports": [{"port": "milk"}]}, "10.1.0.2", 4711)
        assert not self._could({"ports": [{"port": "milk", "protocol": "UDP"}]}, "10.1.0.2", 4711)

    def test_a_block_could_allow_only_what_lies_in_it(self) -> None:
        rule = {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}
        assert self._could(rule, "10.2.0.1", 80)
        assert not self._could(rule, "10.1.0.1", 80)
        assert not self._could(rule, "203.0.113.9", 80)

    def test_nothing_could_be_where_nothing_is_allowed(self) -> None:
        egress = policy_of(COW, a={"policyTypes": ["Egress"]}).egress
        assert not egress.could_allow(None, None, Protocol.TCP)
        assert not egress.could_allow(OUTSIDE, 80, Protocol.TCP)


def test_address_rules_resolve_the_pods_own_names_and_leave_pods_out() -> None:
    rules = [
        {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, {"podSelector": {}}],
         "ports": [{"port": "milk"}, {"protocol": "UDP", "port": 5, "endPort": 9}, {"protocol": "SCTP"}]},
        {"ports": [{"port": 22}, {"port": "absent"}]},
        {"ports": [{"port": 22}]},
    ]  # fmt: skip
    block = (ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))

    assert policy_of(COW, a={"ingress": rules}).ingress.address_rules() == (
        AddressRule(*block, Protocol.TCP, (8080, 8080)),
        AddressRule(*block, Protocol.UDP, (5, 9)),
        AddressRule(*block, Protocol.SCTP, None),
        AddressRule(protocol=Protocol.TCP, ports=(22, 22)),
    )


def test_address_rules_of_egress_have_no_named_ports() -> None:
    egress = policy_of(COW, a={"policyTypes": ["Egress"], "egress": [{"ports": [{"port": "milk"}]}]}).egress
    assert egress.address_rules() == ()
    assert egress.evaluate(HEN, HEN_ADDRESS, 9090, Protocol.TCP).is_allowed


def test_a_snapshot_keeps_what_it_compiled_and_forgets_it_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enforcer_daemon.policy.compile.MAX_COMPILED_SETS", 2)
    specs = {f"p{i}": {"podSelector": {"matchLabels": {f"k{i}": "v"}}} for i in range(5)}
    objects = [
        decode_network_policy({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                               "metadata": {"name": name, "namespace": "farm"}, "spec": spec})
        for name, spec in specs.items()
    ]  # fmt: skip
    snapshot = compile_snapshot(objects, 7)

    for index in range(5):
        ingress = snapshot.pod_policy(replace(COW, labels={f"k{index}": "v"})).ingress
        assert ingress.isolating == (RuleRef("farm", f"p{index}"),)
        assert len(snapshot._compiled["farm"]._compiled) <= 2
    assert snapshot.generation == 7
    assert snapshot.policies == tuple(objects)
