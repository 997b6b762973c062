# SPDX-License-Identifier: Apache-2.0
"""What one source may have of a pod's tables and of the node's signature checks, and that it alone pays."""

from __future__ import annotations

from typing import Any

import pytest

from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import (
    SynFrame,
    encode_block,
    encode_syn,
)
from enforcer_daemon.model import Direction
from enforcer_daemon.reasons import Reason
from tests.unit.datapath.guarded import AUTHORITY, framed_syn
from tests.unit.datapath.pair import (
    Connection,
    Node,
    make_pair,
)


def test_a_flood_of_new_tokens_is_charged_to_its_source() -> None:
    client, server = make_pair(max_verifications_per_s=2.0)
    for n in range(5):  # The first makes its credential known, which ranks the others higher.
        block = encode_block(server.node.credential.der, b"%d" % n)
        server.receive(framed_syn(client, server, encode_syn(SynFrame(bytes(16), block))))
    assert server.reasons() == ["token-malformed"] * 3 + ["verify-rate"] * 2
    assert server.context.node.limit_hits[Limit.VERIFICATIONS_PER_SOURCE] == 2


@pytest.mark.parametrize(
    ("limits", "bound"),
    [
        ({"max_half_open_flows": 2}, Limit.HALF_OPEN_FLOWS),
        ({"max_half_open_flows_per_source": 2}, Limit.HALF_OPEN_FLOWS_PER_SOURCE),
    ],
)
def test_the_tables_of_handshakes_are_bounded_and_the_oldest_one_is_given_up(
    limits: dict[str, Any], bound: Limit
) -> None:
    client, server = make_pair(**limits)
    connections = [Connection(client, server, sport=sport) for sport in (1, 2, 3)]
    for connection in connections:
        for syn in client.send(connection.syn()):
            server.receive(syn)
        server.send(connection.syn_ack())
    reports = client.take_reports() + server.take_reports()
    given_up = [(report.direction, report.port) for report in reports if report.reason is Reason.FLOW_TABLE_FULL]
    assert given_up == [(Direction.EGRESS, 80), (Direction.INGRESS, 80)]
    assert [endpoint.datapath.half_open_flows for endpoint in (client, server)] == [2, 2]
    assert [endpoint.context.node.limit_hits[bound] for endpoint in (client, server)] == [1, 1]


def test_who_floods_with_handshakes_gives_up_his_own() -> None:
    honest_connections = 3
    node = Node("node-2", AUTHORITY, 2, max_half_open_flows=16)
    server = node.endpoint("server", "10.2.0.2", "server")
    honest = Node("node-1", AUTHORITY, 1).endpoint("client", "10.1.0.2", "client")
    flooder = Node("node-3", AUTHORITY, 3).endpoint("flooder", "10.3.0.2", "client")
    waiting = [Connection(honest, server, sport=sport) for sport in range(honest_connections)]
    flood = (Connection(flooder, server, sport=sport) for sport in range(1_000, 1_100))
    for connection in (*waiting, *flood):
        (syn,) = connection.client.send(connection.syn())
        assert len(server.receive(syn)) == 1  # Nobody is refused.
    assert server.datapath.half_open_flows == 16
    assert server.context.node.limit_hits[Limit.HALF_OPEN_FLOWS] == honest_connections + 100 - 16
    for connection in waiting:
        (answer,) = server.send(connection.syn_ack())
        assert len(honest.receive(answer)) == 1
        (proof,) = honest.send(connection.ack())
        assert len(server.receive(proof)) == 1
