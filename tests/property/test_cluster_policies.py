# SPDX-License-Identifier: Apache-2.0
"""A peer never gains by hiding its identity, whatever the cluster policies and NetworkPolicies are."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.policy import compile_snapshot, decode_network_policy
from enforcer_daemon.policy.cluster_objects import Channel
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from enforcer_daemon.policy.evaluate_cluster import ClusterPolicies, Flow, Node
from tests.property.policy_worlds import (
    ADDRESSES,
    NETWORKS,
    PORT_NAMES,
    PORTS,
    flows,
    identity,
    labels,
    pods,
    policies,
    selectors,
    worlds,
)

Tree = dict[str, Any]

_pods = st.fixed_dictionaries({"podSelector": selectors}, optional={"namespaceSelector": selectors})
_subjects = st.one_of(
    st.fixed_dictionaries({"namespaces": selectors}), st.fixed_dictionaries({"pods": _pods})
)  # fmt: skip
_networks = st.lists(st.sampled_from(sorted(NETWORKS)), min_size=1, max_size=2, unique=True)
_to = st.one_of(
    _subjects,
    st.fixed_dictionaries({"networks": _networks}),
    st.fixed_dictionaries({"nodes": selectors}),
    st.just({}),
)
_ranges = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).filter(lambda ends: ends[0] < ends[1])
_numbers = st.one_of(
    st.sampled_from(PORTS).map(lambda number: {"number": number}),
    _ranges.map(lambda ends: {"range": {"start": ends[0], "end": ends[1]}}),
)
_protocols = st.one_of(
    st.tuples(st.sampled_from(["tcp", "udp", "sctp"]), _numbers).map(
        lambda pair: {pair[0]: {"destinationPort": pair[1]}}
    ),
    st.sampled_from(PORT_NAMES).map(lambda name: {"destinationNamedPort": name}),
)


def _rules(peers: st.SearchStrategy[Tree], field: str) -> st.SearchStrategy[list[Tree]]:
    rule = st.fixed_dictionaries(
        {
            "action": st.sampled_from(["Accept", "Deny", "Pass"]),
            field: st.lists(peers, min_size=1, max_size=2),
        },
        optional={"protocols": st.lists(_protocols, min_size=1, max_size=2)},
    )
    return st.lists(rule, max_size=4)


_specs = st.fixed_dictionaries({
    "tier": st.sampled_from(["Admin", "Baseline"]),
    "priority": st.integers(0, 2),
    "subject": st.one_of(st.just({"namespaces": {}}), _subjects),
    "ingress": _rules(_subjects, "from"),
    "egress": _rules(_to, "to"),
})  # fmt: skip


def _cluster_policy(name: str, spec: Tree) -> Tree:
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


@given(worlds(), st.lists(_specs, min_size=1, max_size=4), policies(), pods, pods, flows, labels)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_peer_gains_nothing_by_hiding_its_identity(
    world: Tree, specs: list[Tree], manifests: list[Tree], pod: Tree, peer: Tree, flow: Tree, node_labels: Tree
) -> None:
    own, other = identity(world, pod, "10.0.0.200"), identity(world, peer, flow["address"])
    direction = Direction(flow["direction"].lower())
    below = compile_snapshot([decode_network_policy(m) for m in manifests], 1).pod_policy(own).direction(direction)
    decoded = [
        decode_cluster_policy(_cluster_policy(f"p{index}", spec), Channel.EXPERIMENTAL, is_stored=True)
        for index, spec in enumerate(specs)
    ]
    together = ClusterPolicies(decoded, [Node(node_labels, (ip_address(ADDRESSES[0]),))])
    policy = together.direction(own, below, direction)
    facts = (ip_address(flow["address"]), True, flow["port"], Protocol[flow["protocol"]])

    hidden, shown = policy.evaluate(Flow(None, *facts)), policy.evaluate(Flow(other, *facts))

    assert shown.is_allowed or not hidden.is_allowed
