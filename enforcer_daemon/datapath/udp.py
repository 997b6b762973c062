# SPDX-License-Identifier: Apache-2.0
"""UDP as a carrier: messages stand behind the data of datagrams, or go alone (docs/protocol.md, UDP).

No kernel keeps the handshake's state, so the enforcers hold datagrams and retransmit. If policy allows the address
with any pod there, datagrams leave at once with the offer behind their data: a stack without an enforcer takes no
notice of it. A datagram of an unknown flow, as after a loss of state, waits, and its sender's enforcer is asked to
rehandshake.
"""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.decisions import Evaluation
from enforcer_daemon.datapath.engine import SUSPICION_POLL_S, Initiator, Responder
from enforcer_daemon.datapath.flowindex import is_by_address
from enforcer_daemon.datapath.messages import Messages, accepted_bare
from enforcer_daemon.datapath.rehandshake import Rehandshakes
from enforcer_daemon.datapath.udpopened import PATIENCE_S, OpenedFlows
from enforcer_daemon.errors import FrameError, PeerError, ProofError
from enforcer_daemon.handshake.carriers import UDP
from enforcer_daemon.handshake.datagrams import bare, beside, find_message, has_marker
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import (
    TYPE_ANSWER,
    TYPE_CHALLENGE,
    TYPE_LEASE,
    TYPE_OFFER,
    TYPE_PROOF,
    TYPE_REHANDSHAKE,
    decode_head,
    decode_proof,
    frame_type,
)
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.session import NEVER, Session
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO, NODE, RELEASED, REPLY
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.packet.ip import IPHeader
from enforcer_daemon.packet.udp import (
    UDPDatagram,
    decode_udp,
    decode_udp_datagram,
)
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Verdict

RETRANSMIT_S = 0.1
"""The least time before the enforcer's message is sent again, seconds; it doubles each time."""
MAX_TRIES = 4
"""How often it is sent again."""
_MAX_LAG_S = 0.3
"""A queue that is further behind is not waited for any longer: datagrams wait for a second only."""
_MAX_ANSWERS = 2 * MAX_TRIES
"""Answers to one offer that comes alone: to its sender's tries and some that the network makes. More is a replay."""
_MAX_HELD_ASKED = 8
"""Datagrams of an unknown flow that wait."""
_PROTOCOL = UDP.protocol
IDENTIFIED_S = 180.0
"""How long an address that showed an identity is not taken for one that has none, seconds; longer than conntrack keeps
a UDP flow that was answered (nf_conntrack_udp_timeout_stream, 120 s)."""
MAX_IDENTIFIED = 16_384
"""Such addresses; each takes a verified token, so only pods that there are can fill it."""
_Found = tuple[bytes, bool]
"""A message, and whether it came alone."""
_UNPROVEN = Evaluation(Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS), None)
"""On a datagram without a handshake from an address that shows identities: its pod went past its own enforcer."""


