# SPDX-License-Identifier: Apache-2.0
"""A change of policy while a handshake is under way ends it at both sides; caches of decisions stay bounded."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from enforcer_daemon.datapath import decisions, networks
from enforcer_daemon.datapath.networks import Destination, Networks
from enforcer_daemon.model import Protocol
from enforcer_daemon.packet.tcp import ACK, RST, SYN, build
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.verdict import Inject, Settle
from tests.unit.datapath.pair import TIMESTAMPS, Connection, Endpoint, make_pair, segment


def connected() -> Connection:
    """Go as far as the SYN-ACK's delivery."""
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    return connection


def resets(endpoint: Endpoint) -> list[tuple[bytes, int, int]]:
    """Forget everything; answer source, sequence number and flags of each RST."""
    effects = endpoint.end_denied(lambda index: True)
    found = [segment(effect.packet) for effect in effects if isinstance(effect, Inject)]
    assert all(reset.flags & RST for reset in found)
    assert endpoint.datapath.half_open_flows == 0
    return [(reset.src, reset.seq, reset.ack) for reset in found]


def test_the_initiators_enforcer_resets_both_ends() -> None:
    connection = connected()
    client, server = connection.client, connection.server
    assert sorted(resets(client)) == sorted([(client.address, 1_001, 5_001), (server.address, 5_001, 1_001)])
    assert client.send(connection.ack()) == []


def test_the_responders_enforcer_resets_both_ends() -> None:
    connection = connected()
    client, server = connection.client, connection.server
    assert sorted(resets(server)) == sorted([(client.address, 1_001, 5_001), (server.address, 5_001, 1_001)])
    (ack,) = client.send(connection.ack())
    assert server.receive(ack) == []


def test_before_an_answer_nobody_waits_and_nothing_is_sent() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    assert resets(connection.server) == []
    assert connection.client.end_denied(lambda index: True) == ()


def test_what_waits_for_a_proof_is_dropped_with_its_flow() -> None:
    connection = connected()
    connection.client.send(connection.ack(b"data", TIMESTAMPS * 2))
    effects = connection.client.end_denied(lambda index: True)
    assert len([effect for effect in effects if isinstance(effect, Settle)]) == 1


def test_a_syn_ack_of_another_handshake_asks_for_no_proof() -> None:
    connection = connected()
    connection.client.send(connection.ack())
    other = Connection(connection.client, connection.server, isn_r=77)
    (again,) = connection.server.send(connection.syn_ack())
    connection.client.reasons()
    forged = segment(again)
    packet = forged.packet[:24] + other.isn_r.to_bytes(4, "big") + forged.packet[28:]
    assert connection.client.receive(packet) == []
    assert connection.client.reasons() == ["unknown-flow"]
    assert connection.client.injected == []


def test_data_from_the_peer_while_our_proof_travels_is_not_let_in() -> None:
    connection = connected()
    connection.client.send(connection.ack(b"data", TIMESTAMPS * 2))
    back = Connection(connection.server, connection.client, sport=80, dport=40_000, isn_i=5_000, isn_r=1_000)
    connection.client.reasons()
    assert connection.client.receive(back.ack(b"early")) == []
    assert connection.client.reasons() == ["unknown-flow"]
    assert segment(back.ack()).flags == ACK


def test_a_virtual_network_may_lie_in_an_enforced_one() -> None:
    networks = Networks(NetworkSettings(enforced=(IPv4Network("10.0.0.0/8"),), virtual=(IPv4Network("10.96.0.0/12"),)))
    classes = {
        bytes((10, 1, 0, 2)): Destination.ENFORCED,
        bytes((10, 96, 0, 1)): Destination.VIRTUAL,
        bytes((192, 0, 2, 1)): Destination.EXTERNAL,
        bytes(16): Destination.EXTERNAL,
    }
    for address, expected in classes.items():
        assert networks.destination(address) is expected
        assert networks.destination(address) is expected


def test_remembered_decisions_and_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MAX_DECISIONS", 4)
    monkeypatch.setattr(networks, "_MAX_DESTINATIONS", 4)
    client, _ = make_pair()
    policy, known = client.context.policy, client.context.node.networks
    for n in range(20):
        policy.outbound(bytes((10, 0, 0, n)), 80, Protocol.TCP)
        policy.outbound(bytes((10, 96, 0, n)), 80, Protocol.TCP)
        policy.inbound(segment(build(bytes((10, 0, 0, n)), client.address, (80, 80), (1, 0), SYN, 0)), Protocol.TCP)
    for table in (policy._ingress, policy._egress, policy._outbound, known._known):
        assert 0 < len(table) <= 4


def test_a_released_flow_that_is_remembered_is_forgotten_without_a_word() -> None:
    """Its sockets are ended by the kernel's own means."""
    connection = connected()
    (ack,) = connection.client.send(connection.ack())
    connection.server.receive(ack)
    for endpoint in (connection.client, connection.server):
        assert endpoint.end_denied(lambda index: True) == ()
        endpoint.reasons()
    assert connection.client.send(connection.ack()) == []
    assert connection.client.reasons() == ["unknown-flow"]


def test_a_failure_of_our_own_drops_the_packet_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = make_pair()

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(client.context.policy, "outbound", fail)
    assert client.send(Connection(client, server).syn()) == []
    (report,) = client.take_reports()
    assert (report.reason.value, report.detail, report.port) == ("internal-error", "RuntimeError: broken", 80)


def test_a_rst_of_the_server_after_its_answer_reaches_the_clients_kernel() -> None:
    connection = connected()
    back = connection.dport, connection.sport
    reset = build(connection.server.address, connection.client.address, back, (5_001, 0), RST, 0)
    assert connection.client.receive(reset) == [reset]
    assert connection.client.datapath.half_open_flows == 1  # The kernel evaluates its numbers, and says so by a RST.


def test_a_syn_under_way_with_the_old_identity_is_sent_anew_with_the_new_one() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    (old,) = client.send(connection.syn())
    client.context.local = client.node.token(client.identity)
    client.end_opening()
    (new,) = client.send(connection.syn())
    assert segment(new).payload != segment(old).payload
    assert server.receive(new) == [connection.syn()]
    assert len(server.send(connection.syn_ack())) == 1
