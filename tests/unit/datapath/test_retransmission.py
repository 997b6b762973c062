# SPDX-License-Identifier: Apache-2.0
"""A SYN-ACK whose proof does not come is repeated by the enforcer, once, as soon as the path explains no more."""

from __future__ import annotations

import pytest

from enforcer_daemon.datapath.tcp import LAGS, MAX_LAG_S, MAX_WAIT_S, MIN_WAIT_S
from enforcer_daemon.packet.tcp import RST, build
from enforcer_daemon.verdict import Inject
from tests.unit.datapath.pair import TIMESTAMPS, Connection, make_pair

CROWDED = TIMESTAMPS * 2
"""Options that leave no room for a proof."""
NOW = 1.0
DUE = NOW + MIN_WAIT_S


def offer(connection: Connection) -> bytes:
    """Go as far as the SYN-ACK on the wire."""
    (syn,) = connection.client.send(connection.syn(), NOW)
    connection.server.receive(syn, NOW)
    (syn_ack,) = connection.server.send(connection.syn_ack(), NOW)
    return syn_ack


def repeated(connection: Connection, now: float) -> list[bytes]:
    """Let the server's enforcer repeat what is due; answer what leaves for the wire."""
    effects = connection.server.expire(now)
    own = [effect.packet for effect in effects if isinstance(effect, Inject)]
    assert len(own) == len(effects)
    return [left for packet in own for left in connection.server.send(packet, now)]


def headless(packet: bytes) -> bytes:
    """Leave out the IPv4 header, of which a repetition has another identification."""
    return packet[20:]


@pytest.fixture
def connection() -> Connection:
    return Connection(*make_pair())


def test_a_lost_syn_ack_is_repeated_as_it_was(connection: Connection) -> None:
    lost = offer(connection)
    assert connection.server.wake_at == DUE
    assert repeated(connection, DUE - 0.001) == []
    (again,) = repeated(connection, DUE)
    assert headless(again) == headless(lost)
    (delivered,) = connection.client.receive(again, DUE)
    assert headless(delivered) == headless(connection.syn_ack())


def test_it_is_repeated_once(connection: Connection) -> None:
    offer(connection)
    assert len(repeated(connection, DUE)) == 1
    assert connection.server.wake_at is None
    assert repeated(connection, DUE + 10) == []


def test_a_lost_proof_comes_again_although_the_client_has_nothing_to_say(connection: Connection) -> None:
    connection.client.receive(offer(connection), NOW)
    connection.client.send(connection.ack(), NOW)  # Lost on the wire.
    (again,) = repeated(connection, DUE)
    assert connection.client.receive(again, DUE) == []
    (proof,) = connection.client.flush_injected(DUE)
    assert connection.server.receive(proof, DUE) == [connection.ack()]


def test_a_lost_ack_comes_again_although_its_standalone_proof_came(connection: Connection) -> None:
    connection.client.receive(offer(connection), NOW)
    assert connection.client.send(connection.ack(options=CROWDED), NOW) == []
    proof, _lost = connection.client.flush_injected(NOW)
    assert connection.server.receive(proof, NOW) == []
    (again,) = repeated(connection, DUE)
    assert connection.client.receive(again, DUE) == []
    proof, ack = connection.client.flush_injected(DUE)
    assert connection.server.receive(proof, DUE) == []
    assert connection.server.receive(ack, DUE) == [connection.ack(options=CROWDED)]


def test_a_repetition_that_crosses_the_proof_changes_nothing(connection: Connection) -> None:
    connection.client.receive(offer(connection), NOW)
    (proof,) = connection.client.send(connection.ack(), NOW)
    (again,) = repeated(connection, DUE)
    assert connection.server.receive(proof, DUE) == [connection.ack()]
    assert connection.client.receive(again, DUE) == []
    (once_more,) = connection.client.flush_injected(DUE)
    assert connection.server.receive(once_more, DUE) == [connection.ack()]


