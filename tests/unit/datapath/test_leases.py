# SPDX-License-Identifier: Apache-2.0
"""Leases as the datapath has them: releases open them, messages travel as datagrams, a newcomer's offer waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer_daemon.handshake import leases
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID, find_message
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.handshake.frames import TYPE_ANSWER, TYPE_LEASE, frame_type
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.leasepairs import Lapse
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.model import Direction, PodRef, Protocol
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option
from enforcer_daemon.verdict import Action, Inject, Settle
from tests.unit.datapath.pair import (
    ACCEPTED,
    DROPPED,
    TAKEN,
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


def renew(endpoint: Endpoint, now: float) -> list[bytes]:
    """Return what leaves of the lease messages that are due."""
    left = []
    for inject in endpoint.renew(now):
        assert inject.is_untracked
        assert endpoint.verdict(inject.packet, Direction.EGRESS, now) == ACCEPTED
        left.append(inject.packet)
    return left


def exchange(client: Endpoint, server: Endpoint, now: float) -> None:
    """Carry lease messages until nobody has more to say."""
    waiting = [(server, packet) for packet in renew(client, now)] + [(client, packet) for packet in renew(server, now)]
    while waiting:
        to, packet = waiting.pop(0)
        verdict = to.verdict(packet, Direction.INGRESS, now)
        assert verdict.action is Action.TAKE
        for effect in verdict.effects:
            assert isinstance(effect, Inject)
            assert to.verdict(effect.packet, Direction.EGRESS, now) == ACCEPTED
            waiting.append((client if to is server else server, effect.packet))


def begin(client: Endpoint, server: Endpoint) -> None:
    for endpoint in (client, server):
        endpoint.renew(1.0)


def test_a_released_connection_and_a_udp_flow_have_one_lease() -> None:
    client, server = make_pair(None, ADMITTING)
    begin(client, server)
    release(Connection(client, server))
    release_datagrams(client, server, PORTS)
    for endpoint in (client, server):
        assert len(endpoint.context.leases) == 1
        (pair,) = endpoint.context.leases._pairs
        assert pair.protocols == {Protocol.TCP, Protocol.UDP}
    exchange(client, server, 1.5)
    assert client.context.leases.unanswered() == server.context.leases.unanswered() == 0
    assert len(client.context.leases.worked(1.5)) == 1
    assert client.reasons()[-1] != "malformed-frame"


def test_a_lease_message_goes_from_address_to_address_on_ports_of_ours() -> None:
    client, server = make_pair()
    begin(client, server)
    release(Connection(client, server))
    (packet,) = renew(client, 1.5)
    datagram = decode_udp(packet)
    found = find_message(datagram)
    assert found is not None
    assert (datagram.src, datagram.dst) == (client.address, server.address)
    assert (datagram.sport, datagram.dport, frame_type(found[0])) == (LEASE_PORT, LEASE_PORT, TYPE_LEASE)
    surplus = encode_option(UDP_HEADER, STANDALONE_EXID, found[0])
    elsewhere = build_udp(client.address, server.address, PORTS, b"", surplus)
    assert server.verdict(elsewhere, Direction.INGRESS) == DROPPED
    assert server.reasons()[-1] == "malformed-frame"


def test_a_pod_that_reaches_itself_has_no_lease() -> None:
    client, _ = make_pair()
    client.node.true_sources[client.address] = client.address
    begin(client, client)
    peer = client.node.context.verify(client.context.local.block, client.address, 1.0)
    (packet,) = client.send(Connection(client, client).syn())
    assert packet
    (opened,) = client.sessions(Protocol.TCP, Role.INITIATOR)
    opened.peer = peer
    client.context.prove(opened, 1.0)
    assert len(client.context.leases) == 0


@pytest.fixture
def successor() -> tuple[Endpoint, Endpoint, Endpoint]:
    """A server with a lease whose client is gone, and another pod that has the client's address now."""
    client, server = make_pair(None, ADMITTING)
    begin(client, server)
    release(Connection(client, server))
    exchange(client, server, 1.5)
    identity = replace(client.identity, pod=PodRef("default", "newcomer"))
    newcomer = Endpoint(client.node, identity, FakePolicy(), client.node.token(identity))
    return client, server, newcomer


def test_a_newcomers_offer_is_answered_when_the_old_pods_flows_are_ended(
    successor: tuple[Endpoint, Endpoint, Endpoint],
) -> None:
    _, server, newcomer = successor
    assert newcomer.send(build_udp(newcomer.address, server.address, PORTS, b"x" * 1_400)) == []
    (offer,) = newcomer.flush_injected()
    for now in (5.0, 5.1):  # Sent again, it is not answered either.
        assert server.verdict(offer, Direction.INGRESS, now) == TAKEN
    probes = [packet for n in range(12) for packet in renew(server, 5.1 + n / 10)]
    assert 3 <= len(probes) <= 4
    assert server.expire(6.2) == ()
    (lapse,) = server.context.leases.take_events()
    assert isinstance(lapse, Lapse)
    assert lapse.peer.pod.name == "client"
    server.context.leases.note_ended([lapse])
    (answer,) = [effect for effect in server.expire(6.3) if not isinstance(effect, Settle)]
    found = find_message(decode_udp(answer.packet))
    assert found is not None
    assert frame_type(found[0]) == TYPE_ANSWER


def test_its_datagram_waits_too_and_no_answer_is_repeated_meanwhile(
    successor: tuple[Endpoint, Endpoint, Endpoint],
) -> None:
    _, server, newcomer = successor
    (riding,) = newcomer.send(build_udp(newcomer.address, server.address, PORTS, b"new"))
    verdict = server.verdict(riding, Direction.INGRESS, 5.0)
    assert (verdict.action, verdict.effects) == (Action.HOLD, ())
    assert server.expire(5.4) == ()
    assert all(isinstance(effect, Settle) for effect in server.expire(9.0))
    assert server.datapath.half_open_flows == 0


def test_a_live_pod_answers_and_the_newcomer_is_answered_too(successor: tuple[Endpoint, Endpoint, Endpoint]) -> None:
    client, server, newcomer = successor
    assert newcomer.send(build_udp(newcomer.address, server.address, PORTS, b"x" * 1_400)) == []
    (offer,) = newcomer.flush_injected()
    assert server.verdict(offer, Direction.INGRESS, 5.0) == TAKEN
    exchange(client, server, 5.1)
    assert len(server.expire(5.2)) == 1
    assert server.context.leases.take_events() == []


def test_a_newcomers_syn_for_the_ports_of_the_old_connection_waits(
    successor: tuple[Endpoint, Endpoint, Endpoint],
) -> None:
    _, server, newcomer = successor
    (syn,) = newcomer.send(Connection(newcomer, server).syn())
    assert server.verdict(syn, Direction.INGRESS, 5.0, mark=RELEASED | 2 << 12) == DROPPED
    (other,) = newcomer.send(Connection(newcomer, server, sport=40_001).syn())
    assert server.verdict(other, Direction.INGRESS, 5.0).action is Action.ACCEPT


def test_the_memory_of_recent_releases_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_PAIRS", 1)
    client, server = make_pair()
    peer = client.node.context.verify(server.context.local.block, server.address, 1.0)
    begin(client, server)
    for n in range(3):
        ends = bytes((10, 2, 0, n)), client.address
        client.context.leases.note(peer, ends, Protocol.TCP, client.context.local, 1.0)
    assert len(client.context.leases._recent) == 1
