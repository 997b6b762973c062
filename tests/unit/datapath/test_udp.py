# SPDX-License-Identifier: Apache-2.0
"""Flows of datagrams between two endpoints: in order, under every single and double fault of the wire, and attacked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum

import pytest

from enforcer_daemon.datapath.udp import MAX_TRIES
from enforcer_daemon.handshake import datagrams
from enforcer_daemon.handshake.carriers import UDP
from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID, find_message
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import TYPE_OFFER, TYPE_PROOF, encode_again, encode_proof, frame_type
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO, RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option, with_option
from enforcer_daemon.verdict import Action, Inject, Settle, Verdict
from tests.unit.datapath.pair import DROPPED, Endpoint, FakePolicy, Result, Rules, make_pair

PORTS = 40_000, 53
ADMITTING = FakePolicy(ingress=Rules(frozenset({"client"})))
BOUND = FakePolicy(egress=Rules(frozenset({"server"}), direction=Direction.EGRESS))
OPEN = FakePolicy()
POLICIES = {"rides": OPEN, "goes alone": BOUND}
modes = pytest.mark.parametrize("mode", POLICIES)


class Fault(Enum):
    LOST = "lost"
    TWICE = "twice"
    LATE = "late"


@dataclass
class Exchange:
    """A client, a server that admits clients, and what is on its way between them."""

    client: Endpoint
    server: Endpoint
    faults: dict[int, Fault] = field(default_factory=dict)
    now: float = 1.0
    delivered: list[bytes] = field(default_factory=list)
    """What the server's kernel got."""
    is_proof_made: bool = False
    _sent: int = 0
    _late: list[tuple[Endpoint, bytes]] = field(default_factory=list)

    def query(self, payload: bytes) -> bytes:
        return build_udp(self.client.address, self.server.address, PORTS, payload)

    def say(self, payload: bytes) -> None:
        self.carry(self.server, self.client.send(self.query(payload), self.now))
        self.flush()

    def carry(self, to: Endpoint, packets: list[bytes]) -> None:
        for packet in packets:
            fault = self.faults.get(self._sent)
            self._sent += 1
            found = find_message(decode_udp(packet))
            if to is self.server and found is not None and frame_type(found[0]) == TYPE_PROOF:
                self.is_proof_made = True
            if fault is Fault.LATE:
                self._late.append((to, packet))
                continue
            for _ in range({Fault.LOST: 0, Fault.TWICE: 2}.get(fault, 1) if fault else 1):
                self.arrive(to, packet)

    def arrive(self, at: Endpoint, packet: bytes) -> None:
        passed = at.receive(packet, self.now)
        if at is self.server and passed:
            assert self.is_proof_made
            self.delivered += passed
        else:
            assert all(decode_udp(packet).src == self.client.address for packet in passed)
            self.carry(self.server, passed)

    def flush(self) -> None:
        """Send what the enforcers themselves have to say, until there is nothing more; then what was late."""
        while self.client.injected or self.server.injected:
            self.carry(self.server, self.client.flush_injected(self.now))
            self.carry(self.client, self.server.flush_injected(self.now))
        late, self._late = self._late, []
        for to, packet in late:
            self.arrive(to, packet)
        if late:
            self.flush()

    def pass_time(self, seconds: float) -> None:
        ticks = min(round(seconds * 10), 15)  # All that is repeated is repeated in the first seconds.
        for tick in range(ticks + 1):
            self.now += 0.1 if tick < ticks else max(0.0, seconds - ticks / 10)
            for endpoint, other in ((self.client, self.server), (self.server, self.client)):
                for effect in endpoint.expire(self.now):
                    if isinstance(effect, Settle):
                        held = endpoint.held.pop(effect.hold_id)
                        if effect.verdict.action is not Action.DROP:
                            self.carry(other, [held])
                    else:
                        endpoint.injected.append(effect.packet)
            self.flush()


def make(mode: str, faults: dict[int, Fault] | None = None) -> Exchange:
    return Exchange(*make_pair(POLICIES[mode], ADMITTING), faults or {})


