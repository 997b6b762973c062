# SPDX-License-Identifier: Apache-2.0
"""The handshake engine: both roles, for every protocol. Carriers bring it packets and carry its messages.

How protocols differ is data (handshake/carriers.py): the engine branches on that, and never on a protocol. A carrier
attaches a frame to a packet, takes one off, finds a proof, and ends a flow that the enforcer gives up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, TypeVar

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.decisions import Opener
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.carriers import CarrierFacts
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import SYN_OVERHEAD, decode_head, decode_syn_ack, frame_type
from enforcer_daemon.handshake.machine import REMEMBERED, UNVERIFIED, Event, State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.handshake.sessions import SessionTable
from enforcer_daemon.handshake.signaturebudget import TokenBucket
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP, Verdict

MAX_RIVALS, MAX_RIVALS_PER_SOURCE = 1_024, 64
"""Handshakes for flows that are under way or released, of one endpoint and protocol, in all and of one source."""
RIVAL_S = 5.0
"""How long a rival waits for the choice of the pod's kernel, seconds; a kernel answers a SYN at once."""
SUSPICION_POLL_S = 0.05
"""How often to look whether an address is still suspected to be another pod's, seconds."""


class _Packet(Opener, Protocol):
    """What the engine reads of a packet."""

    @property
    def sport(self) -> int: ...

    @property
    def dport(self) -> int: ...


P = TypeVar("P", bound=_Packet, contravariant=True)


class Carrier(Protocol[P]):
    """What the engine needs of a protocol."""

    facts: CarrierFacts

    def send_offer(self, packet: P, session: Session, mark: int, now: float) -> Verdict:
        """Let a packet of the pod's out with the offer, or let it wait; raise PeerError if it has no room."""

    def make_way(self, packet: P, key: FlowKey, mark: int) -> Verdict | None:
        """Return what becomes of a packet whose flow cannot be opened yet, since an earlier one is in the way."""

    def deny(self, packet: P, direction: Direction) -> None:
        """Tell the end that opens a flow that it is denied, if so configured."""

    def require_room(self, packet: P) -> None:
        """Raise PeerError if the initiator cannot receive our answer."""


class _Side(Generic[P]):
    """What both roles have in common."""

    role: ClassVar[Role]

    def __init__(self, context: EndpointContext, carrier: Carrier[P]) -> None:
        self._context = context
        self._carrier = carrier
        self._facts = carrier.facts
        self.sessions = context.open_table(carrier.facts, self.role)

    def find(self, key: FlowKey, now: float) -> Session | None:
        """Find a flow that is remembered still."""
        session = self.sessions.get(key)
        if session is None:
            return None
        if session.deadline <= now:
            self.expire(session)
            return None
        if session.state is State.DOUBTED and session.doubted_until <= now:
            session.advance(Event.DOUBT_ENDED)
        return session

    def add(self, session: Session) -> None:
        """Keep a session, and end the one that makes room for it."""
        evicted = self.sessions.add(session)
        if evicted is not None:
            self._context.evict(self.sessions, evicted)

    def expire(self, session: Session) -> None:
        """End a session whose time is over."""
        context = self._context
        if session.state in REMEMBERED:
            context.end(self.sessions, session, Event.FORGOTTEN)
            return
        if not session.is_address_allowed or self._facts.has_kernel_state:
            context.report_end(session, Reason.HANDSHAKE_TIMEOUT)
        context.end(self.sessions, session, Event.EXPIRED)


