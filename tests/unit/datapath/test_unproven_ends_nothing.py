# SPDX-License-Identifier: Apache-2.0
"""A message without a proof ends no flow: SYNs and offers with a copied identity, for connections that are released."""

from __future__ import annotations

import pytest

from enforcer_daemon.datapath import engine
from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID, STANDALONE_EXID
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import MARKER_ID, TYPE_OFFER, SynFrame, encode_proof, encode_syn
from enforcer_daemon.marks import NODE, RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import ACK, SYN, build, with_options_and_payload
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option, with_marker, with_option
from enforcer_daemon.verdict import Action, Settle
from tests.unit.datapath.pair import (
    DROPPED,
    SYN_OPTIONS,
    Connection,
    Endpoint,
    FakePolicy,
    Result,
    Rules,
    make_pair,
    release,
    segment,
)

ADMITTING = FakePolicy(ingress=Rules(frozenset({"client"})))
MARK = RELEASED | 2 << 12
BY_ADDRESS_MARK = RELEASED | 1 << 12
"""Of the server's first flow that was evaluated by an identity."""
PORTS = 40_000, 53


def copied_syn(connection: Connection, nonce: bytes = b"n" * 16, isn: int = 77_000) -> bytes:
    """Make the SYN of an attacker who has copied the client's identity block off the wire."""
    ports = connection.sport, connection.dport
    bare = build(connection.client.address, connection.server.address, ports, (isn, 0), SYN, 64_240)
    frame = encode_syn(SynFrame(nonce, connection.client.context.local.block))
    return with_options_and_payload(segment(bare), SYN_OPTIONS, frame)


def released() -> Connection:
    connection = Connection(*make_pair(None, ADMITTING))
    release(connection)
    connection.server.reasons()
    return connection


def arrive(endpoint: Endpoint, packet: bytes, mark: int, now: float = 1.0) -> Result:
    return endpoint.verdict(packet, Direction.INGRESS, now, mark)


# TCP.


def test_a_syn_with_a_copied_identity_is_delivered_and_the_release_stays() -> None:
    connection = released()
    verdict = arrive(connection.server, copied_syn(connection), MARK)
    assert (verdict.action, verdict.effects) == (Action.ACCEPT, ())
    assert segment(verdict.payload or b"").payload == b""
    # What comes to the queue of the released connection is still its own.
    data = arrive(connection.server, connection.ack(b"data"), 0)
    assert (data.action, data.mark) == (Action.RELEASE, MARK)


def test_a_denied_one_changes_nothing() -> None:
    connection = released()
    connection.server.context.policy.replace_rules(FakePolicy(ingress=Rules(frozenset({"other"}))))
    assert arrive(connection.server, copied_syn(connection), MARK) == DROPPED
    assert connection.server.reasons() == ["ingress-denied"]


def test_one_without_an_identity_changes_nothing_before_the_pods_kernel_answers_it() -> None:
    connection = Connection(*make_pair())
    release(connection)
    syn = build(connection.client.address, connection.server.address, (40_000, 80), (9_000, 0), SYN, 64_240)
    assert arrive(connection.server, syn, MARK) == Result(Action.ACCEPT)
    again = Connection(connection.client, connection.server, isn_i=9_000, isn_r=9_500)
    answer = connection.server.verdict(again.syn_ack(), Direction.EGRESS, mark=MARK)
    assert (answer.action, answer.mark) == (Action.RELEASE, RELEASED | 1 << 12)


def test_the_servers_answer_shows_that_its_socket_is_gone() -> None:
    connection = released()
    server = connection.server
    assert server.verdict(connection.ack(b"late"), Direction.INGRESS, 1.0).action is Action.RELEASE
    arrive(server, copied_syn(connection, isn=9_000), MARK)
    again = Connection(connection.client, server, isn_i=9_000, isn_r=9_500)
    answer = server.verdict(again.syn_ack(), Direction.EGRESS, mark=MARK)
    assert answer.action is Action.FORGET
    # Nothing passes without the proof from now on.
    assert arrive(server, again.ack(b"data"), 0).action is Action.HOLD


def test_a_retransmitted_rival_is_delivered_again() -> None:
    connection = released()
    syn = copied_syn(connection)
    first = arrive(connection.server, syn, MARK)
    assert arrive(connection.server, syn, MARK) == first
    assert connection.server.reasons() == ["policy"]