@modes
def test_datagrams_arrive_in_order_as_they_were_and_the_flow_is_released(mode: str) -> None:
    exchange = make(mode)
    first, second = exchange.query(b"A?"), exchange.query(b"AAAA?")
    on_wire = exchange.client.send(first) + exchange.client.send(second)
    exchange.carry(exchange.server, on_wire)
    assert exchange.delivered == []
    exchange.flush()
    assert exchange.delivered == [first, second]
    third = exchange.client.verdict(exchange.query(b"the third"), Direction.EGRESS, 1.0)
    assert third.action is Action.RELEASE
    assert third.mark & RELEASED
    assert exchange.server.verdict(exchange.query(b"the third"), Direction.INGRESS, 1.0).mark & RELEASED
    assert exchange.client.reasons()[0] == ("not-isolated" if mode == "rides" else "policy")
    assert exchange.server.reasons() == ["policy"]


SINGLE = [{at: fault} for at in range(6) for fault in Fault]
DOUBLE = [
    {one: fault, other: second}
    for one, other in itertools.combinations(range(4), 2)
    for fault, second in itertools.product(Fault, repeat=2)
]


@modes
@pytest.mark.parametrize("faults", [SINGLE, DOUBLE], ids=["single", "double"])
def test_no_fault_delivers_before_the_proof_or_stops_a_flow_that_is_tried_again(
    mode: str, faults: list[dict[int, Fault]]
) -> None:
    for chosen in faults:
        exchange = make(mode, dict(chosen))
        for n in range(3):
            if n == 2:
                exchange.faults = {}
            exchange.say(b"query %d" % n)
            exchange.pass_time(5.0 if n < 2 else 1.5)
        assert exchange.delivered, chosen
        assert {decode_udp(packet).payload for packet in exchange.delivered} <= {b"query 0", b"query 1", b"query 2"}
        assert exchange.query(b"query 2") in map(bare, exchange.delivered), chosen
        assert not exchange.client.held
        assert not exchange.server.held


def bare(packet: bytes) -> bytes:
    return datagrams.bare(decode_udp(packet))


@modes
@pytest.mark.parametrize("at", [1, 2])
def test_one_lost_message_of_the_enforcers_costs_no_datagram(mode: str, at: int) -> None:
    exchange = make(mode, {at: Fault.LOST})
    if mode == "goes alone" and at == 2:
        pytest.skip("the proof rides on the datagram itself")
    exchange.say(b"once")
    exchange.pass_time(1.0)
    assert exchange.delivered == [exchange.query(b"once")]


def test_an_offer_that_is_lost_again_and_again_is_sent_so_often_and_no_more() -> None:
    exchange = make("goes alone", dict.fromkeys(range(100), Fault.LOST))
    exchange.say(b"nobody hears")
    exchange.pass_time(10.0)
    assert exchange._sent <= 1 + MAX_TRIES
    assert exchange.client.held == {}
    assert "handshake-timeout" in exchange.client.reasons()
    assert exchange.client.datapath.half_open_flows == 0


def test_a_stranger_is_denied_by_who_he_is() -> None:
    client, server = make_pair(OPEN, FakePolicy(ingress=Rules(frozenset({"other"}))))
    (packet,) = client.send(build_udp(client.address, server.address, PORTS, b"let me in"))
    assert server.verdict(packet, Direction.INGRESS) == DROPPED
    assert server.reasons() == ["ingress-denied"]
    # Of a released flow it is answered all the same: a proof would show that the address is another pod's now.
    verdict = server.verdict(packet, Direction.INGRESS, mark=RELEASED)
    assert (verdict.action, len(verdict.effects)) == (Action.DROP, 1)


def test_egress_is_judged_by_who_answers() -> None:
    elsewhere = FakePolicy(egress=Rules(frozenset({"other"}), direction=Direction.EGRESS))
    exchange = Exchange(*make_pair(elsewhere, OPEN))
    exchange.say(b"hello")
    assert exchange.delivered == []
    assert exchange.client.reasons() == ["egress-denied"]
    assert exchange.client.held == {}


