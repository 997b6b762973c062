# SPDX-License-Identifier: Apache-2.0
"""One endpoint's state that all its handshakes share: tables, timers, held packets, and what is to be done next."""

from __future__ import annotations

from typing import NamedTuple

from enforcer_daemon.datapath.decisions import FlowPolicy
from enforcer_daemon.datapath.node import NodeContext
from enforcer_daemon.datapath.own import OwnPackets
from enforcer_daemon.errors import PeerError, TokenError
from enforcer_daemon.handshake.carriers import CarrierFacts
from enforcer_daemon.handshake.fairtable import Evicted, FairTable, Limit
from enforcer_daemon.handshake.flowkey import Ends, FlowKey, Role
from enforcer_daemon.handshake.leases import Leases
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.machine import Event
from enforcer_daemon.handshake.session import NEVER, Session
from enforcer_daemon.handshake.sessions import SessionTable, Timers
from enforcer_daemon.marks import NODE
from enforcer_daemon.model import Decision, Direction, Identity, PodRef, RuleRef
from enforcer_daemon.packet.udp import UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, Action, Effect, Inject, Settle, Verdict

_OTHER = {Role.INITIATOR: Role.RESPONDER, Role.RESPONDER: Role.INITIATOR}
HOLD_S = 1.0
"""How long a packet waits for its flow's proof, seconds."""


class FlowReport(NamedTuple):
    """One decision on a flow, for logs, counters and operators."""

    is_allowed: bool
    reason: Reason
    direction: Direction
    protocol: int
    remote: bytes
    """Packed address; empty if the packet could not be read."""
    port: int | None
    """Destination port."""
    peer: Identity | None
    rules: tuple[RuleRef, ...]
    detail: str


class _Held(NamedTuple):
    """A packet that waits in the kernel's queue."""

    hold_id: int
    deadline: float
    session: Session