def test_a_proven_connection_is_left_alone(connection: Connection) -> None:
    connection.client.receive(offer(connection), NOW)
    (proof,) = connection.client.send(connection.ack(), NOW)
    connection.server.receive(proof, NOW)
    assert connection.server.wake_at is None
    assert repeated(connection, DUE) == []


def test_so_is_one_that_ended(connection: Connection) -> None:
    offer(connection)
    ports = connection.sport, connection.dport
    reset = build(connection.client.address, connection.server.address, ports, (1_001, 0), RST, 0)
    assert connection.server.receive(reset, NOW) == [reset]
    assert repeated(connection, DUE) == []


def test_what_comes_unproven_right_after_it_asks_for_itself(connection: Connection) -> None:
    """A bare ACK that overtakes its standalone proof is dropped, and only an answer brings another."""
    connection.client.receive(offer(connection), NOW)
    repeated(connection, DUE)
    assert connection.client.send(connection.ack(options=CROWDED), DUE) == []
    _late, ack = connection.client.flush_injected(DUE)
    assert connection.server.receive(ack, DUE + 0.001) == []
    assert len(connection.server.injected) == 1


@pytest.mark.parametrize(("round_trip_s", "wait_s"), [(0.001, MIN_WAIT_S), (0.1, 0.2), (MAX_WAIT_S, None)])
def test_a_far_peer_has_more_time(round_trip_s: float, wait_s: float | None) -> None:
    client, server = make_pair()
    first, second = Connection(client, server), Connection(client, server, sport=40_001)
    client.receive(offer(first), NOW)
    (proof,) = client.send(first.ack(), NOW)
    server.receive(proof, NOW + round_trip_s)
    offer(second)
    repeat_at = server.wake_at
    assert repeat_at == (None if wait_s is None else pytest.approx(NOW + wait_s))


@pytest.mark.parametrize(("lag_s", "counted_s"), [(0.0, 0.0), (0.1, 0.1), (MAX_LAG_S, MAX_LAG_S), (0.9, MAX_LAG_S)])
def test_a_queue_that_is_behind_has_more_time(connection: Connection, lag_s: float, counted_s: float) -> None:
    (syn,) = connection.client.send(connection.syn(), NOW)
    connection.server.receive(syn, NOW)
    answered_at = NOW + lag_s
    connection.server.send(connection.syn_ack(), answered_at)
    due_at = answered_at + MIN_WAIT_S + LAGS * counted_s
    assert connection.server.wake_at == pytest.approx(due_at)
    assert repeated(connection, due_at - 0.001) == []
    assert len(repeated(connection, due_at + 0.001)) == 1


def test_a_syn_that_had_to_come_again_says_nothing_of_the_queue(connection: Connection) -> None:
    """The pod's kernel had no room for the first one: its silence is none of the queue's."""
    (syn,) = connection.client.send(connection.syn(), NOW)
    connection.server.receive(syn, NOW)
    connection.server.receive(syn, NOW + 1.0)
    connection.server.send(connection.syn_ack(), NOW + 1.0)
    assert connection.server.wake_at == pytest.approx(NOW + 1.0 + MIN_WAIT_S)


def test_one_long_round_trip_among_short_ones_counts_little() -> None:
    client, server = make_pair()
    for n, took_s in enumerate((0.2, 0.02, 0.1)):
        connection = Connection(client, server, sport=40_000 + n)
        client.receive(offer(connection), NOW)
        (proof,) = client.send(connection.ack(), NOW)
        server.receive(proof, NOW + took_s)
    offer(Connection(client, server, sport=41_000))
    assert server.wake_at == pytest.approx(NOW + 2 * (0.02 + 0.08 / 8))


def test_what_is_awaited_is_bounded() -> None:
    client, server = make_pair(max_half_open_flows=2)
    for n in range(2):
        offer(Connection(client, server, sport=40_000 + n))
    for n in range(3):  # Other SYN-ACKs of a kernel that began anew.
        server.send(Connection(client, server, isn_r=6_000 + n).syn_ack(), NOW)
    assert len(repeated(Connection(client, server), DUE)) == 2
