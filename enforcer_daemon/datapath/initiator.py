# SPDX-License-Identifier: Apache-2.0
"""Connections that the pod opens: attach the frame, verify the answer, judge egress, prove, release."""

from __future__ import annotations

from enforcer_daemon.datapath.binding import require_dialled
from enforcer_daemon.datapath.context import EndpointContext, bare_reset, reset_local
from enforcer_daemon.datapath.judging import Destination, Ruling
from enforcer_daemon.errors import PeerError, TokenError
from enforcer_daemon.handshake.flows import FlowTable, InitiatorFlow, fragmentation_of
from enforcer_daemon.handshake.frames import (
    decode_syn_ack,
    find_proof,
    has_room,
    is_frame,
    proof_option,
)
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.marks import CUT, OWN_MASK, RELEASED
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.packet.ip import NOT_TO_BE_CUT
from enforcer_daemon.packet.tcp import ACK, RST, Segment, build, with_options_and_payload, without_fast_open
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

_NUMBERS = 0xFFFF_FFFF
_MAX_CLEARED = 1_024
"""SYNs that wait for their repetition; the oldest makes room, and may be held back once more."""
_SYN_HEADERS = 60
"""IP and TCP header bytes of the smallest SYN: with the frame, a packet size that this path has already carried."""


class Initiator:
    """The initiating side of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self.flows: FlowTable[InitiatorFlow] = FlowTable(context.node.settings, context.node.bound_hits)
        self._cleared: dict[bytes, int] = {}
        """SYNs that were held back for a RST to go first, by flow: their ISNs."""

    def syn_out(self, segment: Segment, key: bytes, mark: int, now: float) -> Verdict:
        """Let a SYN out: with our frame into the enforced networks, judged by address elsewhere."""
        flow = self.flows.get(key)
        if flow is not None:
            if flow.isn == segment.seq and flow.state is State.OPENING:
                return self._attach_frame(segment, flow, 0)
            self.flows.discard(flow)
        context = self._context
        destination = context.node.networks.destination(segment.dst, segment.dport)
        if destination is Destination.EXTERNAL:
            return self._release_by_address(segment, context.judge.egress(None, segment.dst, segment.dport))
        if not context.judge.could_allow_egress(destination, segment.dst, segment.dport):
            decision = context.judge.egress(None, segment.dst, segment.dport).decision
            return self._deny_syn(segment, Decision(False, Reason.EGRESS_DENIED, Direction.EGRESS, decision.rules))
        if now + context.node.wall_offset_s > context.local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the daemon overloaded?")
        if mark & OWN_MASK and self._cleared.pop(key, None) != segment.seq:
            return self._clear_way(segment, key)
        flow = InitiatorFlow(
            key, context.local, context.node.random(16), segment.seq, now + context.node.settings.timeout_s
        )
        verdict = self._attach_frame(segment, flow, mark)
        evicted = self.flows.add(flow)
        return verdict if evicted is None else verdict._replace(effects=context.give_up(*evicted))

    def _clear_way(self, segment: Segment, key: bytes) -> Verdict:
        """Send a RST in place of the SYN, which the pod's kernel repeats a second later.

        The mark of an earlier connection of these ports is still there: the peer ended it by RST, and conntrack keeps
        its entry for 10 s. So do the nodes on the way. There conntrack ignores the SYN, and believes the SYN-ACK only
        if that acknowledges all of it, our frame included; so the third segment would be invalid to it, which strict
        nodes drop after connect() has returned. After a RST in the SYN's own direction it begins anew with the SYN
        (nf_conntrack_proto_tcp.c, "attempt to reopen a closed/aborted connection"). The peer's kernel has nothing that
        this RST could end.
        """
        if len(self._cleared) >= _MAX_CLEARED:
            del self._cleared[next(iter(self._cleared))]
        self._cleared[key] = segment.seq
        ports, numbers = (segment.sport, segment.dport), (segment.seq, 0)
        reset = build(segment.src, segment.dst, ports, numbers, RST, 0)
        return DROP._replace(effects=(self._context.inject(key, reset, RST, numbers),))

    def may_reach(self, segment: Segment) -> bool:
        """Tell whether the pod could be allowed to send anything at all to where a segment goes."""
        context = self._context
        destination = context.node.networks.destination(segment.dst, segment.dport)
        if destination is Destination.EXTERNAL:
            return context.judge.egress(None, segment.dst, segment.dport).decision.is_allowed
        return context.judge.could_allow_egress(destination, segment.dst, segment.dport)

    def _attach_frame(self, segment: Segment, flow: InitiatorFlow, mark: int) -> Verdict:
        """Replace the SYN's payload; Fast Open data among it is sent again by the kernel, after the handshake."""
        options = without_fast_open(segment.options)
        packet = with_options_and_payload(segment, options, flow.frame, fragmentation_of(flow.nonce))
        if len(packet) > self._context.mtu:
            raise PeerError(Reason.IDENTITY_TOO_LARGE, f"{len(packet)} bytes, MTU {self._context.mtu}")
        return Verdict(Action.FORGET if mark & OWN_MASK else Action.ACCEPT, packet)

    def _release_by_address(self, segment: Segment, ruling: Ruling) -> Verdict:
        decision = ruling.decision
        if not decision.is_allowed:
            return self._deny_syn(segment, decision)
        self._context.report(Direction.EGRESS, segment.dst, segment.dport, decision)
        return ruling.release

    def _deny_syn(self, segment: Segment, decision: Decision) -> Verdict:
        self._context.report(Direction.EGRESS, segment.dst, segment.dport, decision)
        if self._context.node.deny_with is DenyWith.RESET:
            return DROP._replace(effects=(Inject(reset_local(segment)),))
        return DROP

    def syn_ack_in(self, segment: Segment, key: bytes, mark: int, now: float) -> Verdict:
        """Verify who answers, judge egress, and deliver the SYN-ACK as its sender's kernel made it."""
        flow = self.flows.get(key)
        if flow is None:
            if mark & RELEASED:
                return self._forgotten_syn_ack(segment, key)
            return self._context.refuse_unknown(key, segment)
        if segment.ack != (flow.isn + 1) & _NUMBERS:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK acknowledges another SYN")
        payload = segment.payload
        if not is_frame(payload):
            return self._plain_syn_ack(segment, flow, key)
        if flow.state is State.RELEASED:
            return _prove_again(segment, flow)
        context = self._context
        frame = decode_syn_ack(payload)
        peer = context.node.verify(frame.block, segment.src, now)
        require_dialled(context, frame, peer, (segment.src, segment.sport))
        flow.verify(payload, frame, segment.seq, peer)
        decision, flow.release, flow.judged = context.judge.egress(peer, frame.address, frame.port)
        if flow.state is State.OPENING or not decision.is_allowed:
            context.report(Direction.EGRESS, frame.address, frame.port, decision, peer=peer.identity)
        if not decision.is_allowed:
            return self._refuse(segment, flow, key)
        flow.advance(Event.SYN_ACK_VERIFIED)
        flow.address = frame.address
        return _deliver(segment)

    def _forgotten_syn_ack(self, segment: Segment, key: bytes) -> Verdict:
        """Answer a SYN-ACK of a connection that was released, and that we remember no more.

        Bare, it is a matter of the kernels. With a frame, the peer's enforcer never saw our proof, and we cannot make
        it again: both ends are told, which else would wait. A late copy does no harm to ends that have spoken since:
        the numbers are then out of their windows.
        """
        if not is_frame(segment.payload):
            return ACCEPT
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.EGRESS)
        self._context.report(Direction.EGRESS, segment.src, segment.sport, decision, detail="SYN-ACK after release")
        next_r = (segment.seq + 1) & _NUMBERS
        own, remote = (segment.ack, next_r), (next_r, segment.ack)
        return DROP._replace(effects=self._context.reset_both(key, own, remote))

    def _plain_syn_ack(self, segment: Segment, flow: InitiatorFlow, key: bytes) -> Verdict:
        """No frame in the answer: the peer is an address, whatever it sits behind."""
        if flow.state is State.RELEASED and segment.seq == flow.isn_r:
            return ACCEPT  # The peer's enforcer has our proof, its kernel not our ACK.
        if flow.state is not State.OPENING:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK without identity after one with it")
        decision, release, _ = self._context.judge.egress(None, segment.src, segment.sport)
        self._context.report(Direction.EGRESS, segment.src, segment.sport, decision)
        if not decision.is_allowed:
            return self._refuse(segment, flow, key)
        self.flows.discard(flow)
        return release

    def _refuse(self, segment: Segment, flow: InitiatorFlow, key: bytes) -> Verdict:
        """End both sides: the peer's half-open connection by a RST, ours by one where so configured."""
        flow.advance(Event.REFUSED)
        self.flows.discard(flow)
        effects = (self._context.reset_remote(key, segment, Direction.INGRESS),)
        if self._context.node.deny_with is DenyWith.RESET:
            ports = segment.sport, segment.dport
            numbers = 0, (flow.isn + 1) & _NUMBERS
            refused = build(segment.src, segment.dst, ports, numbers, RST | ACK, 0)
            return Verdict(Action.ACCEPT, refused, effects=effects)
        return DROP._replace(effects=effects)

    def abort(self, flow: InitiatorFlow) -> tuple[Settle | Inject, ...]:
        """Give a flow up because a change of policy no longer allows it."""
        self.flows.discard(flow)
        dropped = self._context.settle_held(flow, DROP)
        if flow.state not in (State.VERIFIED, State.PROVING):
            return dropped
        next_i, next_r = (flow.isn + 1) & _NUMBERS, (flow.isn_r + 1) & _NUMBERS
        return dropped + self._context.reset_both(flow.key, (next_i, next_r), (next_r, next_i))

    def _settle(self, flow: InitiatorFlow, now: float) -> None:
        """Remember a released flow without what only its handshake needed."""
        self.flows.settle(flow)
        flow.frame = b""
        if flow.peer is not None:
            self._context.note_release(flow, flow.peer, flow.address, now)

    def segment_out(self, flow: InitiatorFlow, segment: Segment, mark: int, now: float) -> Verdict:
        """Let the pod's first segment after the SYN-ACK carry the proof, and release the flow with it."""
        if segment.flags & RST:
            self.flows.discard(flow)
            return bare_reset(segment)._replace(effects=self._context.settle_held(flow, DROP))
        match flow.state:
            case State.VERIFIED:
                return self._prove(segment, flow, mark, now)
            case State.PROVING:
                return self._pass_lone_proof(segment, flow, now)
            case State.RELEASED:
                return flow.release
            case _:
                raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {flow.state.name.lower()}")

    def _prove(self, segment: Segment, flow: InitiatorFlow, mark: int, now: float) -> Verdict:
        options = segment.options
        length = segment.end + len(proof_option(flow.proof, is_lone=False))
        is_small = segment.data == segment.end or length <= len(flow.frame) + _SYN_HEADERS
        if has_room(options) and is_small and not mark & CUT:
            flow.advance(Event.PROOF_ATTACHED)
            self._settle(flow, now)
            # First, since nothing counts that follows an end-of-options marker of the pod's stack.
            options = proof_option(flow.proof, is_lone=False) + options
            packet = with_options_and_payload(segment, options, segment.payload)
            if segment.data == segment.end:
                flow.again = (Inject(packet),)
            return Verdict(Action.RELEASE, packet, flow.release.mark)
        flow.advance(Event.LONE_PROOF_SENT)
        lone = _lone_proof(segment, flow)
        if segment.data == segment.end:
            flow.again = (lone, Inject(with_options_and_payload(segment, options, b"")))
        return self._context.hold(flow, now, (lone,))

    def _pass_lone_proof(self, segment: Segment, flow: InitiatorFlow, now: float) -> Verdict:
        found = find_proof(segment.options)
        if found is None or not found.is_lone or found.proof != flow.proof:
            # None waits: what did, timed out, and so our ACK was lost before it came here.
            return self._context.hold(flow, now, () if flow.held else (_lone_proof(segment, flow),))
        flow.advance(Event.LONE_PROOF_PASSED)
        self._settle(flow, now)
        return flow.release._replace(effects=self._context.settle_held(flow, flow.release))

    def awaits_answer(self, key: bytes) -> bool:
        """Tell whether the pod opens a connection with these ends, which is not released yet."""
        flow = self.flows.get(key)
        return flow is not None and flow.state is not State.RELEASED

    def forget(self, key: bytes) -> None:
        """Forget a handshake that needs no end of its own any more."""
        flow = self.flows.get(key)
        if flow is not None:
            self.flows.discard(flow)

    def segment_in(self, flow: InitiatorFlow, segment: Segment) -> Verdict:
        """Let in what the peer may send before our proof has reached it."""
        if flow.state is State.RELEASED:
            return flow.release
        if segment.flags & RST:
            if flow.state is State.OPENING and segment.ack != (flow.isn + 1) & _NUMBERS:
                raise PeerError(Reason.UNKNOWN_FLOW, "RST that refuses another SYN")
            if flow.state is State.OPENING:
                self.flows.discard(flow)
            return bare_reset(segment)
        if segment.data == segment.end and flow.state is State.OPENING:
            # A challenge ACK of a peer that still has the last connection of these ports (RFC 5961): the pod's kernel
            # answers it with a RST and sends its SYN again.
            return ACCEPT
        raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {flow.state.name.lower()}")


