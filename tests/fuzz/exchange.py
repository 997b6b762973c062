# SPDX-License-Identifier: Apache-2.0
"""The target of whole handshakes: an input is a script of what two kernels send and an attacker does with it.

Both enforcers are real and share nothing but the wire. The client's egress and the server's ingress are isolated, so
whatever is released must have been proven: the client releases only after a frame that the server's enforcer made, bit
for bit, and the server only for a flow whose proof the client's enforcer made. No input may raise in either. Each
script is played in both families.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime

from enforcer_daemon.datapath.node import NodeContext
from enforcer_daemon.errors import PacketError
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.handshake.frames import find_proof, proof_option
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.identity.credential import TrustBundle
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.tcp import ACK, FIN, PSH, RST, SYN_ACK, Segment, build, decode_tcp, with_options_and_payload
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Effect, Inject, Verdict
from tests.unit.datapath.pair import (
    ENDING,
    SYN_OPTIONS,
    TIMESTAMPS,
    WALL,
    Connection,
    Endpoint,
    FakePolicy,
    Node,
    Result,
    Rules,
)

MAX_STEPS = 64
_MAX_RECORDED = 256
_OPTIONS = (b"", TIMESTAMPS, TIMESTAMPS * 2, TIMESTAMPS * 2 + b"\1\1\1\1", b"\x08\x0a" + bytes(8) + b"\0\0")
_LATER_FLAGS = (ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, 0)
BOUNDS = {"max_half_open_flows": 4, "max_held_packets": 3}
ADDRESSES = (("10.1.0.2", "10.2.0.2"), ("fd01::2", "fd02::2"))
"""Of client and server, in each family."""
_NUMBERS = 0xFFFF_FFFF
_NONCE = slice(8, 24)  # of a frame
_DER_BYTES = 362
_AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))


def _node(name: str) -> Node:
    """Make a node whose certificate has the usual length (signatures vary by some bytes), so that a script's places
    mean the same bytes in every run.
    """
    while True:
        node = Node(name, _AUTHORITY, **BOUNDS)
        if len(node.credential.der) == _DER_BYTES:
            return node


NODES = _node("node-1"), _node("node-2")


class Script:
    """The input, read piece by piece; after its end everything is zero."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._content)

    def number(self, below: int, length: int = 1) -> int:
        return int.from_bytes(self.take(length), "big") % below

    def take(self, length: int) -> bytes:
        taken = self._content[self._at : self._at + length]
        self._at += length
        return taken.ljust(length, b"\0")


