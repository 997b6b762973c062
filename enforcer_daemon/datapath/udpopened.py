# SPDX-License-Identifier: Apache-2.0
"""UDP flows that the pod opens, after their offer: who answers, and what a peer without an identity gets meanwhile."""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.engine import Initiator
from enforcer_daemon.datapath.messages import Messages
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.datagrams import beside, marked
from enforcer_daemon.handshake.flowkey import FlowKey
from enforcer_daemon.handshake.frames import encode_proof
from enforcer_daemon.handshake.lapse import UDP_LAPSE_S
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.session import NEVER, Session
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.packet.udp import UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Verdict

PATIENCE_S = 0.2
"""How long an enforcer is waited for if policy allows the address with any pod there, seconds."""


class OpenedFlows:
    """One endpoint's UDP flows that the pod opens."""

    def __init__(self, context: EndpointContext, initiator: Initiator[UDPDatagram], messages: Messages) -> None:
        self._context = context
        self._initiator = initiator
        self._messages = messages

    def answer_in(self, datagram: UDPDatagram, message: bytes, key: FlowKey, mark: int, now: float) -> Verdict:
        """Verify who answers, decide on egress, prove, and release what waits; the answer itself ends here."""
        context, session = self._context, self._initiator.find(key, now)
        if session is None:
            raise PeerError(Reason.UNKNOWN_FLOW, "an answer to no offer")
        if not self._initiator.accept_answer(datagram, session, message, 0, now):
            return Verdict(Action.CONSUME)
        if session.state is State.VERIFIED:
            context.settle(session, Event.PROOF_ATTACHED, now)
        else:
            session.advance(Event.PROOF_SENT)
            context.prove(session, now)
        proof = encode_proof(session.nonce_i, session.proof)
        release = session.establish(now)
        if session.held:  # What waits goes first, and takes the flow with it.
            self._messages.establish(session, proof, release, now)
            return TAKEN
        self._messages.send(session.key, proof)
        when_drained = not mark & RELEASED and release.when_drained
        return Verdict(Action.CONSUME, mark=release.mark, when_drained=when_drained)

    def datagram_in(self, datagram: UDPDatagram, session: Session, now: float) -> Verdict:
        """Let in what comes back without an identity: from an address that policy allows, or once a peer showed one.

        An answer can overtake the other enforcer's, so the address is not taken for the peer at once.
        """
        if session.state is State.DOUBTED:
            session.deadline = now + UDP_LAPSE_S
            return Verdict(Action.ACCEPT, mark=session.establish(now).mark)
        if session.state is State.RELEASED:
            return session.establish(now)
        grant = self._context.policy.answered(session.key).evaluation.grant
        if grant is None:
            return self._context.hold(session, None, now)
        is_first, session.grant = session.grant is None, grant
        session.advance(Event.PLAIN_REPLY)
        patient_until = session.opened_at + PATIENCE_S
        if now < patient_until:
            if session.wake_at == NEVER:
                self._context.timers.set(session, patient_until)
            return Verdict(Action.ACCEPT, mark=grant.verdict.mark) if is_first else ACCEPT
        release = self.take_as_address(session, now)
        is_doubted = now < session.doubted_until
        return Verdict(Action.ACCEPT, mark=release.mark) if is_doubted else release

    def take_as_address(self, session: Session, now: float) -> Verdict:
        """Release a flow by its peer's address, since no identity was shown; a fresh pod's stays in the queue."""
        context = self._context
        if not self._initiator.accept_reply(session):
            return DROP
        if now < context.fresh_until:
            release = context.settle(session, Event.TAKEN_IN_DOUBT, now)
            session.doubted_until, session.deadline = context.fresh_until, now + UDP_LAPSE_S
            self._messages.establish(session, b"", ACCEPT, now)
            return release
        context.settle(session, Event.TAKEN_AS_ADDRESS, now)
        release = session.establish(now)
        self._messages.establish(session, b"", release, now)
        return release

    def send_in_doubt(self, datagram: UDPDatagram, session: Session, now: float) -> Verdict:
        """Let a datagram of a fresh pod out to a peer that showed no identity.

        The peer may be a pod that still has the flow of the former owner of the address: its enforcer sees no plain
        datagram of that. So each carries the offer, as long as the address is fresh.
        """
        session.deadline = now + UDP_LAPSE_S
        if not self._messages.has_room(datagram, session.frame):
            return self.send_without_room(datagram, session, now)
        session.advance(Event.OFFER_ATTACHED)
        return Verdict(Action.ACCEPT, beside(datagram, session.frame), session.establish(now).mark)

    def send_without_room(self, datagram: UDPDatagram, session: Session, now: float) -> Verdict:
        """Let a datagram out that no enforcer answered, and which has no room for the offer."""
        if now >= self._context.fresh_until:
            return ACCEPT
        if now - session.sent_at >= PATIENCE_S:
            session.sent_at = now
            session.advance(Event.OFFER_SENT)
            self._messages.send(session.key, session.frame)
        return Verdict(Action.ACCEPT, marked(datagram))
