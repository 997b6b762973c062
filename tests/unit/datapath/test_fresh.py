# SPDX-License-Identifier: Apache-2.0
"""UDP flows that a fresh pod opens: no release by address, while a peer may have that of the address's former owner."""

from __future__ import annotations

import pytest

from enforcer_daemon.handshake.carriers import UDP
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID, find_message
from enforcer_daemon.handshake.frames import MARKER_ID, TYPE_OFFER, encode_again, frame_type
from enforcer_daemon.handshake.lapse import UDP_LAPSE_S
from enforcer_daemon.marks import GSO, RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option, is_marked
from enforcer_daemon.verdict import Action, Settle
from tests.unit.datapath.pair import DROPPED, Endpoint, FakePolicy, Result, Rules, make_pair, v4

PORTS = 40_000, 53
FRESH_UNTIL = 1.0 + UDP_LAPSE_S
LARGE = b"large " * 190


@pytest.fixture
def pod() -> Endpoint:
    client, _ = make_pair()
    client.context.fresh_until = FRESH_UNTIL
    return client


def query(pod: Endpoint, payload: bytes = b"query", to: str = "10.2.0.2") -> bytes:
    return build_udp(pod.address, v4(to), PORTS, payload)


def reply(pod: Endpoint, source: str = "10.2.0.2") -> bytes:
    return build_udp(v4(source), pod.address, PORTS[::-1], b"reply")


def offers(packet: bytes) -> bool:
    found = find_message(decode_udp(packet))
    return found is not None and frame_type(found[0]) == TYPE_OFFER


def take_as_address(pod: Endpoint, source: str = "10.2.0.2") -> None:
    """Let a peer without an enforcer answer, until nobody waits for an identity any more."""
    (left,) = pod.send(query(pod, to=source))
    assert offers(left)
    assert pod.receive(reply(pod, source), 1.1, REPLY) == [reply(pod, source)]
    pod.expire(1.3)


@pytest.mark.parametrize("source", ["10.2.0.2", "10.96.0.7"])
def test_each_datagram_carries_the_offer_until_the_address_is_no_longer_fresh(pod: Endpoint, source: str) -> None:
    take_as_address(pod, source)
    for now in (1.4, 30.0, FRESH_UNTIL - 1.0):
        verdict = pod.verdict(query(pod, to=source), Direction.EGRESS, now)
        assert verdict.action is Action.ACCEPT
        assert verdict.mark & RELEASED  # It has come about, though the kernel does not get it.
        assert offers(verdict.payload or b"")
        answer = pod.verdict(reply(pod, source), Direction.INGRESS, now, REPLY)
        assert (answer.action, bool(answer.mark & RELEASED)) == (Action.ACCEPT, True)
    assert pod.verdict(query(pod, to=source), Direction.EGRESS, FRESH_UNTIL).action is Action.RELEASE


def test_one_that_is_silent_for_long_is_forgotten(pod: Endpoint) -> None:
    pod.context.fresh_until = 10 * UDP_LAPSE_S
    take_as_address(pod)
    later = 1.3 + UDP_LAPSE_S
    assert pod.receive(reply(pod), later, REPLY) == []


def test_an_answer_at_last_releases_it(pod: Endpoint) -> None:
    _, server = make_pair()
    client, server = make_pair()
    client.context.fresh_until = FRESH_UNTIL
    take_as_address(client)
    verdict = client.verdict(query(client), Direction.EGRESS, 1.4)
    server.receive(verdict.payload or b"", 1.4)
    (answer,) = server.flush_injected(1.4)
    arrived = client.verdict(answer, Direction.INGRESS, 1.5)
    assert (arrived.action, arrived.mark & RELEASED) == (Action.CONSUME, RELEASED)
    assert client.verdict(query(client), Direction.EGRESS, 1.6).action is Action.RELEASE


def test_one_whose_peer_asks_to_shake_hands_again_shows_its_offer(pod: Endpoint) -> None:
    take_as_address(pod)
    surplus = encode_option(UDP_HEADER, STANDALONE_EXID, encode_again(bytes(16)))
    again = build_udp(v4("10.2.0.2"), pod.address, PORTS[::-1], b"", surplus)
    verdict = pod.verdict(again, Direction.INGRESS, 1.5, REPLY)
    assert (verdict.action, len(verdict.effects)) == (Action.TAKE, 1)
    for _ in range(100):
        verdict = pod.verdict(again, Direction.INGRESS, 1.5, REPLY)
    assert verdict == DROPPED


def test_what_has_no_room_gets_the_marker_and_an_offer_goes_alone_now_and_then(pod: Endpoint) -> None:
    large = query(pod, LARGE)
    assert pod.send(large) == []
    effects = pod.expire(1.25)
    (settled,) = [effect for effect in effects if isinstance(effect, Settle)]
    assert is_marked(settled.verdict.payload or b"", MARKER_ID)
    verdicts = [pod.verdict(large, Direction.EGRESS, now) for now in (1.3, 1.35, 1.7)]
    assert all(is_marked(verdict.payload or b"", MARKER_ID) for verdict in verdicts)
    assert [len(verdict.effects) for verdict in verdicts] == [1, 0, 1]
    cut = pod.verdict(large, Direction.EGRESS, 1.7, GSO)
    assert cut == Result(Action.ACCEPT)
    take_as_address(pod)
    assert is_marked(pod.verdict(large, Direction.EGRESS, 2.0).payload or b"", MARKER_ID)


def test_a_reply_that_comes_late_takes_it_as_an_address_but_not_into_the_kernel(pod: Endpoint) -> None:
    assert len(pod.send(query(pod))) == 1
    verdict = pod.verdict(reply(pod), Direction.INGRESS, 2.5, REPLY)
    assert (verdict.action, verdict.mark & RELEASED) == (Action.ACCEPT, RELEASED)
    assert pod.verdict(query(pod), Direction.EGRESS, 2.5 + UDP.remembered_s).action is Action.ACCEPT


def test_what_waits_leaves_with_the_offer_or_the_marker(pod: Endpoint) -> None:
    assert pod.send(query(pod, LARGE)) == []
    assert pod.send(query(pod)) == []
    assert pod.receive(reply(pod), 1.1, REPLY) == [reply(pod)]
    settled = [effect.verdict.payload or b"" for effect in pod.expire(1.3) if isinstance(effect, Settle)]
    assert [is_marked(packet, MARKER_ID) for packet in settled] == [True, True]
    assert [offers(packet) for packet in settled] == [False, True]


def test_outside_the_enforced_networks_the_kernel_gets_it_at_once(pod: Endpoint) -> None:
    assert pod.verdict(query(pod, to="192.0.2.1"), Direction.EGRESS).action is Action.RELEASE


def test_a_peer_that_policy_wants_to_know_is_no_address(pod: Endpoint) -> None:
    pod.context.policy.replace_rules(FakePolicy(egress=Rules(frozenset({"server"}), direction=Direction.EGRESS)))
    assert pod.send(query(pod)) == []
    pod.expire(1.3)
    assert pod.datapath.half_open_flows == 1