class UDPFlows:
    """One endpoint's flows of datagrams."""

    facts = UDP

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self.messages = Messages(context)
        self.initiator: Initiator[UDPDatagram] = Initiator(context, self)
        self.responder: Responder[UDPDatagram] = Responder(context, self)
        self._opened = OpenedFlows(context, self.initiator, self.messages)
        self.rehandshakes = Rehandshakes(context, self.messages, self.initiator, self.responder, self._offer_alone)
        self._identified: dict[bytes, float] = {}
        """Until when an address is known to have an enforcer, oldest first."""
        self._lag_s = 0.0
        """How long an offer waited in the pod's queue lately, seconds; its answer waits there as long."""

    def process(self, packet: bytes, header: IPHeader, direction: Direction, mark: int, now: float) -> Verdict:
        """Evaluate one datagram; raise PeerError or PacketError if it does not hold."""
        datagram = decode_udp_datagram(packet, header)
        if mark & (CHECKSUM_PARTIAL | GSO):
            datagram = datagram._replace(is_checksum_partial=bool(mark & CHECKSUM_PARTIAL), is_gso=bool(mark & GSO))
        found = find_message(datagram)
        if direction is Direction.EGRESS:
            key = FlowKey(datagram.dst, datagram.src, datagram.dport, datagram.sport, _PROTOCOL, Role.INITIATOR)
            return self._out(datagram, key, mark, now) if found is None else self._message_out(found, key, now)
        key = FlowKey(datagram.src, datagram.dst, datagram.sport, datagram.dport, _PROTOCOL, Role.RESPONDER)
        if found is None:
            return self._in(datagram, key, mark, now)
        return self._message_in(datagram, found, key, mark, now)

    # The carrier of the engine.

    def send_offer(self, packet: UDPDatagram, session: Session, mark: int, now: float) -> Verdict:
        """Let a datagram out beside the offer, if policy allows the address and nothing waits; else it waits."""
        is_first = not session.has_waiting
        if is_first and session.is_address_allowed:
            if self.messages.has_room(packet, session.frame):
                session.advance(Event.OFFER_ATTACHED)
                return Verdict(Action.ACCEPT, beside(packet, session.frame))
            if session.state is State.UNANSWERED:
                return self._opened.send_without_room(packet, session, now)
        verdict = self._context.hold(session, packet, now)
        if is_first:
            self._await_answer(session, now)
            if session.state is State.OPENING:
                self.messages.send(session.key, session.frame)
        return verdict

    def make_way(self, packet: UDPDatagram, key: FlowKey, mark: int) -> Verdict | None:
        """Return None: an earlier flow of the same ports is in no way."""

    def deny(self, packet: UDPDatagram, direction: Direction) -> None:
        """Do nothing: a denied datagram is dropped."""

    def require_room(self, packet: UDPDatagram) -> None:
        """Do nothing: the answer goes alone, and was found to fit when the pod was registered."""

    def on_timer(self, session: Session, now: float) -> None:
        """Send again what was not answered, or do without an answer."""
        if session.key.role is Role.RESPONDER:
            self._responder_overdue(session, now)
        elif session.is_address_allowed:
            if session.state is State.REPLIED:
                self._opened.take_as_address(session, now)
                return
            # Nothing came back at all: datagrams may be too large to carry the offer, and the peer without an enforcer.
            session.advance(Event.PATIENCE_ENDED)
            self.messages.establish(session, b"", ACCEPT, now)
        elif session.has_waiting and self._context.policy.answered(session.key).evaluation.grant is not None:
            # The offer has left, so the node knows where the flow leads: to an address that policy allows.
            session.is_address_allowed = True
            session.advance(Event.PATIENCE_ENDED)
            self.messages.establish(session, b"", ACCEPT, now)
        elif session.tries < MAX_TRIES and session.has_waiting:
            self._retransmit(session, Event.OFFER_SENT, 2 * self._lag_s, now)

    def abort(self, session: Session) -> None:
        """End a flow that policy no longer allows."""
        is_initiator = session.key.role is Role.INITIATOR
        table = self.initiator.sessions if is_initiator else self.responder.sessions
        self._context.end(table, session, Event.POLICY_CHANGED)

    def _retransmit(self, session: Session, event: Event, lag_s: float, now: float) -> None:
        session.tries += 1
        session.advance(event)
        self._context.timers.set(session, now + RETRANSMIT_S * 2**session.tries + lag_s)
        self.messages.send(session.key, session.frame)

    # What the pod sends.

    def _message_out(self, found: _Found, key: FlowKey, now: float) -> Verdict:
        content, is_standalone = found
        if not is_standalone or not self._context.is_own_message(key.ends, content):
            raise FrameError(Reason.MALFORMED_FRAME, "a message that the pod made itself")
        session = self.initiator.find(key, now)
        is_awaited = session is not None and session.wake_at != NEVER and not session.tries
        if is_awaited and session is not None and not session.is_address_allowed and content == session.frame:
            # Only now can the answer be on its way, and it has to wait like the offer. To send the offer again sooner
            # would add to a queue that is behind already, with an offer and an answer a time.
            self._lag_s = min(max(now - session.sent_at, 0.0), _MAX_LAG_S)
            self._context.timers.set(session, now + self._lag_s + RETRANSMIT_S)
        return ACCEPT

    def _out(self, datagram: UDPDatagram, key: FlowKey, mark: int, now: float) -> Verdict:
        answered = self._find_answered(key.in_role(Role.RESPONDER), now)
        if answered is not None and answered.state is State.RELEASED:
            return answered.establish(now)
        session = self.initiator.find(key, now)
        if session is None:
            if mark & REPLY:
                raise PeerError(Reason.UNKNOWN_FLOW, "a reply in a flow that is not released")
            return self.initiator.open(datagram, key, 0, 0, now)
        if session.state is State.RELEASED:
            return session.establish(now)
        if session.state is State.DOUBTED:
            return self._opened.send_in_doubt(datagram, session, now)
        return self.send_offer(datagram, session, 0, now)

    def _offer_alone(self, key: FlowKey, now: float) -> Session:
        session = self.initiator.begin(key, 0, now)
        self.initiator.add(session)
        self._await_answer(session, now)
        self.messages.send(key, session.frame)
        return session

    def _await_answer(self, session: Session, now: float) -> None:
        session.tries, session.sent_at = 0, now
        wait_s = PATIENCE_S if session.is_address_allowed else RETRANSMIT_S + 2 * self._lag_s
        self._context.timers.set(session, now + wait_s)

    # What comes in.

    def _message_in(self, datagram: UDPDatagram, found: _Found, key: FlowKey, mark: int, now: float) -> Verdict:
        content, is_standalone = found
        if not self._context.is_own_address(datagram.dst):
            if is_standalone:
                return DROP
            # To a group or to all: no pod can answer for its address.
            return self._in(decode_udp(bare(datagram)), key, mark, now)
        match frame_type(content):
            case kind if kind == TYPE_OFFER:
                return self._offer_in(datagram, found, key, mark, now)
            case kind if kind == TYPE_PROOF:
                return self._proof_in(datagram, found, key, mark, now)
            case kind if kind in (TYPE_ANSWER, TYPE_CHALLENGE) and is_standalone:
                return self._opened.answer_in(datagram, content, key.in_role(Role.INITIATOR), mark, now)
            case kind if kind == TYPE_REHANDSHAKE and is_standalone:
                return self.rehandshakes.requested(content, key.in_role(Role.INITIATOR), mark, now)
            case kind if kind == TYPE_LEASE and is_standalone:
                verdict = self.messages.receive_lease(datagram, content, now)
                self._note_identified(datagram.src, now)
                return verdict
            case kind:
                raise FrameError(Reason.MALFORMED_FRAME, f"type {kind} beside a datagram")

    def _marked_in(self, datagram: UDPDatagram, key: FlowKey, mark: int, now: float) -> Verdict:
        """Let a marked datagram without a message that holds into a released flow only after another handshake.

        Its marker is there by chance, or a guard put it in, since a pod that has the address only now sends likewise:
        its enforcer is asked.
        """
        if is_by_address(mark):
            return accepted_bare(datagram)
        if mark & REPLY:
            return self.rehandshakes.opened_marked_in(datagram, key.in_role(Role.INITIATOR), now)
        session = self._find_answered(key, now)
        if session is not None and session.state is not State.RELEASED:
            return self._answered_in(datagram, session, now)
        if session is not None:
            if now < session.drained_at:  # The proof was just now.
                return accepted_bare(datagram)
            self._context.end(self.responder.sessions, session, Event.TAKEN_BACK)
        if not self.rehandshakes.may_ask(datagram, now):
            raise PeerError(Reason.UNKNOWN_FLOW, "a marked datagram, and no handshake can tell whose it is")
        return self.rehandshakes.ask(datagram, key, Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS), now)

    def _in(self, datagram: UDPDatagram, key: FlowKey, mark: int, now: float) -> Verdict:
        if mark & (RELEASED | NODE):
            if not has_marker(datagram.packet):
                raise FrameError(Reason.MALFORMED_FRAME, "looks like a message to the kernel's rules, and is none")
            return self._marked_in(datagram, key, mark, now)
        answered = self._find_answered(key, now)
        if answered is not None:
            return self._answered_in(datagram, answered, now)
        opened = self.initiator.find(key.in_role(Role.INITIATOR), now)
        if opened is not None:
            return self._opened.datagram_in(datagram, opened, now)
        if mark & REPLY:
            raise PeerError(Reason.UNKNOWN_FLOW, "a reply in a flow that is not released")
        return self._plain_in(datagram, key, now)

    def _find_answered(self, key: FlowKey, now: float) -> Session | None:
        session = self.responder.find(key, now)
        return self.rehandshakes.find(key, now) if session is None else session

    def _offer_in(self, datagram: UDPDatagram, found: _Found, key: FlowKey, mark: int, now: float) -> Verdict:
        """Verify and decide on an offer, and answer it; the datagram that it rides on waits for the proof."""
        message, is_standalone = found
        known = self._named(key, decode_head(message, TYPE_OFFER), now)
        if known is not None:
            return self._offered_again(datagram, known, is_standalone, now)
        earlier = self._find_answered(key, now)
        session = self.responder.accept_offer(datagram, message, key, earlier, 0, mark, now)
        if session is None:
            return DROP
        if session is earlier:
            self.rehandshakes.asked.remove(session)
        if session.wake_at == NEVER:  # Else the answer waits until it is known whether another pod has the address.
            self._send_answer(session, now)
        return DROP if session.grant is None else self._keep(datagram, session, is_standalone, now)

    def _send_answer(self, session: Session, now: float) -> None:
        """Make the answer, and send it again while datagrams wait for the proof."""
        session.make_answer(0, self._context.node.random(16))
        session.advance(Event.CHALLENGE_SENT if session.grant is None else Event.ANSWER_SENT)
        self.messages.send(session.key, session.frame)
        if session.peer is not None and session.key.remote in session.peer.addresses:
            self._note_identified(session.key.remote, now)
        if session.held:
            self._await_proof(session, now)

    def _await_proof(self, session: Session, now: float) -> None:
        if session.state is State.ANSWERED and session.wake_at == NEVER:
            session.tries = 0
            self._context.timers.set(session, now + RETRANSMIT_S)

    def _responder_overdue(self, session: Session, now: float) -> None:
        if session.state is State.OFFERED:
            if self._context.leases.is_suspected(session.source):
                self._context.timers.set(session, now + SUSPICION_POLL_S)
            else:
                self._send_answer(session, now)
        elif session.tries < MAX_TRIES and session.held and session.state is State.ANSWERED:
            self._retransmit(session, Event.ANSWER_SENT, 0.0, now)

    def _named(self, key: FlowKey, nonce: bytes, now: float) -> Session | None:
        session = self.responder.sessions.named(key, nonce)
        return session if session is not None and session.key == key and session.deadline > now else None

    def _offered_again(self, datagram: UDPDatagram, session: Session, is_standalone: bool, now: float) -> Verdict:
        """The flow's next datagram carries the offer too; one that comes alone asks for the answer again."""
        if session.state is State.RELEASED:
            raise PeerError(Reason.REPLAYED_NONCE, "the offer of a flow that was released")
        session.advance(Event.OFFER_RETRANSMITTED)
        if not is_standalone:
            return self._keep(datagram, session, is_standalone, now)
        if session.state is not State.OFFERED:
            if session.answers >= _MAX_ANSWERS:
                raise PeerError(Reason.REPLAYED_NONCE, "an offer that was answered often enough")
            session.answers += 1
            self.messages.send(session.key, session.frame)
        return TAKEN

    def _keep(self, datagram: UDPDatagram, session: Session, is_standalone: bool, now: float) -> Verdict:
        if is_standalone:
            return TAKEN
        verdict = self._context.hold(session, datagram, now)
        self._await_proof(session, now)
        return verdict

    def _proof_in(self, datagram: UDPDatagram, found: _Found, key: FlowKey, mark: int, now: float) -> Verdict:
        """Release the flow, and what waits for it in order, once the initiator's enforcer has proven itself."""
        message, is_standalone = found
        nonce, proof = decode_proof(message)
        session, context = self._named(key, nonce, now), self._context
        if session is None:
            return self._stray_proof(datagram, key, is_standalone, mark, now)
        session.verify_proof(proof)
        if session.state is State.RELEASED:
            if is_standalone:
                return Verdict(Action.CONSUME, mark=session.establish(now).mark)
            raise PeerError(Reason.REPLAYED_NONCE, "the proof of a flow that was released")
        if session in self.responder.rivals:
            self._take_place(session, now)
        if session.grant is None:
            # The pod that has the address now is another than the flow was released for, and policy denies it.
            context.end(self.responder.sessions, session, Event.PROOF_VERIFIED)
            return Verdict(Action.CONSUME)
        release = context.settle(session, Event.PROOF_VERIFIED, now)
        if is_standalone and not session.held:
            return Verdict(Action.CONSUME, mark=release.mark, when_drained=not mark & RELEASED)
        if is_standalone:
            self.messages.admit(context.take_held(session), session.establish(now))
            return TAKEN
        if not session.held:
            return session.establish(now)._replace(payload=bare(datagram))
        # Others came before it: it takes its place behind them.
        own = context.next_hold_id()
        self.messages.admit({**context.take_held(session), own: datagram}, session.establish(now))
        return Verdict(Action.HOLD, hold_id=own)

    def _take_place(self, session: Session, now: float) -> None:
        """Let a rival that has proven itself take the place of an earlier handshake or flow."""
        earlier = self._find_answered(session.key, now)
        if earlier is not None and earlier.state is State.ASKED:
            if session.grant is not None:  # What waited because we asked for this proof.
                self.messages.admit(self._context.take_held(earlier), ACCEPT)
            self._context.end(self.rehandshakes.asked, earlier, Event.REPLACED)
            earlier = None
        self.responder.take_place(session, earlier)

    def _stray_proof(self, datagram: UDPDatagram, key: FlowKey, is_standalone: bool, mark: int, now: float) -> Verdict:
        """Evaluate a datagram with the proof of a handshake that is not known, or known no longer."""
        earlier = self._find_answered(key, now)
        if earlier is not None and earlier.state is not State.ASKED:
            raise ProofError(Reason.PROOF_INVALID, "of another handshake")
        if is_standalone:
            raise PeerError(Reason.UNKNOWN_FLOW, "a proof of no handshake")
        if mark & RELEASED:
            return self._marked_in(datagram, key, mark & ~REPLY, now)
        verdict = self._plain_in(datagram, key, now)
        return verdict._replace(payload=bare(datagram)) if verdict.action is Action.RELEASE else verdict

    def _note_identified(self, address: bytes, now: float) -> None:
        """Take note of an address whose enforcer has our answer.

        By that the conntrack of its node takes the flow for established, and the guard there lets the pod's own packets
        follow, whatever its policy says of them.
        """
        self._identified.pop(address, None)
        if len(self._identified) >= MAX_IDENTIFIED:
            del self._identified[next(iter(self._identified))]
        self._identified[address] = now + IDENTIFIED_S

    def _plain_in(self, datagram: UDPDatagram, key: FlowKey, now: float) -> Verdict:
        """Decide on a datagram without an identity; one from the enforced networks may have lost its own."""
        context = self._context
        context.refuse_reflection(datagram.src, datagram.dst)
        source, evaluation = context.policy.inbound(datagram, _PROTOCOL)
        has_enforcer = self._identified.get(datagram.src, 0.0) > now and context.is_own_address(datagram.dst)
        if has_enforcer and evaluation.grant is not None:
            self._note_identified(datagram.src, now)
            evaluation = _UNPROVEN
        if evaluation.grant is None and self.rehandshakes.may_ask(datagram, now):
            return self.rehandshakes.ask(datagram, key, evaluation.decision, now)
        self.responder.report(datagram, source, evaluation.decision)
        return DROP if evaluation.grant is None else context.admit(datagram.dst, evaluation.grant.verdict)

    def _answered_in(self, datagram: UDPDatagram, session: Session, now: float) -> Verdict:
        """Let a datagram of a known flow wait for the proof."""
        if session.state is State.RELEASED:
            return session.establish(now)
        if session.state is State.ASKED and len(session.held) >= _MAX_HELD_ASKED:
            raise PeerError(Reason.HOLD_QUEUE_FULL, "of a flow that is not known")
        return self._keep(datagram, session, False, now)