def test_a_syn_with_a_copied_identity_ends_no_handshake_under_way() -> None:
    connection = Connection(*make_pair(None, ADMITTING))
    client, server = connection.client, connection.server
    (syn,) = client.send(connection.syn())
    server.receive(syn)
    arrive(server, copied_syn(connection), 0)
    (syn_ack,) = server.send(connection.syn_ack())  # The kernel answers the first one.
    arrive(server, copied_syn(connection, b"m" * 16, 88_000), 0)
    client.receive(syn_ack)
    (ack,) = client.send(connection.ack())
    assert server.receive(ack) == [connection.ack()]


def test_a_syn_that_policy_no_longer_allows_is_not_answered() -> None:
    connection = released()
    arrive(connection.server, copied_syn(connection, isn=9_000), MARK)
    connection.server.end_denied(lambda index: True)
    again = Connection(connection.client, connection.server, isn_i=9_000, isn_r=9_500)
    assert connection.server.verdict(again.syn_ack(), Direction.EGRESS, mark=MARK) == DROPPED


def test_rivals_are_bounded_and_one_that_is_not_kept_is_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_RIVALS_PER_SOURCE", 2)
    connection = released()
    syns = [copied_syn(connection, bytes((n,)) * 16, 10_000 + n) for n in range(4)]
    actions = [arrive(connection.server, syn, MARK).action for syn in syns]
    assert actions == [Action.ACCEPT, Action.ACCEPT, Action.DROP, Action.DROP]
    assert connection.server.node.context.limit_hits[Limit.HALF_OPEN_FLOWS_PER_SOURCE] == 2
    assert arrive(connection.server, syns[3], MARK, now=1.0 + engine.RIVAL_S).action is Action.ACCEPT
    assert len(connection.server.datapath._tcp.responder.rivals) == 1


def test_rivals_of_all_sources_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_RIVALS", 1)
    connection = released()
    for n, action in enumerate((Action.ACCEPT, Action.DROP)):
        assert arrive(connection.server, copied_syn(connection, bytes((n,)) * 16, n), MARK).action is action
    assert connection.server.node.context.limit_hits[Limit.HALF_OPEN_FLOWS] == 1


def test_a_challenge_ack_leaves_though_its_flow_is_not_in_the_kernel() -> None:
    connection = released()
    arrive(connection.server, copied_syn(connection), 0)
    back = connection.dport, connection.sport
    challenge = build(connection.server.address, connection.client.address, back, (5_001, 1_001), ACK, 502)
    assert connection.server.verdict(challenge, Direction.EGRESS).action is Action.RELEASE


# UDP.


def offer(client: Endpoint, server: Endpoint, nonce: bytes, payload: bytes | None = None) -> bytes:
    message = encode_syn(SynFrame(nonce, client.context.local.block), TYPE_OFFER)
    if payload is None:
        surplus = encode_option(UDP_HEADER, STANDALONE_EXID, message)
        return build_udp(client.address, server.address, PORTS, b"", surplus)
    plain = build_udp(client.address, server.address, PORTS, payload)
    return with_option(decode_udp(plain), PIGGYBACKED_EXID, message)


def test_an_offer_on_a_released_flow_is_answered_and_the_release_stays() -> None:
    client, server = make_pair(None, ADMITTING)
    standalone = arrive(server, offer(client, server, b"a" * 16), MARK)
    assert (standalone.action, standalone.mark, len(standalone.effects)) == (Action.TAKE, 0, 1)
    riding = arrive(server, offer(client, server, b"b" * 16, b"data"), MARK)
    assert (riding.action, len(riding.effects)) == (Action.HOLD, 1)


def test_a_denied_one_is_answered_too_and_its_proof_takes_the_release_back() -> None:
    client, server = make_pair(None, FakePolicy(ingress=Rules(frozenset({"other"}))))
    query = build_udp(client.address, server.address, PORTS, b"data")
    (framed,) = client.send(query)
    verdict = arrive(server, framed, MARK)
    assert (verdict.action, len(verdict.effects)) == (Action.DROP, 1)
    answer = verdict.effects[0]
    assert not isinstance(answer, Settle)
    server.reasons()
    proofs = [effect.packet for effect in arrive(client, answer.packet, 0).effects if not isinstance(effect, Settle)]
    assert [arrive(server, proof, MARK) for proof in proofs] == [Result(Action.CONSUME)]