class Initiator(_Side[P]):
    """Flows of one protocol that the pod opens."""

    role = Role.INITIATOR

    def open(self, packet: P, key: FlowKey, isn: int, mark: int, now: float) -> Verdict:
        """Let out what opens a flow: with our offer into the enforced networks, decided by address elsewhere."""
        context, protocol = self._context, key.protocol
        outbound = context.policy.outbound(packet.dst, packet.dport, protocol)
        evaluation = outbound.evaluation
        if not outbound.needs_handshake:
            context.report(Direction.EGRESS, packet.dst, packet.dport, evaluation.decision, protocol)
            if evaluation.grant is not None:
                return evaluation.grant.verdict
            self._carrier.deny(packet, Direction.EGRESS)
            return DROP
        context.require_token(now)
        if mark and (verdict := self._carrier.make_way(packet, key, mark)) is not None:
            return verdict
        session = self.begin(key, isn, now)
        session.is_address_allowed = evaluation.grant is not None
        if self._facts.has_kernel_state:  # What has no room for the offer leaves nothing behind.
            verdict = self._carrier.send_offer(packet, session, mark, now)
            self.add(session)
            return verdict
        self.add(session)
        return self._carrier.send_offer(packet, session, mark, now)

    def begin(self, key: FlowKey, isn: int, now: float) -> Session:
        """Make an offer for a flow."""
        context = self._context
        unfinished_s = self._facts.unfinished_s or context.node.settings.timeout_s
        session = Session(key, self._facts, context.local, State.OPENING, now + unfinished_s)
        session.offer(context.node.random(16), isn)
        session.sent_at = session.opened_at = now
        return session

    def accept_answer(self, packet: P, session: Session, payload: bytes, isn_r: int, now: float) -> bool:
        """Verify who answers and decide on egress; a denial ends the session. Raise PeerError if it does not hold.

        Policy decides on the peer's own address and port, which may lie behind a Service.
        """
        context, protocol = self._context, self._facts.protocol
        kind = self._facts.answer_type if self._facts.has_kernel_state else frame_type(payload)
        answer = decode_syn_ack(payload, kind)
        peer = context.node.verify(answer.block, packet.src, now)
        context.policy.require_dialled(answer, peer, (packet.src, packet.sport), protocol)
        session.verify_answer(payload, answer, isn_r, peer)
        evaluation = context.policy.egress(peer, answer.address, answer.port, protocol)
        if evaluation.grant is None or session.state in UNVERIFIED or session.state is State.DOUBTED:
            context.report(
                Direction.EGRESS, answer.address, answer.port, evaluation.decision, protocol, peer=peer.identity
            )
        if evaluation.grant is None:
            context.end(self.sessions, session, Event.REFUSED)
            return False
        session.grant = evaluation.grant
        session.advance(Event.ANSWER_VERIFIED)
        return True

    def accept_reply(self, session: Session) -> bool:
        """Take the peer for its address, since it showed no identity; a denial ends the session.

        That is the dialed address, or the one that the node's NAT put in its place.
        """
        context, key = self._context, session.key
        evaluation, remote, port, detail = context.policy.answered(key)
        context.report(Direction.EGRESS, remote, port, evaluation.decision, key.protocol, detail=detail)
        if evaluation.grant is None:
            context.end(self.sessions, session, Event.REFUSED)
            return False
        session.grant = evaluation.grant
        return True

    def end_opening(self) -> None:
        """End the handshakes whose offer shows an identity that the pod no longer has, before an answer."""
        for session in self.sessions.known():
            if session.state in UNVERIFIED:
                self._context.end(self.sessions, session, Event.IDENTITY_CHANGED)