class Exchange:
    """One client, one server, the wire between them, and what an observer has seen on it."""

    def __init__(self, script: Script, addresses: tuple[str, str]) -> None:
        self.script = script
        self.now = 1.0
        self.recorded: list[bytes] = []
        self.frames: set[bytes] = set()
        """SYN-ACK payloads that the server's enforcer made."""
        self.proofs: set[bytes] = set()
        """Proofs that the client's enforcer made."""
        self.answered: set[bytes] = set()
        """Proofs that the client's enforcer could compute, each after an answer that it believed."""
        self.own: list[tuple[Endpoint, bytes]] = []
        one, two = NODES
        for seed, node in enumerate(NODES):
            renew(node, seed)
        nobody = Rules(frozenset())
        self.client = one.endpoint(
            "client",
            addresses[0],
            "client",
            FakePolicy(nobody, Rules(frozenset({"server"}), direction=Direction.EGRESS)),
        )
        self.server = two.endpoint(
            "server",
            addresses[1],
            "server",
            FakePolicy(Rules(frozenset({"client"})), Rules(frozenset(), direction=Direction.EGRESS)),
        )

    def run(self) -> None:
        steps: tuple[Callable[[], None], ...] = (
            self.orderly,
            self.client_syn,
            self.server_syn_ack,
            self.later_segment,
            self.deliver_changed,
            self.deliver_changed,
            self.splice,
            self.raw,
            self.send_own,
            self.wait,
            self.change_policy,
            self.forge,
        )
        for _ in range(MAX_STEPS):
            if self.script.is_over:
                return
            steps[self.script.number(len(steps))]()
            for endpoint in (self.client, self.server):
                assert endpoint.datapath.half_open_flows <= 2 * BOUNDS["max_half_open_flows"]

    # What kernels send.

    def connection(self) -> Connection:
        choice = self.script.number(8)
        isn = (1_000, 0xFFFF_FFFE)[choice >> 1 & 1]
        return Connection(self.client, self.server, 40_000 + (choice & 1), 80, isn, 5_000 + (choice >> 2))

    def client_syn(self) -> None:
        self.send(self.client, self.connection().syn())

    def server_syn_ack(self) -> None:
        self.send(self.server, _syn_ack(self.connection()))

    def later_segment(self) -> None:
        connection = self.connection()
        options = _OPTIONS[self.script.number(len(_OPTIONS))]
        flags = _LATER_FLAGS[self.script.number(len(_LATER_FLAGS))]
        self.send(self.client, _later(connection, flags, b"data" * self.script.number(3), options))

    def orderly(self) -> None:
        """Go some steps of a handshake without trouble."""
        connection = self.connection()
        options = _OPTIONS[self.script.number(len(_OPTIONS))]
        last = self.script.number(6)
        packets = (connection.syn(), _syn_ack(connection), _later(connection, ACK, b"", options))
        for step, packet in enumerate(packets):
            sender, receiver = (self.server, self.client) if step == 1 else (self.client, self.server)
            left = self.send(sender, packet)
            if 2 * step >= last:
                return
            for each in left:
                self.arrive(receiver, each)

    # What an attacker on the wire does.

    def receiver(self) -> Endpoint:
        return (self.server, self.client)[self.script.number(2)]

    def pick(self) -> bytes:
        return self.recorded[-1 - self.script.number(len(self.recorded))] if self.recorded else b""

    def deliver_changed(self) -> None:
        """Deliver what was seen, once more and with some bytes changed."""
        packet, receiver = bytearray(self.pick()), self.receiver()
        for _ in range(self.script.number(5)):
            place, value = self.script.number(max(len(packet), 1), 2), self.script.number(256)
            packet[place : place + 1] = bytes((value,))
        self.arrive(receiver, bytes(packet), 0x8000_1000 if self.script.number(4) == 3 else 0)

    def splice(self) -> None:
        """Put the options or the payload of one packet on another."""
        onto, source = _tcp(self.pick()), _tcp(self.pick())
        if onto is None or source is None or onto.end > len(onto.packet):
            return
        choice = self.script.number(4)
        options = source.options if choice & 1 else onto.options
        payload = source.payload if choice & 2 else onto.payload
        self.arrive(self.receiver(), with_options_and_payload(onto, options, payload))

    def forge(self) -> None:
        """Send the server an ACK with a proof that is made up."""
        connection, kind = self.connection(), self.script.number(4)
        option = proof_option(self.script.take(16), is_standalone=bool(kind & 1))
        self.arrive(self.server, _later(connection, ACK, b"data" if kind & 2 else b"", option))

    def raw(self) -> None:
        receiver = self.receiver()
        packet = self.script.take(self.script.number(96))
        if self.script.number(2):
            self.send(receiver, packet)
        else:
            self.arrive(receiver, packet)

    # What else happens.

    def send_own(self) -> None:
        own, self.own = self.own, []
        for endpoint, packet in own:
            self.send(endpoint, packet)

    def wait(self) -> None:
        self.now += (0.01, 0.5, 1.5, 80.0)[self.script.number(4)]
        for endpoint in (self.client, self.server):
            for effect in endpoint.expire(self.now):
                self.settle(endpoint, effect)

    def change_policy(self) -> None:
        receiver = self.receiver()
        for effect in receiver.end_denied(lambda _: True):
            self.settle(receiver, effect)

    # Carrying it out, and what must hold.

    def send(self, endpoint: Endpoint, packet: bytes) -> list[bytes]:
        left = self.carry_out(endpoint, packet, endpoint.verdict(packet, Direction.EGRESS, self.now))
        for each in left:
            self.recorded = [*self.recorded[1 - _MAX_RECORDED :], each]
            found = _tcp(each)
            if found is None:
                continue
            proof = find_proof(found.options)
            if endpoint is self.server:
                self.frames.add(found.payload)
            elif proof is not None:
                self.proofs.add(proof.proof)
        return left

    def arrive(self, endpoint: Endpoint, packet: bytes, mark: int = 0) -> None:
        self.carry_out(endpoint, packet, endpoint.verdict(packet, Direction.INGRESS, self.now, mark))
        for flow in self.client.sessions(Protocol.TCP, Role.INITIATOR):
            if flow.proof and flow.proof not in self.answered:
                assert decode_tcp(packet).payload in self.frames, "an answer that the server's enforcer never gave"
                self.answered.add(flow.proof)

    def carry_out(self, endpoint: Endpoint, packet: bytes, verdict: Result | Verdict) -> list[bytes]:
        for report in endpoint.take_reports():
            assert report.reason is not Reason.INTERNAL_ERROR, report.detail
        passed = []
        if verdict.action is Action.HOLD:
            assert verdict.hold_id not in endpoint.held
            endpoint.held[verdict.hold_id] = packet
        elif verdict.action not in ENDING:
            passed.append(packet if verdict.payload is None else verdict.payload)
        if verdict.action is Action.RELEASE:
            self.check_release(endpoint, packet)
        for effect in verdict.effects if isinstance(verdict, Result) else ():
            passed += self.settle(endpoint, effect)
        return passed

    def settle(self, endpoint: Endpoint, effect: Effect) -> list[bytes]:
        if isinstance(effect, Inject):
            decode_tcp(effect.packet)
            self.own.append((endpoint, effect.packet))
            return []
        return self.carry_out(endpoint, endpoint.held.pop(effect.hold_id), effect.verdict)

    def check_release(self, endpoint: Endpoint, packet: bytes) -> None:
        segment = decode_tcp(packet)
        ports = {segment.sport, segment.dport}
        flows = [
            flow
            for role in Role
            for flow in endpoint.sessions(Protocol.TCP, role)
            if flow.state is State.RELEASED and {flow.key.remote_port, (flow.alias or flow.key).own_port} == ports
        ]
        assert flows, "released without a flow"
        for flow in flows:
            self.check_proven(endpoint, flow)

    def check_proven(self, endpoint: Endpoint, flow: Session) -> None:
        assert flow.peer is not None
        if flow.key.role is Role.INITIATOR:
            assert endpoint is self.client, "the server opened a connection that policy denies"
            assert flow.peer.identity.pod == self.server.identity.pod
        else:
            assert endpoint is self.server, "the client took a connection that policy denies"
            assert flow.peer.identity.pod == self.client.identity.pod
            assert flow.nonce_r in {frame[_NONCE] for frame in self.frames}
            assert flow.proof in self.proofs, "released without the initiator's proof"