@modes
def test_a_replay_of_anything_delivers_nothing_more(mode: str) -> None:
    exchange = make(mode)
    seen: list[bytes] = []
    receive = exchange.server.receive

    def record(packet: bytes, now: float = 1.0, mark: int = 0) -> list[bytes]:
        seen.append(packet)
        return receive(packet, now, mark)

    exchange.server.receive = record  # type: ignore[method-assign]
    exchange.say(b"once")
    assert len(exchange.delivered) == 1
    for later in (1.5, 4.0, 30.0):
        exchange.server.expire(later)
        for packet in list(seen):
            assert receive(packet, later) == []
    assert exchange.server.expire(60.0) is not None
    assert exchange.server.context.held_packets == 0


def test_a_forged_proof_releases_nothing() -> None:
    exchange = make("rides")
    (framed,) = exchange.client.send(exchange.query(b"query"))
    exchange.server.receive(framed)
    found = find_message(decode_udp(framed))
    assert found is not None
    nonce = found[0][8:24]
    for forged in (encode_proof(nonce, bytes(16)), encode_proof(bytes(16), bytes(16)), encode_proof(nonce, b"")):
        riding = with_option(decode_udp(exchange.query(b"attack")), PIGGYBACKED_EXID, forged)
        assert exchange.server.receive(riding) == []
    assert len(exchange.server.held) == 1


def test_what_waits_for_one_flow_is_bounded() -> None:
    client, server = make_pair(OPEN, ADMITTING, max_held_packets=4)
    packets = [client.send(build_udp(client.address, server.address, PORTS, bytes(n)))[0] for n in range(9)]
    for packet in packets:
        assert server.receive(packet) == []
    assert len(server.held) == 4
    assert server.reasons().count("hold-queue-full") == 5


def test_an_offer_that_is_replayed_is_answered_so_often_and_no_more() -> None:
    client, server = make_pair(BOUND, ADMITTING)
    assert client.send(build_udp(client.address, server.address, PORTS, b"query")) == []
    (offer,) = client.flush_injected()
    actions = [server.verdict(offer, Direction.INGRESS, 1.0).action for _ in range(20)]
    assert actions == [Action.TAKE] * (1 + 2 * MAX_TRIES) + [Action.DROP] * (19 - 2 * MAX_TRIES)
    assert server.reasons()[-1] == "replayed-nonce"


def test_a_request_to_shake_hands_again_starts_one_handshake_and_only_for_a_released_flow_of_the_pods() -> None:
    client, server = make_pair(BOUND, ADMITTING)
    surplus = encode_option(UDP_HEADER, 0x5453, encode_again(bytes(16)))
    again = build_udp(server.address, client.address, PORTS[::-1], b"", surplus)
    for mark in (0, REPLY, RELEASED, 0x4000_0000 | REPLY):
        assert client.verdict(again, Direction.INGRESS, mark=mark) == DROPPED
        assert client.reasons() == ["unknown-flow"]
    offered = client.verdict(again, Direction.INGRESS, mark=RELEASED | REPLY)
    assert (offered.action, len(offered.effects)) == (Action.TAKE, 1)
    assert client.verdict(again, Direction.INGRESS, mark=RELEASED | REPLY) == DROPPED


def test_a_responder_that_forgot_the_flow_asks_and_keeps_the_datagram() -> None:
    exchange = make("goes alone")
    exchange.say(b"first")
    exchange.now = 100.0
    lost = exchange.query(b"second")
    assert exchange.server.receive(lost, exchange.now) == []
    (request,) = exchange.server.flush_injected(exchange.now)
    assert exchange.client.receive(request, exchange.now, RELEASED | REPLY) == []
    exchange.flush()
    assert exchange.delivered[1:] == [lost]


def test_replies_are_never_judged_as_flows_of_their_own() -> None:
    client, server = make_pair(OPEN, OPEN)
    reply = build_udp(server.address, client.address, PORTS[::-1], b"reply")
    assert server.verdict(reply, Direction.EGRESS, mark=REPLY) == DROPPED
    assert client.verdict(reply, Direction.INGRESS, mark=REPLY) == DROPPED
    assert server.reasons() == client.reasons() == ["unknown-flow"]


def test_a_message_that_the_pod_makes_itself_does_not_leave() -> None:
    client, server = make_pair()
    own = with_option(
        decode_udp(build_udp(client.address, server.address, PORTS, b"x")), PIGGYBACKED_EXID, encode_again(bytes(16))
    )
    assert client.verdict(own, Direction.EGRESS) == DROPPED
    assert client.reasons() == ["malformed-frame"]


