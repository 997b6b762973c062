# SPDX-License-Identifier: Apache-2.0
"""Two endpoints, a wire that loses, repeats and reorders, and an attacker who changes and replays what he saw.

Whatever happens: no data reaches the server's kernel, and no flow is released, before both proofs held; nothing raises,
and nothing grows without bound. Two kernels are played by the rules of the test: each sends what a kernel could.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from enforcer_daemon.datapath.tcp import MAX_WAIT_S
from enforcer_daemon.errors import PacketError
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import find_proof, is_frame, proof_option
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.tcp import ACK, FIN, RST, SYN, SYN_ACK, Segment, build, with_options_and_payload
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Inject, Settle, Verdict
from tests.unit.datapath.pair import (
    ENDING,
    TIMESTAMPS,
    WALL,
    Connection,
    Endpoint,
    FakePolicy,
    Node,
    Result,
    Rules,
    segment,
)

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
NODE = Node("node-1", AUTHORITY)
MAX_HALF_OPEN, MAX_HELD = 4, 3
OPTIONS = [b"", TIMESTAMPS, TIMESTAMPS * 2, b"\x08\x0a" + bytes(8) + b"\0\0"]
SPORTS = st.sampled_from([40_000, 40_001])
ISNS = st.sampled_from([1_000, 0xFFFF_FFF0])
PICK = st.integers(0, 10_000)


def tcp_of(packet: bytes) -> Segment | None:
    """Read a packet that may be of another protocol."""
    try:
        return segment(packet)
    except PacketError:
        return None


class Wire(RuleBasedStateMachine):
    """One client, one server that admits clients alone, and what is between them."""

    @initialize()
    def begin(self) -> None:
        limits = {"max_half_open_flows": MAX_HALF_OPEN, "max_held_packets": MAX_HELD}
        one, two = Node("node-1", AUTHORITY, 1, **limits), Node("node-2", AUTHORITY, 2, **limits)
        self.now = 1.0
        self.client = one.endpoint("client", "10.1.0.2", "client")
        self.server = two.endpoint("server", "10.2.0.2", "server", FakePolicy(ingress=Rules(frozenset({"client"}))))
        self.wire: list[tuple[Endpoint, bytes]] = []
        self.seen: list[bytes] = []
        self.proofs: set[bytes] = set()
        """Proofs that the client's enforcer made: only these can be right."""

    def connection(self, sport: int, isn: int) -> Connection:
        return Connection(self.client, self.server, sport=sport, isn_i=isn, isn_r=(isn * 7 + sport) & 0xFFFF_FFF0)

    # What two kernels send.

    @rule(sport=SPORTS, isn=ISNS, payload=st.sampled_from([b"", b"fast open"]), mark=st.sampled_from([0, 0x8000_1000]))
    def client_syn(self, sport: int, isn: int, payload: bytes, mark: int) -> None:
        syn = self.connection(sport, isn).syn()
        self.send(self.client, with_options_and_payload(segment(syn), segment(syn).options, payload), mark)

    @rule(
        sport=SPORTS,
        isn=ISNS,
        payload=st.sampled_from([b"", b"data"]),
        options=st.sampled_from(OPTIONS),
        flags=st.sampled_from([ACK, ACK | FIN, RST, RST | ACK]),
    )
    def client_segment(self, sport: int, isn: int, payload: bytes, options: bytes, flags: int) -> None:
        connection = self.connection(sport, isn)
        numbers = (connection.isn_i + 1) & 0xFFFF_FFFF, (connection.isn_r + 1) & 0xFFFF_FFFF
        bare = build(self.client.address, self.server.address, (sport, 80), numbers, flags, 502, options)
        self.send(self.client, with_options_and_payload(segment(bare), options, payload))

    @rule(
        sport=SPORTS,
        isn=ISNS,
        flags=st.sampled_from([SYN_ACK, SYN_ACK, SYN_ACK, ACK, RST | ACK]),
        payload=st.sampled_from([b"", b"banner"]),
    )
    def server_segment(self, sport: int, isn: int, flags: int, payload: bytes) -> None:
        connection = self.connection(sport, isn)
        numbers = connection.isn_r, (connection.isn_i + 1) & 0xFFFF_FFFF
        bare = build(self.server.address, self.client.address, (80, sport), numbers, flags, 502, TIMESTAMPS)
        self.send(self.server, with_options_and_payload(segment(bare), TIMESTAMPS, payload))

    @rule(
        sport=SPORTS,
        isn=ISNS,
        steps=st.sampled_from([6, 6, 6, 5, 4, 3, 2, 1]),
        options=st.sampled_from(OPTIONS),
        data=st.booleans(),
    )
    def orderly(self, sport: int, isn: int, steps: int, options: bytes, data: bool) -> None:
        """Go some steps of a handshake without any trouble."""
        for step in range(steps):
            if step == 0:
                self.client_syn(sport, isn, b"", 0)
            elif step == 2:
                self.server_segment(sport, isn, SYN_ACK, b"")
            elif step == 4:
                self.client_segment(sport, isn, b"data" if data else b"", options, ACK)
                self.send_own_packets()
            elif self.wire:
                self.deliver(len(self.wire) - 1)

    # What the wire and time do.

    @rule(pick=PICK)
    def deliver(self, pick: int) -> None:
        if self.wire:
            endpoint, packet = self.wire.pop(pick % len(self.wire))
            self.arrive(endpoint, packet)

    @rule(pick=PICK)
    def repeat(self, pick: int) -> None:
        if self.wire:
            self.wire.append(self.wire[pick % len(self.wire)])

    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        if self.wire:
            self.wire.pop(pick % len(self.wire))

    @rule()
    def send_own_packets(self) -> None:
        for endpoint in (self.client, self.server):
            for packet in endpoint.take_injected():
                self.send(endpoint, packet)

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.5, 80.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for endpoint in (self.client, self.server):
            for effect in endpoint.expire(self.now):
                if isinstance(effect, Inject):  # A SYN-ACK whose proof has not come.
                    endpoint.injected.append(effect.packet)
                    continue
                assert effect.verdict.action in ENDING
                endpoint.held.pop(effect.hold_id)

    @rule(is_server=st.booleans())
    def policy_changes(self, is_server: bool) -> None:
        endpoint = self.server if is_server else self.client
        for effect in endpoint.end_denied(lambda index: True):
            if isinstance(effect, Settle):
                assert effect.verdict.action in ENDING
                endpoint.held.pop(effect.hold_id)

    @rule()
    def repeat_answers(self) -> None:
        """Time passes until every awaited proof is overdue."""
        self.time_passes(MAX_WAIT_S)

    # What the attacker does, with everything that he ever saw.

    @rule(pick=PICK, at_server=st.booleans())
    def replay(self, pick: int, at_server: bool) -> None:
        if self.seen:
            self.arrive(self.server if at_server else self.client, self.seen[pick % len(self.seen)])

    @rule(pick=PICK, at=PICK, value=st.integers(0, 255), at_server=st.booleans())
    def change_a_byte(self, pick: int, at: int, value: int, at_server: bool) -> None:
        if self.seen:
            packet = self.seen[pick % len(self.seen)]
            at %= len(packet)
            self.arrive(self.server if at_server else self.client, packet[:at] + bytes((value,)) + packet[at + 1 :])

    @rule(pick=PICK, from_pick=PICK, sport=SPORTS)
    def cross(self, pick: int, from_pick: int, sport: int) -> None:
        """Put the payload and options of one packet on the headers of another."""
        if self.seen:
            onto, source = (segment(self.seen[n % len(self.seen)]) for n in (pick, from_pick))
            self.arrive(self.server, with_options_and_payload(onto, source.options, source.payload))

    @rule(pick=PICK, payload=st.sampled_from([b"", b"attack"]))
    def strip(self, pick: int, payload: bytes) -> None:
        if self.seen:
            self.arrive(self.server, with_options_and_payload(segment(self.seen[pick % len(self.seen)]), b"", payload))

    @rule(sport=SPORTS, isn=ISNS, is_standalone=st.booleans())
    def forge(self, sport: int, isn: int, is_standalone: bool) -> None:
        self.arrive(
            self.server, self.connection(sport, isn).ack(b"", proof_option(bytes(16), is_standalone=is_standalone))
        )

    @rule(packet=st.binary(max_size=100), at_server=st.booleans(), direction=st.sampled_from(Direction))
    def garbage(self, packet: bytes, at_server: bool, direction: Direction) -> None:
        endpoint = self.server if at_server else self.client
        assert endpoint.verdict(b"\x45" + packet, direction, self.now).action in ENDING

    # Carrying it out, and what must hold.

    def send(self, endpoint: Endpoint, packet: bytes, mark: int = 0) -> None:
        other = self.server if endpoint is self.client else self.client
        verdict = endpoint.verdict(packet, Direction.EGRESS, self.now, mark)
        for left in self.carry_out(endpoint, packet, verdict, Direction.EGRESS):
            self.wire.append((other, left))
            self.seen.append(left)
            found = find_proof(segment(left).options)
            if endpoint is self.client and found is not None:
                self.proofs.add(found.proof)
            if endpoint is self.server:
                assert not segment(left).payload or is_frame(segment(left).payload) or self.is_released(left)

    def is_released(self, packet: bytes) -> bool:
        found = segment(packet)
        key = FlowKey(found.dst, found.src, found.dport, found.sport, Protocol.TCP, Role.RESPONDER)
        session = self.server.context.tables[Protocol.TCP, Role.RESPONDER].get(key)
        return session is not None and session.state is State.RELEASED

    def arrive(self, endpoint: Endpoint, packet: bytes) -> None:
        verdict = endpoint.verdict(packet, Direction.INGRESS, self.now)
        delivered = self.carry_out(endpoint, packet, verdict, Direction.INGRESS)
        if endpoint is not self.server:
            # Another protocol than TCP may reach the client, which no policy isolates.
            assert all(not is_frame(found.payload) for found in map(tcp_of, delivered) if found is not None)
            return
        for found in map(segment, delivered):
            if found.payload or not found.flags & (RST | SYN):
                assert self.is_proven(found.sport)
                event("released to the server's kernel")

    def is_proven(self, sport: int) -> bool:
        """Only a flow whose expected proof the client's enforcer has made may carry anything to the server."""
        flows = self.server.sessions(Protocol.TCP, Role.RESPONDER)
        return any(
            flow.key.remote_port == sport and flow.state is State.RELEASED and flow.proof in self.proofs
            for flow in flows
        )

    def carry_out(
        self, endpoint: Endpoint, packet: bytes, verdict: Result | Verdict, direction: Direction
    ) -> list[bytes]:
        passed = []
        if verdict.action is Action.HOLD:
            assert verdict.hold_id not in endpoint.held
            endpoint.held[verdict.hold_id] = packet
        elif verdict.action not in ENDING:
            passed.append(verdict.payload if verdict.payload is not None else packet)
            assert verdict.action is not Action.RELEASE or verdict.mark
        for effect in verdict.effects if isinstance(verdict, Result) else ():
            if isinstance(effect, Inject):
                endpoint.injected.append(effect.packet)
                continue
            waiting = endpoint.held.pop(effect.hold_id)
            passed += self.carry_out(endpoint, waiting, effect.verdict, direction)
        for report in endpoint.take_reports():
            assert report.reason is not Reason.INTERNAL_ERROR, report.detail
        return passed

    @invariant()
    def tables_are_bounded(self) -> None:
        if not hasattr(self, "client"):
            return
        for endpoint in (self.client, self.server):
            assert endpoint.datapath.half_open_flows <= 2 * MAX_HALF_OPEN
            assert len(endpoint.held) == len(endpoint.context._held)
            assert all(len(session.held) <= MAX_HELD for session in endpoint.datapath.sessions())


TestWire = pytest.mark.slow(Wire.TestCase)
TestWire.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=120),
    st.sampled_from([0x45, 0x60, 0x4F]),
    st.sampled_from(Direction),
    st.integers(0, 0xFFFF_FFFF),
)
def test_process_never_raises(rest: bytes, head: int, direction: Direction, mark: int) -> None:
    endpoint = NODE.endpoint("client", "10.1.0.2", "client")
    verdict = endpoint.verdict(bytes((head,)) + rest, direction, 1.0, mark)
    assert isinstance(verdict, Result)
    assert all(report.reason is not Reason.INTERNAL_ERROR for report in endpoint.take_reports())
