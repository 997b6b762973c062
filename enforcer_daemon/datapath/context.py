# SPDX-License-Identifier: Apache-2.0
"""What the two sides of an endpoint's handshakes share: the node, the endpoint, its reports and its held packets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import NamedTuple

from enforcer_daemon.datapath.judging import Destination, Judge, Networks
from enforcer_daemon.datapath.own import OwnPackets
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.bounds import Bound, FairTable
from enforcer_daemon.handshake.datagrams import LONE_EXID
from enforcer_daemon.handshake.flows import Flow
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.leasepairs import LeaseTimes
from enforcer_daemon.handshake.leases import Leases, Outgoing
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.peers import Peer, PeerVerifier
from enforcer_daemon.handshake.placement import Placement
from enforcer_daemon.marks import NODE
from enforcer_daemon.model import Decision, Direction, Identity, PodRef, RuleRef
from enforcer_daemon.packet.tcp import ACK, RST, SYN, Segment, build, with_payload
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, encode_option
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith
from enforcer_daemon.verdict import ACCEPT, DROP, Action, Inject, Settle, Verdict

TrueSource = Callable[[int, bytes, int, bytes, int], bytes | None]
"""(protocol, source, source port, destination, destination port) of a packet that came from one of the node's addresses
-> the packed address it really came from: the same where the node itself sent it, None where the node does not know."""

HOLD_S = 1.0
"""How long a packet waits for its flow's proof, seconds."""
_FINISHED = b"finished"
"""In place of the connection that used a nonce; no connection has this name."""
_NUMBERS = 0xFFFF_FFFF
_PORTS = Struct("!HH")


class FlowReport(NamedTuple):
    """One decision on a flow, for logs, counters and operators."""

    is_allowed: bool
    reason: Reason
    direction: Direction
    protocol: int
    remote: bytes
    """Packed address; empty where the packet could not be read."""
    port: int | None
    """Destination port."""
    peer: Identity | None
    rules: tuple[RuleRef, ...]
    detail: str


class _Held(NamedTuple):
    """A packet that waits in the kernel's queue."""

    hold_id: int
    deadline: float
    flow: Flow


class NodeContext:
    """What the endpoints of a node share."""

    __slots__ = (
        "_nonces",
        "addresses",
        "bound_hits",
        "deny_with",
        "lease_times",
        "networks",
        "placement",
        "random",
        "settings",
        "true_source",
        "verifier",
        "wall_offset_s",
    )

    def __init__(
        self,
        settings: HandshakeLimits,
        deny_with: DenyWith,
        networks: Networks,
        verifier: PeerVerifier,
        random: Callable[[int], bytes],
        true_source: TrueSource,
    ) -> None:
        self.settings = settings
        self.deny_with = deny_with
        self.networks = networks
        self.verifier = verifier
        self.random = random
        """Cryptographically strong random bytes."""
        self.true_source = true_source
        self.addresses: frozenset[bytes] = frozenset()
        """Packed addresses of the node's own interfaces."""
        self.wall_offset_s = 0.0
        """Unix time less monotonic time."""
        self.bound_hits = verifier.bound_hits
        self.placement: Placement | None = None
        """Whether pods are where their nodes say; None: that is not looked up."""
        self.lease_times = LeaseTimes()
        self._nonces: FairTable[bytes, bytes] = FairTable(settings.max_nonces, settings.max_nonces)
        """Whoever used most is forgotten first."""

    def trace(self, protocol: int, source: tuple[bytes, int], destination: tuple[bytes, int]) -> tuple[bytes, bool]:
        """Give the address that a packet really came from, and whether the node itself sent it."""
        address = source[0]
        if address not in self.addresses:
            return address, False
        true_source = self.true_source(protocol, *source, *destination)
        return true_source or address, true_source == address

    def verify(self, block: bytes, source: bytes, now: float) -> Peer:
        """Give the peer of an identity block that came from an address; raise PeerError where it does not hold."""
        is_pod = self.networks.destination(source) is Destination.ENFORCED
        peer = self.verifier.verify(block, source, now, now + self.wall_offset_s, is_pod=is_pod)
        if self.placement is not None:
            self.placement.require(peer.identity, now)
        return peer

    def finish_nonce(self, nonce: bytes, source: bytes) -> None:
        """Let no SYN with this nonce be offered again: its connection was released."""
        if self._nonces.get(nonce) is not None:
            self._nonces.put(nonce, _FINISHED, source)

    def use_nonce(self, nonce: bytes, connection: bytes, source: bytes) -> None:
        """Remember an initiator's nonce; raise PeerError where it was used before.

        `connection` names the flow and its ISN. One that ended before its SYN is retransmitted (a lost RST) is offered
        again; empty where another handshake of these ports is under way, which no old SYN may replace. `source` is the
        pod's address, verified.
        """
        used = self._nonces.get(nonce)
        if used is not None and used != connection:
            raise PeerError(Reason.REPLAYED_NONCE)
        if self._nonces.put(nonce, connection, source) is not None:
            self.bound_hits[Bound.NONCES] += 1


