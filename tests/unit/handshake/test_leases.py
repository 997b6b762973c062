# SPDX-License-Identifier: Apache-2.0
"""Leases between two endpoints: signs of life, silence, new tokens, restarts, and what an attacker can make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import pytest

from enforcer_daemon.errors import FrameError, PeerError, ProofError
from enforcer_daemon.handshake import leasepairs, leases
from enforcer_daemon.handshake.fairtable import Limit, no_hits
from enforcer_daemon.handshake.lapse import TCP_LAPSE_S, UDP_LAPSE_S
from enforcer_daemon.handshake.leaseframes import (
    LEASE_BYTES,
    NO_ID,
    LeaseFlag,
    LeaseMessage,
    decode_lease,
    encode_lease,
    lease_key,
    token_id,
)
from enforcer_daemon.handshake.leasepairs import Lapse, LeaseTimes, Replaced
from enforcer_daemon.handshake.leases import Leases, Outgoing
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.model import Identity, PodRef, Protocol
from tests.unit.datapath.pair import WALL, Endpoint, make_pair

TIMES = LeaseTimes()


@dataclass
class Side:
    """One endpoint's leases, with the token that it shows."""

    endpoint: Endpoint
    leases: Leases
    local: LocalToken
    log: list[LeaseMessage] = field(default_factory=list)
    """What it sent."""

    @classmethod
    def of(cls, endpoint: Endpoint) -> Side:
        return cls(endpoint, fresh(endpoint), endpoint.context.local)

    @property
    def address(self) -> bytes:
        return self.endpoint.address

    def verify(self, block: bytes) -> Peer:
        return self.endpoint.node.context.verify(block, bytes((10, 9, 9, 9)), 1.0)

    def restart(self) -> None:
        """Begin with nothing but a new token, as another daemon does."""
        self.leases, self.local = fresh(self.endpoint), self.sign(self.endpoint.identity)

    def sign(self, identity: Identity, later_s: float = 1.0) -> LocalToken:
        return self.endpoint.node.token(identity, WALL + later_s)


def fresh(endpoint: Endpoint) -> Leases:
    return Leases(TIMES, endpoint.node.context.random, no_hits())


@dataclass
class World:
    """Two sides and the wire between them."""

    a: Side
    b: Side
    now: float = 1.0
    is_lost: Callable[[Outgoing], bool] = lambda _: False
    seen: list[tuple[Side, Outgoing]] = field(default_factory=list)

    def other(self, side: Side) -> Side:
        return self.b if side is self.a else self.a

    def carry(self, side: Side, messages: list[Outgoing]) -> None:
        for message in messages:
            self.seen.append((side, message))
            side.log.append(decode_lease(message.content))
            if not self.is_lost(message):
                to = self.other(side)
                self.carry(to, to.leases.receive(message.content, (message.own, message.remote), to.verify, self.now))

    def pass_time(self, seconds: float, *, only: Side | None = None, step: float = 0.5) -> None:
        for _ in range(round(seconds / step)):
            self.now += step
            for side in (self.a, self.b):
                if only in (None, side):
                    self.carry(side, side.leases.tick(side.local, self.now))

    def note(self, protocol: Protocol = Protocol.TCP) -> None:
        """A flow is released at both ends."""
        for side in (self.a, self.b):
            peer = side.verify(self.other(side).local.block)
            side.leases.note(peer, (self.other(side).address, side.address), protocol, side.local, self.now)

    def in_use(self, *protocols: Protocol) -> None:
        """Both kernels have such flows, by the identities that they were released with."""
        for side in (self.a, self.b):
            other = self.other(side)
            found = [(other.endpoint.identity, other.address, side.address, protocol) for protocol in protocols]
            side.leases.use(found, self.now, self.now)


@pytest.fixture
def world() -> World:
    client, server = make_pair()
    world = World(Side.of(client), Side.of(server))
    for side in (world.a, world.b):
        side.leases.tick(side.local, world.now)
    return world


@pytest.fixture
def open_world(world: World) -> World:
    """Two sides that have exchanged their first messages."""
    world.note()
    world.pass_time(1.0)
    for side in (world.a, world.b):
        side.log.clear()
    return world


def silence(world: World) -> None:
    world.is_lost = lambda _: True


# Signs of life.