def test_an_offer_with_a_copied_identity_ends_no_handshake_under_way() -> None:
    client, server = make_pair(None, ADMITTING)
    query = build_udp(client.address, server.address, PORTS, b"query")
    (framed,) = client.send(query)
    assert server.receive(framed) == []
    assert arrive(server, offer(client, server, b"a" * 16), 0).action is Action.TAKE
    assert arrive(server, offer(client, server, b"b" * 16, b"evil"), 0).action is Action.HOLD
    answer = server.injected[0]
    client.receive(answer)
    delivered = [packet for proof in client.flush_injected() for packet in server.receive(proof)]
    assert delivered == [query]


def test_only_its_proof_lets_a_second_handshake_take_the_place_of_the_first() -> None:
    client, server = make_pair(None, ADMITTING)
    for _ in range(2):
        (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"query"))
        server.receive(framed)
        client.end_opening()  # As a restart of its enforcer.
    (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"third"))
    server.receive(framed)
    for answer in server.flush_injected():
        client.receive(answer)
    (proof,) = client.flush_injected()
    assert [decode_udp(packet).payload for packet in server.receive(proof)] == [b"third"]
    server.expire(10.0)
    assert server.context.held_packets == server.datapath.half_open_flows == 0


def test_a_stray_proof_beside_a_datagram_of_a_released_flow_is_taken_off() -> None:
    client, server = make_pair(None, ADMITTING)
    plain = build_udp(client.address, server.address, PORTS, b"data")
    framed = with_option(decode_udp(plain), PIGGYBACKED_EXID, encode_proof(b"n" * 16, bytes(16)), MARKER_ID)
    assert arrive(server, framed, BY_ADDRESS_MARK) == Result(Action.ACCEPT, plain)


def test_challenges_are_limited_and_counted() -> None:
    client, server = make_pair(None, ADMITTING, max_rehandshakes_per_s=2.0)
    verdicts = [arrive(server, offer(client, server, bytes((n,)) * 16), MARK) for n in range(4)]
    assert [len(verdict.effects) for verdict in verdicts] == [1, 1, 0, 0]
    assert server.node.context.limit_hits[Limit.REHANDSHAKES] == 2


def test_rivals_of_datagram_flows_are_bounded() -> None:
    client, server = make_pair(None, ADMITTING, max_half_open_flows_per_source=2)
    for n in range(4):
        arrive(server, offer(client, server, bytes((n,)) * 16), MARK)
    assert server.datapath.half_open_flows == 2
    assert server.end_denied(lambda index: False) == ()
    assert server.datapath.half_open_flows == 0


def test_a_request_to_shake_hands_again_takes_no_release_back() -> None:
    client, server = make_pair(FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS)))
    surplus = encode_option(UDP_HEADER, STANDALONE_EXID, b"\xd3TRI\x01\x06\x00\x18" + bytes(16))
    again = build_udp(server.address, client.address, PORTS[::-1], b"", surplus)
    assert arrive(client, again, MARK | REPLY) == DROPPED


@pytest.mark.parametrize("addresses", [("10.1.0.2", "10.2.0.2"), ("fd00:1::2", "fd00:2::2")])
def test_a_datagram_with_the_marker_alone_passes_where_its_address_is_allowed(addresses: tuple[str, str]) -> None:
    client, server = make_pair(None, ADMITTING)
    far, near = (client.node.endpoint("c", addresses[0], "client"), server.node.endpoint("s", addresses[1], "server"))
    plain = build_udp(far.address, near.address, PORTS, b"data")
    marked = with_marker(decode_udp(plain), MARKER_ID)
    assert arrive(near, marked, BY_ADDRESS_MARK) == Result(Action.ACCEPT)
    assert near.reasons() == []
    odd = with_option(decode_udp(plain), 0x1111, b"other", MARKER_ID)
    assert arrive(near, odd, BY_ADDRESS_MARK) == Result(Action.ACCEPT, plain)
    assert arrive(near, odd, NODE) == Result(Action.ACCEPT, plain)
    assert arrive(near, plain, MARK) == DROPPED
