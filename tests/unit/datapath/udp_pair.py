# SPDX-License-Identifier: Apache-2.0
"""Flows of datagrams between two endpoints, a wire that loses, repeats and reorders, and an attacker who changes it.

Whatever happens: nothing reaches a kernel, and no flow is released, before the proofs held; nothing raises, and when
all is over nothing is left. Each step asserts it. tests/property chooses the steps, and so does tests/fuzz.
"""

from __future__ import annotations

from enforcer_daemon.errors import FrameError, PacketError
from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID, STANDALONE_EXID, find_message
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.handshake.frames import TYPE_PROOF, encode_again, encode_proof, frame_type
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.marks import GSO, INDEX_MASK, RELEASED, REPLY
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.udp import UDP_HEADER, UDPDatagram, build_udp, decode_udp, encode_option, with_option
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Effect, Inject, Verdict
from tests.unit.datapath.pair import ENDING, Endpoint, FakePolicy, Node, Result, Rules

MAX_HALF_OPEN, MAX_HELD = 4, 3
DNS = 53
NEVER_S = 1_000.0
"""Longer than anything is kept, seconds."""


def message_of(packet: bytes) -> bytes | None:
    """Give a handshake's message, where there is one that holds."""
    try:
        found = find_message(decode_udp(packet))
    except (FrameError, PacketError):
        return None
    return None if found is None else found[0]


