# SPDX-License-Identifier: Apache-2.0
"""Two endpoints and a wire between them: packets as a kernel would make them, verdicts carried out in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.datapath.context import EndpointContext, FlowReport
from enforcer_daemon.datapath.decisions import FlowPolicy
from enforcer_daemon.datapath.endpoint import EndpointDatapath, Output
from enforcer_daemon.datapath.flowindex import EvaluatedBy, FlowIndex
from enforcer_daemon.datapath.networks import Networks
from enforcer_daemon.datapath.node import NodeContext
from enforcer_daemon.handshake.flowkey import Role
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.local import LocalToken, sign_local_token
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.identity.authority import Authority, issue_credential, make_authority, node_spiffe_id
from enforcer_daemon.identity.credential import TrustBundle, decode_credential
from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, PodRef, Protocol, RuleRef
from enforcer_daemon.packet.tcp import ACK, SYN, SYN_ACK, Segment, build, decode_tcp, with_options_and_payload
from enforcer_daemon.packet.udp import UDP, build_udp, decode_udp
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith, NetworkSettings
from enforcer_daemon.verdict import Action, Effect, Inject, Settle, Verdict

WALL = 1_800_000_000.0
ENDING = (Action.DROP, Action.CONSUME, Action.TAKE)
"""After these a packet goes no further."""
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(8)
SYN_OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x08\x0a" + bytes(8) + b"\x01\x03\x03\x07"


class Result(NamedTuple):
    """What an endpoint's datapath wants done with a packet, and beside it."""

    action: Action
    payload: bytes | None = None
    mark: int = 0
    hold_id: int = 0
    effects: tuple[Effect, ...] = ()
    when_drained: bool = False


ACCEPTED, DROPPED, TAKEN = Result(Action.ACCEPT), Result(Action.DROP), Result(Action.TAKE)


def is_lease(packet: bytes) -> bool:
    """Tell lease messages from other packets of an enforcer's own."""
    if packet[9 if packet[0] >> 4 == 4 else 6] != UDP:
        return False
    datagram = decode_udp(packet)
    return (datagram.sport, datagram.dport) == (LEASE_PORT, LEASE_PORT)


@dataclass
class Rules:
    """One direction of a fake policy: allowed labels `app`, and whether addresses are."""

    apps: frozenset[str] | None = None
    addresses: bool = False
    direction: Direction = Direction.INGRESS

    @property
    def is_isolated(self) -> bool:
        return self.apps is not None

    def evaluate(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Decision:
        if self.apps is None:
            return Decision(True, Reason.NOT_ISOLATED, self.direction)
        rules = (RuleRef("default", "fake", 0),)
        if self.addresses if peer is None else peer.labels.get("app") in self.apps:
            return Decision(True, Reason.POLICY, self.direction, rules)
        denied = Reason.INGRESS_DENIED if self.direction is Direction.INGRESS else Reason.EGRESS_DENIED
        return Decision(False, denied, self.direction, rules)

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol) -> bool:
        return self.apps is None or bool(self.apps) or self.addresses


@dataclass
class FakePolicy:
    """Both directions of a fake policy."""

    ingress: Rules = field(default_factory=Rules)
    egress: Rules = field(default_factory=lambda: Rules(direction=Direction.EGRESS))