def first_verdict(endpoint: Endpoint, packet: bytes, direction: Direction) -> Result:
    """Give the verdict for a packet, and settle what waits for it as the queue does."""
    verdict = endpoint.verdict(packet, direction)
    for effect in verdict.effects:
        if isinstance(effect, Settle):
            endpoint.held.pop(effect.hold_id, None)
        else:
            endpoint.injected.append(effect.packet)
    return verdict


def settled(verdict: Result) -> list[tuple[Action, bool]]:
    """Give what becomes of each packet that waited, in order, and whether it takes the flow with it."""
    return [(e.verdict.action, e.verdict.when_drained) for e in verdict.effects if isinstance(e, Settle)]


def answer_to(client: Endpoint, server: Endpoint) -> bytes:
    """Let the client's offer arrive; give the answer."""
    for offer in client.flush_injected():
        server.receive(offer)
    (answer,) = server.flush_injected()
    return answer


def test_what_waited_goes_first_and_the_last_of_it_takes_the_flow_into_the_kernel() -> None:
    client, server = make_pair(BOUND, ADMITTING)
    queries = [build_udp(client.address, server.address, PORTS, bytes(n)) for n in range(3)]
    for query in queries:
        assert client.send(query) == []
    verdict = first_verdict(client, answer_to(client, server), Direction.INGRESS)
    assert (verdict.action, verdict.mark) == (Action.TAKE, 0)
    assert settled(verdict) == [(Action.ACCEPT, False), (Action.ACCEPT, False), (Action.RELEASE, True)]
    later = client.verdict(build_udp(client.address, server.address, PORTS, b"later"), Direction.EGRESS)
    assert (later.action, later.when_drained) == (Action.RELEASE, True)
    at_last = client.verdict(build_udp(client.address, server.address, PORTS, b"later"), Direction.EGRESS, 1.5)
    assert (at_last.action, at_last.when_drained) == (Action.RELEASE, False)


def test_an_answer_that_is_repeated_into_a_full_queue_takes_the_flow_with_it_soon() -> None:
    """Else whoever answers could keep a flow in the queue, and have each repetition count as a connection."""
    client, server = make_pair(OPEN, ADMITTING)
    (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"query"))
    server.receive(framed)
    (answer,) = server.flush_injected()
    for now, when_drained in ((1.0, True), (1.0 + UDP.drain_s / 2, True), (1.0 + UDP.drain_s, False)):
        verdict = client.verdict(answer, Direction.INGRESS, now)
        assert (verdict.action, verdict.when_drained) == (Action.CONSUME, when_drained)


def test_the_first_plain_answer_says_that_the_flow_has_come_about() -> None:
    """The queue must tell lookups at a server without an enforcer from a flood that nobody answers."""
    client, server = make_pair(OPEN, ADMITTING)
    client.send(build_udp(client.address, server.address, PORTS, b"query"))
    plain = build_udp(server.address, client.address, PORTS[::-1], b"answer")
    verdicts = [client.verdict(plain, Direction.INGRESS, 1.0 + n / 100, REPLY) for n in range(2)]
    assert [verdict.action for verdict in verdicts] == [Action.ACCEPT, Action.ACCEPT]
    assert [bool(verdict.mark & RELEASED) for verdict in verdicts] == [True, False]


def test_at_the_responder_too() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    framed = [client.send(build_udp(client.address, server.address, PORTS, bytes(n)))[0] for n in range(3)]
    for packet in framed:
        assert server.receive(packet) == []
    (answer,) = server.flush_injected()
    client.receive(answer)
    (proof,) = client.flush_injected()
    verdict = first_verdict(server, proof, Direction.INGRESS)
    assert verdict.action is Action.TAKE
    assert settled(verdict) == [(Action.ACCEPT, False), (Action.ACCEPT, False), (Action.RELEASE, True)]
    assert server.context.held_packets == 0