def test_the_first_message_goes_right_after_the_first_release_and_is_answered(world: World) -> None:
    world.note()
    world.pass_time(0.5)
    assert [bool(message.flags & LeaseFlag.PROBE) for message in world.a.log][:1] == [True]
    assert len(world.a.log) + len(world.b.log) <= 4
    assert all(not message.block for message in (*world.a.log, *world.b.log))  # The handshake showed the tokens.
    assert (world.a.leases.unanswered(), world.b.leases.unanswered()) == (0, 0)
    assert set(world.a.leases.worked(world.now)) == {("cluster.local", PodRef("default", "server"), world.b.address)}


def test_each_side_sends_one_message_in_a_leases_time(open_world: World) -> None:
    open_world.pass_time(300.0)
    assert 10 <= len(open_world.a.log) <= 13
    assert 10 <= len(open_world.b.log) <= 13
    assert open_world.a.leases.take_events() == []


def test_ten_thousand_flows_of_a_hundred_pairs_cost_four_messages_a_second() -> None:
    client, server = make_pair()
    side = Side.of(client)
    peer = side.verify(server.context.local.block)
    side.leases.tick(side.local, 1.0)
    sent = []
    for n in range(100):
        pod = replace(peer.identity, pod=PodRef("default", f"server-{n}"))
        each = Peer.__new__(Peer)
        for name in Peer.__slots__:
            setattr(each, name, getattr(peer, name))
        each.identity = pod
        for _ in range(100):
            side.leases.note(each, (bytes((10, 3, 0, n)), client.address), Protocol.TCP, side.local, 1.0)
    now = 1.0
    for pair in side.leases._pairs:
        pair.worked = True
    for _ in range(1_200):
        now += 0.25
        for pair in side.leases._pairs:
            pair.heard_at = now
        sent += side.leases.tick(side.local, now)
    assert len(side.leases) == 100
    assert len(sent) / 300 <= 4.0


def test_an_endpoint_without_flows_sends_nothing(open_world: World) -> None:
    open_world.pass_time(1.0)
    open_world.in_use()
    open_world.a.log.clear()
    open_world.b.log.clear()
    open_world.pass_time(40.0)
    assert open_world.a.log == open_world.b.log == []
    assert len(open_world.a.leases) == 0
    open_world.pass_time(700.0, step=5.0)
    assert list(open_world.a.leases._pairs) == []


def test_a_pair_that_is_used_again_goes_on(open_world: World) -> None:
    open_world.in_use()
    open_world.pass_time(100.0)
    open_world.note()
    open_world.pass_time(40.0)
    assert len(open_world.a.log) >= 1
    open_world.in_use()
    open_world.pass_time(100.0)
    open_world.in_use(Protocol.UDP)
    open_world.pass_time(1.0)
    assert len(open_world.a.leases) == 1


# Silence.


def test_silence_lapses_udp_and_then_tcp_and_is_measured_from_what_was_echoed(open_world: World) -> None:
    open_world.note(Protocol.UDP)
    silence(open_world)
    died_at = open_world.now
    open_world.pass_time(UDP_LAPSE_S - 40.0, only=open_world.a)
    assert open_world.a.leases.take_events() == []
    open_world.pass_time(46.0, only=open_world.a)
    (lapse,) = open_world.a.leases.take_events()
    assert isinstance(lapse, Lapse)
    assert (lapse.protocols, lapse.address) == (frozenset({Protocol.UDP}), open_world.b.address)
    assert open_world.now - died_at <= UDP_LAPSE_S + 6.0
    open_world.pass_time(TCP_LAPSE_S - UDP_LAPSE_S - 10.0, only=open_world.a)
    assert open_world.a.leases.take_events() == []
    open_world.pass_time(10.0, only=open_world.a)
    (lapse,) = open_world.a.leases.take_events()
    assert isinstance(lapse, Lapse)
    assert lapse.protocols == frozenset(Protocol)
    assert len(open_world.a.leases) == 0


def test_a_peer_that_is_heard_again_in_time_loses_nothing(open_world: World) -> None:
    silence(open_world)
    open_world.pass_time(100.0)
    open_world.is_lost = lambda _: False
    open_world.pass_time(60.0)
    assert open_world.a.leases.take_events() == open_world.b.leases.take_events() == []


def test_a_few_lost_messages_end_nothing(open_world: World) -> None:
    count = 0

    def lose(_: Outgoing) -> bool:
        nonlocal count
        count += 1
        return count % 3 == 0

    open_world.is_lost = lose
    open_world.pass_time(2_000.0)
    assert open_world.a.leases.take_events() == open_world.b.leases.take_events() == []