class Responder(_Side[P]):
    """Flows of one protocol that are opened to the pod."""

    role = Role.RESPONDER

    def __init__(self, context: EndpointContext, carrier: Carrier[P]) -> None:
        super().__init__(context, carrier)
        settings = context.node.settings
        limits = MAX_RIVALS, MAX_RIVALS_PER_SOURCE
        if not self._facts.has_kernel_state:
            limits = (
                min(limits[0], settings.max_half_open_flows),
                min(limits[1], settings.max_half_open_flows_per_source),
            )
        self.rivals = SessionTable(limits, 0, context.node.limit_hits, self.sessions.names)
        """Handshakes for flows that are under way or released: they end nothing before a proof or the kernel decides.

        If the kernel decides, none is evicted: it could be answered unseen, under the release of the earlier flow.
        """
        self._challenges = TokenBucket(settings.max_rehandshakes_per_s, context.node.limit_hits, Limit.REHANDSHAKES)

    def accept_offer(
        self, packet: P, payload: bytes, key: FlowKey, earlier: Session | None, isn: int, mark: int, now: float,
        *, is_answer: bool = False,
    ) -> Session | None:  # fmt: skip
        """Verify who offers and decide on ingress; return the session, or None if the packet is to be dropped.

        `earlier` is the flow's handshake that is under way or released here, `mark` what the kernel knows of it. An
        offer proves nothing, so it ends nothing: beside another handshake it is a rival. Raise PeerError if the offer
        does not hold.
        """
        context, facts = self._context, self._facts
        nonce = decode_head(payload, facts.offer_type)
        peer = context.node.verify(payload[SYN_OVERHEAD:], packet.src, now)
        source, evaluation = context.policy.inbound(packet, facts.protocol, peer, is_answer=is_answer)
        is_released = bool(mark & RELEASED)
        if evaluation.grant is None and not (facts.challenge_type and is_released):
            self.report(packet, packet.src, evaluation.decision, peer)
            self._carrier.deny(packet, Direction.INGRESS)
            return None
        if is_released and facts.challenge_type and not self._challenges.take(now):
            return None
        self._carrier.require_room(packet)
        context.require_token(now)
        connection = hash((key, isn)) if earlier is None or not facts.has_numbers else 0
        context.node.use_nonce(nonce, connection, source)
        is_suspected = context.leases.suspect(peer, source, now)
        if is_suspected and is_released and facts.has_kernel_state:
            return None  # Until it is known whether the pod of the released flow lives; the offer comes again.
        self.report(packet, packet.src, evaluation.decision, peer)
        session = self._session(key, earlier if not is_released else None, now)
        session.grant = evaluation.grant
        session.accept(payload, nonce, isn, peer, source)
        session.opened_at = now
        is_same_attempt = facts.has_numbers and earlier is not None and self.is_same_attempt(earlier, isn)
        if is_released or (earlier is not None and earlier is not session and not is_same_attempt):
            self.add_rival(session, now)
        else:
            if earlier is not None and is_same_attempt:
                context.end(self.sessions, earlier, Event.REPLACED)
            self.add(session)
        if is_suspected and not facts.has_kernel_state:
            context.timers.set(session, now + SUSPICION_POLL_S)
        return session

    def _session(self, key: FlowKey, earlier: Session | None, now: float) -> Session:
        """Return a session for an offer: that of the packets that wait because they were asked for it, or a new one."""
        unfinished_s = self._facts.unfinished_s or self._context.node.settings.timeout_s
        if earlier is not None and earlier.state is State.ASKED:
            earlier.local, earlier.deadline = self._context.local, now + unfinished_s
            earlier.advance(Event.OFFER_VERIFIED)
            return earlier
        return Session(key, self._facts, self._context.local, State.OFFERED, now + unfinished_s)

    @staticmethod
    def is_same_attempt(session: Session, isn: int) -> bool:
        """Tell whether an offer is that of a handshake under way with another frame: the peer's enforcer restarted."""
        return session.isn_i == isn and session.state is not State.RELEASED

    def add_rival(self, session: Session, now: float) -> None:
        """Keep a rival of another handshake; raise PeerError if there is no room and none may be evicted."""
        context, rivals = self._context, self.rivals
        self.expire_rivals(now)
        if self._facts.has_kernel_state:
            session.deadline = now + RIVAL_S
            full = rivals.full(session.source)
            if full is not None:
                context.node.limit_hits[full] += 1
                raise PeerError(Reason.FLOW_TABLE_FULL, "offers for ports of released flows")
        evicted = rivals.add(session)
        if evicted is not None:
            context.evict(rivals, evicted)

    def take_place(self, session: Session, earlier: Session | None) -> None:
        """Let a rival take the place of an earlier handshake or flow: it was proven, or the pod's kernel chose it."""
        self.rivals.remove(session)
        if earlier is not None:
            self._context.end(self.sessions, earlier, Event.REPLACED)
        self.add(session)

    def report(self, packet: P, source: bytes, decision: Decision, peer: Peer | None = None) -> None:
        """Report a decision on a packet that opens a flow to the pod, or answers one that the pod opens."""
        port = packet.dport if decision.direction is Direction.INGRESS else packet.sport
        identity = None if peer is None else peer.identity
        self._context.report(decision.direction, source, port, decision, self._facts.protocol, identity)

    def expire_rivals(self, now: float) -> None:
        """End the rivals that nothing has chosen."""
        for rival in self.rivals.expired(now):
            self._end_rival(rival, Event.EXPIRED)

    def end_denied_rivals(self, is_denied: Callable[[Session], bool]) -> None:
        """End the rivals that policy no longer allows.

        If the pod's kernel chooses, a denied one is kept, CLOSED, so that the kernel's answer to it does not leave. If
        a proof does, all end, since some were challenged because policy denied them: an offer that is retransmitted
        begins another handshake.
        """
        for rival in self.rivals.known():
            if not self._facts.has_kernel_state:
                self._end_rival(rival, Event.POLICY_CHANGED)
            elif is_denied(rival):
                rival.advance(Event.POLICY_CHANGED)
                rival.grant = None

    def _end_rival(self, rival: Session, event: Event) -> None:
        if rival.state is State.CLOSED:
            self.rivals.remove(rival)
        else:
            self._context.end(self.rivals, rival, event)
