# SPDX-License-Identifier: Apache-2.0
"""Peers whose addresses somebody rewrote on the way: Services, node ports, masquerades."""

from __future__ import annotations

from enforcer_daemon.packet.tcp import ACK, SYN, build, with_payload
from tests.unit.datapath.guarded import AUTHORITY, CLIENTS_ONLY, clients_frame, guarded, refusal
from tests.unit.datapath.pair import (
    Node,
    segment,
    v4,
)


def test_a_pods_own_connection_comes_home_through_a_service() -> None:
    """The hairpin arrives from the node's address; conntrack says whose it is."""
    node = Node("node-1", AUTHORITY)
    pod = node.endpoint("pod", "10.1.0.2", "pod")
    gateway = v4("10.1.0.1")
    node.context.addresses = frozenset({gateway})
    node.true_sources[gateway] = pod.address
    syn = build(pod.address, v4("10.96.0.1"), (40_000, 80), (1_000, 0), SYN, 64_240)
    (framed,) = pod.send(syn)
    at_home = build(gateway, pod.address, (40_000, 8_080), (1_000, 0), SYN, 64_240)
    assert pod.receive(with_payload(segment(at_home), segment(framed).payload)) == [at_home]
    back = build(pod.address, gateway, (8_080, 40_000), (5_000, 1_001), SYN | ACK, 64_240)
    (answer,) = pod.send(back)
    translated = build(v4("10.96.0.1"), pod.address, (80, 40_000), (5_000, 1_001), SYN | ACK, 64_240)
    assert pod.receive(with_payload(segment(translated), segment(answer).payload)) == [translated]
    ack = build(pod.address, v4("10.96.0.1"), (40_000, 80), (1_001, 5_001), ACK, 502)
    (proven,) = pod.send(ack)
    home = build(gateway, pod.address, (40_000, 8_080), (1_001, 5_001), ACK, 502, segment(proven).options)
    (delivered,) = pod.receive(home)
    assert segment(delivered).options == b""
    assert pod.reasons().count("self") == 2


def test_a_masqueraded_peer_is_judged_under_its_tokens_address_where_the_operator_says_so() -> None:
    client, server, _ = guarded()
    frame = clients_frame(client, server)
    masquerade = build(v4("192.0.2.7"), server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    packet = with_payload(segment(masquerade), frame)
    assert refusal(server, packet) == "source-mismatch"
    server.context.node.networks.masquerade = frozenset({v4("192.0.2.7")})
    assert server.receive(packet) == [masquerade]


def test_a_source_that_conntrack_knows_is_not_excused_by_a_masquerade() -> None:
    """The attacker dials through a node port, so that the client's stolen frame comes from the node's address."""
    client, _, attacker = guarded()
    node = Node("node-2", AUTHORITY)
    server = node.endpoint("server", "10.2.0.2", "server")
    gateway = v4("10.2.0.1")
    node.context.addresses = frozenset({gateway})
    node.true_sources[gateway] = attacker.address
    node.context.networks.masquerade = frozenset({gateway})
    packet = build(gateway, server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    assert refusal(server, with_payload(segment(packet), clients_frame(client, attacker))) == "source-mismatch"


def test_a_plain_syn_through_a_node_port_is_judged_by_its_true_source() -> None:
    node = Node("node-2", AUTHORITY)
    server = node.endpoint("server", "10.2.0.2", "server", CLIENTS_ONLY)
    gateway, outside = v4("10.2.0.1"), v4("198.51.100.9")
    node.context.addresses = frozenset({gateway})
    packet = build(gateway, server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    node.true_sources[gateway] = outside
    server.receive(packet)
    (report,) = server.take_reports()
    assert (report.reason.value, report.remote) == ("unidentified-peer", outside)
    node.true_sources[gateway] = gateway  # The node's own: a probe.
    assert server.receive(packet) == [packet]
    assert server.reasons() == ["node"]
    del node.true_sources[gateway]  # Unknown to conntrack: an ordinary address.
    assert refusal(server, packet) == "unidentified-peer"
