# SPDX-License-Identifier: Apache-2.0
"""What a denied connection sees where the operator wants it told: a reset, at each step."""

from __future__ import annotations

from enforcer_daemon.model import Direction
from enforcer_daemon.settings import DenyWith
from tests.unit.datapath.guarded import clients_frame, framed_syn, guarded
from tests.unit.datapath.pair import (
    Connection,
    FakePolicy,
    Rules,
    make_pair,
    segment,
)


def test_denials_are_told_by_reset_where_so_configured() -> None:
    client, server, attacker = guarded()
    for endpoint in (client, server, attacker):
        endpoint.context.node.deny_with = DenyWith.RESET
    frame = clients_frame(attacker, server)
    server.receive(framed_syn(attacker, server, frame))
    (refused,) = server.flush_injected()
    found = segment(refused)
    assert (found.dst, found.dport, found.seq, found.ack, found.flags) == (attacker.address, 40_000, 0, 1_001, 0x14)
    assert attacker.receive(refused) == [refused]


def test_an_egress_denial_at_the_syn_resets_the_pod_where_so_configured() -> None:
    nobody = FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS))
    client, server = make_pair(client_policy=nobody)
    connection = Connection(client, server)
    assert client.send(connection.syn()) == []
    assert client.reasons() == ["egress-denied"]
    assert client.injected == []
    client.context.node.deny_with = DenyWith.RESET
    assert client.send(connection.syn()) == []
    found = segment(client.injected[0])
    assert (found.src, found.dst, found.seq, found.ack) == (server.address, client.address, 0, 1_001)


def test_an_egress_denial_at_the_syn_ack_resets_the_pod_where_so_configured() -> None:
    others = FakePolicy(egress=Rules(frozenset({"other"}), direction=Direction.EGRESS))
    connection = Connection(*make_pair(client_policy=others))
    connection.client.context.node.deny_with = DenyWith.RESET
    connection.server.receive(connection.client.send(connection.syn())[0])
    (refused,) = connection.client.receive(connection.server.send(connection.syn_ack())[0])
    found = segment(refused)
    assert (found.src, found.seq, found.ack, found.flags) == (connection.server.address, 0, 1_001, 0x14)
    (reset,) = connection.client.flush_injected()
    assert segment(reset).seq == 1_001
    assert connection.server.receive(reset) == [reset]
