# SPDX-License-Identifier: Apache-2.0
"""How many functions the datapath calls for one connection: the same in every run, unlike a time.

Budgets are a little above what is needed. Whoever exceeds one has put work on each packet that a connection, a peer or
a policy needs once; whoever finds them too wide may lower them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import build_udp
from tests.unit.datapath.pair import Connection, Endpoint, FakePolicy, Rules, make_pair

CONNECTION_BUDGET = {"client": 106, "server": 125}
"""Python functions for SYN, SYN-ACK and the ACK that carries the proof, caches warm."""
UDP_BUDGET = {"client": 180, "server": 185}
"""The same for offer, answer, proof, and the datagram that waited."""


class Calls:
    """Python functions called by each endpoint's datapath."""

    def __init__(self) -> None:
        self.of = {"client": 0, "server": 0}

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        def note(_frame: FrameType, kind: str, _argument: object) -> None:
            self.of[name] += kind == "call"

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def observe(self, endpoint: Endpoint) -> None:
        process = endpoint.datapath.process

        def observed(packet: bytes, direction: Direction, mark: int, now: float) -> object:
            with self.counted(endpoint.identity.pod.name):
                return process(packet, direction, mark, now)

        endpoint.datapath.process = observed  # type: ignore[method-assign, assignment]


def connect(client: Endpoint, server: Endpoint, n: int) -> None:
    connection = Connection(client, server, sport=10_000 + n, isn_i=1_000 * n)
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    assert server.receive(client.send(connection.ack())[0]) == [connection.ack()]


def ask(client: Endpoint, server: Endpoint, n: int) -> None:
    query = build_udp(client.address, server.address, (10_000 + n, 53), b"query")
    assert client.send(query) == []
    for _ in range(2):
        for packet in client.flush_injected():
            server.receive(packet)
        for packet in server.flush_injected():
            for proven in client.receive(packet):
                assert server.receive(proven) == [query]


@pytest.mark.parametrize(("flow", "budget"), [(connect, CONNECTION_BUDGET), (ask, UDP_BUDGET)], ids=["tcp", "udp"])
def test_a_flow_costs_so_many_calls_and_no_more(
    flow: Callable[[Endpoint, Endpoint, int], None], budget: dict[str, int]
) -> None:
    client, server = make_pair(
        FakePolicy(egress=Rules(frozenset({"server"}))), FakePolicy(ingress=Rules(frozenset({"client"})))
    )
    for endpoint in (client, server):
        endpoint.renew(1.0)
    for n in range(3):  # Tokens, decisions, and the pair's lease.
        flow(client, server, n)
    calls = Calls()
    for endpoint in (client, server):
        calls.observe(endpoint)
    flow(client, server, 3)
    assert calls.of["client"] <= budget["client"], calls.of
    assert calls.of["server"] <= budget["server"], calls.of
    assert all(2 * calls.of[name] > budget[name] for name in budget), calls.of  # Something was counted.
