# SPDX-License-Identifier: Apache-2.0
"""The engine against the plain reference, on generated worlds."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from ipaddress import ip_address
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from enforcer_daemon.errors import PolicyError
from enforcer_daemon.model import Direction, Identity, Protocol, RuleRef
from enforcer_daemon.policy import DirectionPolicy, PolicySnapshot, compile_snapshot, decode_network_policy
from enforcer_daemon.policy.cluster_objects import Channel
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from tests.property import policy_reference as reference
from tests.property.policy_worlds import ADDRESSES, PORTS, flows, identity, pods, policies, specs, worlds

Tree = dict[str, Any]


def _compile(manifests: list[Tree]) -> PolicySnapshot:
    return compile_snapshot([decode_network_policy(manifest) for manifest in manifests], 1)


def _direction(world: Tree, manifests: list[Tree], pod: Tree, flow: Tree) -> DirectionPolicy:
    policy = _compile(manifests).pod_policy(identity(world, pod, "10.0.0.200"))
    return policy.direction(Direction(flow["direction"].lower()))


@given(worlds(), policies(), pods, st.one_of(st.none(), pods), flows)
@settings(max_examples=1_000, deadline=None)
def test_engine_and_reference_agree(
    world: Tree, manifests: list[Tree], pod: Tree, peer: Tree | None, flow: Tree
) -> None:
    policy = _direction(world, manifests, pod, flow)
    known = None if peer is None else identity(world, peer, flow["address"])
    question = (known, ip_address(flow["address"]), flow["port"], Protocol[flow["protocol"]])

    decision = policy.evaluate(*question)

    isolating = dict(reference.isolating_rules(manifests, pod, flow["direction"]))
    allowing = reference.allowing(world, manifests, pod, peer, flow)
    assert policy.is_isolated == bool(isolating)
    assert decision.is_allowed == reference.verdict(world, manifests, pod, peer, flow)
    namespace = pod["namespace"]
    if not isolating:
        assert decision.rules == ()
    elif decision.is_allowed:
        everyone = {RuleRef(namespace, name, rule) for name, rule in allowing}
        assert set(decision.rules) <= everyone
        assert decision.rules
        assert policy.explain(*question).rules == tuple(sorted(everyone))
    else:
        assert decision.rules == tuple(sorted(RuleRef(namespace, name) for name in isolating))
        assert policy.explain(*question) == decision


@given(worlds(), policies(), pods, pods, flows)
@settings(max_examples=500, deadline=None)
def test_nothing_is_allowed_that_could_not_be(
    world: Tree, manifests: list[Tree], pod: Tree, peer: Tree, flow: Tree
) -> None:
    policy = _direction(world, manifests, pod, flow)
    address, port, protocol = ip_address(flow["address"]), flow["port"], Protocol[flow["protocol"]]

    if policy.evaluate(identity(world, peer, flow["address"]), address, port, protocol).is_allowed:
        assert policy.could_allow(address, port, protocol)
        assert policy.could_allow(address, None, protocol)
        assert policy.could_allow(None, port, protocol)
        assert policy.could_allow(None, None, protocol)


@given(worlds(), policies(), pods, flows, st.sampled_from(ADDRESSES), st.sampled_from(PORTS))
@settings(max_examples=500, deadline=None)
def test_address_rules_say_the_same_as_judging_an_address(
    world: Tree, manifests: list[Tree], pod: Tree, flow: Tree, text: str, port: int
) -> None:
    policy = _direction(world, manifests, pod, flow)
    address, protocol = ip_address(text), Protocol[flow["protocol"]]

    matches = any(rule.holds(address, port, protocol) for rule in policy.address_rules())

    assert matches == policy.evaluate(None, address, port, protocol).is_allowed


@given(worlds(), policies(), policies(), pods, pods, flows)
@settings(max_examples=200, deadline=None)
def test_a_snapshot_that_takes_over_from_another_answers_as_a_new_one(
    world: Tree, before: list[Tree], after: list[Tree], pod: Tree, peer: Tree, flow: Tree
) -> None:
    first = _compile(before)
    own, other = identity(world, pod, "10.0.0.200"), identity(world, peer, flow["address"])
    first.pod_policy(own)
    objects = [decode_network_policy(manifest) for manifest in after]
    question = (other, ip_address(flow["address"]), flow["port"], Protocol[flow["protocol"]])

    direction = Direction(flow["direction"].lower())
    taken_over = compile_snapshot(objects, 2, first).pod_policy(own).direction(direction)
    fresh = compile_snapshot(objects, 2).pod_policy(own).direction(direction)

    assert taken_over.explain(*question) == fresh.explain(*question)


_ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@given(policies().filter(bool), st.data())
@settings(max_examples=300, deadline=None)
@example([{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": None, "spec": []}], None)
def test_any_damage_gives_a_policy_or_a_named_problem(manifests: list[Tree], data: st.DataObject | None) -> None:
    manifest: Any = manifests[0]
    if data is not None:
        node: Any = manifest
        while isinstance(node, dict | list) and node:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                node[key] = data.draw(_ANY)
                break
            node = node[key]
    with suppress(PolicyError):
        assert decode_network_policy(manifest).name


_CLUSTER_POLICY: Tree = {
    "apiVersion": "policy.networking.k8s.io/v1alpha2",
    "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "p"},
    "spec": {
        "tier": "Admin",
        "priority": 1,
        "subject": {"pods": {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}}},
        "egress": [
            {
                "action": "Deny",
                "to": [{"networks": ["10.0.0.0/8"]}, {"domainNames": ["a.b"]}, {"namespaces": {"matchLabels": {}}}],
                "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 2}}}}],
            }
        ],
    },
}


@given(st.data(), st.sampled_from(Channel), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_a_cluster_policy_or_a_named_problem(
    data: st.DataObject, channel: Channel, is_stored: bool
) -> None:
    manifest = deepcopy(_CLUSTER_POLICY)
    node: Any = manifest
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(_ANY)
            break
        node = node[key]
    with suppress(PolicyError):
        assert decode_cluster_policy(manifest, channel, is_stored=is_stored).name


@given(st.lists(st.tuples(st.integers(0, 5), specs | st.none()), max_size=6), policies(), worlds(), pods)
@settings(max_examples=150, deadline=None)
def test_a_snapshot_made_by_changes_is_the_one_made_at_once(
    changes: list[tuple[int, Tree | None]], manifests: list[Tree], world: Tree, pod: Tree
) -> None:
    """Whatever was created, replaced, deleted, or read anew as it was."""
    objects = {manifest["metadata"]["name"]: decode_network_policy(manifest) for manifest in manifests}
    own = identity(world, pod, "10.0.0.200")
    by_steps = compile_snapshot(objects.values(), 1)
    for number, (index, spec) in enumerate(changes):
        by_steps.pod_policy(own)  # Compiles the namespace, which the next snapshot may take over.
        name = f"p{index}"
        if spec is None:
            objects.pop(name, None)
        else:
            namespace = objects[name].namespace if name in objects else pod["namespace"]
            metadata = {"name": name, "namespace": namespace}
            typed = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
            objects[name] = decode_network_policy({**typed, "metadata": metadata, "spec": spec})
        before, by_steps = by_steps, compile_snapshot(objects.values(), number + 2, by_steps)
        at_once = compile_snapshot(objects.values(), number + 2)
        assert by_steps.policies == at_once.policies
        for ours, theirs in zip(_sides(by_steps, own), _sides(at_once, own), strict=True):
            assert ours.isolating == theirs.isolating
            assert ours.address_rules() == theirs.address_rules()
        if before.policies == by_steps.policies:
            pairs = zip(_sides(before, own), _sides(by_steps, own), strict=True)
            assert all(old.is_same(new) for old, new in pairs)


def _sides(snapshot: PolicySnapshot, own: Identity) -> tuple[DirectionPolicy, DirectionPolicy]:
    policy = snapshot.pod_policy(own)
    return policy.ingress, policy.egress
