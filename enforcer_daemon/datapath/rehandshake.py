# SPDX-License-Identifier: Apache-2.0
"""Another handshake of a UDP flow: one end lost its state, or a marked datagram casts doubt on a released flow.

Its marker is there by chance, or a guard put it in, since a pod that has the address only now sends likewise. Who asks
for a handshake proves nothing, and gains nothing but that: the flow goes on meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.engine import Initiator, Responder
from enforcer_daemon.datapath.messages import Messages, accepted_bare
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.carriers import UDP
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.flowkey import FlowKey
from enforcer_daemon.handshake.frames import decode_again, encode_again
from enforcer_daemon.handshake.machine import REMEMBERED, Event, State
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.handshake.sessions import SessionTable
from enforcer_daemon.handshake.signaturebudget import TokenBucket
from enforcer_daemon.marks import NODE, RELEASED, REPLY
from enforcer_daemon.model import Decision
from enforcer_daemon.packet.udp import UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP, TAKEN, Verdict

_PROTOCOL = UDP.protocol


class Rehandshakes:
    """The repeated handshakes of one endpoint's flows, asked for and begun; both are limited."""

    def __init__(
        self,
        context: EndpointContext,
        messages: Messages,
        initiator: Initiator[UDPDatagram],
        responder: Responder[UDPDatagram],
        begin: Callable[[FlowKey, float], Session],
    ) -> None:
        """`begin` makes an offer for a flow, and sends it alone until it is answered."""
        self._context = context
        self._messages = messages
        self._initiator = initiator
        self._responder = responder
        self._begin = begin
        settings, hits = context.node.settings, context.node.limit_hits
        rate = settings.max_rehandshakes_per_s
        # As many as can be asked in the time for which such a flow is remembered, and at once before.
        max_asked = math.ceil(rate * (1 + (UDP.unfinished_s or 0.0)))
        self.asked = SessionTable((max_asked, max_asked), 0, hits)
        """Flows whose sender was asked."""
        self._begun = TokenBucket(rate, hits, Limit.REHANDSHAKES)
        self._asking = TokenBucket(rate, hits, Limit.REHANDSHAKES)

    def requested(self, message: bytes, key: FlowKey, mark: int, now: float) -> Verdict:
        """Rehandshake for a flow that the pod opened and that was released here, while it goes on.

        Who asks proves nothing, so asking gains nothing: at most a handshake, and those are counted.
        """
        decode_again(message)
        session = self._initiator.find(key, now)
        if session is not None and session.state is State.DOUBTED:
            # The peer is a pod after all, and has not seen an offer: it would have answered.
            if not self._begun.take(now):
                return DROP
            session.advance(Event.OFFER_SENT)
            self._messages.send(session.key, session.frame)
            return TAKEN
        if mark & (RELEASED | NODE | REPLY) != RELEASED | REPLY:
            raise PeerError(Reason.UNKNOWN_FLOW, "a request to rehandshake for no flow of the pod's")
        if self._is_under_way(session, now):
            return DROP
        return TAKEN if self._rehandshake(key, now) is not None else DROP

    def opened_marked_in(self, datagram: UDPDatagram, key: FlowKey, now: float) -> Verdict:
        """Let a marked datagram without a message into a released flow of the pod's only after another handshake."""
        context, session = self._context, self._initiator.find(key, now)
        if session is not None and session.state not in REMEMBERED:
            # Not as an answer of an address without an enforcer: that would release the flow by its address.
            allowed = context.policy.egress(None, datagram.src, datagram.sport, _PROTOCOL).grant
            return accepted_bare(datagram) if allowed else context.hold(session, None, now)
        if self._is_under_way(session, now):
            return accepted_bare(datagram)
        session = self._rehandshake(key, now)
        if session is None:
            raise PeerError(Reason.UNKNOWN_FLOW, "a marked datagram, and no handshake can tell whose it is")
        return context.hold(session, None, now)

    def _is_under_way(self, session: Session | None, now: float) -> bool:
        """Tell whether a handshake is under way or just over; end one that is over."""
        if session is None:
            return False
        if session.state not in REMEMBERED or now < session.drained_at:
            return True
        self._context.end(self._initiator.sessions, session, Event.TAKEN_BACK)
        return False

    def _rehandshake(self, key: FlowKey, now: float) -> Session | None:
        """Begin a handshake for a flow that is released; return None if none may be begun.

        A release that policy forbids ends by the change of policy.
        """
        if not self._context.policy.outbound(key.remote, key.remote_port, _PROTOCOL).needs_handshake:
            return None
        if not self._begun.take(now):
            return None
        self._context.require_token(now)
        return self._begin(key, now)

    def find(self, key: FlowKey, now: float) -> Session | None:
        """Find a flow whose sender was asked."""
        asked = self.asked.get(key)
        if asked is not None and asked.deadline <= now:
            self._context.end(self.asked, asked, Event.EXPIRED)
            return None
        return asked

    def may_ask(self, datagram: UDPDatagram, now: float) -> bool:
        """Only of a pod that has shown an identity before: another's application would get an empty datagram."""
        context = self._context
        is_known = context.policy.flows.knows(datagram.src) and context.is_own_address(datagram.dst)
        return is_known and self._asking.take(now)

    def ask(self, datagram: UDPDatagram, key: FlowKey, refusal: Decision, now: float) -> Verdict:
        """Let a datagram wait for a handshake; `refusal` is what becomes of it if none comes."""
        context = self._context
        session = Session(key, UDP, context.local, State.ASKED, now + (UDP.unfinished_s or 0.0))
        session.refusal = refusal
        self.asked.add(session)  # None makes room: `may_ask` is limited to what there is room for.
        self._messages.send(key, encode_again(context.node.random(16)))
        return context.hold(session, datagram, now)