def exchange(content: bytes) -> None:
    """Play the script, once in each family."""
    for addresses in ADDRESSES:
        Exchange(Script(content), addresses).run()


def renew(node: Node, seed: int) -> None:
    """Give the node's tables and random numbers a fresh start; its key and certificate stay."""
    old = node.context
    node.verifier = PeerVerifier(TrustBundle([_AUTHORITY.certificate]), old.settings)
    node.context = NodeContext(
        old.settings,
        old.deny_with,
        old.networks,
        node.verifier,
        random.Random(seed).randbytes,
        old.true_source,
        old.true_destination,
    )
    node.context.wall_offset_s = WALL


def _syn_ack(connection: Connection) -> bytes:
    numbers = connection.isn_r, (connection.isn_i + 1) & _NUMBERS
    ports = connection.dport, connection.sport
    return build(connection.server.address, connection.client.address, ports, numbers, SYN_ACK, 65_160, SYN_OPTIONS)


def _later(connection: Connection, flags: int, payload: bytes, options: bytes) -> bytes:
    numbers = (connection.isn_i + 1) & _NUMBERS, (connection.isn_r + 1) & _NUMBERS
    ports = connection.sport, connection.dport
    bare = build(connection.client.address, connection.server.address, ports, numbers, flags, 502, options)
    return with_options_and_payload(decode_tcp(bare), options, payload)


def _tcp(packet: bytes) -> Segment | None:
    try:
        return decode_tcp(packet)
    except PacketError:
        return None
