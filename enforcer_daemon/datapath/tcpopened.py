# SPDX-License-Identifier: Apache-2.0
"""Connections that the pod opens, after their SYN: who answers, the proof, and what may come in before it."""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.engine import Initiator
from enforcer_daemon.datapath.segments import bare, bare_reset, is_after_frame, refusal, standalone_proof, successor
from enforcer_daemon.datapath.strays import Strays
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.flowkey import FlowKey
from enforcer_daemon.handshake.frames import MAGIC, find_proof, has_room, proof_option
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.marks import GSO, RELEASED
from enforcer_daemon.packet.tcp import RST, Segment, with_options_and_payload
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Verdict

_SYN_HEADERS = 60
"""IP and TCP header bytes of the smallest SYN: with the frame, a packet size that this path has already carried."""


class OpenedConnections:
    """One endpoint's connections that the pod opens."""

    def __init__(self, context: EndpointContext, strays: Strays, initiator: Initiator[Segment]) -> None:
        self._context = context
        self._strays = strays
        self._initiator = initiator
        self._sessions = initiator.sessions

    def answer_in(self, segment: Segment, key: FlowKey, mark: int, now: float) -> Verdict:
        """Verify who answers, decide on egress, and deliver the SYN-ACK as its sender's kernel made it."""
        session, payload = self._sessions.get(key), segment.payload
        is_framed = payload[:4] == MAGIC
        if session is None:
            if not mark & RELEASED:
                return self._strays.refuse_answer(segment, key)
            return self._strays.end_forgotten(segment, key) if is_framed else ACCEPT  # Bare, the kernels settle it.
        if segment.ack != successor(session.isn_i):
            if not is_framed and session.state is State.SHOWN and is_after_frame(segment, session):
                return self._without_frame(segment, session)
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK acknowledges another SYN")
        if not is_framed:
            return self._plain_answer(segment, session)
        if session.state is State.RELEASED:
            return self._retransmit_proof(segment, session)
        if not self._initiator.accept_answer(segment, session, payload, segment.seq, now):
            return self._strays.refuse_both(segment, key)
        return Verdict(Action.ACCEPT, bare(segment))

    def _without_frame(self, segment: Segment, session: Session) -> Verdict:
        """Reset a connection whose responder took our frame for data, and let the next SYN leave without it.

        It accepts data of every SYN (Fast Open without a cookie), and has no enforcer. Its bare answer is decided on by
        its address, as any other; the pod's kernel retransmits the SYN a second later.
        """
        self._strays.reset_remote(segment)
        session.frame, session.frame_sum = b"", 0
        return DROP

    def _plain_answer(self, segment: Segment, session: Session) -> Verdict:
        """Take the peer for its address, whatever it sits behind: there is no frame in its SYN-ACK."""
        if session.state is State.RELEASED and segment.seq == session.isn_r:
            return ACCEPT  # The peer's enforcer has our proof, its kernel not our ACK.
        if session.state is not State.SHOWN:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK without identity after one with it")
        if not self._initiator.accept_reply(session):
            return self._strays.refuse_both(segment, session.key)
        grant = session.grant
        for event in (Event.PLAIN_REPLY, Event.TAKEN_AS_ADDRESS):
            session.advance(event)
        self._context.end(self._sessions, session, Event.FORGOTTEN)
        return DROP if grant is None else grant.verdict

    def _retransmit_proof(self, segment: Segment, session: Session) -> Verdict:
        """Answer the SYN-ACK that the peer retransmits because our proof was lost; the pod's kernel need not know.

        The pod's own bare ACK goes along: else a server that speaks first waits for it. Data its kernel
        retransmits.
        """
        if segment.seq != session.isn_r:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK of another handshake")
        session.advance(Event.PROOF_SENT)
        self._context.effects += session.resend or (standalone_proof(session, segment.window),)
        return TAKEN

    def segment_out(self, segment: Segment, session: Session, mark: int, now: float) -> Verdict:
        """Let the pod's first segment after the SYN-ACK carry the proof, and release the flow with it."""
        if segment.flags & RST:
            if self._context.is_injected(session.key.ends, segment.flags, (segment.seq, segment.ack)):
                return ACCEPT  # That of `_without_frame`; the handshake goes on.
            self._context.end(self._sessions, session, Event.RESET)
            return bare_reset(segment)
        match session.state:
            case State.VERIFIED:
                return self._prove(segment, session, mark, now)
            case State.PROVING:
                return self._pass_standalone_proof(segment, session, now)
            case State.RELEASED:
                return session.establish(now)
            case _:
                raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {session.state.name.lower()}")

    def _prove(self, segment: Segment, session: Session, mark: int, now: float) -> Verdict:
        context, options = self._context, segment.options
        option = proof_option(session.proof, is_standalone=False)
        is_bare = segment.data == segment.end
        is_small = is_bare or segment.end + len(option) <= len(session.frame) + _SYN_HEADERS
        if has_room(options) and is_small and not mark & GSO:
            # First, since nothing counts that follows an end-of-options marker of the pod's stack.
            packet = with_options_and_payload(segment, option + options, segment.payload)
            release = context.settle(session, Event.PROOF_ATTACHED, now)
            if is_bare:
                session.resend = (Inject(packet),)
            return Verdict(Action.RELEASE, packet, release.mark)
        alone = standalone_proof(session, segment.window)
        if is_bare:
            session.resend = (alone, Inject(with_options_and_payload(segment, options, b"")))
        return self._hold_behind_proof(session, alone, now)

    def _hold_behind_proof(self, session: Session, alone: Inject, now: float) -> Verdict:
        session.advance(Event.PROOF_SENT)
        verdict = self._context.hold(session, None, now)
        self._context.effects.append(alone)
        return verdict

    def _pass_standalone_proof(self, segment: Segment, session: Session, now: float) -> Verdict:
        found = find_proof(segment.options)
        if found is None or not found.is_standalone or found.proof != session.proof:
            if session.held:
                return self._context.hold(session, None, now)
            # What waited timed out, and so our ACK was lost before it came here.
            return self._hold_behind_proof(session, standalone_proof(session, segment.window), now)
        release = self._context.settle(session, Event.PROOF_PASSED, now)
        self._context.settle_held(session, release)
        return release

    def segment_in(self, segment: Segment, session: Session, now: float) -> Verdict:
        """Let in what the peer may send before our proof has reached it."""
        if session.state is State.RELEASED:
            return session.establish(now)
        is_shown = session.state is State.SHOWN
        if segment.flags & RST:
            if not is_shown:
                return bare_reset(segment)
            verdict = refusal(segment, session)
            self._context.end(self._sessions, session, Event.RESET)
            return verdict
        if segment.data == segment.end and is_shown:
            # A challenge ACK of a peer that still has the last connection of these ports (RFC 5961): the pod's kernel
            # answers it with a RST and sends its SYN again.
            return ACCEPT
        raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {session.state.name.lower()}")
