# SPDX-License-Identifier: Apache-2.0
"""Ports that are used again, flows that are remembered no more, and answers that a sidecar gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from enforcer_daemon.datapath import strays
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.handshake.frames import is_frame
from enforcer_daemon.handshake.machine import Event
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.tcp import ACK, RST, build, with_payload
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import Connection, Endpoint, connect, make_pair, release, segment

SIDECAR_PORT = 15_006


def refusal(connection: Connection, port: int | None = None) -> bytes:
    ports = port or connection.dport, connection.sport
    numbers = 0, connection.isn_i + 1
    return build(connection.server.address, connection.client.address, ports, numbers, RST | ACK, 0)


def sent_instead(client: Endpoint, again: Connection, now: float, mark: int = 0) -> list[tuple[int, int]]:
    """Give flags and sequence number of what leaves in place of a SYN."""
    assert client.send(again.syn(), now, mark) == []
    return [(segment(packet).flags, segment(packet).seq) for packet in client.flush_injected(now)]


# Ports that are used again: conntrack on the way must begin anew.


def test_after_a_reset_by_the_peer_a_rst_goes_before_the_next_syn() -> None:
    client, server = make_pair()
    release(Connection(client, server))
    again = Connection(client, server, isn_i=9_000, isn_r=9_500)
    assert sent_instead(client, again, 2.0, RELEASED) == [(RST, 9_000)]
    (framed,) = client.send(again.syn(), now=3.0)  # The kernel's repetition, of a connection without marks.
    assert is_frame(segment(framed).payload)
    assert server.receive(framed, now=3.0) == [again.syn()]


def test_a_mark_that_does_not_go_away_delays_a_syn_only_once() -> None:
    client, server = make_pair()
    again = Connection(client, server)
    assert sent_instead(client, again, 2.0, RELEASED) == [(RST, 1_000)]
    verdict = client.verdict(again.syn(), Direction.EGRESS, 3.0, RELEASED)
    assert (verdict.action, is_frame(segment(verdict.payload or b"").payload)) == (Action.FORGET, True)


def test_after_a_refusal_the_next_syn_goes_at_once() -> None:
    """Conntrack forgets an attempt that was answered by nothing but a RST."""
    client, server = make_pair()
    refused = Connection(client, server)
    (syn,) = client.send(refused.syn())
    server.receive(syn)
    client.receive(refusal(refused))
    assert len(client.send(Connection(client, server, isn_i=9_000).syn(), now=2.0)) == 1


def test_the_memory_of_syns_that_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strays, "MAX_CLEARED", 2)
    client, server = make_pair()
    for sport in range(40_000, 40_003):
        client.send(Connection(client, server, sport=sport).syn(), mark=RELEASED)
    assert len(client.datapath._tcp._strays._cleared) == 2


# Released flows that are remembered no more.


@pytest.fixture
def forgetful() -> Connection:
    """A released connection whose initiator remembers only a later one; its proof was lost on the way."""
    connection = Connection(*make_pair(max_settled_flows=1))
    connect(connection)
    connection.client.send(connection.ack())
    release(Connection(connection.client, connection.server, sport=40_001))
    return connection


def test_a_proof_that_cannot_be_made_again_ends_both_sides(forgetful: Connection) -> None:
    client, server = forgetful.client, forgetful.server
    client.reasons()
    (framed,) = server.send(forgetful.syn_ack(), now=2.0)
    verdict = client.verdict(framed, Direction.INGRESS, 2.0, RELEASED)
    outward, inward = (segment(effect.packet) for effect in verdict.effects)  # type: ignore[union-attr]
    assert verdict.action is Action.DROP
    assert (outward.dst, outward.flags, outward.seq) == (server.address, RST | ACK, 1_001)
    assert (inward.dst, inward.flags, inward.seq) == (client.address, RST | ACK, 5_001)
    assert client.reasons() == ["unknown-flow"]
    assert server.receive(outward.packet, now=2.0) == [outward.packet]
    assert server.datapath.half_open_flows == 0


def test_a_kernel_that_lost_the_ack_is_heard_by_the_other_kernel() -> None:
    """The proof arrived, and so the enforcers have no part in it: remembered or not, the SYN-ACK goes bare."""
    client, server = make_pair()
    connection = Connection(client, server)
    release(connection)
    assert server.send(connection.syn_ack(), now=2.0) == [connection.syn_ack()]
    assert client.receive(connection.syn_ack(), now=2.0, mark=RELEASED) == [connection.syn_ack()]
    (session,) = client.sessions(Protocol.TCP, Role.INITIATOR)
    client.context.end(client.context.tables[Protocol.TCP, Role.INITIATOR], session, Event.FORGOTTEN)
    assert client.receive(connection.syn_ack(), now=2.0, mark=RELEASED) == [connection.syn_ack()]


def test_the_syn_of_a_released_flow_is_a_replay_also_when_the_flow_is_forgotten() -> None:
    client, server = make_pair(max_settled_flows=1)
    first = Connection(client, server)
    (syn,) = client.send(first.syn())
    server.receive(syn)
    client.receive(server.send(first.syn_ack())[0])
    server.receive(client.send(first.ack())[0])
    release(Connection(client, server, sport=40_001))
    server.reasons()
    assert server.receive(syn, now=2.0, mark=RELEASED) == []
    assert server.reasons() == ["replayed-nonce"]


# Beside a sidecar, the pod's answers show the sidecar's port.


def by_sidecar(connection: Connection, packet: bytes) -> bytes:
    ports = SIDECAR_PORT, connection.sport
    read = segment(packet)
    bare = build(read.src, read.dst, ports, (read.seq, read.ack), read.flags, read.window, read.options)
    return with_payload(segment(bare), read.payload)


def connect_to_sidecar(connection: Connection) -> None:
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    (framed,) = connection.server.send(by_sidecar(connection, connection.syn_ack()))
    assert segment(framed).sport == SIDECAR_PORT  # The kernel puts the dialed port in afterwards.
    dialed = with_payload(segment(connection.syn_ack()), segment(framed).payload)
    assert connection.client.receive(dialed) == [connection.syn_ack()]
    (ack,) = connection.client.send(connection.ack())
    assert connection.server.receive(ack) == [connection.ack()]


def test_the_answer_of_a_sidecar_is_the_flows() -> None:
    connect_to_sidecar(Connection(*make_pair()))


@pytest.mark.parametrize("is_later_first", [False, True])
def test_a_sidecar_answers_two_ports_that_were_dialled_at_the_same_moment(is_later_first: bool) -> None:
    """From one port of the client; only the number that is acknowledged tells which SYN was answered."""
    client, server = make_pair()
    both = [Connection(client, server, dport=80, isn_i=1_000), Connection(client, server, dport=81, isn_i=2_000)]
    for connection in both:
        (syn,) = client.send(connection.syn())
        assert server.receive(syn) == [connection.syn()]
    for connection in reversed(both) if is_later_first else both:
        (framed,) = server.send(by_sidecar(connection, connection.syn_ack()))
        dialed = with_payload(segment(connection.syn_ack()), segment(framed).payload)
        assert client.receive(dialed) == [connection.syn_ack()]
        (ack,) = client.send(connection.ack())
        assert server.receive(ack) == [connection.ack()]
    assert server.datapath.half_open_flows == 0


def test_what_a_sidecar_refuses_is_refused() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    answer = refusal(connection, SIDECAR_PORT)
    assert connection.server.send(answer) == [answer]
    assert connection.server.datapath.half_open_flows == 0


def test_what_a_sidecar_refuses_after_its_answer_is_refused() -> None:
    connection = Connection(*make_pair())
    connect_to_sidecar(connection)
    ports, numbers = (SIDECAR_PORT, connection.sport), (connection.isn_r + 1, 0)
    late = build(connection.server.address, connection.client.address, ports, numbers, RST, 0)
    assert connection.server.send(late) == [late]
    assert connection.server.datapath.half_open_flows == 0


def test_another_port_of_the_pod_answers_for_nobody() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    connection.server.reasons()
    other = Connection(connection.client, connection.server, isn_i=77)
    assert connection.server.send(by_sidecar(other, other.syn_ack())) == []
    assert connection.server.reasons() == ["unknown-flow"]


@pytest.mark.parametrize("connects", [connect, connect_to_sidecar])
@pytest.mark.parametrize("flags", [ACK, RST | ACK])
def test_a_flow_that_was_answered_covers_no_other_port(connects: Callable[[Connection], None], flags: int) -> None:
    """A pod that may open nothing has one connection; it sends to that client from another port."""
    connection = Connection(*make_pair())
    connects(connection)
    connection.server.reasons()
    numbers = connection.isn_r + 1, connection.isn_i + 1
    ports = SIDECAR_PORT + 1, connection.sport
    stray = build(connection.server.address, connection.client.address, ports, numbers, flags, 0)
    assert connection.server.send(stray) == []
    assert connection.server.reasons() == ["unknown-flow"]


@pytest.mark.parametrize("flags", [ACK, RST])
def test_what_comes_in_for_a_sidecars_own_port_is_no_part_of_the_flow(flags: int) -> None:
    """The peer was allowed to reach the dialed port, and no other."""
    connection = Connection(*make_pair())
    connect_to_sidecar(connection)
    connection.server.reasons()
    ports, numbers = (connection.sport, SIDECAR_PORT), (connection.isn_i + 1, connection.isn_r + 1)
    stray = build(connection.client.address, connection.server.address, ports, numbers, flags, 0)
    assert connection.server.receive(stray) == []
    assert connection.server.reasons() == ["unknown-flow"]
    assert len(connection.server.sessions(Protocol.TCP, Role.RESPONDER)) == 1