class EndpointContext:
    """What the parts of one endpoint's datapath share."""

    __slots__ = (
        "_held",
        "_hold_ids",
        "_own",
        "fresh_until",
        "judge",
        "leases",
        "local",
        "lost_reports",
        "mtu",
        "node",
        "pod",
        "reports",
    )

    def __init__(self, pod: PodRef, node: NodeContext, judge: Judge, local: LocalToken, mtu: int) -> None:
        self.pod = pod
        self.node = node
        self.judge = judge
        self.local = local
        """The token for new flows; unfinished flows keep the one they began with."""
        self.mtu = mtu
        self.leases = Leases(node.lease_times, node.random, node.bound_hits)
        self.fresh_until = 0.0
        """Until when peers may still have released flows of a pod that had the address before, or of this pod under an
        identity that it no longer has; monotonic seconds."""
        self.reports: list[FlowReport] = []
        self.lost_reports = 0
        self._hold_ids = 0
        settings = node.settings
        self._held: FairTable[int, _Held] = FairTable(
            settings.max_held_packets_per_pod, settings.max_held_packets_per_source
        )
        self._own = OwnPackets(settings.max_own_packets, node.bound_hits)

    def is_own_address(self, address: bytes) -> bool:
        """Tell whether a packed address is the pod's own."""
        return any(own.packed == address for own in self.local.identity.ips)

    def refuse_reflection(self, source: bytes, destination: bytes) -> None:
        """Raise PeerError for a packet that the pod sent to a group or to all, and a bridge brought back to it.

        To release its flow would release what the pod sends there next, whatever its egress policy says.
        """
        if self.is_own_address(source) and not self.is_own_address(destination):
            raise PeerError(Reason.SPOOFED_SOURCE, "the pod's own packet to others, reflected")

    def let_in(self, destination: bytes, release: Verdict) -> Verdict:
        """Return how an allowed packet comes in: one to a group, or to all, releases no flow.

        Its sender may be the pod itself, under a link-local address that a bridge reflects.
        """
        is_one = release.mark & NODE or self.is_own_address(destination)
        return release if is_one else ACCEPT

    def report(
        self,
        direction: Direction,
        remote: bytes,
        port: int | None,
        decision: Decision,
        *,
        protocol: int = 6,
        peer: Identity | None = None,
        detail: str = "",
    ) -> None:
        """Leave a decision for the shell to log and count."""
        if len(self.reports) >= self.node.settings.max_reports:
            self.lost_reports += 1
            self.node.bound_hits[Bound.REPORTS] += 1
            return
        self.reports.append(
            FlowReport(
                decision.is_allowed, decision.reason, direction, protocol, remote, port, peer, decision.rules, detail
            )
        )

    def inject(self, key: bytes, segment: bytes, flags: int, numbers: tuple[int, int]) -> Inject:
        """Send a packet of our own towards the peer, and know it again when it passes the queue."""
        self._own.add((key, flags, *numbers))
        return Inject(segment)

    def is_injected(self, key: bytes, segment: Segment) -> bool:
        """Tell whether the enforcer itself sent this packet; as often as it did."""
        if segment.data < segment.end:  # Not ours, whatever its numbers.
            return False
        return self._own.take((key, segment.flags, segment.seq, segment.ack))

    def send_message(self, key: bytes, content: bytes) -> Inject:
        """Send a message alone, in a datagram of our own from the pod to the flow's other end.

        It does not count in the pod's conntrack: while a datagram is held, it would open the flow the wrong way round.
        """
        half = (len(key) - 4) // 2
        far_port, near_port = _PORTS.unpack(key[-4:])
        surplus = encode_option(UDP_HEADER, LONE_EXID, content)
        packet = build_udp(key[half:-4], key[:half], (near_port, far_port), b"", surplus)
        self._own.add((key, hash(content)))
        return Inject(packet, is_untracked=True)

    def send_leases(self, messages: Iterable[Outgoing]) -> tuple[Inject, ...]:
        """Send lease messages from the pod's addresses."""
        ports = _PORTS.pack(LEASE_PORT, LEASE_PORT)
        return tuple(self.send_message(remote + own + ports, content) for own, remote, content in messages)

    def give_index(self, flow: Flow) -> None:
        """Let a flow that has been proven be released under the index of what it was allowed by.

        Not earlier: an offer or a SYN proves nothing, and whoever sends many must not fill the index.
        """
        if flow.judged is not None:
            flow.release, flow.judged = self.judge.release(flow.judged), None

    def note_release(self, flow: Flow, peer: Peer, address: bytes, now: float) -> None:
        """Take note that a flow with a peer at its own address has been proven: give it an index, and a lease."""
        self.give_index(flow)
        if not self.judge.is_own(peer):
            ends = address, flow.key[(len(flow.key) - 4) // 2 : -4]
            self.leases.note(peer, ends, flow.protocol, flow.local, now)

    def is_own_message(self, key: bytes, content: bytes) -> bool:
        """Tell whether the enforcer itself sent this message; as often as it did."""
        return self._own.take((key, hash(content)))

    def reset_remote(self, key: bytes, segment: Segment, direction: Direction) -> Inject:
        """Tell the remote end that the connection is refused or unknown: a RST as the pod's kernel would send."""
        if direction is Direction.INGRESS:
            src, dst, ports = segment.dst, segment.src, (segment.dport, segment.sport)
            seq, ack, flags = _reset_numbers(segment)
        else:
            src, dst, ports = segment.src, segment.dst, (segment.sport, segment.dport)
            seq, ack, flags = segment.seq, segment.ack, RST | ACK
        packet = build(src, dst, ports, (seq, ack), flags, 0)
        return self.inject(key, packet, flags, (seq, ack))

    def reset_both(self, key: bytes, own: tuple[int, int], remote: tuple[int, int]) -> tuple[Inject, Inject]:
        """End a flow that the enforcer gives up: a RST to the peer with our `own` seq and ack, one to the pod with the
        `remote`'s, each as the kernel at the other end would send it.
        """
        half = (len(key) - 4) // 2
        far, near, far_port, near_port = key[:half], key[half:-4], *_PORTS.unpack(key[-4:])
        outward = build(near, far, (near_port, far_port), own, RST | ACK, 0)
        inward = build(far, near, (far_port, near_port), remote, RST | ACK, 0)
        return self.inject(key, outward, RST | ACK, own), Inject(inward)

    def refuse_unknown(self, key: bytes, segment: Segment) -> Verdict:
        """End at both sides a SYN-ACK that answers no known SYN of the pod, as after a restart of the daemon.

        Without an ACK flag: a kernel of ours that has seen the SYN-ACK before gives its connection up, one that has not
        takes no notice and repeats its SYN (RFC 9293, section 3.10.7.3). The other way round, for a SYN-ACK of the pod,
        it would not do: to a RST against the direction of the SYN, followed by a SYN with a frame, conntrack on the
        way closes for good.
        """
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS)
        self.report(Direction.INGRESS, segment.src, segment.dport, decision, detail="SYN-ACK")
        own, remote = segment.ack, (segment.seq + 1) & _NUMBERS
        outward = build(segment.dst, segment.src, (segment.dport, segment.sport), (own, 0), RST, 0)
        inward = build(segment.src, segment.dst, (segment.sport, segment.dport), (remote, 0), RST, 0)
        return DROP._replace(effects=(self.inject(key, outward, RST, (own, 0)), Inject(inward)))

    def report_flow(self, flow: Flow, reason: Reason, detail: str = "") -> None:
        """Report what became of an unfinished flow, by its names alone."""
        direction = flow.direction
        address_length = (len(flow.key) - 4) // 2
        far_port, near_port = _PORTS.unpack(flow.key[-4:])
        port = far_port if direction is Direction.EGRESS else near_port
        decision = Decision(False, reason, direction, flow.rules)
        self.report(direction, flow.key[:address_length], port, decision, protocol=flow.protocol, detail=detail)

    def give_up(self, flow: Flow, is_own: bool) -> tuple[Settle, ...]:
        """Account for a flow that made room for one of its source's own or of another, and drop what waits for it."""
        bound = Bound.HALF_OPEN_FLOWS_PER_SOURCE if is_own else Bound.HALF_OPEN_FLOWS
        self.node.bound_hits[bound] += 1
        self.report_flow(flow, Reason.FLOW_TABLE_FULL, bound.value)
        return self.settle_held(flow, DROP)

    def hold(self, flow: Flow, now: float, effects: tuple[Settle | Inject, ...] = ()) -> Verdict:
        """Keep the packet in the kernel's queue until the flow's proof; raise PeerError where too many wait for it.

        Where too many wait for others, the oldest one is dropped: of the same source, or of the one with most.
        """
        hits = self.node.bound_hits
        if len(flow.held) >= self.node.settings.max_held_packets:
            hits[Bound.HELD_PACKETS_PER_FLOW] += 1
            raise PeerError(Reason.HOLD_QUEUE_FULL, Bound.HELD_PACKETS_PER_FLOW.value)
        self.next_hold_id()
        flow.held.append(self._hold_ids)
        evicted = self._held.put(self._hold_ids, _Held(self._hold_ids, now + HOLD_S, flow), flow.source)
        if evicted is not None:
            bound = Bound.HELD_PACKETS_PER_SOURCE if evicted.is_own else Bound.HELD_PACKETS
            hits[bound] += 1
            dropped = evicted.value
            dropped.flow.held.remove(dropped.hold_id)
            self.report_flow(dropped.flow, Reason.HOLD_QUEUE_FULL, bound.value)
            effects = (*effects, Settle(dropped.hold_id, DROP))
        return Verdict(Action.HOLD, hold_id=self._hold_ids, effects=effects)

    def next_hold_id(self) -> int:
        """Give a number that no held packet has had; one that is settled at once needs no place among them."""
        self._hold_ids += 1
        return self._hold_ids

    @property
    def held_packets(self) -> int:
        """How many packets wait for proofs."""
        return len(self._held)

    def settle_held(self, flow: Flow, verdict: Verdict) -> tuple[Settle, ...]:
        """Give every packet that waits for a flow the same verdict, oldest first."""
        held, flow.held = flow.held, []
        for hold_id in held:
            self._held.pop(hold_id)
        return tuple(Settle(hold_id, verdict) for hold_id in held)

    def expire_held(self, now: float) -> list[tuple[Flow, Settle]]:
        """Drop what has waited too long; give each with the flow whose proof did not come."""
        effects = []
        while (held := next(iter(self._held), None)) is not None and held.deadline <= now:
            self._held.pop(held.hold_id)
            held.flow.held.remove(held.hold_id)
            effects.append((held.flow, Settle(held.hold_id, DROP)))
        return effects


def bare_reset(segment: Segment) -> Verdict:
    """Let a RST pass, without the data that it may carry: nobody has proven anything yet."""
    return ACCEPT if segment.data == segment.end else Verdict(Action.ACCEPT, with_payload(segment, b""))


def reset_local(segment: Segment) -> bytes:
    """Answer the pod's own packet with the RST that its peer would send; it reaches the pod over its loopback."""
    seq, ack, flags = _reset_numbers(segment)
    return build(segment.dst, segment.src, (segment.dport, segment.sport), (seq, ack), flags, 0)


def _reset_numbers(segment: Segment) -> tuple[int, int, int]:
    """RFC 9293, section 3.10.7.1: a RST takes its number from an ACK, else it acknowledges what it refuses.

    A SYN's payload is a frame, which the sender's kernel knows nothing of, so it is not acknowledged.
    """
    if segment.flags & ACK:
        return segment.ack, 0, RST
    length = 1 if segment.flags & SYN else segment.end - segment.data
    return 0, (segment.seq + length) & _NUMBERS, RST | ACK