def test_a_proof_that_rides_takes_its_place_behind_what_waits() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    small = build_udp(client.address, server.address, PORTS, b"small")
    (framed,) = client.send(small)
    large = build_udp(client.address, server.address, PORTS, bytes(1_100))
    assert client.send(large) == []
    server.receive(framed)
    (answer,) = server.flush_injected()
    (proven,) = client.receive(answer)
    assert server.receive(proven) == [small, large]


def test_what_came_in_before_the_answer_does_not_stop_it() -> None:
    """Anybody can send it under the server's address: it waits with the pod's own datagrams, and passes with them."""
    client, server = make_pair(BOUND, ADMITTING)
    query = build_udp(client.address, server.address, PORTS, b"query")
    assert client.send(query) == []
    early = build_udp(server.address, client.address, PORTS[::-1], b"early")
    assert client.receive(early, mark=REPLY) == []
    left, delivered = client.receive(answer_to(client, server))
    assert (bare(left), delivered) == (query, early)
    assert client.reasons()[-1] != "internal-error"
    assert server.receive(left) == [query]


def test_where_only_such_a_datagram_waits_the_proof_goes_alone() -> None:
    client, server = make_pair(BOUND, ADMITTING)
    assert client.send(build_udp(client.address, server.address, PORTS, b"query")) == []
    answer = answer_to(client, server)
    (effect,) = client.expire(2.1)
    assert effect == Settle(1, Verdict(Action.DROP))  # The query waited too long.
    client.held.clear()
    early = build_udp(server.address, client.address, PORTS[::-1], b"early")
    assert client.receive(early, 2.2, mark=REPLY) == []
    assert client.receive(answer, 2.3) == [early]
    proofs = [find_message(decode_udp(own)) for own in client.injected]
    assert [frame_type(found[0]) for found in proofs if found][-1] == TYPE_PROOF


def test_a_send_that_is_not_cut_yet_passes_as_it_is_behind_the_proof() -> None:
    client, server = make_pair(BOUND, ADMITTING)
    send = build_udp(client.address, server.address, PORTS, bytes(300))
    assert client.send(send, mark=CHECKSUM_PARTIAL | GSO) == []
    verdict = first_verdict(client, answer_to(client, server), Direction.INGRESS)
    assert [type(effect) for effect in verdict.effects] == [Inject, Settle]
    assert settled(verdict) == [(Action.RELEASE, True)]
    assert isinstance(verdict.effects[1], Settle)
    assert verdict.effects[1].verdict.payload is None
    assert [frame_type(found[0]) for own in client.injected if (found := find_message(decode_udp(own)))] == [TYPE_PROOF]


def test_a_send_that_is_not_cut_yet_carries_no_offer_however_short() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    assert client.send(build_udp(client.address, server.address, PORTS, bytes(300)), mark=CHECKSUM_PARTIAL | GSO) == []
    (offer,) = client.flush_injected()
    found = find_message(decode_udp(offer))
    assert found is not None
    assert (frame_type(found[0]), found[1]) == (TYPE_OFFER, True)
    assert client.context.held_packets == 1


def test_each_datagram_of_a_burst_leaves_beside_the_offer() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    queries = [build_udp(client.address, server.address, PORTS, b"%d" % n) for n in range(6)]
    left = [packet for query in queries for packet in client.send(query)]
    assert [bare(packet) for packet in left] == queries
    assert client.injected == []  # The offer has left: a peer without an enforcer gets no empty datagram.


def test_a_checksum_that_is_not_made_yet_is_made_where_a_message_is_put_beside_the_datagram() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    query = build_udp(client.address, server.address, PORTS, b"odd")
    at = decode_udp(query).offset + 6
    unsummed = query[:at] + b"\x12\x34" + query[at + 2 :]
    (left,) = client.send(unsummed, mark=CHECKSUM_PARTIAL)
    assert bare(left) == query
    assert datagrams.bare(decode_udp(left)._replace(is_checksum_partial=True)) == query


def test_a_checksum_that_shows_damage_stays() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    query = build_udp(client.address, server.address, PORTS, b"data")
    damaged = query[:-1] + b"?"
    (left,) = client.send(damaged)
    assert bare(left) == damaged


