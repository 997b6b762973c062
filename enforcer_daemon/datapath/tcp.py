# SPDX-License-Identifier: Apache-2.0
"""TCP as a carrier: frames ride as payload of SYN and SYN-ACK, proofs as an option of the next segment.

Both kernels keep the connection's state and retransmit. What is odd about ports, numbers and RSTs stands here
(docs/tcp.md).
"""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.engine import Initiator, Responder
from enforcer_daemon.datapath.segments import (
    answer_of,
    answers,
    bare,
    bare_reset,
    framed,
    successor,
)
from enforcer_daemon.datapath.strays import Strays
from enforcer_daemon.datapath.tcpopened import OpenedConnections
from enforcer_daemon.errors import PacketError, PeerError
from enforcer_daemon.handshake.carriers import TCP
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import (
    MAGIC,
    SYN_ACK_OVERHEAD,
    FoundProof,
    find_proof,
)
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.proofs import frame_hash
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.marks import NODE, OWN_MASK, RELEASED, REPLY
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.packet.tcp import (
    ACK,
    FIN,
    RST,
    SYN,
    SYN_ACK,
    TCP_MAX_HEADER,
    TCP_MIN_HEADER,
    Segment,
    announced_mss,
    with_options_and_payload,
)
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Verdict

MIN_WAIT_S = 0.025
"""Before a SYN-ACK without a proof is retransmitted, seconds: a local network needs less than one, and so do two
enforcers. A kernel waits a second (RFC 6298, section 2), since it knows nothing of the path. The enforcer has seen how
long the same peer took before, as RACK-TLP (RFC 8985, section 7) does for data."""
MAX_WAIT_S = 0.5
"""If two round trips take longer, the kernel's own retransmission is soon enough."""
LAGS = 2
"""How many times as long as the SYN-ACK its proof may have to wait in the queue: one that is behind gets longer."""
MAX_LAG_S = 0.2
"""A queue that is further behind is not waited for any longer: the kernel's own retransmission is near."""
_ROUND_TRIPS = 2
_ASK_S = 0.02
"""The least time between two retransmissions of a SYN-ACK for unproven data, seconds."""
_MAX_OPTIONS = TCP_MAX_HEADER - TCP_MIN_HEADER
_KINDS = SYN | ACK | RST | FIN
_PROTOCOL = TCP.protocol
_INITIATOR, _RESPONDER = Role


