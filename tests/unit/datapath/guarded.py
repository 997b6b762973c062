# SPDX-License-Identifier: Apache-2.0
"""A client, a server that admits clients alone, and an attacker; how to read why the server refused."""

from __future__ import annotations

from datetime import UTC, datetime

from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.packet.tcp import SYN, build, with_payload
from tests.unit.datapath.pair import (
    WALL,
    Connection,
    Endpoint,
    FakePolicy,
    Node,
    Rules,
    segment,
)

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
CLIENTS_ONLY = FakePolicy(ingress=Rules(frozenset({"client"})))


def guarded() -> tuple[Endpoint, Endpoint, Endpoint]:
    """Make a client, a server that admits clients alone, and an attacker on a node of its own."""
    client = Node("node-1", AUTHORITY, 1).endpoint("client", "10.1.0.2", "client")
    server = Node("node-2", AUTHORITY, 2).endpoint("server", "10.2.0.2", "server", CLIENTS_ONLY)
    attacker = Node("node-3", AUTHORITY, 3).endpoint("attacker", "10.3.0.2", "attacker")
    return client, server, attacker


def framed_syn(source: Endpoint, server: Endpoint, frame: bytes, isn: int = 1_000) -> bytes:
    """Make a SYN from the source's address with any payload."""
    bare = build(source.address, server.address, (40_000, 80), (isn, 0), SYN, 64_240)
    return with_payload(segment(bare), frame)


def refusal(server: Endpoint, packet: bytes, now: float = 1.0) -> str:
    """Answer why the server's enforcer dropped a packet."""
    server.reasons()
    assert server.receive(packet, now) == []
    (reason,) = server.reasons()
    return reason


def clients_frame(client: Endpoint, server: Endpoint) -> bytes:
    (syn,) = client.send(Connection(client, server).syn())
    return segment(syn).payload


def refusal_last(endpoint: Endpoint, packet: bytes) -> str:
    assert endpoint.receive(packet) == []
    return endpoint.reasons()[-1]
