# SPDX-License-Identifier: Apache-2.0
"""A daemon that restarts in the midst of a handshake: both kernels give it up, and nobody waits for ever."""

from __future__ import annotations

from enforcer_daemon.packet.tcp import RST, Segment
from tests.unit.datapath.pair import Connection, Endpoint, make_pair, segment


def _resets(endpoint: Endpoint) -> tuple[Segment, Segment]:
    """Take the enforcer's own packets: one for the peer, one for the pod."""
    outward, inward = map(segment, endpoint.injected)
    assert (outward.flags, inward.flags) == (RST, RST)  # no ACK: an initiator that only sent its SYN is not disturbed
    assert (outward.src, inward.dst) == (endpoint.address, endpoint.address)
    assert (outward.dst, outward.dport, outward.sport) == (inward.src, inward.sport, inward.dport)
    return outward, inward


def test_a_repeated_syn_ack_that_the_responders_new_daemon_does_not_know_waits_for_the_syn() -> None:
    connection = Connection(*make_pair())
    server = connection.server
    assert server.send(connection.syn_ack()) == []
    assert server.injected == []
    assert server.reasons() == ["unknown-flow"]
    (framed_syn,) = connection.client.send(connection.syn())
    assert server.receive(framed_syn) == [connection.syn()]
    assert len(server.send(connection.syn_ack())) == 1


def test_a_repeated_syn_ack_that_the_initiators_new_daemon_does_not_know() -> None:
    first = Connection(*make_pair())
    (framed_syn,) = first.client.send(first.syn())
    assert first.server.receive(framed_syn) == [first.syn()]
    (framed_syn_ack,) = first.server.send(first.syn_ack())
    client = Connection(*make_pair()).client  # another daemon: it has no flow
    assert client.receive(framed_syn_ack) == []
    outward, inward = _resets(client)
    assert (outward.seq, inward.seq) == (first.isn_i + 1, first.isn_r + 1)
    assert client.reasons() == ["unknown-flow"]
    assert client.flush_injected() == [outward.packet]  # known again by the queue; the other goes by loopback


def test_a_responder_takes_the_reset_of_an_initiators_new_daemon_for_its_flow() -> None:
    first = Connection(*make_pair())
    (framed_syn,) = first.client.send(first.syn())
    first.server.receive(framed_syn)
    (framed_syn_ack,) = first.server.send(first.syn_ack())
    client = Connection(*make_pair()).client
    client.receive(framed_syn_ack)
    outward, _ = client.injected
    assert first.server.receive(outward) == [outward]
    assert first.server.datapath.half_open_flows == 0


def test_a_syn_ack_repeated_without_its_syn_ends_both_sides() -> None:
    connection = Connection(*make_pair())
    server = connection.server
    assert server.send(connection.syn_ack()) == []
    assert server.injected == []
    assert server.send(connection.syn_ack()) == []
    outward, inward = map(segment, server.injected)
    assert (outward.seq, outward.ack) == (connection.isn_r + 1, connection.isn_i + 1)
    assert (inward.seq, inward.ack) == (connection.isn_i + 1, connection.isn_r + 1)
    assert server.flush_injected() == [outward.packet]