def test_a_denial_of_what_was_asked_for_its_identity_names_the_policies() -> None:
    exchange = make("goes alone")
    exchange.say(b"first")
    exchange.server.reasons()
    exchange.now = 100.0
    assert exchange.server.receive(exchange.query(b"second"), exchange.now) == []
    exchange.server.expire(exchange.now + 1.1)
    (report,) = exchange.server.take_reports()
    assert (report.reason.value, [str(rule) for rule in report.rules]) == ("unidentified-peer", ["default/fake[0]"])


def test_a_queue_that_is_behind_gets_no_more_offers_than_one_that_is_not() -> None:
    client, server = make_pair(BOUND, ADMITTING)

    def repeats(now: float) -> int:
        return sum(isinstance(effect, Inject) for effect in client.expire(now))

    def send(port: int, now: float) -> None:
        assert client.send(build_udp(client.address, server.address, (port, 53), b"query"), now) == []

    send(4_000, 10.0)
    assert repeats(10.09) == 0
    client.flush_injected(10.09)  # It waited for 0.09 s, and so will its answer.
    assert (repeats(10.25), repeats(10.29)) == (0, 1)
    send(4_001, 11.0)
    assert (repeats(11.27), repeats(11.29)) == (0, 1)


def test_requests_to_shake_hands_again_are_bounded_and_counted() -> None:
    client, server = make_pair(OPEN, ADMITTING, max_rehandshakes_per_s=20)
    exchange = Exchange(client, server)
    exchange.say(b"met")
    hits = server.node.context.limit_hits
    for n in range(300):
        stray = build_udp(client.address, server.address, (10_000 + n, 53), b"stray")
        assert server.receive(stray, 50.0) == []
    assert len(server.held) == len(server.injected) == 20
    assert hits[Limit.REHANDSHAKES] == 300 - 20
    for effect in server.expire(51.5):
        assert isinstance(effect, Settle)
        assert effect.verdict.action is Action.DROP
    server.expire(54.0)
    assert server.datapath.half_open_flows == 0


def sent_alone(endpoint: Endpoint, key: FlowKey, content: bytes) -> bytes:
    """Have the enforcer send a message of its own; return the packet."""
    endpoint.datapath._udp.messages.send(key, content)
    effect = endpoint.context.effects.pop()
    assert isinstance(effect, Inject)
    return effect.packet


def test_a_message_that_was_sent_twice_before_it_passed_passes_twice() -> None:
    client, server = make_pair(OPEN, ADMITTING)
    key = FlowKey(server.address, client.address, 53, 4_000, UDP.protocol, Role.INITIATOR)
    sent = [sent_alone(client, key, b"again") for _ in range(2)]
    assert [client.verdict(packet, Direction.EGRESS).action for packet in (*sent, sent[0])] == [
        Action.ACCEPT,
        Action.ACCEPT,
        Action.DROP,
    ]


def test_own_messages_that_never_came_to_the_queue_are_bounded_and_counted() -> None:
    client, _ = make_pair(OPEN, ADMITTING, max_own_packets=50)
    for n in range(350):
        sent_alone(client, FlowKey(bytes(4), bytes(4), 53, n, UDP.protocol, Role.INITIATOR), b"lost")
    assert client.node.context.limit_hits[Limit.OWN_PACKETS] == 300


def test_a_burst_of_new_flows_knows_all_its_offers_again() -> None:
    """They come to the queue behind the whole burst."""
    client, server = make_pair(BOUND, ADMITTING)
    for port in range(10_000, 11_000):
        assert client.send(build_udp(client.address, server.address, (port, 53), b"query")) == []
    assert len(client.flush_injected()) == 1_000
    assert "malformed-frame" not in client.reasons()


def test_a_proof_of_no_handshake_does_not_reach_the_pod_with_the_datagram_that_it_rode_on() -> None:
    exchange = make("goes alone")
    exchange.say(b"first")
    exchange.now = 100.0
    lost = exchange.query(b"second")
    proof = with_option(decode_udp(lost), PIGGYBACKED_EXID, encode_proof(bytes(16), bytes(16)))
    assert exchange.server.receive(proof, exchange.now) == []
    (request,) = exchange.server.flush_injected(exchange.now)
    exchange.client.receive(request, exchange.now, RELEASED | REPLY)
    exchange.flush()
    assert exchange.delivered[1:] == [lost]
