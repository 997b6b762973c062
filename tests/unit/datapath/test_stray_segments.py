# SPDX-License-Identifier: Apache-2.0
"""Segments that belong to no handshake, or come at the wrong moment of one."""

from __future__ import annotations

import pytest

from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import ACK, FIN, SYN, build, with_options_and_payload, with_payload
from enforcer_daemon.verdict import Action, Inject
from tests.unit.datapath.guarded import framed_syn, guarded, refusal, refusal_last
from tests.unit.datapath.pair import (
    TIMESTAMPS,
    Connection,
    FakePolicy,
    Rules,
    make_pair,
    segment,
    v4,
)


@pytest.mark.parametrize("direction", list(Direction))
def test_unknown_data_is_ended_at_both_sides(direction: Direction) -> None:
    client, server = make_pair()
    data = Connection(client, server).ack(b"data")
    endpoint = client if direction is Direction.EGRESS else server
    verdict = endpoint.verdict(data, direction)
    onward = segment(verdict.payload or b"")
    assert (onward.payload, onward.seq, onward.flags, onward.sport) == (b"", 1_001, 0x14, 40_000)
    (effect,) = verdict.effects
    assert isinstance(effect, Inject)
    back = segment(effect.packet)
    assert (back.src, back.dst, back.seq, back.flags) == (server.address, client.address, 5_001, 0x04)
    assert endpoint.reasons() == ["unknown-flow"]


def test_our_own_reset_passes_the_queue_once_and_carries_nothing() -> None:
    client, server = make_pair()
    server.receive(Connection(client, server).ack(b"data"))
    (reset,) = server.injected
    loaded = with_payload(segment(reset), b"secret")
    assert server.send(loaded) == []
    assert server.flush_injected() == [reset]
    assert server.send(reset) == []


def test_unknown_data_is_no_way_out_for_a_pod_that_may_reach_nobody() -> None:
    nobody = FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS))
    client, server = make_pair(client_policy=nobody)
    for destination in (server.address, v4("198.51.100.9")):
        bare = build(client.address, destination, (40_000, 80), (1_001, 5_001), ACK, 502)
        verdict = client.verdict(with_payload(segment(bare), b"secret"), Direction.EGRESS)
        assert verdict.action is Action.DROP
        assert len(verdict.effects) == 1  # The pod's own kernel is told.


@pytest.mark.parametrize("flags", [FIN | ACK, ACK, 0x04])
@pytest.mark.parametrize("direction", list(Direction))
def test_stray_segments_without_data_are_dropped(flags: int, direction: Direction) -> None:
    client, server = make_pair()
    packet = build(client.address, server.address, (40_000, 80), (1_001, 5_001), flags, 502)
    endpoint = client if direction is Direction.EGRESS else server
    assert endpoint.verdict(packet, direction).action is Action.DROP
    assert endpoint.reasons() == ["unknown-flow"]


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | 0x04, SYN | ACK | FIN])
def test_impossible_flags_are_malformed(flags: int) -> None:
    client, server = make_pair()
    assert refusal(server, build(client.address, server.address, (1, 2), (1, 2), flags, 0)) == "malformed-packet"


def test_a_syn_ack_that_nobody_asked_for() -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    assert refusal(client, connection.syn_ack()) == "unknown-flow"
    client.send(connection.syn())
    assert refusal(client, Connection(client, server, isn_i=77).syn_ack()) == "unknown-flow"
    assert server.send(connection.syn_ack()) == []
    assert server.reasons() == ["unknown-flow"]


def test_a_syn_ack_of_the_pod_for_another_syn() -> None:
    client, server, _ = guarded()
    server.receive(client.send(Connection(client, server).syn())[0])
    server.reasons()
    assert server.send(Connection(client, server, isn_i=77).syn_ack()) == []
    assert server.reasons() == ["unknown-flow"]


def test_a_plain_syn_ack_is_judged_by_its_address() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    verdict = connection.client.verdict(connection.syn_ack(), Direction.INGRESS)
    assert verdict.action is Action.RELEASE
    only_servers = FakePolicy(egress=Rules(frozenset({"server"}), direction=Direction.EGRESS))
    denied = Connection(*make_pair(client_policy=only_servers))
    denied.client.send(denied.syn())
    assert denied.client.receive(denied.syn_ack()) == []
    assert denied.client.reasons() == ["unidentified-peer"]


def test_a_plain_syn_ack_after_one_with_identity_is_refused() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    assert refusal_last(connection.client, connection.syn_ack()) == "unknown-flow"


def test_data_before_any_answer_stays_in() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    assert connection.client.send(connection.ack(b"data")) == []
    assert connection.client.reasons() == ["unknown-flow"]


def test_data_of_the_server_before_the_proof_stays_in_and_is_not_let_in() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    back = build(server.address, client.address, (80, 40_000), (5_001, 1_001), ACK, 502, TIMESTAMPS)
    assert server.send(back) == [back]
    data = with_options_and_payload(segment(back), TIMESTAMPS, b"banner")
    assert server.send(data) == []
    assert client.receive(data) == []
    assert "unknown-flow" in client.reasons()


def test_a_strangers_plain_syn_does_not_end_a_handshake() -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    assert refusal(server, framed_syn(client, server, b"")) == "unidentified-peer"
    assert server.receive(client.send(connection.ack())[0]) == [connection.ack()]


def test_an_allowed_plain_syn_takes_the_place_of_a_handshake() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    verdict = connection.server.verdict(connection.syn(), Direction.INGRESS)
    assert (verdict.action, verdict.payload) == (Action.RELEASE, None)
    assert connection.server.datapath.half_open_flows == 0
