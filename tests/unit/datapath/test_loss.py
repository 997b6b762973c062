# SPDX-License-Identifier: Apache-2.0
"""Packets lost, repeated and out of order, at each step of the handshake: it goes on, or ends with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from enforcer_daemon.datapath.context import HOLD_S
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import is_frame
from enforcer_daemon.packet.tcp import ACK, FIN, build
from enforcer_daemon.verdict import Inject, Settle
from tests.unit.datapath.pair import TIMESTAMPS, Connection, connect, make_pair, segment

CROWDED = TIMESTAMPS * 2
"""Options that leave no room for a proof."""


def exchange(connection: Connection, rounds: int = 4) -> list[bytes]:
    """Carry the enforcers' own packets to and fro; answer what the server's kernel gets."""
    delivered = []
    for n in range(rounds):
        for packet in connection.server.flush_injected(1.0 + n):
            connection.client.receive(packet, 1.0 + n)
        for packet in connection.client.flush_injected(1.0 + n):
            delivered += connection.server.receive(packet, 1.0 + n)
    return delivered


def test_a_lost_syn_is_sent_again_with_the_same_frame() -> None:
    connection = Connection(*make_pair())
    (lost,) = connection.client.send(connection.syn())
    (again,) = connection.client.send(connection.syn(), now=2.0)
    assert lost == again
    assert connection.server.receive(again, now=2.0) == [connection.syn()]


def test_a_lost_syn_ack_is_sent_again_with_the_same_frame_and_proof() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    (lost,) = connection.server.send(connection.syn_ack())
    (repeated_syn,) = connection.client.send(connection.syn(), now=2.0)
    assert connection.server.receive(repeated_syn, now=2.0) == [connection.syn()]
    assert connection.server.send(connection.syn_ack(), now=2.0) == [lost]
    assert connection.client.receive(lost, now=2.0) == [connection.syn_ack()]


def test_a_syn_ack_that_comes_twice_before_the_ack_is_delivered_twice() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    (again,) = connection.server.send(connection.syn_ack())
    assert connection.client.receive(again) == [connection.syn_ack()]
    (ack,) = connection.client.send(connection.ack())
    assert connection.server.receive(ack) == [connection.ack()]


def test_a_server_that_speaks_first_gets_its_ack_although_the_proof_was_lost() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.client.send(connection.ack())  # Lost on the wire; the client has nothing to say.
    (syn_ack,) = connection.server.send(connection.syn_ack(), now=2.0)  # The server's kernel asks again.
    assert connection.client.receive(syn_ack, now=2.0) == []
    (proof,) = connection.client.flush_injected(2.0)
    assert connection.server.receive(proof, now=2.0) == [connection.ack()]


def test_the_same_where_the_proof_went_alone() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    assert connection.client.send(connection.ack(options=CROWDED)) == []
    assert len(connection.client.flush_injected()) == 2  # The proof and the ACK, both lost.
    (syn_ack,) = connection.server.send(connection.syn_ack(), now=2.0)
    assert connection.client.receive(syn_ack, now=2.0) == []
    proof, ack = connection.client.flush_injected(2.0)
    assert connection.server.receive(proof, now=2.0) == []
    assert connection.server.receive(ack, now=2.0) == [connection.ack(options=CROWDED)]


def test_lost_data_with_the_proof_is_repeated_by_the_kernel_and_the_proof_by_us() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    data = connection.ack(b"GET /")  # No pure ACK: the proof rides on data.
    assert len(connection.client.send(data)) == 1
    assert connection.server.receive(data, now=2.0) == []
    assert exchange(connection) == [data]


def test_a_proof_lost_before_our_own_queue_is_made_again() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    connect(connection)
    data = connection.ack(b"data", CROWDED)
    assert client.send(data) == []
    client.injected.clear()  # The raw socket's buffer was full.
    assert client.send(data, now=1.2) == []
    assert client.injected == []  # Data waits; a second proof would tell nothing new.
    dropped = client.expire(1.3 + HOLD_S)
    assert [type(effect) for effect in dropped] == [Settle, Settle]
    assert client.send(data, now=3.0) == []
    proof, delivered = client.flush_injected(3.0)
    assert server.receive(proof, now=3.0) == []
    assert server.receive(delivered, now=3.0) == [data]


def test_the_proof_twice_changes_nothing() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    (ack,) = connection.client.send(connection.ack())
    assert connection.server.receive(ack) == [connection.ack()]
    assert connection.server.receive(ack) == [connection.ack()]


def test_a_standalone_proof_twice_and_after_the_release_is_consumed() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.client.send(connection.ack(b"data", CROWDED))
    proof, data = connection.client.flush_injected()
    assert connection.server.receive(proof) == []
    assert connection.server.receive(proof) == []
    assert connection.server.receive(data) == [data]
    assert connection.server.receive(proof) == []


def test_data_that_overtakes_the_standalone_proof_waits_for_it() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.client.send(connection.ack(b"data", CROWDED))
    proof, data = connection.client.flush_injected()
    assert connection.server.receive(data) == []
    assert connection.server.receive(proof) == [data]


def test_data_that_overtakes_the_ack_with_the_proof_follows_it() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    (ack,) = connection.client.send(connection.ack())
    (data,) = connection.client.send(connection.ack(b"data"))
    assert connection.server.receive(data) == []
    assert connection.server.receive(ack) == [connection.ack(), data]


def test_a_fin_that_overtakes_the_proof_waits_for_it() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    (ack,) = connection.client.send(connection.ack())
    ports = connection.sport, connection.dport
    fin = build(connection.client.address, connection.server.address, ports, (1001, 5001), FIN | ACK, 502)
    assert connection.server.receive(fin) == []
    assert connection.server.receive(ack) == [connection.ack(), fin]


def test_an_ack_that_overtakes_the_syn_ack_at_the_server_is_refused() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    connection.server.reasons()
    assert connection.server.receive(connection.ack()) == []
    assert connection.server.reasons() == ["unknown-flow"]


def test_the_servers_syn_ack_is_repeated_for_unproven_data_but_not_for_each_packet() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    for offset in range(3):
        connection.server.receive(connection.ack(b"x", offset=offset), now=1.0 + offset / 1_000)
    assert len(connection.server.injected) == 1
    connection.server.receive(connection.ack(b"x", offset=3), now=1.1)
    assert len(connection.server.injected) == 2
    (repeated, _) = connection.server.flush_injected(1.1)
    assert is_frame(segment(repeated).payload)


def test_an_old_syn_replaces_no_handshake_under_way() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    (old,) = client.send(connection.syn())
    server.receive(old)
    (syn_ack,) = server.send(connection.syn_ack())
    client.receive(syn_ack)  # Dropped by the client's kernel, which begins anew: another nonce.
    (new,) = client.send(connection.syn())
    assert old != new
    assert server.receive(new) == [connection.syn()]
    server.reasons()
    assert server.receive(old) == []
    assert server.reasons() == ["replayed-nonce"]
    (syn_ack,) = server.send(connection.syn_ack())
    assert client.receive(syn_ack) == [connection.syn_ack()]
    (ack,) = client.send(connection.ack())
    assert server.receive(ack) == [connection.ack()]


def test_unfinished_handshakes_end_with_their_deadline() -> None:
    connection = Connection(*make_pair(timeout_s=10.0))
    connect(connection)
    for endpoint, direction in ((connection.client, "egress"), (connection.server, "ingress")):
        endpoint.take_reports()
        assert all(isinstance(effect, Inject) for effect in endpoint.expire(10.9))
        assert endpoint.datapath.half_open_flows == 1
        endpoint.expire(11.1)
        assert endpoint.datapath.half_open_flows == 0
        (report,) = endpoint.take_reports()
        assert (report.reason.value, report.direction.value, report.port) == ("handshake-timeout", direction, 80)


def test_held_data_is_dropped_after_a_while_and_the_bound_of_a_flow_holds() -> None:
    connection = Connection(*make_pair(max_held_packets=3))
    server = connection.server
    connect(connection)
    server.reasons()
    for offset in range(5):
        server.receive(connection.ack(b"x", offset=offset))
    assert server.reasons() == ["hold-queue-full"] * 2
    assert len(server.held) == 3
    assert not any(isinstance(effect, Settle) for effect in server.expire(1.0 + HOLD_S / 2))
    assert len(server.expire(1.0 + HOLD_S)) == 3


@pytest.mark.parametrize(
    ("limits", "bound"),
    [
        ({"max_held_packets_per_pod": 2}, Limit.HELD_PACKETS),
        ({"max_held_packets_per_source": 2}, Limit.HELD_PACKETS_PER_SOURCE),
    ],
)
def test_the_bounds_of_an_endpoint_count_what_waits_and_nothing_else(limits: dict[str, Any], bound: Limit) -> None:
    client, server = make_pair(**limits)
    for sport in range(40_000, 40_010):
        connection = Connection(client, server, sport=sport)
        connect(connection)
        assert client.send(connection.ack(b"data", CROWDED)) == []
        assert len(client.flush_injected()) == 2
    assert "hold-queue-full" not in client.reasons()
    server.reasons()
    for sport in range(40_000, 40_003):
        server.receive(Connection(client, server, sport=sport).ack(b"x"))
    assert server.reasons() == ["hold-queue-full"]
    assert len(server.held) == server.context.held_packets == 2
    assert server.context.node.limit_hits[bound] == 1
    # What was dropped comes again, once its proof has.
    first = Connection(client, server, sport=40_000)
    (carrier,) = client.send(first.ack())
    server.receive(carrier)
    assert len(server.held) == 2


def test_simultaneous_open_is_proven_both_ways() -> None:
    connection = Connection(*make_pair())
    one, two = connection.client, connection.server
    back = Connection(two, one, sport=80, dport=40_000, isn_i=5_000)
    (syn_one,) = one.send(connection.syn())
    (syn_two,) = two.send(back.syn())
    assert two.receive(syn_one) == [connection.syn()]
    assert one.receive(syn_two) == [back.syn()]
    # Each kernel answers the other's SYN with its own ISN.
    from_one = Connection(two, one, sport=80, dport=40_000, isn_i=5_000, isn_r=1_000).syn_ack()
    (answer_one,) = one.send(from_one)
    (answer_two,) = two.send(connection.syn_ack())
    assert two.receive(answer_one) == [from_one]
    assert one.receive(answer_two) == [connection.syn_ack()]
    (ack,) = one.send(connection.ack())
    assert two.receive(ack) == [connection.ack()]
    assert (one.datapath.half_open_flows, two.datapath.half_open_flows) == (0, 0)  # And none will time out.
