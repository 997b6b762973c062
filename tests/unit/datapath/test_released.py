# SPDX-License-Identifier: Apache-2.0
"""After the release: its ports used again, its packets in the queue again, and a change of policy."""

from __future__ import annotations

from enforcer_daemon.handshake.frames import find_proof
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import ACK, build
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import Connection, connect, make_pair, release, segment


def test_the_servers_answer_to_a_new_connection_takes_back_the_release() -> None:
    connection = Connection(*make_pair())
    release(connection)
    again = Connection(connection.client, connection.server, isn_i=9_000, isn_r=9_500)
    assert again.client.send(again.syn(), mark=RELEASED) == []  # A RST goes first.
    verdict = again.client.verdict(again.syn(), Direction.EGRESS, mark=RELEASED)
    assert verdict.action is Action.FORGET
    arrived = again.server.verdict(verdict.payload or b"", Direction.INGRESS, mark=RELEASED)
    assert (arrived.action, arrived.payload) == (Action.ACCEPT, again.syn())  # It proves nothing.
    answer = again.server.verdict(again.syn_ack(), Direction.EGRESS, mark=RELEASED)
    assert answer.action is Action.FORGET  # The server's kernel has no other connection of these ports.
    syn_ack = answer.payload or b""
    again.client.receive(syn_ack)
    (ack,) = again.client.send(again.ack())
    assert find_proof(segment(ack).options) is not None
    assert again.server.receive(again.ack()) == []
    assert again.server.receive(ack) == [again.ack()]


def test_packets_of_released_flows_that_come_to_the_queue_are_released_again() -> None:
    connection = Connection(*make_pair())
    release(connection)
    data = connection.ack(b"data")
    back = connection.dport, connection.sport
    answer = build(connection.server.address, connection.client.address, back, (5001, 1001), ACK, 502)
    for endpoint, packet, direction in (
        (connection.client, data, Direction.EGRESS),
        (connection.server, data, Direction.INGRESS),
        (connection.server, answer, Direction.EGRESS),
        (connection.client, answer, Direction.INGRESS),
    ):
        assert endpoint.verdict(packet, direction).action is Action.RELEASE


def test_a_syn_ack_of_another_connection_than_the_proven_one_does_not_leave() -> None:
    connection = Connection(*make_pair())
    release(connection)
    other = Connection(connection.client, connection.server, isn_r=7_777)
    connection.server.reasons()
    assert other.server.send(other.syn_ack()) == []
    assert other.server.reasons() == ["unknown-flow"]
    assert len(connection.server.send(connection.syn_ack())) == 1  # Its own, once more, does.


def test_a_policy_change_forgets_handshakes_and_remembered_releases() -> None:
    client, server = make_pair()
    released, waiting = Connection(client, server), Connection(client, server, sport=40_001)
    release(released)
    connect(waiting)
    server.receive(waiting.ack(b"data"))
    effects = server.end_denied(lambda index: True)
    assert [type(effect).__name__ for effect in effects] == ["Settle", "Inject", "Inject"]
    assert server.datapath.half_open_flows == 0
    server.reasons()
    assert len(server.receive(released.ack(b"data"))) == 1  # The RST for the pod's kernel.
    assert server.reasons() == ["unknown-flow"]


def test_a_policy_change_that_still_allows_them_changes_nothing() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    assert connection.server.end_denied(lambda index: False) == ()
    (ack,) = connection.client.send(connection.ack())
    assert connection.server.receive(ack) == [connection.ack()]
