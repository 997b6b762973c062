# SPDX-License-Identifier: Apache-2.0
"""Attacks on an endpoint's datapath that once had an effect."""

from __future__ import annotations

import pytest

from enforcer_daemon.model import Direction
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import Connection, make_pair


def test_a_syn_repeated_after_its_connection_was_released_is_a_replay() -> None:
    """The kernel would open another connection for it, which the released flow would let go on without a proof."""
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    (syn,) = client.send(connection.syn())
    server.receive(syn)
    (syn_ack,) = server.send(connection.syn_ack())
    client.receive(syn_ack)
    (ack,) = client.send(connection.ack())
    assert server.verdict(ack, Direction.INGRESS).action is Action.RELEASE
    server.reasons()
    assert server.receive(syn) == []
    assert server.reasons() == ["replayed-nonce"]


def test_a_syn_repeated_before_the_proof_is_a_retransmission() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    assert connection.server.receive(syn) == [connection.syn()]
    assert connection.server.receive(syn) == [connection.syn()]
    connection.server.send(connection.syn_ack())
    assert connection.server.receive(syn) == [connection.syn()]


@pytest.mark.parametrize("protocol", [6, 17, 132])
def test_a_packet_of_which_only_the_ip_headers_are_at_hand_is_dropped_with_a_reason(protocol: int) -> None:
    """Behind extension headers that are longer than what the queue copies, there is no transport header to read."""
    _, server = make_pair()
    options = bytes((protocol, 255)) + bytes(2_046)
    packet = b"\x60\x00\x00\x00\x20\x00\x3c\x40" + bytes(32) + options
    assert server.receive(packet) == []
    assert server.reasons() == ["malformed-packet"]
