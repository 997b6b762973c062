# SPDX-License-Identifier: Apache-2.0
"""The handshake between two endpoints, packet by packet."""

from __future__ import annotations

from enforcer_daemon.handshake.frames import find_proof, is_frame
from enforcer_daemon.model import Direction
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import TIMESTAMPS, Connection, FakePolicy, Rules, make_pair, segment


def connect(connection: Connection) -> None:
    """Go as far as the SYN-ACK's delivery."""
    client, server = connection.client, connection.server
    (syn,) = client.send(connection.syn())
    assert server.receive(syn) == [connection.syn()]
    (syn_ack,) = server.send(connection.syn_ack())
    assert client.receive(syn_ack) == [connection.syn_ack()]


def test_three_packets_carry_identity_and_are_delivered_as_they_were() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    verdict = connection.client.verdict(connection.ack(), Direction.EGRESS)
    assert verdict.action is Action.RELEASE
    assert find_proof(segment(verdict.payload or b"").options) is not None
    delivered = connection.server.verdict(verdict.payload or b"", Direction.INGRESS)
    assert (delivered.action, delivered.payload) == (Action.RELEASE, connection.ack())


def test_syn_and_syn_ack_carry_frames() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    assert is_frame(segment(syn).payload)
    connection.server.receive(syn)
    (syn_ack,) = connection.server.send(connection.syn_ack())
    assert is_frame(segment(syn_ack).payload)


def test_routers_may_cut_what_carries_a_frame_and_nothing_else() -> None:
    """The pods' kernels forbid it for packets that are small; pieces are told apart by the identification."""
    identifications = set()
    for port in range(40_000, 40_004):
        connection = Connection(*make_pair(), sport=port)
        (syn,) = connection.client.send(connection.syn())
        (again,) = connection.client.send(connection.syn())
        connection.server.receive(syn)
        (syn_ack,) = connection.server.send(connection.syn_ack())
        assert again == syn
        assert syn[6:8] == syn_ack[6:8] == bytes(2)
        identifications |= {syn[4:6], syn_ack[4:6]}
        connection.client.receive(syn_ack)
        (ack,) = connection.client.send(connection.ack())
        assert ack[6:8] == connection.ack()[6:8] == b"\x40\x00"
    assert len(identifications) > 1


def test_ingress_denied_at_the_syn() -> None:
    connection = Connection(*make_pair(server_policy=FakePolicy(ingress=Rules(frozenset({"other"})))))
    (syn,) = connection.client.send(connection.syn())
    assert connection.server.receive(syn) == []
    assert connection.server.reasons() == ["ingress-denied"]


def test_egress_denied_at_the_syn_ack_and_the_server_is_reset() -> None:
    policy = FakePolicy(egress=Rules(frozenset({"other"}), direction=Direction.EGRESS))
    connection = Connection(*make_pair(client_policy=policy))
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    (syn_ack,) = connection.server.send(connection.syn_ack())
    assert connection.client.receive(syn_ack) == []
    assert connection.client.reasons() == ["egress-denied"]
    (reset,) = connection.client.flush_injected()
    assert connection.server.receive(reset) == [reset]


def test_ack_without_proof_is_not_delivered() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.server.take_reports()
    assert connection.server.receive(connection.ack()) == []
    assert connection.server.reasons() == ["proof-missing"]


def test_lost_proof_is_asked_for_and_held_data_follows_it_in_order() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    connect(connection)
    client.send(connection.ack())  # Lost on the wire.
    first, second = connection.ack(b"hello"), connection.ack(b" world", offset=5)
    assert server.receive(first) == []
    assert server.receive(second) == []
    (again,) = server.flush_injected()
    assert client.receive(again) == []
    (proof,) = client.flush_injected()
    assert server.receive(proof) == [connection.ack(), first, second]


def test_no_room_for_the_option_sends_the_proof_alone_and_first() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    connect(connection)
    crowded = connection.ack(b"data", TIMESTAMPS * 2)
    assert client.send(crowded) == []
    proof, data = client.flush_injected()
    assert data == crowded
    assert server.receive(proof) == []
    assert server.receive(data) == [data]


def test_retransmissions_get_the_same_answer() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    first, second = client.send(connection.syn()), client.send(connection.syn())
    assert first == second
    server.receive(first[0])
    assert server.receive(second[0]) == [connection.syn()]
    assert server.send(connection.syn_ack()) == server.send(connection.syn_ack())
