# SPDX-License-Identifier: Apache-2.0
"""networks.requireIdentity: from inside the enforced networks nothing comes without an identity, of any protocol."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Network, ip_address

import pytest

from enforcer_daemon.datapath.networks import Networks
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.model import Protocol
from enforcer_daemon.packet.tcp import SYN, build, with_payload
from enforcer_daemon.packet.udp import build_udp
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.settings_file import decode_settings
from tests.unit.datapath.pair import WALL, Connection, Endpoint, Node, segment

SETTINGS = NetworkSettings((IPv4Network("10.0.0.0/8"),), (IPv4Network("10.96.0.0/12"),), require_identity=True)
INSIDE, SERVICE, OUTSIDE, NODE = "10.9.0.9", "10.96.0.1", "203.0.113.7", "10.2.0.1"


def make_server(settings: NetworkSettings = SETTINGS) -> Endpoint:
    node = Node("node-2", make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC)))
    node.context.networks = Networks(settings)
    node.context.addresses = frozenset({ip_address(NODE).packed})
    return node.endpoint("server", "10.2.0.2", "server")


def plain_syn(source: str, server: Endpoint) -> bytes:
    return build(ip_address(source).packed, server.address, (40_000, 80), (1_000, 0), SYN, 64_240)


def plain_packet(source: str, server: Endpoint, protocol: int) -> bytes:
    """Make a packet of a protocol that carries no identity, with ports where SCTP has them."""
    datagram = build_udp(ip_address(source).packed, server.address, (40_000, 9), b"data")
    return datagram[:9] + bytes((protocol,)) + datagram[10:]


@pytest.mark.parametrize("payload", [b"", b"x" * 600])
def test_a_pod_that_nobody_vouches_for_is_refused_by_a_pod_that_no_policy_isolates(payload: bytes) -> None:
    server = make_server()
    assert server.receive(with_payload(segment(plain_syn(INSIDE, server)), payload)) == []
    assert server.reasons() == ["identity-required"]


@pytest.mark.parametrize("source", [OUTSIDE, SERVICE])
def test_others_are_judged_by_policy(source: str) -> None:
    server = make_server()
    packet = plain_syn(source, server)
    assert server.receive(packet) == [packet]


def test_the_node_itself_passes() -> None:
    server = make_server()
    server.node.true_sources[ip_address(NODE).packed] = ip_address(NODE).packed
    packet = plain_syn(NODE, server)
    assert server.receive(packet) == [packet]


def test_a_pod_that_comes_masqueraded_is_known_by_its_true_source() -> None:
    server = make_server()
    server.node.true_sources[ip_address(NODE).packed] = ip_address(INSIDE).packed
    assert server.receive(plain_syn(NODE, server)) == []
    assert server.reasons() == ["identity-required"]


def test_a_pod_with_an_identity_passes() -> None:
    authority = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
    client = Node("node-1", authority, 1).endpoint("client", "10.1.0.2", "client")
    server = Node("node-2", authority, 2).endpoint("server", "10.2.0.2", "server")
    server.node.context.networks = Networks(SETTINGS)
    (framed,) = client.send(Connection(client, server).syn())
    assert len(server.receive(framed)) == 1


@pytest.mark.parametrize("protocol", [Protocol.SCTP, 47])
def test_a_protocol_that_carries_no_identity_is_refused_from_inside(protocol: int) -> None:
    server = make_server()
    assert server.receive(plain_packet(INSIDE, server, protocol)) == []
    assert server.reasons() == ["identity-required"]
    for source in (OUTSIDE, SERVICE):
        packet = plain_packet(source, server, protocol)
        assert server.receive(packet) == [packet]
    server.node.true_sources[ip_address(NODE).packed] = ip_address(NODE).packed
    packet = plain_packet(NODE, server, protocol)
    assert server.receive(packet) == [packet]


def test_a_datagram_without_an_identity_is_refused_from_inside() -> None:
    server = make_server()
    packet = build_udp(ip_address(INSIDE).packed, server.address, (40_000, 53), b"query")
    assert server.receive(packet) == []
    assert server.reasons() == ["identity-required"]


def test_by_default_policy_alone_decides() -> None:
    server = make_server(replace(SETTINGS, require_identity=False))
    assert len(server.receive(plain_syn(INSIDE, server))) == 1


def test_the_setting_is_true_or_false() -> None:
    assert decode_settings(
        {"node": "n", "networks": {"enforced": ["10.0.0.0/8"], "requireIdentity": True}}
    ).networks.require_identity
    with pytest.raises(SettingsError, match=r"networks\.requireIdentity: must be true or false"):
        decode_settings({"node": "n", "networks": {"requireIdentity": 1}})
