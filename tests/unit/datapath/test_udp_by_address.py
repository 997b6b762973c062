# SPDX-License-Identifier: Apache-2.0
"""UDP flows whose peer shows no identity, and flows in the queue after their release."""

from __future__ import annotations

import pytest

from enforcer_daemon.datapath import engine, strays
from enforcer_daemon.handshake.carriers import UDP
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.marks import RELEASED, REPLY
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.udp import build_udp
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.verdict import Action, Settle
from tests.unit.datapath.pair import (
    ACCEPTED,
    DROPPED,
    Connection,
    Endpoint,
    FakePolicy,
    Rules,
    make_pair,
    release,
    release_datagrams,
)

PORTS = 40_000, 53
ADMITTING = FakePolicy(ingress=Rules(frozenset({"client"})))
LARGE = b"large " * 190
NOBODY = FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS))


def query(client: Endpoint, server: Endpoint, payload: bytes = b"query") -> bytes:
    return build_udp(client.address, server.address, PORTS, payload)


def reply(client: Endpoint, server: Endpoint) -> bytes:
    return build_udp(server.address, client.address, PORTS[::-1], b"reply")


def test_a_peer_that_answers_without_an_identity_is_taken_for_its_address_after_a_while() -> None:
    client, server = make_pair()
    assert len(client.send(query(client, server))) == 1
    assert client.receive(reply(client, server), 1.1, REPLY) == [reply(client, server)]
    assert client.expire(1.25) == ()
    for packet, direction in ((query(client, server), Direction.EGRESS), (reply(client, server), Direction.INGRESS)):
        verdict = client.verdict(packet, direction, 1.5, REPLY if direction is Direction.INGRESS else 0)
        assert (verdict.action, verdict.mark) == (Action.RELEASE, RELEASED | 1 << 12)


def test_it_is_not_if_policy_denies_the_address_meanwhile() -> None:
    client, server = make_pair()
    client.send(query(client, server))
    client.receive(reply(client, server), 1.1, REPLY)
    client.context.policy.replace_rules(NOBODY)
    client.expire(1.25)
    assert client.reasons() == ["unidentified-peer"]
    assert client.datapath.half_open_flows == 0


def test_what_has_no_room_for_an_offer_waits_for_a_while_and_no_longer() -> None:
    client, server = make_pair()
    large = query(client, server, LARGE)
    assert client.send(large) == []
    (settled,) = client.expire(1.25)
    assert isinstance(settled, Settle)
    assert settled.verdict.action is Action.ACCEPT
    assert client.verdict(large, Direction.EGRESS, 1.3) == ACCEPTED


def test_a_reply_of_a_released_flow_takes_it_into_the_kernel() -> None:
    client, server = make_pair(None, ADMITTING)
    release_datagrams(client, server, PORTS)
    verdict = server.verdict(reply(client, server), Direction.EGRESS, 1.5, REPLY)
    assert (verdict.action, bool(verdict.mark & RELEASED)) == (Action.RELEASE, True)


def test_a_flow_whose_release_is_taken_back_begins_with_a_handshake() -> None:
    client, server = make_pair(None, ADMITTING)
    release_datagrams(client, server, PORTS)
    remote, own = (server.address, PORTS[1]), (client.address, PORTS[0])
    assert client.verdict(query(client, server), Direction.EGRESS, 1.5).action is Action.RELEASE
    for _ in range(2):
        assert client.note(client.datapath.end_opened(remote, own)) == ()
        assert client.sessions(Protocol.UDP, Role.INITIATOR) == []
    assert client.verdict(query(client, server), Direction.EGRESS, 1.6).action is Action.ACCEPT  # With the offer.


def test_a_released_flow_is_remembered_for_a_moment() -> None:
    client, server = make_pair(None, ADMITTING)
    release_datagrams(client, server, PORTS)
    later = 1.0 + UDP.remembered_s
    assert server.verdict(reply(client, server), Direction.EGRESS, later, REPLY) == DROPPED
    assert server.sessions(Protocol.UDP, Role.RESPONDER) == []


def test_few_datagrams_of_an_unknown_flow_wait() -> None:
    client, server = make_pair(None, ADMITTING)
    release_datagrams(client, server, PORTS)
    server.reasons()
    actions = [server.verdict(query(client, server, bytes(n)), Direction.INGRESS, 100.0).action for n in range(10)]
    assert actions == [Action.HOLD] * 8 + [Action.DROP] * 2
    assert server.reasons() == ["hold-queue-full"] * 2


def test_a_change_of_networks_counts_for_the_next_flow() -> None:
    client, server = make_pair()
    assert client.send(Connection(client, server).syn()) != [Connection(client, server).syn()]
    client.context.node.networks.replace(NetworkSettings())
    other = Connection(client, server, sport=40_001)
    assert client.send(other.syn()) == [other.syn()]  # Outside the enforced networks now: no frame.


def test_a_rival_that_policy_denied_is_not_kept_for_ever() -> None:
    client, server = make_pair()
    release(Connection(client, server))
    again = Connection(client, server, isn_i=9_000)
    (syn,) = client.send(again.syn())
    assert server.verdict(syn, Direction.INGRESS, mark=RELEASED | 2 << 12).action is Action.ACCEPT
    server.end_denied(lambda allowed: not isinstance(allowed, int))
    rivals = server.datapath._tcp.responder.rivals
    assert len(rivals) == 1
    server.expire(1.0 + engine.RIVAL_S)
    assert len(rivals) == 0


def test_the_memory_of_unknown_answers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strays, "_MAX_UNKNOWN", 2)
    client, server = make_pair()
    for sport in range(3):
        assert server.send(Connection(client, server, sport=sport).syn_ack()) == []
    assert len(server.datapath._tcp._strays._unknown_answers) == 2
