# SPDX-License-Identifier: Apache-2.0
"""Datagrams that a pod sends past its own enforcer, into a flow that its offer made an established one on its node."""

from __future__ import annotations

import pytest

from enforcer_daemon.datapath.udp import IDENTIFIED_S
from enforcer_daemon.packet.udp import build_udp
from tests.unit.datapath.pair import Endpoint, make_pair

LATER = 10.0
"""When the offer's handshake is forgotten."""


def datagram(client: Endpoint, server: Endpoint, sport: int = 40_000) -> bytes:
    return build_udp(client.address, server.address, (sport, 53), b"data")


def offer(client: Endpoint, server: Endpoint) -> None:
    """Have the server's enforcer answer an offer that is never proven."""
    for packet in (*client.send(datagram(client, server)), *client.flush_injected()):
        server.receive(packet)
    assert server.flush_injected()


@pytest.fixture
def pair() -> tuple[Endpoint, Endpoint]:
    return make_pair()


@pytest.mark.parametrize("sport", [40_000, 40_001])
def test_nothing_plain_comes_from_an_address_that_showed_an_identity(
    pair: tuple[Endpoint, Endpoint], sport: int
) -> None:
    """Although anybody may reach the server."""
    client, server = pair
    offer(client, server)
    server.expire(LATER)
    server.take_reports()
    assert server.receive(datagram(client, server, sport), LATER) == []
    assert server.reasons() == ["unknown-flow"]


def test_what_is_refused_keeps_the_address_refused(pair: tuple[Endpoint, Endpoint]) -> None:
    client, server = pair
    offer(client, server)
    for n in range(1, 4):
        assert server.receive(datagram(client, server), n * (IDENTIFIED_S - 1)) == []
    after = 4 * IDENTIFIED_S
    assert server.receive(datagram(client, server), after) == [datagram(client, server)]


def test_an_address_that_showed_none_is_decided_by_itself(pair: tuple[Endpoint, Endpoint]) -> None:
    client, server = pair
    assert server.receive(datagram(client, server), LATER) == [datagram(client, server)]
