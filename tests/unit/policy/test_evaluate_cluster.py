# SPDX-License-Identifier: Apache-2.0
"""Cluster policies around NetworkPolicy: tiers, order, Pass, address rules, and peers that hide who they are."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from enforcer_daemon.model import Direction, Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.policy import compile_snapshot, decode_network_policy, evaluate_cluster
from enforcer_daemon.policy.cluster_objects import Channel
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from enforcer_daemon.policy.evaluate_cluster import ClusterDirection, ClusterPolicies, Flow, Node
from enforcer_daemon.reasons import Reason

Tree = dict[str, Any]
ALL: Tree = {"namespaces": {}}
DEV: Tree = {"pods": {"podSelector": {"matchLabels": {"team": "dev"}}}}
EVERY_NETWORK: Tree = {"networks": ["0.0.0.0/0", "::/0"]}


def pod(name: str, address: str, **labels: str) -> Identity:
    """Return the identity of a pod in namespace shop, with a port 80 called web."""
    namespace_labels = {"kubernetes.io/metadata.name": "shop"}
    ports = (NamedPort("web", 80, Protocol.TCP),)
    return Identity(PodRef("shop", name), (ip_address(address),), labels, namespace_labels, "n", named_ports=ports)


WEB = pod("web", "10.0.0.1", app="web")
PEER = pod("peer", "10.0.0.2", team="dev")


def rule(action: str, *peers: Tree, field: str = "to", **fields: object) -> Tree:
    """Return one rule of egress, or of ingress with the field `from`."""
    return {"action": action, field: list(peers), **fields}


def policy(name: str, *rules: Tree, tier: str = "Admin", priority: int = 10, **fields: object) -> Tree:
    """Return a cluster policy with these rules of egress, for all pods."""
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": tier, "priority": priority, "subject": ALL, "egress": list(rules), **fields},
    }


def isolating(*allowed: Tree) -> Tree:
    """Return a NetworkPolicy that isolates all pods of shop for egress but for these peers."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "isolated", "namespace": "shop"},
        "spec": {
            "podSelector": {},
            "policyTypes": ["Egress"],
            "egress": [{"to": list(allowed)}] if allowed else [],
        },
    }


def direction(
    manifests: list[Tree], of: Direction = Direction.EGRESS, subject: Identity = WEB, nodes: tuple[Node, ...] = ()
) -> ClusterDirection:
    """Return what these policies say together of a pod."""
    cluster = [m for m in manifests if m["kind"] == "ClusterNetworkPolicy"]
    others = [decode_network_policy(m) for m in manifests if m["kind"] == "NetworkPolicy"]
    below = compile_snapshot(others, 1).pod_policy(subject).direction(of)
    policies = ClusterPolicies([decode_cluster_policy(m, Channel.EXPERIMENTAL) for m in cluster], nodes)
    return policies.direction(subject, below, of)


def flow(peer: Identity | None = PEER, *, port: int | None = 80, is_pod_address: bool = True) -> Flow:
    """Return a flow with a peer at the address of PEER."""
    return Flow(peer, ip_address("10.0.0.2"), is_pod_address, port, None if port is None else Protocol.TCP)


def is_allowed(*manifests: Tree, peer: Identity | None = PEER, port: int | None = 80) -> bool:
    """Return whether egress to the peer is allowed."""
    return direction(list(manifests)).evaluate(flow(peer, port=port)).is_allowed


def test_without_policies_all_is_allowed() -> None:
    decision = direction([]).evaluate(flow())

    assert (decision.is_allowed, decision.reason, decision.cluster_rules) == (True, Reason.NOT_ISOLATED, ())


def test_a_policy_without_a_matching_rule_isolates_nobody() -> None:
    assert is_allowed(policy("a", rule("Deny", {"pods": {"podSelector": {"matchLabels": {"team": "ops"}}}})))


def test_the_admin_tier_overrules_networkpolicy_both_ways() -> None:
    assert is_allowed(policy("a", rule("Accept", DEV)), isolating())
    assert not is_allowed(policy("a", rule("Deny", DEV)), isolating({"podSelector": {}}))


def test_networkpolicy_overrules_the_baseline_tier_both_ways() -> None:
    assert is_allowed(policy("b", rule("Deny", DEV), tier="Baseline"), isolating({"podSelector": {}}))
    assert not is_allowed(policy("b", rule("Accept", DEV), tier="Baseline"), isolating())


def test_the_baseline_tier_decides_for_pods_without_networkpolicy() -> None:
    assert not is_allowed(policy("b", rule("Deny", DEV), tier="Baseline"))
    assert is_allowed(policy("b", rule("Accept", DEV), rule("Deny", ALL), tier="Baseline"))