def test_a_stalled_enforcer_probes_before_it_counts_silence(open_world: World) -> None:
    open_world.pass_time(100.0)
    open_world.now += 2 * TCP_LAPSE_S  # Nothing ran, here or there.
    open_world.pass_time(5.0)
    assert open_world.a.leases.take_events() == []


def test_where_no_message_ever_came_through_silence_ends_nothing_and_is_counted(world: World) -> None:
    silence(world)
    world.note()
    world.pass_time(3_000.0, step=1.0)
    assert world.a.leases.take_events() == []
    assert (len(world.a.leases), world.a.leases.unanswered()) == (1, 1)
    assert len(world.a.log) < 20  # The time between tries grows.
    world.is_lost = lambda _: False
    world.pass_time(700.0, step=1.0)
    assert world.a.leases.unanswered() == 0


def test_what_an_earlier_daemon_knew_to_work_lapses_though_it_was_never_heard_again(open_world: World) -> None:
    worked = open_world.a.leases.worked(open_world.now)
    silence(open_world)
    open_world.a.restart()
    open_world.a.leases.answered = worked
    open_world.in_use(Protocol.UDP)
    open_world.pass_time(UDP_LAPSE_S + 40.0, only=open_world.a)
    assert [type(event) for event in open_world.a.leases.take_events()] == [Lapse]


# Freshness and proofs.


def test_replayed_and_withheld_messages_are_no_sign_of_life(open_world: World) -> None:
    open_world.pass_time(100.0)
    old = [message for side, message in open_world.seen if side is open_world.b]
    silence(open_world)
    lapses = []
    for _ in range(300):
        open_world.pass_time(0.5, only=open_world.a)
        for message in old:
            ends = message.own, message.remote
            open_world.carry(
                open_world.a, open_world.a.leases.receive(message.content, ends, open_world.a.verify, open_world.now)
            )
        lapses += open_world.a.leases.take_events()
        if lapses:
            break
    assert lapses == []  # The kernel has no UDP flows of this pair.
    open_world.pass_time(TCP_LAPSE_S, only=open_world.a)
    assert [type(event) for event in open_world.a.leases.take_events()] == [Lapse]


def test_a_message_under_another_key_does_not_hold(open_world: World) -> None:
    message = next(m for side, m in open_world.seen if side is open_world.b)
    at = LEASE_BYTES - 1
    forged = message.content[:at] + bytes((message.content[at] ^ 1,)) + message.content[at + 1 :]
    with pytest.raises(ProofError):
        open_world.a.leases.receive(forged, (message.own, message.remote), open_world.a.verify, open_world.now)


def presentation(of: Side, to_id: bytes = NO_ID, **changes: Any) -> bytes:
    """Make the presentation of whoever has copied a side's block."""
    flags = LeaseFlag.PROBE | LeaseFlag.PRESENTS
    own = token_id(of.local.token_hash)
    message = LeaseMessage(b"x" * 16, bytes(16), own, to_id, flags, block=of.local.block)
    return encode_lease(message._replace(**changes), None)