class DatagramWorld:
    """One client, one server that admits clients alone, their kernels' conntrack, and what is between them."""

    def __init__(self, nodes: tuple[Node, Node], addresses: tuple[str, str], is_free: bool) -> None:
        """`is_free`: the client may send to any address; else to the server alone."""
        one, two = nodes
        apps = None if is_free else frozenset({"server"})
        self.now = 1.0
        self.is_free = is_free
        self.client = one.endpoint(
            "client", addresses[0], "client", FakePolicy(Rules(frozenset()), Rules(apps, direction=Direction.EGRESS))
        )
        self.server = two.endpoint("server", addresses[1], "server", FakePolicy(Rules(frozenset({"client"}))))
        self.wire: list[tuple[Endpoint, bytes]] = []
        self.seen: list[bytes] = []
        self.marks: dict[tuple[str, int], int] = {}
        """What each kernel's conntrack holds of the flow from a port of the client: the mark of its release."""
        self.answers: set[bytes] = set()
        """Answers that the server's enforcer made."""
        self.proofs: set[bytes] = set()
        """Proofs that the client's enforcer made."""
        self.sends: set[bytes] = set()
        """What the client's kernel is going to cut."""
        self.delivered = 0
        """Datagrams that the server's kernel got."""
        self.believed: set[bytes] = set()
        """Proofs that the client's enforcer could compute, each after an answer that it believed."""

    # What two kernels send.

    def query(self, port: int, payload: bytes, offloads: int = 0) -> None:
        is_gso = bool(offloads & GSO)
        packet = build_udp(self.client.address, self.server.address, (port, DNS), b"send " * is_gso + payload)
        if is_gso:
            self.sends.add(packet)
        self.send(self.client, packet, offloads)

    def reply(self, port: int) -> None:
        self.send(self.server, build_udp(self.server.address, self.client.address, (DNS, port), b"reply"), REPLY)

    def orderly(self, port: int, steps: int) -> None:
        """Go some steps of a handshake without any trouble."""
        self.query(port, b"query")
        for _ in range(steps):
            self.send_own_packets()
            while self.wire:
                self.deliver(0)

    # What the wire, time and operators do.

    def deliver(self, pick: int) -> None:
        if self.wire:
            self.arrive(*self.wire.pop(pick % len(self.wire)))

    def repeat(self, pick: int) -> None:
        if self.wire:
            self.wire.append(self.wire[pick % len(self.wire)])

    def lose(self, pick: int) -> None:
        if self.wire:
            self.wire.pop(pick % len(self.wire))

    def send_own_packets(self) -> None:
        for endpoint in (self.client, self.server):
            for packet in endpoint.take_injected():
                self.send(endpoint, packet)

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for endpoint in (self.client, self.server):
            self.settle_all(endpoint, endpoint.expire(self.now))

    def policy_changes(self, is_server: bool) -> None:
        endpoint = self.server if is_server else self.client
        self.settle_all(endpoint, endpoint.end_denied(lambda index: True))
        self.forget(is_server)

    def lose_state(self, port: int) -> None:
        """A flow is in use that the server's side has forgotten."""
        self.orderly(port, 6)
        self.time_passes(4.0)
        self.forget(True)
        self.query(port, b"more")
        self.query(port, b"and more")
        while self.wire:
            self.deliver(0)

    def forget(self, is_server: bool) -> None:
        """Conntrack's table is emptied."""
        name = "server" if is_server else "client"
        self.marks = {key: mark for key, mark in self.marks.items() if key[0] != name}

    # What the attacker does, with everything that he ever saw.

    def replay(self, pick: int, at_server: bool) -> None:
        if self.seen:
            self.arrive(self.server if at_server else self.client, self.seen[pick % len(self.seen)])

    def change_a_byte(self, pick: int, at: int, value: int, at_server: bool) -> None:
        if self.seen:
            packet = self.seen[pick % len(self.seen)]
            at %= len(packet)
            self.arrive(self.server if at_server else self.client, packet[:at] + bytes((value,)) + packet[at + 1 :])

    def cross(self, pick: int, from_pick: int, port: int, is_standalone: bool, at_server: bool) -> None:
        """Put a message that was seen beside other data, or on other ports."""
        messages = [message for message in map(message_of, self.seen) if message]
        if messages:
            self.attack(messages[from_pick % len(messages)], port, is_standalone, at_server)

    def forge(self, pick: int, port: int, is_standalone: bool, is_proof: bool) -> None:
        """Make up a proof for a handshake that was seen, or a request for another one."""
        nonces = [message[8:24] for message in map(message_of, self.seen) if message] or [bytes(16)]
        nonce = nonces[pick % len(nonces)]
        self.attack(encode_proof(nonce, bytes(16)) if is_proof else encode_again(nonce), port, is_standalone, is_proof)

    def tamper(self, pick: int, at: int, change: int, port: int, at_server: bool) -> None:
        """Change a byte of a message that was seen, and its checksum with it."""
        messages = [message for message in map(message_of, self.seen) if message]
        if messages:
            message = bytearray(messages[-1 - pick % len(messages)])
            message[at % len(message)] ^= change
            self.attack(bytes(message), port, True, at_server)

    def tamper_with_an_answer(self, port: int, at: int, change: int) -> None:
        """The answer that the client waits for comes with a byte of it changed."""
        self.query(port, b"query")
        self.send_own_packets()
        while self.wire:
            self.deliver(0)
        self.send_own_packets()
        self.tamper(0, at, change, port, False)

    def attack(self, message: bytes, port: int, is_standalone: bool, at_server: bool) -> None:
        ends = (self.client.address, self.server.address) if at_server else (self.server.address, self.client.address)
        ports = (port, DNS) if at_server else (DNS, port)
        if is_standalone:
            packet = build_udp(*ends, ports, b"", encode_option(UDP_HEADER, STANDALONE_EXID, message))
        else:
            packet = with_option(decode_udp(build_udp(*ends, ports, b"attack")), PIGGYBACKED_EXID, message)
        self.arrive(self.server if at_server else self.client, packet)

    # Carrying it out, and what must hold.

    def mark_of(self, endpoint: Endpoint, datagram: UDPDatagram) -> tuple[tuple[str, int], int]:
        port = datagram.dport if datagram.sport == DNS else datagram.sport
        key = endpoint.identity.pod.name, port
        return key, self.marks.get(key, 0)

    def send(self, endpoint: Endpoint, packet: bytes, mark: int = 0) -> None:
        key, released = self.mark_of(endpoint, decode_udp(packet))
        left = [packet]
        if not released:
            verdict = endpoint.verdict(packet, Direction.EGRESS, self.now, mark)
            left = self.carry_out(endpoint, packet, verdict, key)
        other = self.server if endpoint is self.client else self.client
        for each in left:
            self.note(endpoint, each)
            self.wire.append((other, each))

    def note(self, endpoint: Endpoint, packet: bytes) -> None:
        """See what an observer on the wire sees."""
        self.seen.append(packet)
        message = message_of(packet)
        if message is None:
            return
        if endpoint is self.server:
            self.answers.add(message)
        elif frame_type(message) == TYPE_PROOF:
            self.proofs.add(message[-16:])

    def arrive(self, endpoint: Endpoint, packet: bytes) -> None:
        try:
            datagram = decode_udp(packet)
        except PacketError:
            assert endpoint.verdict(packet, Direction.INGRESS, self.now).action is not Action.HOLD
            self.check_reports(endpoint)
            return
        key, released = self.mark_of(endpoint, datagram)
        is_message = message_of(packet) is not None
        if released and not is_message:
            return
        reply = REPLY if endpoint is self.client and (released or datagram.sport == DNS) else 0
        mark = (released & (RELEASED | INDEX_MASK)) | reply
        verdict = endpoint.verdict(packet, Direction.INGRESS, self.now, mark)
        for flow in self.client.sessions(Protocol.UDP, Role.INITIATOR):
            if flow.proof and flow.proof not in self.believed:
                assert message_of(packet) in self.answers, "an answer that the server's enforcer never gave"
                self.believed.add(flow.proof)
        passed = self.carry_out(endpoint, packet, verdict, key)
        for each in passed:
            if decode_udp(each).src in (self.client.address, self.server.address):
                self.check_delivered(endpoint, decode_udp(each))

    def check_delivered(self, endpoint: Endpoint, datagram: UDPDatagram) -> None:
        if endpoint is self.server and datagram.dst == self.server.address:
            assert not datagram.has_surplus or message_of(datagram.packet) is None
            assert self.is_proven(datagram.sport) or datagram.dport != DNS, "delivered without the initiator's proof"
            self.delivered += 1

    def is_proven(self, port: int) -> bool:
        return any(
            flow.key.remote_port == port and flow.state is State.RELEASED and flow.proof in self.proofs
            for flow in self.server.sessions(Protocol.UDP, Role.RESPONDER)
        )

    def settle_all(self, endpoint: Endpoint, effects: tuple[Effect, ...]) -> None:
        other = self.server if endpoint is self.client else self.client
        for effect in effects:
            if isinstance(effect, Inject):
                endpoint.injected.append(effect.packet)
                continue
            waiting = endpoint.held.pop(effect.hold_id)
            key, _ = self.mark_of(endpoint, decode_udp(waiting))
            for left in self.carry_out(endpoint, waiting, effect.verdict, key):
                assert endpoint is self.client, "what waited at the server left by a deadline"
                assert self.is_free, "what waited for an identity left without one"
                self.note(endpoint, left)
                self.wire.append((other, left))

    def carry_out(
        self, endpoint: Endpoint, packet: bytes, verdict: Result | Verdict, key: tuple[str, int]
    ) -> list[bytes]:
        passed = []
        if verdict.action is Action.HOLD:
            assert verdict.hold_id not in endpoint.held
            endpoint.held[verdict.hold_id] = packet
        elif verdict.action not in ENDING:
            assert verdict.payload is None or packet not in self.sends, "rewritten before it was cut"
            passed.append(verdict.payload if verdict.payload is not None else packet)
        if verdict.action in (Action.RELEASE, Action.CONSUME):
            self.check_release(endpoint, verdict, key)
            self.marks[key] = verdict.mark
        for effect in verdict.effects if isinstance(verdict, Result) else ():
            if isinstance(effect, Inject):
                endpoint.injected.append(effect.packet)
                continue
            waiting = endpoint.held.pop(effect.hold_id)
            left = self.carry_out(endpoint, waiting, effect.verdict, key)
            if decode_udp(waiting).src == endpoint.address and endpoint is self.client:
                for each in left:
                    self.note(endpoint, each)
                    self.wire.append((self.server, each))
            else:
                passed += left
        self.check_reports(endpoint)
        return passed

    def check_reports(self, endpoint: Endpoint) -> None:
        for report in endpoint.take_reports():
            assert report.reason is not Reason.INTERNAL_ERROR, report.detail

    def check_release(self, endpoint: Endpoint, verdict: Result | Verdict, key: tuple[str, int]) -> None:
        if not verdict.mark:
            return
        if endpoint is self.server:
            assert self.is_proven(key[1]), "released without the initiator's proof"
        elif not self.is_free:
            flows = self.client.sessions(Protocol.UDP, Role.INITIATOR)
            proven = [flow for flow in flows if flow.state is State.RELEASED and flow.key.own_port == key[1]]
            assert any(flow.proof in self.believed for flow in proven), "released without an answer"

    def check_bounds(self) -> None:
        for endpoint in (self.client, self.server):
            assert endpoint.datapath.half_open_flows <= 3 * MAX_HALF_OPEN
            assert len(endpoint.held) == endpoint.context.held_packets
            assert all(len(session.held) <= 8 for session in endpoint.datapath.sessions())

    def end(self) -> None:
        """When all has come to its end, nothing is left."""
        for step in range(1, 30):
            for endpoint in (self.client, self.server):
                self.settle_all(endpoint, endpoint.expire(self.now + 0.2 * step))
        for endpoint in (self.client, self.server):
            self.settle_all(endpoint, endpoint.expire(self.now + NEVER_S))
            assert endpoint.held == {}
            assert endpoint.context.held_packets == endpoint.datapath.half_open_flows == 0
            assert endpoint.wake_at is None
            named = {session.name for session in endpoint.datapath.sessions()} - {None}
            assert set(endpoint.datapath._udp.responder.sessions.names) == named
            assert not endpoint.datapath._udp.rehandshakes.asked.names