def test_pass_skips_the_rest_of_its_tier_only() -> None:
    passes = policy("a", rule("Pass", DEV), rule("Deny", ALL))

    assert is_allowed(passes)
    assert not is_allowed(passes, isolating())
    assert not is_allowed(passes, policy("b", rule("Deny", DEV), tier="Baseline"))


def test_pass_in_the_baseline_tier_is_the_default() -> None:
    assert is_allowed(policy("b", rule("Pass", DEV), rule("Deny", ALL), tier="Baseline"))


def test_the_lower_priority_number_is_asked_first_in_its_tier() -> None:
    assert not is_allowed(policy("z", rule("Deny", DEV), priority=0), policy("a", rule("Accept", DEV), priority=1))
    assert is_allowed(
        policy("z", rule("Accept", DEV), priority=1000), policy("a", rule("Deny", DEV), priority=0, tier="Baseline")
    )


def test_of_equal_priorities_the_first_name_is_asked_first() -> None:
    assert is_allowed(policy("b", rule("Deny", DEV)), policy("a", rule("Accept", DEV)))


def test_rules_are_asked_in_their_written_order_over_both_kinds() -> None:
    by_address, by_label = rule("Accept", {"networks": ["10.0.0.0/8"]}), rule("Deny", DEV)

    assert is_allowed(policy("a", by_address, by_label))
    assert not is_allowed(policy("a", by_label, by_address))


def test_networks_cover_pods_too() -> None:
    assert not is_allowed(policy("a", rule("Deny", EVERY_NETWORK)))


def test_ingress_and_egress_are_independent() -> None:
    manifests = [policy("a", rule("Deny", ALL), ingress=[rule("Accept", ALL, field="from")])]

    assert not direction(manifests).evaluate(flow()).is_allowed
    assert direction(manifests, Direction.INGRESS).evaluate(flow()).is_allowed


def test_ingress_from_outside_matches_no_rule_for_pods() -> None:
    manifests = [policy("a", ingress=[rule("Deny", ALL, field="from")])]

    assert direction(manifests, Direction.INGRESS).evaluate(flow(None, is_pod_address=False)).is_allowed


def test_only_the_subjects_pods_are_meant() -> None:
    subject = {"pods": {"podSelector": {"matchLabels": {"app": "db"}}}}

    assert is_allowed(policy("a", rule("Deny", ALL), subject=subject))
    assert is_allowed(policy("a", rule("Deny", ALL), subject={"namespaces": {"matchLabels": {"team": "x"}}}))


def test_rules_for_ports_leave_other_ports_and_protocols_alone() -> None:
    manifest = policy("a", rule("Deny", ALL, protocols=[{"tcp": {"destinationPort": {"number": 80}}}]))

    assert not is_allowed(manifest)
    assert is_allowed(manifest, port=81)
    assert is_allowed(manifest, port=None)


def test_a_rule_without_protocols_matches_protocols_without_ports() -> None:
    assert not is_allowed(policy("a", rule("Deny", ALL)), port=None)


def test_a_port_name_is_the_destinations() -> None:
    protocols = [{"destinationNamedPort": "web"}]
    named = policy("a", rule("Deny", DEV, protocols=protocols), ingress=[
        rule("Deny", DEV, field="from", protocols=protocols)
    ])  # fmt: skip

    assert not is_allowed(named)
    assert is_allowed(named, port=81)
    assert not direction([named], Direction.INGRESS).evaluate(flow()).is_allowed
    assert direction([named], Direction.INGRESS).evaluate(flow(port=81)).is_allowed


def test_addresses_have_no_port_names() -> None:
    manifest = policy("a", rule("Deny", {"networks": ["10.0.0.0/8"]}, protocols=[{"destinationNamedPort": "web"}]))
    decoded = decode_cluster_policy(manifest, Channel.STANDARD)
    below = compile_snapshot([], 1).pod_policy(WEB).egress

    assert ClusterPolicies([decoded]).direction(WEB, below, Direction.EGRESS).evaluate(flow()).is_allowed


def test_nodes_are_matched_by_the_addresses_of_those_selected() -> None:
    nodes = (Node({"role": "edge"}, (ip_address("10.0.0.2"),)), Node({}, (ip_address("10.0.0.3"),)))
    edge = policy("a", rule("Deny", {"nodes": {"matchLabels": {"role": "edge"}}}))
    other = policy("a", rule("Deny", {"nodes": {"matchLabels": {"role": "other"}}}))
    outside = flow(None, is_pod_address=False)

    assert not direction([edge], nodes=nodes).evaluate(outside).is_allowed
    assert direction([other], nodes=nodes).evaluate(outside).is_allowed