def test_a_copied_block_is_answered_and_changes_nothing(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    before = a.leases.worked(open_world.now), len(a.leases)
    sent = [a.leases.receive(presentation(b), (b.address, a.address), b.verify, open_world.now) for _ in range(100)]
    assert 60 <= sum(map(len, sent)) <= 64
    assert (a.leases.worked(open_world.now), len(a.leases)) == before
    open_world.pass_time(100.0)
    assert a.leases.take_events() == b.leases.take_events() == []


def test_a_block_at_another_address_or_under_another_id_does_not_hold(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    with pytest.raises(PeerError, match="the token is of"):
        a.leases.receive(presentation(b), (b"\x0a\x09\x09\x09", a.address), b.verify, open_world.now)
    with pytest.raises(FrameError, match="another token"):
        a.leases.receive(presentation(b, sender=b"y" * 16), (b.address, a.address), b.verify, open_world.now)


def test_a_message_of_an_unknown_token_is_answered_with_a_request_and_that_only_if_it_echoes_ours(
    open_world: World,
) -> None:
    a, b = open_world.a, open_world.b
    stranger = LeaseMessage(b"n" * 16, bytes(16), b"?" * 16, token_id(a.local.token_hash), LeaseFlag(0))
    (request,) = a.leases.receive(encode_lease(stranger, None), (b.address, a.address), b.verify, open_world.now)
    assert decode_lease(request.content).flags == LeaseFlag.REQUEST
    assert b.leases.receive(request.content, (a.address, b.address), b.verify, open_world.now) == []
    answers = [
        a.leases.receive(encode_lease(stranger, None), (b.address, a.address), b.verify, open_world.now)
        for _ in range(100)
    ]
    assert sum(map(len, answers)) < 64


def test_before_its_first_token_an_endpoint_answers_nothing() -> None:
    client, server = make_pair()
    side = Side.of(client)
    assert side.leases.receive(presentation(Side.of(server)), (server.address, client.address), side.verify, 1.0) == []


# New tokens.


def relabelled(side: Side, app: str, later_s: float = 1.0) -> LocalToken:
    return side.sign(replace(side.endpoint.identity, labels={"app": app}), later_s)


def test_a_new_identity_is_presented_at_once_and_reevaluated(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    b.local = relabelled(b, "other")
    open_world.pass_time(0.5)
    (event,) = a.leases.take_events()
    assert isinstance(event, Replaced)
    assert (event.old.labels, event.new.labels) == ({"app": "server"}, {"app": "other"})
    b.log.clear()
    open_world.pass_time(40.0)
    assert b.log
    assert all(not message.block for message in b.log)  # Confirmed.


def test_a_rotated_token_of_the_same_identity_is_presented_and_nothing_is_reevaluated(open_world: World) -> None:
    open_world.a.local = open_world.a.sign(open_world.a.endpoint.identity)
    open_world.pass_time(300.0)
    assert open_world.a.leases.take_events() == open_world.b.leases.take_events() == []


def test_a_presentation_that_is_lost_is_sent_again(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    silence(open_world)
    b.local = relabelled(b, "other")
    open_world.pass_time(1.0)
    open_world.is_lost = lambda _: False
    open_world.pass_time(3.0)
    assert [type(event) for event in a.leases.take_events()] == [Replaced]


def test_both_sides_may_have_new_tokens_at_once(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    a.local, b.local = relabelled(a, "one"), relabelled(b, "two")
    open_world.pass_time(5.0)
    a.local, b.local = relabelled(a, "three", 2.0), relabelled(b, "four", 2.0)
    open_world.pass_time(5.0)
    for side, app in ((a, "four"), (b, "three")):
        last = side.leases.take_events()[-1]
        assert isinstance(last, Replaced)
        assert last.new.labels == {"app": app}


def test_an_older_token_does_not_come_back(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    old = b.local
    b.local = relabelled(b, "other")
    open_world.pass_time(2.0)
    a.leases.take_events()
    b.local = old
    open_world.pass_time(100.0)
    assert a.leases.take_events() == []


def test_presentations_are_paced(monkeypatch: pytest.MonkeyPatch, open_world: World) -> None:
    monkeypatch.setattr(leases, "PRESENTATIONS_PER_S", 2)
    a = open_world.a
    identity = open_world.b.endpoint.identity
    pods = [replace(identity, pod=PodRef("default", f"other-{n}")) for n in range(9)]
    found = [(pod, bytes((10, 3, 0, n)), a.address, Protocol.TCP) for n, pod in enumerate(pods)]
    a.leases.use(found, open_world.now + 0.01, open_world.now)
    silence(open_world)
    open_world.pass_time(2.0, only=a)
    for pair in a.leases._pairs:
        a.leases._schedule(pair, open_world.now + 1_000.0)
    a.log.clear()
    a.local = relabelled(a, "other")
    open_world.pass_time(1.0, only=a)
    assert len(a.log) <= 3


def test_flows_that_an_older_identity_of_a_known_peer_was_judged_by_are_reevaluated(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    older = replace(b.endpoint.identity, labels={"app": "older"})
    a.leases.use([(older, b.address, a.address, Protocol.TCP)], open_world.now, open_world.now)
    (event,) = a.leases.take_events()
    assert isinstance(event, Replaced)
    assert event.old is older


def test_another_pod_of_the_same_name_is_not_heard(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    for pair in a.leases._pairs:
        pair.identity = replace(pair.identity, uid="one")
    b.local = b.sign(replace(b.endpoint.identity, uid="two"))
    open_world.pass_time(2.0)
    assert a.leases.take_events() == []


# Restarts.


@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_a_restart_costs_no_flow(open_world: World, which: str) -> None:
    for side in (open_world.a, open_world.b):
        if which in ("both", "a" if side is open_world.a else "b"):
            side.restart()
            side.leases.tick(side.local, open_world.now)
    open_world.in_use(Protocol.TCP, Protocol.UDP)
    open_world.pass_time(900.0, step=1.0)
    assert open_world.a.leases.take_events() == open_world.b.leases.take_events() == []
    assert open_world.a.leases.unanswered() == open_world.b.leases.unanswered() == 0
    assert len(open_world.a.log) < 60


def test_silence_while_the_own_enforcer_does_not_run_does_not_count(open_world: World) -> None:
    worked = open_world.a.leases.worked(open_world.now)
    open_world.now += 10_000.0
    open_world.a.restart()
    open_world.a.leases.answered = worked
    open_world.in_use(Protocol.TCP)
    open_world.pass_time(100.0)
    assert open_world.a.leases.take_events() == []


def test_silence_before_each_restart_counts(open_world: World) -> None:
    """An enforcer that restarts each two minutes keeps a dead pair's flows no longer than their time."""
    silence(open_world)
    a, ran_s = open_world.a, 0.0
    while not a.leases.take_events():
        assert ran_s < TCP_LAPSE_S + 200.0, "the flows of a dead pair last"
        worked = a.leases.worked(open_world.now)
        open_world.now += 40.0  # While no enforcer runs.
        a.restart()
        a.leases.answered = worked
        open_world.in_use(Protocol.TCP)
        open_world.pass_time(120.0, only=a)
        ran_s += 120.0
    assert ran_s >= TCP_LAPSE_S


@pytest.mark.parametrize("killed_every_s", [25.0, 50.0])
def test_silence_counts_however_often_the_enforcer_is_killed(open_world: World, killed_every_s: float) -> None:
    """What it wrote last counts: five seconds before its end, at most."""
    silence(open_world)
    a, ran_s = open_world.a, 0.0
    while not a.leases.take_events():
        assert ran_s < 2 * TCP_LAPSE_S + 200.0, "the flows of a dead pair last"
        worked = a.leases.worked(open_world.now - 5.0)
        a.restart()
        a.leases.answered = worked
        open_world.in_use(Protocol.TCP)
        open_world.pass_time(killed_every_s, only=a)
        ran_s += killed_every_s
    assert ran_s >= TCP_LAPSE_S


def test_one_that_was_silent_before_a_restart_and_answers_after_it_loses_nothing(open_world: World) -> None:
    a = open_world.a
    silence(open_world)
    open_world.pass_time(UDP_LAPSE_S - 15.0)
    worked = a.leases.worked(open_world.now)
    assert list(worked.values()) > [60.0]
    open_world.is_lost = lambda _: False
    a.restart()
    a.leases.answered = worked
    open_world.in_use(Protocol.TCP, Protocol.UDP)
    open_world.pass_time(TCP_LAPSE_S, step=1.0)
    assert a.leases.take_events() == []
    assert list(a.leases.worked(open_world.now).values()) == [0.0]
    assert list(a.leases.worked(open_world.now, is_last=True).values()) > [0.0]


# Another pod at the address.


def newcomer(side: Side) -> Peer:
    identity = Identity(PodRef("default", "newcomer"), (ip_address(side.address),), {"app": "client"}, {}, "node-2")
    return side.verify(side.endpoint.node.token(identity).block)


def test_a_dead_peer_is_probed_three_times_within_a_second_and_lapses(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    open_world.pass_time(5.0)
    silence(open_world)
    assert a.leases.suspect(newcomer(b), b.address, open_world.now)
    assert a.leases.suspect(newcomer(b), b.address, open_world.now)
    a.log.clear()
    open_world.pass_time(1.3, only=a, step=0.1)
    assert 3 <= len(a.log) <= 4
    (lapse,) = a.leases.take_events()
    assert isinstance(lapse, Lapse)
    assert a.leases.suspect(newcomer(b), b.address, open_world.now)  # Until its flows are ended.
    a.leases.note_ended([lapse])
    assert not a.leases.is_suspected(b.address)


def test_a_live_peer_answers_and_everything_stays(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    open_world.pass_time(5.0)
    assert a.leases.suspect(newcomer(b), b.address, open_world.now)
    open_world.pass_time(3.0, step=0.1)
    assert a.leases.take_events() == []
    assert not a.leases.is_suspected(b.address)


def test_a_proof_of_another_pod_at_the_address_starts_probes(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    open_world.pass_time(5.0)
    a.leases.note(newcomer(b), (b.address, a.address), Protocol.UDP, a.local, open_world.now)
    assert a.leases.is_suspected(b.address)


@pytest.mark.parametrize("restarts", [False, True])
def test_an_answer_of_another_pod_at_the_address_starts_probes(open_world: World, restarts: bool) -> None:
    """Whoever has the address now proves by its own token that it got what was sent to the pod before it."""
    a, b = open_world.a, open_world.b
    worked = a.leases.worked(open_world.now)
    b.restart()
    b.local = b.endpoint.node.token(newcomer(b).identity, WALL + 1.0)
    b.leases.tick(b.local, open_world.now)
    if restarts:
        a.restart()
        a.leases.answered = worked
        own = [(b.endpoint.identity, b.address, a.address, Protocol.UDP)]
        a.leases.use(own, open_world.now, open_world.now)
    open_world.pass_time(35.0, step=0.1)
    (lapse,) = a.leases.take_events()
    assert isinstance(lapse, Lapse)
    assert (lapse.peer.pod, lapse.address) == (b.endpoint.identity.pod, b.address)


def test_one_that_answered_just_now_or_never_is_not_probed(world: World) -> None:
    a, b = world.a, world.b
    world.note()
    assert not a.leases.suspect(newcomer(b), b.address, world.now)
    world.pass_time(1.0)
    assert a.leases.suspect(newcomer(b), b.address, world.now)
    world.pass_time(0.5, step=0.1)
    assert not a.leases.suspect(newcomer(b), b.address, world.now)


def test_what_the_old_pod_said_before_the_suspicion_does_not_clear_it(open_world: World) -> None:
    a, b = open_world.a, open_world.b
    open_world.is_lost = lambda message: message.own == b.address
    open_world.pass_time(31.0)
    withheld = [message for side, message in open_world.seen if side is b][-1]
    assert a.leases.suspect(newcomer(b), b.address, open_world.now)
    a.leases.receive(withheld.content, (b.address, a.address), a.verify, open_world.now)
    assert a.leases.is_suspected(b.address)


# Limits.


def test_pairs_are_limited_and_one_without_flows_makes_room(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(leasepairs, "MAX_PAIRS", 2)
    hits = no_hits()
    a, b = world.a, world.b
    a.leases = Leases(TIMES, a.endpoint.node.context.random, hits)
    a.leases.tick(a.local, 1.0)
    identity = b.endpoint.identity
    pods = [replace(identity, pod=PodRef("default", f"other-{n}")) for n in range(3)]
    found = [(pod, b.address, a.address, Protocol.TCP) for pod in pods]
    a.leases.use(found, 2.0, 2.0)
    assert (len(a.leases), hits[Limit.LEASES]) == (2, 1)
    assert a.leases.receive(presentation(b), (b.address, a.address), a.verify, 2.0) == []
    a.leases.note(a.verify(b.local.block), (b.address, a.address), Protocol.TCP, a.local, 2.0)
    assert len(a.leases) == 2
    a.leases.use(found[:1], 3.0, 3.0)
    assert len(a.leases.receive(presentation(b), (b.address, a.address), a.verify, 3.0)) == 1


# The message.


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[: LEASE_BYTES - 1],
        lambda m: m[:72] + b"\x08" + m[73:],
        lambda m: m[:72] + b"\x02" + m[73:],
        lambda m: m + b"block",
    ],
)
def test_a_malformed_message_is_refused(change: Callable[[bytes], bytes]) -> None:
    message = encode_lease(LeaseMessage(b"n" * 16, b"e" * 16, b"s" * 16, b"r" * 16, LeaseFlag.PROBE), b"k" * 32)
    changed = change(message)
    changed = changed[:6] + len(changed).to_bytes(2, "big") + changed[8:]
    with pytest.raises(FrameError):
        decode_lease(changed)


def test_both_sides_have_the_same_key_whoever_speaks() -> None:
    client, server = make_pair()
    one, other = Side.of(client), Side.of(server)
    assert lease_key(one.local, one.verify(other.local.block)) == lease_key(other.local, other.verify(one.local.block))