class EndpointContext:
    """What the parts of one endpoint's datapath share. Effects and reports collect here until an Output takes them."""

    __slots__ = ("_held", "_hold_ids", "_own", "effects", "fresh_until", "leases", "local", "mtu", "node", "pod",
                 "policy", "reports", "tables", "timers", "withheld")  # fmt: skip

    def __init__(self, pod: PodRef, node: NodeContext, policy: FlowPolicy, local: LocalToken, mtu: int) -> None:
        self.pod = pod
        self.node = node
        self.policy = policy
        self.local = local
        """The token for new flows; unfinished flows keep the one they began with."""
        self.withheld: LocalToken | None = None
        """A token that no new flow may show, though it has not expired."""
        self.mtu = mtu
        self.leases = Leases(node.lease_times, node.random, node.limit_hits)
        self.fresh_until = 0.0
        """Until when peers may still have released flows of a pod that had the address before, or of this pod under an
        identity that it no longer has; monotonic seconds."""
        self.effects: list[Effect] = []
        self.reports: list[FlowReport] = []
        self.tables: dict[tuple[int, Role], SessionTable] = {}
        self.timers = Timers()
        self._hold_ids = 0
        settings = node.settings
        self._held: FairTable[int, _Held] = FairTable(
            settings.max_held_packets_per_pod, settings.max_held_packets_per_source
        )
        self._own = OwnPackets(settings.max_own_packets, node.limit_hits)

    # The pod and its token.

    def is_own_address(self, address: bytes) -> bool:
        """Tell whether a packed address is the pod's own."""
        return any(own.packed == address for own in self.local.identity.ips)

    def require_token(self, now: float) -> LocalToken:
        """Return the pod's token; raise TokenError if it must not be shown."""
        local = self.local
        if local is self.withheld or now + self.node.wall_offset_s > local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the identity too large, or the daemon overloaded?")
        return local

    def refuse_reflection(self, source: bytes, destination: bytes) -> None:
        """Raise PeerError for a packet that the pod sent to a group or to all, and a bridge brought back to it.

        To release its flow would release what the pod sends there next, whatever its egress policy says.
        """
        if self.is_own_address(source) and not self.is_own_address(destination):
            raise PeerError(Reason.SPOOFED_SOURCE, "the pod's own packet to others, reflected")

    def admit(self, destination: bytes, release: Verdict) -> Verdict:
        """Return how an allowed packet comes in: one to a group, or to all, releases no flow.

        Its sender may be the pod itself, under a link-local address that a bridge reflects.
        """
        return release if release.mark & NODE or self.is_own_address(destination) else ACCEPT

    # Reports.

    def report(
        self,
        direction: Direction,
        remote: bytes,
        port: int | None,
        decision: Decision,
        protocol: int,
        peer: Identity | None = None,
        detail: str = "",
    ) -> None:
        """Leave a decision for the shell to log and count."""
        if len(self.reports) >= self.node.settings.max_reports:
            self.node.limit_hits[Limit.REPORTS] += 1
            return
        self.reports.append(
            FlowReport(
                decision.is_allowed, decision.reason, direction, protocol, remote, port, peer, decision.rules, detail
            )
        )

    def report_session(self, session: Session, decision: Decision, detail: str = "") -> None:
        """Report what became of an unfinished flow, by its names alone."""
        key = session.key
        self.report(decision.direction, key.remote, key.port, decision, key.protocol, detail=detail)

    def report_end(self, session: Session, reason: Reason, detail: str = "") -> None:
        """Report why an unfinished flow ended."""
        self.report_session(session, Decision(False, reason, session.key.direction), detail)

    # Sessions.

    def open_table(self, facts: CarrierFacts, role: Role) -> SessionTable:
        """Make the table of a protocol's sessions in one role."""
        settings = self.node.settings
        limits = settings.max_half_open_flows, settings.max_half_open_flows_per_source
        table = SessionTable(limits, settings.max_settled_flows, self.node.limit_hits)
        self.tables[facts.protocol, role] = table
        return table

    def evict(self, table: SessionTable, evicted: Evicted[Session]) -> None:
        """End a session that made room for one of its source's own or of another."""
        bound = Limit.HALF_OPEN_FLOWS_PER_SOURCE if evicted.is_own else Limit.HALF_OPEN_FLOWS
        self.node.limit_hits[bound] += 1
        self.report_end(evicted.value, Reason.FLOW_TABLE_FULL, bound.value)
        self.end(table, evicted.value, Event.EVICTED)

    def end(self, table: SessionTable, session: Session, event: Event) -> None:
        """Take a session out of its table by an event of its end, and drop what waits for it."""
        session.advance(event)
        session.wake_at = NEVER
        table.remove(session)
        if session.held:
            self.settle_held(session, DROP)

    def settle(self, session: Session, event: Event, now: float) -> Verdict:
        """Release a flow: from now on the session is only remembered. Return how its packets are released."""
        session.advance(event)
        key, facts = session.key, session.facts
        session.deadline, session.drained_at = now + facts.remembered_s, now + facts.drain_s
        session.wake_at = NEVER
        table = self.tables[key.protocol, key.role]
        forgotten = table.settle(session)
        if forgotten is not None:
            self.end(table, forgotten, Event.FORGOTTEN)
        if facts.is_opened_by_both and (others := self.tables[key.protocol, _OTHER[key.role]]).by_key:
            self._end_other_role(others, key)
        if facts.has_kernel_state:
            session.frame, session.answer = b"", None
        return self.prove(session, now)

    def prove(self, session: Session, now: float) -> Verdict:
        """Take note that a flow's peer has proven itself: give the flow an index, and the pair of pods a lease.

        Not earlier: an offer proves nothing, and many of them must not fill the index.
        """
        grant, peer = session.grant, session.peer
        session.release = release = DROP if grant is None else self.policy.flows.release(grant)
        if peer is not None and not self.policy.is_own(peer):
            key = session.key
            self.leases.note(peer, (session.address, key.own), session.facts.protocol, session.local, now)
        return release

    def _end_other_role(self, others: SessionTable, key: FlowKey) -> None:
        """Both ends may have opened the flow at once: what one role's handshake released, the other's will not.

        Both ends have shown who they are by then, each by its own offer and by its answer.
        """
        other = others.get(key.in_role(_OTHER[key.role]))
        if other is not None:
            self.end(others, other, Event.REPLACED)

    # Held packets.

    def hold(self, session: Session, packet: UDPDatagram | None, now: float) -> Verdict:
        """Keep a packet in the kernel's queue until the flow's proof; raise PeerError if too many wait for it.

        If too many wait for others, the oldest one is dropped: of the same source, or of the one with most.
        """
        hits = self.node.limit_hits
        if len(session.held) >= self.node.settings.max_held_packets:
            hits[Limit.HELD_PACKETS_PER_FLOW] += 1
            raise PeerError(Reason.HOLD_QUEUE_FULL, Limit.HELD_PACKETS_PER_FLOW.value)
        hold_id = self.next_hold_id()
        session.held[hold_id] = packet
        evicted = self._held.put(hold_id, _Held(hold_id, now + HOLD_S, session), session.source)
        if evicted is not None:
            bound = Limit.HELD_PACKETS_PER_SOURCE if evicted.is_own else Limit.HELD_PACKETS
            hits[bound] += 1
            dropped = evicted.value
            self.report_end(dropped.session, Reason.HOLD_QUEUE_FULL, bound.value)
            del dropped.session.held[dropped.hold_id]
            self.effects.append(Settle(dropped.hold_id, DROP))
        return Verdict(Action.HOLD, hold_id=hold_id)

    def next_hold_id(self) -> int:
        """Return a number that no held packet has had; one that is settled at once needs no place among them."""
        self._hold_ids += 1
        return self._hold_ids

    @property
    def held_packets(self) -> int:
        """How many packets wait for proofs."""
        return len(self._held)

    def take_held(self, session: Session) -> dict[int, UDPDatagram | None]:
        """Return the packets that wait for a flow, oldest first; the caller settles each."""
        held, session.held = session.held, {}
        for hold_id in held:
            self._held.pop(hold_id)
        return held

    def settle_held(self, session: Session, verdict: Verdict) -> None:
        """Give every packet that waits for a flow the same verdict, oldest first."""
        self.effects += [Settle(hold_id, verdict) for hold_id in self.take_held(session)]

    def expire_held(self, now: float) -> None:
        """Drop and report what has waited too long."""
        while (held := next(iter(self._held), None)) is not None and held.deadline <= now:
            self._held.pop(held.hold_id)
            del held.session.held[held.hold_id]
            self.effects.append(Settle(held.hold_id, DROP))
            self.report_session(held.session, held.session.overdue)

    # Packets of the enforcer's own.

    def inject(self, ends: Ends, packet: bytes, flags: int, numbers: tuple[int, int]) -> None:
        """Send a segment of our own towards the peer, and recognize it when it passes the queue."""
        self._own.add((*ends, flags, *numbers))
        self.effects.append(Inject(packet))

    def is_injected(self, ends: Ends, flags: int, numbers: tuple[int, int]) -> bool:
        """Tell whether the enforcer itself sent this segment; as often as it did."""
        return self._own.take((*ends, flags, *numbers))

    def note_message(self, ends: Ends, content: bytes) -> None:
        """Take note of a message of our own, to recognize it when it passes the queue."""
        self._own.add((*ends, content))

    def is_own_message(self, ends: Ends, content: bytes) -> bool:
        """Tell whether the enforcer itself sent this message; as often as it did."""
        return self._own.take((*ends, content))