def _deliver(segment: Segment) -> Verdict:
    """Take off what was added, so that the pod's kernel sees its peer's SYN-ACK."""
    if not is_frame(segment.payload):
        return ACCEPT
    options = without_fast_open(segment.options)
    return Verdict(Action.ACCEPT, with_options_and_payload(segment, options, b"", NOT_TO_BE_CUT))


def _lone_proof(segment: Segment, flow: InitiatorFlow) -> Inject:
    """Make an ACK of our own with nothing but the proof; `segment` goes the same way."""
    numbers = (flow.isn + 1) & _NUMBERS, (flow.isn_r + 1) & _NUMBERS
    options = proof_option(flow.proof, is_lone=True)
    ports = segment.sport, segment.dport
    return Inject(build(segment.src, segment.dst, ports, numbers, ACK, segment.window, options))


def _prove_again(segment: Segment, flow: InitiatorFlow) -> Verdict:
    """The peer repeats its SYN-ACK because our proof was lost; the pod's kernel need not know.

    The pod's own bare ACK goes along: a server that speaks first would wait for it in vain. Data its kernel repeats.
    """
    if segment.seq != flow.isn_r:
        raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK of another handshake")
    answer = segment._replace(src=segment.dst, dst=segment.src, sport=segment.dport, dport=segment.sport)
    return TAKEN._replace(effects=flow.again or (_lone_proof(answer, flow),))