def test_domain_names_have_no_answer() -> None:
    with pytest.raises(ValueError, match="domainNames"):
        direction([policy("a", rule("Accept", {"domainNames": ["a.b"]}))])


def test_pods_of_another_trust_domain_match_only_by_its_name() -> None:
    foreign = Identity(PEER.pod, PEER.ips, PEER.labels, PEER.namespace_labels, "n", trust_domain="other.example")
    named: Tree = {"namespaces": {"matchLabels": {"trireme.io/trust-domain": "other.example"}}}

    assert is_allowed(policy("a", rule("Deny", ALL)), peer=foreign)
    assert not is_allowed(policy("a", rule("Deny", named)), peer=foreign)
    assert is_allowed(policy("a", rule("Deny", named)))


def test_a_closed_rule_denies_everyone_and_accepts_nobody() -> None:
    below = compile_snapshot([], 1).pod_policy(WEB).egress

    def allowed(action: str) -> bool:
        manifest = policy("a", rule(action, {}, ALL), rule("Deny" if action == "Accept" else "Accept", ALL))
        policies = ClusterPolicies([decode_cluster_policy(manifest, is_stored=True)])
        return policies.direction(WEB, below, Direction.EGRESS).evaluate(flow(None, is_pod_address=False)).is_allowed

    assert not allowed("Pass")
    assert not allowed("Deny")
    assert allowed("Accept")  # What it would accept is not denied to the world by the rule for pods behind it.


def test_a_decision_names_tier_policy_rule_and_action() -> None:
    passes = policy("up", rule("Pass", DEV, name="by-team"))
    decision = direction([passes, policy("down", rule("Deny", ALL), tier="Baseline")]).evaluate(flow())

    assert decision.reason is Reason.EGRESS_DENIED
    assert [str(ref) for ref in decision.cluster_rules] == [
        'cluster policy Admin/up rule 0 "by-team" (Pass)',
        "cluster policy Baseline/down rule 0 (Deny)",
    ]


def test_what_passed_is_named_beside_the_networkpolicy_that_allows() -> None:
    passes = policy("up", rule("Pass", DEV))

    decision = direction([passes, isolating({"podSelector": {}})]).evaluate(flow(), explain=True)

    assert [str(ref) for ref in decision.rules] == ["shop/isolated[0]"]
    assert [str(ref) for ref in decision.cluster_rules] == ["cluster policy Admin/up rule 0 (Pass)"]


def test_baseline_rules_are_named_where_they_accept_or_pass() -> None:
    for action, reason in (("Accept", Reason.POLICY), ("Pass", Reason.NOT_ISOLATED)):
        decision = direction([policy("b", rule(action, ALL), tier="Baseline")]).evaluate(flow())

        assert (decision.is_allowed, decision.reason) == (True, reason)
        assert [str(ref) for ref in decision.cluster_rules] == [f"cluster policy Baseline/b rule 0 ({action})"]


def test_a_peer_that_hides_is_denied_where_a_pod_may_be() -> None:
    decision = direction([policy("a", rule("Deny", DEV))]).evaluate(flow(None))

    assert (decision.is_allowed, decision.reason) == (False, Reason.UNIDENTIFIED_PEER)


def test_no_rule_for_pods_accepts_or_passes_who_hides() -> None:
    for action in ("Accept", "Pass"):
        assert not is_allowed(policy("a", rule(action, DEV), rule("Deny", ALL)), peer=None)


def test_hiding_does_not_skip_what_passing_leads_to() -> None:
    manifest = policy("a", rule("Pass", DEV), rule("Accept", EVERY_NETWORK))

    assert not is_allowed(manifest, isolating())
    assert not is_allowed(manifest, isolating(), peer=None)
    assert not is_allowed(manifest, policy("b", rule("Deny", DEV), tier="Baseline"), peer=None)
    assert is_allowed(manifest, peer=None)


def test_a_hidden_destination_may_have_any_port_name() -> None:
    manifest = policy("a", rule("Deny", DEV, protocols=[{"destinationNamedPort": "web"}]))

    assert not is_allowed(manifest, peer=None, port=81)
    assert is_allowed(manifest, peer=None, port=None)


def test_compiled_sets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_cluster, "MAX_COMPILED_SETS", 1)
    subject = {"pods": {"podSelector": {"matchLabels": {"app": "web"}}}}
    policies = ClusterPolicies([decode_cluster_policy(policy("a", rule("Deny", ALL), subject=subject))])
    below = compile_snapshot([], 1)

    for _ in range(2):
        for identity, expected in ((WEB, False), (PEER, True)):
            found = policies.direction(identity, below.pod_policy(identity).egress, Direction.EGRESS)
            assert found.evaluate(flow()).is_allowed is expected
