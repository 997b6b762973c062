# SPDX-License-Identifier: Apache-2.0
"""Which established flows may go on after a change: by identity, by address, unknown; own and peer's policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.reconsider import MasqueradedFlows, Reconsideration
from enforcer_daemon.datapath.flowindex import BY_ADDRESS, UNKNOWN, FlowIndex
from enforcer_daemon.dataplane.established import ReleasedFlow
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.policy import compile_snapshot, decode_network_policy
from enforcer_daemon.sources.manifests import ClusterState

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
DB = Identity(
    PodRef("shop", "db"), (ip_address("10.1.0.1"), ip_address("fd01::1")), {"app": "db"}, {"team": "a"}, "node-a",
    named_ports=(NamedPort("sql", 5432, Protocol.TCP),),
)  # fmt: skip
WEB = Identity(PodRef("front", "web"), (ip_address("10.2.0.2"),), {"app": "web"}, {"team": "old"}, "node-b")
OUTSIDE = ip_address("203.0.113.9")
SERVICE = ip_address("10.96.0.1")
WEB_POD = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}
TEAM_NEW = {"namespaceSelector": {"matchLabels": {"team": "new"}}}


def policy(app: str, namespace: str = "shop", **directions: Sequence[object]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{app}-{'-'.join(directions)}", "namespace": namespace},
        "spec": {
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": [direction.capitalize() for direction in directions],
            **directions,
        },
    }


def reconsideration(
    *policies: dict[str, Any],
    flows: Mapping[int, EvaluatedFlow] | None = None,
    own: Identity = DB,
    namespaces: Mapping[str, Mapping[str, str]] | None = None,
    is_identity_new: bool = False,
) -> Reconsideration:
    snapshot = compile_snapshot([decode_network_policy(manifest) for manifest in policies], 1)
    world = CompiledState(ClusterState(namespaces=namespaces or {}), snapshot, "node-a", "cluster.local")
    return Reconsideration(own, snapshot.pod_policy(own), FlowIndex((flows or {}).items()), world, is_identity_new)


def evaluated(direction: Direction = INGRESS, peer: Identity = WEB, port: int = 5432) -> EvaluatedFlow:
    return EvaluatedFlow(direction, peer, peer.ips[0], port, Protocol.TCP)


def released(
    index: int, direction: Direction = INGRESS, remote: object = WEB.ips[0], port: int = 5432, protocol: int = 6
) -> ReleasedFlow:
    source: Any = remote
    destination: Any = DB.ips[0]
    if direction is EGRESS:
        source, destination = destination, source
    return ReleasedFlow(protocol, source, 40_000, destination, port, index, (destination, port), b"")


def is_ended(question: Reconsideration, flow: ReleasedFlow) -> bool:
    """Ask as the dataplane does: by index first."""
    return not question.is_index_allowed(flow.index) and question.is_ended(flow)


@pytest.mark.parametrize(
    ("rules", "ended"),
    [
        ([{"from": [WEB_POD]}], False),
        ([{"from": [WEB_POD], "ports": [{"port": "sql"}]}], False),
        ([{"from": [WEB_POD], "ports": [{"port": 80}]}], True),
        ([{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}], True),
        ([{"from": [{"ipBlock": {"cidr": "10.2.0.0/16"}}]}], False),
        ([], True),
    ],
)
def test_a_flow_by_identity_is_judged_by_what_its_peer_stated(rules: list[object], ended: bool) -> None:
    question = reconsideration(policy("db", ingress=rules), flows={2: evaluated()})
    assert is_ended(question, released(2)) is ended
    assert question.is_index_denied(2) is ended
    assert question.is_index_denied(evaluated()) is ended, "likewise a handshake that has no index yet"


def test_a_flow_of_a_pod_that_nothing_isolates_goes_on() -> None:
    question = reconsideration(flows={2: evaluated()})
    assert not is_ended(question, released(2))
    assert not question.is_index_denied(2)


def test_egress_behind_a_service_is_judged_by_the_pod_that_answered() -> None:
    flows = {2: evaluated(EGRESS, port=8080)}
    by_pod_port = {"to": [{"ipBlock": {"cidr": "10.2.0.0/16"}}], "ports": [{"port": 8080}]}
    by_service = {"to": [{"ipBlock": {"cidr": "10.96.0.0/16"}}], "ports": [{"port": 80}]}
    dialed = released(2, EGRESS, SERVICE, 80)
    assert not is_ended(reconsideration(policy("db", egress=[by_pod_port]), flows=flows), dialed)
    assert is_ended(reconsideration(policy("db", egress=[by_service]), flows=flows), dialed)


def test_the_namespace_labels_of_a_peer_are_those_of_now() -> None:
    rules = policy("db", ingress=[{"from": [TEAM_NEW]}])
    assert is_ended(reconsideration(rules, flows={2: evaluated()}), released(2))
    assert not is_ended(
        reconsideration(rules, flows={2: evaluated()}, namespaces={"front": {"team": "new"}}), released(2)
    )


def test_a_peer_of_another_trust_domain_keeps_the_labels_that_it_stated() -> None:
    stranger = replace(WEB, trust_domain="elsewhere", namespace_labels={"team": "new"})
    anyone = {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}
    question = reconsideration(
        policy("db", ingress=[anyone]), policy("web", "front", egress=[]), flows={2: evaluated(peer=stranger)},
        is_identity_new=True,
    )  # fmt: skip
    assert not is_ended(question, released(2))  # and its own policies are not known here


@pytest.mark.parametrize(("direction", "opposite"), [(INGRESS, "egress"), (EGRESS, "ingress")])
def test_new_labels_of_the_pod_are_judged_by_its_peers_policies_too(direction: Direction, opposite: str) -> None:
    flows = {2: evaluated(direction)}
    shop_db = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}
    side = {"egress": "to", "ingress": "from"}[opposite]
    admits = policy("web", "front", **{opposite: [{side: [shop_db]}]})
    renamed = replace(DB, labels={"app": "other"})
    flow = released(2, direction)
    assert not is_ended(reconsideration(admits, flows=flows, is_identity_new=True), flow)
    assert is_ended(reconsideration(admits, flows=flows, own=renamed, is_identity_new=True), flow)
    # Where only policies changed, the peer's own node evaluates them.
    assert not is_ended(reconsideration(admits, flows=flows, own=renamed), flow)


def test_a_pods_flow_to_itself_is_never_ended() -> None:
    question = reconsideration(policy("db", ingress=[], egress=[]), flows={2: evaluated(peer=DB)}, is_identity_new=True)
    assert not is_ended(question, released(2, remote=SERVICE))


@pytest.mark.parametrize("direction", [INGRESS, EGRESS])
@pytest.mark.parametrize("protocol", [6, 17, 132])
def test_a_flow_by_address_is_judged_by_address_port_and_protocol(direction: Direction, protocol: int) -> None:
    side = {"ingress": "from", "egress": "to"}[direction.value]
    name = Protocol(protocol).name
    rule: Any = {side: [{"ipBlock": {"cidr": "203.0.113.0/24"}}], "ports": [{"port": 53, "protocol": name}]}
    question = reconsideration(policy("db", "shop", **{direction.value: [rule]}))
    assert not is_ended(question, released(BY_ADDRESS, direction, OUTSIDE, 53, protocol))
    assert is_ended(question, released(BY_ADDRESS, direction, OUTSIDE, 54, protocol))
    assert is_ended(question, released(BY_ADDRESS, direction, WEB.ips[0], 53, protocol))


@pytest.mark.parametrize(
    ("behind", "ended"), [((OUTSIDE, 6443), False), ((OUTSIDE, 443), True), ((WEB.ips[0], 6443), True), (None, True)]
)
def test_a_flow_to_a_service_goes_on_by_what_is_behind(behind: tuple[Any, int] | None, ended: bool) -> None:
    rule = {"to": [{"ipBlock": {"cidr": "203.0.113.0/24"}}], "ports": [{"port": 6443}]}
    question = reconsideration(policy("db", egress=[rule]))
    asked: list[SentTuple] = []

    def translation(sent: SentTuple) -> Any:
        asked.append(sent)
        return behind

    question.translation = translation
    assert is_ended(question, released(BY_ADDRESS, EGRESS, SERVICE, 443)) is ended
    assert asked == [SentTuple(6, DB.ips[0], 40_000, SERVICE, 443)]


def test_a_flow_to_the_pod_is_not_looked_up_behind_a_service() -> None:
    question = reconsideration(policy("db", ingress=[]))
    question.translation = lambda _: (OUTSIDE, 6443)
    assert is_ended(question, released(BY_ADDRESS, INGRESS, OUTSIDE, 6443))


def test_an_ipv6_flow_is_judged_by_ipv6_blocks() -> None:
    remote = ip_address("2001:db8::9")
    flow = ReleasedFlow(6, remote, 40_000, DB.ips[1], 5432, BY_ADDRESS, (DB.ips[1], 5432), b"")
    allowing = policy("db", ingress=[{"from": [{"ipBlock": {"cidr": "2001:db8::/32"}}]}])
    assert not is_ended(reconsideration(allowing), flow)
    assert is_ended(reconsideration(policy("db", ingress=[{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}])), flow)


def test_protocols_that_no_rule_can_name_go_on_by_rules_without_ports() -> None:
    flow = released(BY_ADDRESS, protocol=47)
    assert not is_ended(reconsideration(policy("db", egress=[])), flow)
    assert not is_ended(reconsideration(policy("db", ingress=[{}])), flow)
    assert not is_ended(reconsideration(policy("db", ingress=[{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}])), flow)
    assert is_ended(reconsideration(policy("db", ingress=[{"from": [{"podSelector": {}}]}])), flow)
    assert is_ended(reconsideration(policy("db", ingress=[{"ports": [{"protocol": "UDP"}]}])), flow)


@pytest.mark.parametrize("index", [UNKNOWN, 77], ids=["no room was left", "entry lost"])
def test_an_unknown_flow_ends_where_its_own_direction_is_isolated(index: int) -> None:
    question = reconsideration(policy("db", ingress=[{}]))
    assert not is_ended(question, released(index, EGRESS))
    assert is_ended(question, released(index, INGRESS))  # whatever was said of the one before
    assert question.is_index_denied(index)
    assert not is_ended(reconsideration(), released(index))
    assert not reconsideration().is_index_denied(index)


def test_where_all_peers_may_go_on_the_kernel_is_not_asked() -> None:
    flows = {2: evaluated(), 3: evaluated(EGRESS)}
    assert reconsideration(flows=flows).is_moot((2, 3))
    assert not reconsideration(policy("db", ingress=[]), flows=flows).is_moot((2, 3))
    assert reconsideration().is_moot(())
    assert not reconsideration(flows={3: evaluated()}).is_moot((3,))  # flows of index 2 may be anyone's
    full = reconsideration(flows=flows)
    full.flows.is_complete = False
    assert not full.is_moot((2, 3))


NODE, NODE_OUTSIDE = ip_address("10.1.0.254"), ip_address("192.168.0.1")


@pytest.mark.parametrize(
    ("source", "protocol", "ended"),
    [
        (OUTSIDE, 6, True),
        (OUTSIDE, 17, True),
        (OUTSIDE, 47, False),  # has no ports to be found by
        (ip_address("198.51.100.1"), 6, False),
        (NODE, 6, False),
        (NODE_OUTSIDE, 6, False),  # the node masquerades itself where it dials its own node port
        (DB.ips[0], 6, False),
        (None, 6, False),
    ],
)
def test_who_came_masqueraded_is_judged_by_his_own_address(source: object, protocol: int, *, ended: bool) -> None:
    policy_for_one = policy("db", ingress=[{"from": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}])
    ingress = reconsideration(policy_for_one).policy.ingress
    flows = MasqueradedFlows(frozenset({NODE, NODE_OUTSIDE, *DB.ips}), ingress, lambda *_: source)  # type: ignore[arg-type]
    assert flows.is_ended(released(0, remote=NODE, protocol=protocol)) is ended