class Node:
    """A node: its key, its credential and what its endpoints share."""

    def __init__(self, name: str, authority: Authority, seed: int = 1, **options: object) -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.fromtimestamp(WALL, UTC)
        certificate = issue_credential(
            authority, self.key.public_key(), node_spiffe_id("cluster.local", name), now, timedelta(days=1)
        )
        self.credential = decode_credential(certificate.public_bytes(Encoding.DER))
        settings = HandshakeLimits(**options)  # type: ignore[arg-type]
        self.verifier = PeerVerifier(TrustBundle([authority.certificate]), settings)
        self.true_sources: dict[bytes, bytes] = {}
        self.true_destinations: dict[tuple[bytes, int], tuple[bytes, int]] = {}
        networks = NetworkSettings(
            enforced=(IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/16")), virtual=(IPv4Network("10.96.0.0/12"),)
        )
        self.context = NodeContext(
            settings,
            DenyWith.DROP,
            Networks(networks),
            self.verifier,
            random.Random(seed).randbytes,
            lambda protocol, src, sport, dst, dport: self.true_sources.get(src),
            lambda protocol, src, sport, dst, dport: self.true_destinations.get((dst, dport)),
        )
        self.context.wall_offset_s = WALL

    def token(self, identity: Identity, issued: float = WALL, lifetime: float = 600.0) -> LocalToken:
        return sign_local_token(
            identity,
            self.credential,
            self.key,
            X25519PrivateKey.generate(),
            b"unique",
            (issued, issued + lifetime),
        )

    def endpoint(self, name: str, address: str, app: str, policy: FakePolicy | None = None) -> Endpoint:
        identity = Identity(PodRef("default", name), (ip_address(address),), {"app": app}, {"team": "a"}, self.name)
        return Endpoint(self, identity, policy or FakePolicy(), self.token(identity))


class Endpoint:
    """A pod with its datapath; the packets that are held for it."""

    def __init__(self, node: Node, identity: Identity, policy: FakePolicy, token: LocalToken) -> None:
        self.node = node
        self.identity = identity
        self.address = identity.ips[0].packed
        self.index = FlowIndex()
        flow_policy = FlowPolicy(node.context, identity.pod, identity.trust_domain, policy, self.index)
        self.context = EndpointContext(identity.pod, node.context, flow_policy, token, 1500)
        self.datapath = EndpointDatapath(self.context)
        self.held: dict[int, bytes] = {}
        self.reports: list[FlowReport] = []
        self.wake_at: float | None = None
        """When the datapath wants its timers run, by its last output."""
        self.injected: list[bytes] = []
        """Packets of the enforcer's own, not yet sent."""
        self._waiting: tuple[list[Effect], list[Inject]] = [], []

    def begun_anew(self) -> Endpoint:
        """Give the same pod, of the same node and token, that has no connections yet."""
        return Endpoint(self.node, self.identity, FakePolicy(), self.context.local)

    def forget_round_trip(self, peer: Endpoint) -> None:
        """Know a peer's identity already, but not how far away it is: as at the first handshake, without its price."""
        self.node.context.verify(peer.context.local.block, peer.address, 1.0).round_trip_s = 0.0

    def send(self, packet: bytes, now: float = 1.0, mark: int = 0) -> list[bytes]:
        """Give a packet of the pod's kernel to the datapath; answer what leaves for the wire, in order."""
        return self._carry_out(packet, Direction.EGRESS, now, mark)

    def receive(self, packet: bytes, now: float = 1.0, mark: int = 0) -> list[bytes]:
        """Give a packet of the wire to the datapath; answer what the pod's kernel gets, in order."""
        return self._carry_out(packet, Direction.INGRESS, now, mark)

    def verdict(self, packet: bytes, direction: Direction, now: float = 1.0, mark: int = 0) -> Result:
        output = self.datapath.process(packet, direction, mark, now)
        effects = self.note(output)
        action, payload, released, hold_id, when_drained = output.verdict
        return Result(action, payload, released, hold_id, effects, when_drained)

    def note(self, output: Output) -> tuple[Effect, ...]:
        """Take over what an output says beside its effects, as the shell does."""
        self.reports += output.reports
        self.wake_at = output.wake_at
        return tuple(output.effects)

    def take_reports(self) -> list[FlowReport]:
        """Return the decisions since the last call."""
        reports, self.reports = self.reports, []
        return reports

    def expire(self, now: float) -> tuple[Effect, ...]:
        """Run the timers; return the effects but for lease messages."""
        self._run_timers(now)
        effects = tuple(self._waiting[0])
        self._waiting[0].clear()
        return effects

    def renew(self, now: float) -> tuple[Inject, ...]:
        """Run the timers; return the lease messages that are due."""
        self._run_timers(now)
        messages = tuple(self._waiting[1])
        self._waiting[1].clear()
        return messages

    def _run_timers(self, now: float) -> None:
        for effect in self.note(self.datapath.run_timers(now)):
            if isinstance(effect, Inject) and is_lease(effect.packet):
                self._waiting[1].append(effect)
            else:
                self._waiting[0].append(effect)

    def end_denied(self, is_denied: Callable[[EvaluatedBy], bool]) -> tuple[Effect, ...]:
        """Change the policy so that it no longer allows some flows."""
        return self.note(self.datapath.end_denied(is_denied))

    def end_opening(self) -> None:
        """Change the identity; what waits is dropped."""
        for effect in self.note(self.datapath.end_opening()):
            assert isinstance(effect, Settle)
            assert effect.verdict.action is Action.DROP
            self.held.pop(effect.hold_id, None)

    def sessions(self, protocol: Protocol, role: Role) -> list[Session]:
        """Return the sessions of a protocol and role, without rivals."""
        return self.context.tables[protocol, role].known()

    def _carry_out(self, packet: bytes, direction: Direction, now: float, mark: int) -> list[bytes]:
        result = self.verdict(packet, direction, now, mark)
        return self._apply(packet, result) + self._apply_effects(result.effects)

    def _apply(self, packet: bytes, verdict: Verdict | Result) -> list[bytes]:
        out: list[bytes] = []
        if verdict.action is Action.HOLD:
            self.held[verdict.hold_id] = packet
        elif verdict.action not in ENDING:
            out.append(verdict.payload or packet)
        return out

    def _apply_effects(self, effects: tuple[Effect, ...]) -> list[bytes]:
        out: list[bytes] = []
        for effect in effects:
            match effect:
                case Settle(hold_id, settled):
                    out += self._apply(self.held.pop(hold_id), settled)
                case Inject(injected):
                    self.injected.append(injected)
        return out

    def take_injected(self) -> list[bytes]:
        """Return the enforcer's own packets since the last call, unsent."""
        taken, self.injected = self.injected, []
        return taken

    def flush_injected(self, now: float = 1.0) -> list[bytes]:
        """Send the enforcer's own packets through the queue, as the raw socket would."""
        return [packet for own in self.take_injected() for packet in self.send(own, now)]

    def reasons(self) -> list[str]:
        return [report.reason.value for report in self.take_reports()]


def make_pair(
    client_policy: FakePolicy | None = None, server_policy: FakePolicy | None = None, **options: object
) -> tuple[Endpoint, Endpoint]:
    """Make a client on one node and a server on another."""
    authority = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
    one, two = Node("node-1", authority, 1, **options), Node("node-2", authority, 2, **options)
    return one.endpoint("client", "10.1.0.2", "client", client_policy), two.endpoint(
        "server", "10.2.0.2", "server", server_policy
    )


@dataclass
class Connection:
    """What two kernels send in a handshake, with ISNs 1000 and 5000."""

    client: Endpoint
    server: Endpoint
    sport: int = 40000
    dport: int = 80
    isn_i: int = 1000
    isn_r: int = 5000

    def syn(self) -> bytes:
        ports = self.sport, self.dport
        return build(self.client.address, self.server.address, ports, (self.isn_i, 0), SYN, 64240, SYN_OPTIONS)

    def syn_ack(self) -> bytes:
        numbers = self.isn_r, self.isn_i + 1
        ports = self.dport, self.sport
        return build(self.server.address, self.client.address, ports, numbers, SYN_ACK, 65160, SYN_OPTIONS)

    def ack(self, payload: bytes = b"", options: bytes = TIMESTAMPS, offset: int = 0) -> bytes:
        numbers = self.isn_i + 1 + offset, self.isn_r + 1
        ports = self.sport, self.dport
        bare = build(self.client.address, self.server.address, ports, numbers, ACK, 502, options)
        return with_options_and_payload(decode_tcp(bare), options, payload)


def connect(connection: Connection) -> None:
    """Go as far as the SYN-ACK's delivery."""
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    (syn_ack,) = connection.server.send(connection.syn_ack())
    connection.client.receive(syn_ack)


def release(connection: Connection) -> None:
    """Finish the handshake."""
    connect(connection)
    (ack,) = connection.client.send(connection.ack())
    connection.server.receive(ack)


def release_datagrams(client: Endpoint, server: Endpoint, ports: tuple[int, int]) -> None:
    """Go through a whole handshake of a UDP flow."""
    for packet in client.send(build_udp(client.address, server.address, ports, b"query")):
        server.receive(packet)
    for answer in server.flush_injected():
        client.receive(answer)
    for proof in client.flush_injected():
        server.receive(proof)


def segment(packet: bytes) -> Segment:
    return decode_tcp(packet)


def v4(text: str) -> bytes:
    return IPv4Address(text).packed