class TCPFlows:
    """One endpoint's connections."""

    facts = TCP

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self._strays = Strays(context)
        self.initiator: Initiator[Segment] = Initiator(context, self)
        self.responder: Responder[Segment] = Responder(context, self)
        self._opened = self.initiator.sessions
        self._opening = OpenedConnections(context, self._strays, self.initiator)
        self._answered = self.responder.sessions

    def process(self, segment: Segment, direction: Direction, mark: int, now: float) -> Verdict:
        """Evaluate one segment; raise PeerError or PacketError if it does not hold."""
        kind = segment.flags & _KINDS
        # A SYN-ACK belongs to a connection that was opened the other way.
        role = _INITIATOR if (direction is Direction.EGRESS) is (kind != SYN_ACK) else _RESPONDER
        if direction is Direction.EGRESS:
            key = FlowKey(segment.dst, segment.src, segment.dport, segment.sport, _PROTOCOL, role)
            if not kind & SYN:
                return self._segment_out(segment, key, mark, now)
            if kind == SYN:
                return self._syn_out(segment, key, mark, now)
            if kind == SYN_ACK:
                return self._syn_ack_out(segment, key, mark, now)
        else:
            key = FlowKey(segment.src, segment.dst, segment.sport, segment.dport, _PROTOCOL, role)
            if not kind & SYN:
                return self._segment_in(segment, key, now)
            if kind == SYN:
                return self._syn_in(segment, key, mark, now)
            if kind == SYN_ACK:
                return self._opening.answer_in(segment, key, mark, now)
        raise PacketError("SYN together with RST or FIN")

    # The carrier of the engine.

    def send_offer(self, packet: Segment, session: Session, mark: int, now: float) -> Verdict:
        """Replace the SYN's payload; the kernel sends Fast Open data in it again, after the handshake."""
        payload = framed(packet, session, session.nonce_i, self._context.mtu)
        session.advance(Event.OFFER_ATTACHED)
        return Verdict(Action.FORGET if mark & OWN_MASK else Action.ACCEPT, payload)

    def make_way(self, packet: Segment, key: FlowKey, mark: int) -> Verdict | None:
        """Let a RST go first if the mark of an earlier connection of these ports is still there."""
        return self._strays.make_way(packet, key) if mark & OWN_MASK else None

    def deny(self, packet: Segment, direction: Direction) -> None:
        """Refuse a SYN, if so configured."""
        self._strays.refuse(packet, direction)

    def require_room(self, packet: Segment) -> None:
        """Raise PeerError unless the answer fits the initiator's interface, as far as its MSS tells."""
        mss = announced_mss(packet.options)
        length = SYN_ACK_OVERHEAD + len(self._context.local.block)
        if mss is not None and length + _MAX_OPTIONS > mss + TCP_MIN_HEADER:
            raise PeerError(Reason.IDENTITY_TOO_LARGE, f"frame of {length} bytes, the initiator's MSS is {mss}")

    def on_timer(self, session: Session, now: float) -> None:
        """Retransmit a SYN-ACK whose proof should have come by now: it, or the proof, was lost."""
        self._retransmit_answer(session)

    def abort(self, session: Session) -> None:
        """End a flow that policy no longer allows; connect() may have returned, and must not hang."""
        is_delivered = session.state in (State.VERIFIED, State.PROVING, State.ANSWERED, State.PROVEN)
        is_initiator = session.key.role is Role.INITIATOR
        self._context.end(self._opened if is_initiator else self._answered, session, Event.POLICY_CHANGED)
        if is_delivered:
            own, remote = successor(session.isn_i), successor(session.isn_r)
            numbers = ((own, remote), (remote, own))
            self._strays.reset_both(session.key, *(numbers if is_initiator else numbers[::-1]))

    # The pod opens a connection.

    def _syn_out(self, segment: Segment, key: FlowKey, mark: int, now: float) -> Verdict:
        session = self._opened.get(key)
        if session is not None:
            if session.isn_i == segment.seq and session.state is State.SHOWN:
                return self.send_offer(segment, session, 0, now)
            self._context.end(self._opened, session, Event.REPLACED)
        return self.initiator.open(segment, key, segment.seq, mark, now)

    def _segment_out(self, segment: Segment, key: FlowKey, mark: int, now: float) -> Verdict:
        opened = self._opened.get(key)
        if opened is not None:
            return self._opening.segment_out(segment, opened, mark, now)
        is_bare = segment.data >= segment.end  # Else it is not ours, whatever its numbers.
        if is_bare and self._context.is_injected(key.ends, segment.flags, (segment.seq, segment.ack)):
            return ACCEPT
        answered = self._find_answered(segment, key.in_role(_RESPONDER))
        if answered is None:
            return self._strays.segment(segment, Direction.EGRESS, key)
        return self._answered_out(segment, answered)

    # A connection is opened to the pod.

    def _syn_in(self, segment: Segment, key: FlowKey, mark: int, now: float) -> Verdict:
        """Deliver a SYN without its frame, if the frame's identity is allowed, or its address if it has none."""
        opened = self._opened.get(key.in_role(_INITIATOR)) if self._opened.by_key else None
        # Conntrack knows the pod's SYN longer than we do, and also one that an earlier daemon decided on.
        is_answer = bool(mark & REPLY) or (opened is not None and opened.state is not State.RELEASED)
        mark, payload = mark & ~REPLY, segment.payload
        earlier = self._answered.get(key)
        if payload[:4] != MAGIC:
            return self._plain_syn(segment, key, earlier, mark, now, is_answer=is_answer)
        known = self._answered.named(key, segment.seq)
        if (
            known is not None and known.key == key and known.state is not State.CLOSED
            and known.offer_hash == frame_hash(payload)
        ):  # fmt: skip
            return self._deliver_again(segment, known, now)
        session = self.responder.accept_offer(
            segment, payload, key, earlier, segment.seq, mark, now, is_answer=is_answer
        )
        if session is None:
            return DROP
        is_first = self._answered.get(key) is session
        return Verdict(Action.FORGET if mark & OWN_MASK and is_first else Action.ACCEPT, bare(segment))

    def _deliver_again(self, segment: Segment, session: Session, now: float) -> Verdict:
        """Let a retransmission in while the proof is still owed; after it, the SYN could only be a replay.

        To a kernel that has closed the connection it would open another, and the flow's release would stand in for a
        proof.
        """
        if session.state not in (State.OFFERED, State.ANSWERED):
            raise PeerError(Reason.REPLAYED_NONCE, "the SYN of a connection that was released")
        session.advance(Event.OFFER_RETRANSMITTED)
        session.opened_at = now
        return Verdict(Action.ACCEPT, bare(segment))

    def _plain_syn(
        self, segment: Segment, key: FlowKey, earlier: Session | None, mark: int, now: float, *, is_answer: bool
    ) -> Verdict:
        responder, context = self.responder, self._context
        source, evaluation = context.policy.inbound(segment, _PROTOCOL, is_answer=is_answer)
        responder.report(segment, source, evaluation.decision)
        if evaluation.grant is None:
            self.deny(segment, Direction.INGRESS)  # A stranger's SYN ends no handshake.
            return DROP
        if mark & RELEASED or (earlier is not None and not responder.is_same_attempt(earlier, segment.seq)):
            rival = Session(key, TCP, context.local, State.OFFERED, now)
            rival.grant, rival.isn_i, rival.source = evaluation.grant, segment.seq, source
            responder.add_rival(rival, now)
            return ACCEPT
        if earlier is not None:
            context.end(self._answered, earlier, Event.REPLACED)
        return evaluation.grant.verdict

    def _syn_ack_out(self, segment: Segment, key: FlowKey, mark: int, now: float) -> Verdict:
        """Attach our frame and proof; a retransmission gets the same ones."""
        session = self._find_answered(segment, key)
        if session is None or not answers(segment, session):
            rival = self._answered.named(key, segment.ack - 1 & 0xFFFF_FFFF)
            if rival is not None and rival in self.responder.rivals:
                return self._replace_by_rival(segment, key, rival, mark, now)
        if session is None:
            return ACCEPT if mark & (RELEASED | NODE) else self._strays.answer_out(segment, key)
        if segment.ack != successor(session.isn_i):
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK acknowledges another SYN")
        if session.state in (State.PROVEN, State.RELEASED) and segment.seq != session.isn_r:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK of another connection than the one that was proven")
        if session.state is State.RELEASED:
            return ACCEPT  # Bare: the pod's kernel lost the ACK, or has no room yet; we lack no proof.
        return Verdict(Action.ACCEPT, self._attach_answer(segment, session, key, now))

    def _replace_by_rival(self, segment: Segment, key: FlowKey, rival: Session, mark: int, now: float) -> Verdict:
        """Let the earlier connection of these ports end: the pod's kernel has begun another one."""
        context, grant = self._context, rival.grant
        earlier = self._answered.get(rival.key)
        if rival.peer is not None and grant is not None:
            self.responder.take_place(rival, earlier)
            rival.deadline = now + context.node.settings.timeout_s
            packet = self._attach_answer(segment, rival, key, now)
            return Verdict(Action.FORGET if mark & OWN_MASK else Action.ACCEPT, packet)
        if earlier is not None:
            context.end(self._answered, earlier, Event.REPLACED)
        if grant is None:  # Policy allows it no longer.
            self.responder.rivals.remove(rival)
            return DROP
        rival.advance(Event.TAKEN_AS_ADDRESS)
        context.end(self.responder.rivals, rival, Event.FORGOTTEN)
        return grant.verdict

    def _attach_answer(self, segment: Segment, session: Session, key: FlowKey, now: float) -> bytes:
        context, peer = self._context, session.peer
        if segment.seq != session.isn_r and peer is not None:
            session.make_answer(segment.seq, context.node.random(16))
            session.answer, session.sent_at = segment, now
            session.answer_port = key.own_port
            if key.own_port != session.key.own_port:
                self._answered.add_alias(key, session)
            wait_s = max(MIN_WAIT_S, _ROUND_TRIPS * peer.round_trip_s)
            if wait_s <= MAX_WAIT_S:
                # Sooner would add to a queue that is behind already, in which the proof waits too, and gain nothing.
                context.timers.set(session, now + wait_s + LAGS * min(now - session.opened_at, MAX_LAG_S))
        session.advance(Event.ANSWER_SENT)
        return framed(segment, session, session.nonce_r, self._context.mtu)

    def _find_answered(self, segment: Segment, key: FlowKey) -> Session | None:
        """Find the flow that a segment of the pod's kernel answers.

        Beside a sidecar that redirects it shows the sidecar's port here, not the one that the peer dialed: then the
        peer's end names the flow, and the number that the answer acknowledges. From its SYN-ACK on, the flow has that
        one port: there is no decision on what the pod sends to its peer from another.
        """
        session = self._answered.get(key)
        if session is not None:
            return session
        if segment.flags & ACK:
            named = self._answered.named(key, segment.ack - 1 & 0xFFFF_FFFF)
        else:
            named = self._answered.aliases.get(key)
        if named is None or named in self.responder.rivals or named.answer_port not in (None, key.own_port):
            return None
        return named

    def _segment_in(self, segment: Segment, key: FlowKey, now: float) -> Verdict:
        answered = self._answered.get(key)
        if answered is not None:
            return self._answered_in(segment, answered, now)
        opened = self._opened.get(key.in_role(_INITIATOR))
        if opened is None:
            return self._strays.segment(segment, Direction.INGRESS, key)
        return self._opening.segment_in(segment, opened, now)

    def _answered_in(self, segment: Segment, session: Session, now: float) -> Verdict:
        """Let nothing through to the pod before the initiator's proof."""
        state = session.state
        if segment.flags & RST:
            if segment.seq != successor(session.isn_i):
                if state is State.OFFERED:
                    # It answers a challenge ACK for the last connection of these ports (RFC 5961), which the pod's
                    # kernel still has; the peer sends its SYN again.
                    return bare_reset(segment)
                raise PeerError(Reason.UNKNOWN_FLOW, "RST outside the handshake")
            self._context.end(self._answered, session, Event.RESET)
            return bare_reset(segment)
        found = find_proof(segment.options)
        if found is not None and state is not State.OFFERED:
            return self._accept_proof(segment, session, found, now)
        match state:
            case State.RELEASED:
                return session.establish(now)
            case State.PROVEN:
                return self._settle(session, Event.SEGMENT_FOLLOWED, now)
            case State.ANSWERED:
                return self._await_proof(segment, session, now)
            case _:
                raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {state.name.lower()}")

    def _settle(self, session: Session, event: Event, now: float) -> Verdict:
        """Release a flow; its SYN is of no use any more."""
        release = self._context.settle(session, event, now)
        self._context.node.finish_nonce(session.nonce_i)
        if session.held:
            self._context.settle_held(session, release)
        return release

    def _accept_proof(self, segment: Segment, session: Session, found: FoundProof, now: float) -> Verdict:
        session.verify_proof(found.proof)
        state, peer = session.state, session.peer
        if state is State.ANSWERED and peer is not None:
            peer.note_round_trip(now - session.sent_at)
        if found.is_standalone:
            if state is not State.RELEASED:
                session.advance(Event.STANDALONE_PROOF_VERIFIED)
                self._context.prove(session, now)
                if session.held:  # What waits carries the release, or else the next segment.
                    self._settle(session, Event.SEGMENT_FOLLOWED, now)
            return TAKEN
        packet = with_options_and_payload(segment, found.rest, segment.payload)
        release = session.release if state is State.RELEASED else self._settle(session, Event.PROOF_VERIFIED, now)
        return Verdict(Action.RELEASE, packet, 0 if release is None else release.mark)

    def _await_proof(self, segment: Segment, session: Session, now: float) -> Verdict:
        """Ask for the proof of a segment by our SYN-ACK; data waits for it, a bare ACK does not."""
        is_asked = now - session.asked_at >= _ASK_S
        if segment.data < segment.end or segment.flags & FIN:
            verdict = self._context.hold(session, None, now)
        else:
            verdict, peer = DROP, session.peer
            decision = Decision(False, Reason.PROOF_MISSING, Direction.INGRESS)
            self.responder.report(segment, segment.src, decision, peer)
        if is_asked:
            session.asked_at = now
            self._retransmit_answer(session)
        return verdict

    def _answered_out(self, segment: Segment, session: Session) -> Verdict:
        """Let out a refusal by the pod's own kernel; data before the proof there cannot be."""
        if session.state is State.RELEASED and session.release is not None:
            return session.release
        if segment.flags & RST:
            self._context.end(self._answered, session, Event.RESET)
            return bare_reset(segment)
        if segment.data == segment.end:
            return ACCEPT
        raise PeerError(Reason.UNKNOWN_FLOW, f"data while {session.state.name.lower()}")

    def _retransmit_answer(self, session: Session) -> None:
        packet = answer_of(session, self._context.mtu)
        if packet is not None:
            session.advance(Event.ANSWER_SENT)
            self._context.effects.append(Inject(packet))
