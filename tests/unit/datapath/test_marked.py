# SPDX-License-Identifier: Apache-2.0
"""Marked datagrams without a message, in released flows: by chance, or because a guard does not know the sender."""

from __future__ import annotations

import pytest

from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID
from enforcer_daemon.handshake.frames import MARKER_ID, encode_proof
from enforcer_daemon.marks import RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import build_udp, decode_udp, with_marker, with_option
from enforcer_daemon.verdict import Action, Inject
from tests.unit.datapath.pair import Endpoint, FakePolicy, Rules, make_pair

ADMITTING = FakePolicy(ingress=Rules(frozenset({"client"})))
MARK = RELEASED | 2 << 12
PORTS = 40_000, 53
LATER = 10.0
"""When a released flow is no longer remembered."""


def flow(**options: float) -> tuple[Endpoint, Endpoint]:
    """Give both ends of a flow that is released."""
    client, server = make_pair(None, ADMITTING, **options)
    (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"query"))
    server.receive(framed)
    client.receive(server.flush_injected()[0])
    assert [decode_udp(p).payload for proof in client.flush_injected() for p in server.receive(proof)] == [b"query"]
    server.reasons()
    return client, server


def marked(sender: Endpoint, receiver: Endpoint, ports: tuple[int, int] = PORTS, payload: bytes = b"data") -> bytes:
    return with_marker(decode_udp(build_udp(sender.address, receiver.address, ports, payload)), MARKER_ID)


def test_one_that_comes_to_the_server_waits_until_its_sender_has_shaken_hands_again() -> None:
    client, server = flow()
    verdict = server.verdict(marked(client, server), Direction.INGRESS, LATER, MARK)
    assert verdict.action is Action.HOLD
    (again,) = [effect.packet for effect in verdict.effects if isinstance(effect, Inject)]
    asked = client.verdict(again, Direction.INGRESS, LATER, MARK | REPLY)
    (offer,) = [effect.packet for effect in asked.effects if isinstance(effect, Inject)]
    answered = server.verdict(offer, Direction.INGRESS, LATER, MARK)
    (answer,) = [effect.packet for effect in answered.effects if isinstance(effect, Inject)]
    proven = client.verdict(answer, Direction.INGRESS, LATER, MARK | REPLY)
    (proof,) = [effect.packet for effect in proven.effects if isinstance(effect, Inject)]
    final = server.verdict(proof, Direction.INGRESS, LATER, MARK)
    assert [(effect.hold_id, effect.verdict.action) for effect in final.effects if not isinstance(effect, Inject)] == [
        (verdict.hold_id, Action.ACCEPT)
    ]


def test_one_that_comes_to_the_client_waits_until_the_server_has_answered_again() -> None:
    client, server = flow()
    verdict = client.verdict(marked(server, client, PORTS[::-1]), Direction.INGRESS, LATER, MARK | REPLY)
    assert verdict.action is Action.HOLD
    (offer,) = [effect.packet for effect in verdict.effects if isinstance(effect, Inject)]
    second = client.verdict(marked(server, client, PORTS[::-1]), Direction.INGRESS, LATER, MARK | REPLY)
    assert second.action in (Action.HOLD, Action.ACCEPT)  # Where policy allows the address, at once.
    answered = server.verdict(offer, Direction.INGRESS, LATER, MARK)
    (answer,) = [effect.packet for effect in answered.effects if isinstance(effect, Inject)]
    proven = client.verdict(answer, Direction.INGRESS, LATER, MARK | REPLY)
    assert verdict.hold_id in [effect.hold_id for effect in proven.effects if not isinstance(effect, Inject)]


@pytest.mark.parametrize("now", [1.2, LATER])
def test_nothing_passes_and_nothing_ends_where_nobody_answers(now: float) -> None:
    client, server = flow()
    stranger = replace_pod(client)
    proof = with_option(
        decode_udp(build_udp(client.address, server.address, PORTS, b"evil")),
        PIGGYBACKED_EXID,
        encode_proof(bytes(16), bytes(16)),
        MARKER_ID,
    )
    first = server.verdict(marked(client, server, payload=b"evil"), Direction.INGRESS, now, MARK)
    second = server.verdict(proof, Direction.INGRESS, now, MARK)
    assert (first.action, second.action) == (Action.HOLD, Action.HOLD)
    (again,) = [effect.packet for effect in first.effects if isinstance(effect, Inject)]
    assert stranger.verdict(again, Direction.INGRESS, now).action is Action.DROP
    dropped = server.expire(now + 1.0)
    assert {effect.verdict.action for effect in dropped if not isinstance(effect, Inject)} == {Action.DROP}
    server.expire(now + 10.0)
    assert server.context.held_packets == server.datapath.half_open_flows == 0


def replace_pod(endpoint: Endpoint) -> Endpoint:
    """Give another pod with the same address."""
    return endpoint.node.endpoint("newcomer", str(endpoint.identity.ips[0]), "other")


def test_right_after_the_handshake_nothing_is_asked() -> None:
    client, server = flow()
    for sender, receiver, ports, mark in ((client, server, PORTS, MARK), (server, client, PORTS[::-1], MARK | REPLY)):
        verdict = receiver.verdict(marked(sender, receiver, ports), Direction.INGRESS, 1.01, mark)
        assert (verdict.action, verdict.effects) == (Action.ACCEPT, ())


def test_questions_are_bounded() -> None:
    client, server = flow(max_rehandshakes_per_s=1.0)
    actions = [
        server.verdict(marked(client, server, (port, 53)), Direction.INGRESS, LATER, MARK).action
        for port in range(50_000, 50_003)
    ]
    assert actions == [Action.HOLD, Action.DROP, Action.DROP]
    answers = [
        client.verdict(marked(server, client, (53, port)), Direction.INGRESS, LATER, MARK | REPLY).action
        for port in range(50_000, 50_003)
    ]
    assert answers == [Action.HOLD, Action.DROP, Action.DROP]
