# SPDX-License-Identifier: Apache-2.0
"""Connections that are opened to the pod: verify the SYN, judge ingress, answer, await the proof, release."""

from __future__ import annotations

from struct import Struct

from enforcer_daemon.datapath.binding import require_source
from enforcer_daemon.datapath.context import EndpointContext, bare_reset
from enforcer_daemon.datapath.judging import Ruling
from enforcer_daemon.datapath.rivals import PlainRival, Rival, Rivals, answers, is_same_attempt
from enforcer_daemon.datapath.unproven import Unproven
from enforcer_daemon.errors import PeerError, TokenError
from enforcer_daemon.handshake.flows import FlowTable, Offer, ResponderFlow, fragmentation_of
from enforcer_daemon.handshake.frames import (
    SYN_ACK_OVERHEAD,
    FoundProof,
    decode_syn,
    find_proof,
    is_frame,
)
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import frame_hash
from enforcer_daemon.marks import NODE, OWN_MASK, RELEASED
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.packet.ip import NOT_TO_BE_CUT
from enforcer_daemon.packet.tcp import (
    ACK,
    FIN,
    RST,
    SYN_ACK,
    TCP,
    TCP_MAX_HEADER,
    TCP_MIN_HEADER,
    Segment,
    announced_mss,
    build,
    decode_tcp,
    with_options_and_payload,
    without_fast_open,
)
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

_NUMBERS = 0xFFFF_FFFF
_PORTS = Struct("!HH")
_RELEASE_NODE = Verdict(Action.RELEASE, mark=RELEASED | NODE)
_REPEAT_S = 0.02
"""The least time between two repetitions of a SYN-ACK for unproven data, seconds."""
_MAX_UNKNOWN = 1_024
"""SYN-ACKs of unknown flows that are told apart; the oldest makes room."""
_TOLERATED_TIMES = 1
"""Of one such SYN-ACK: kernels repeat SYN and SYN-ACK at the same pace, so by the next one the SYN has come."""
_MAX_OPTIONS = TCP_MAX_HEADER - TCP_MIN_HEADER


class Responder:
    """The responding side of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self.flows: FlowTable[ResponderFlow] = FlowTable(context.node.settings, context.node.bound_hits)
        self.unproven = Unproven(context.node.settings.max_half_open_flows)
        self._unknown_syn_acks: dict[tuple[bytes, int], int] = {}
        self.rivals = Rivals(context.node.bound_hits)

    def syn_in(self, segment: Segment, key: bytes, mark: int, now: float, *, is_answer: bool = False) -> Verdict:
        """Let a SYN in: verified and judged by its frame, or by its address where it has none.

        `is_answer`: the pod has dialled the same ends. Its kernel takes the SYN for the other half of a simultaneous
        open (RFC 9293, section 3.5), and connect() returns.
        """
        payload = segment.payload
        flow = self.flows.get(key)
        if not is_frame(payload):
            return self._plain_syn(segment, key, flow, mark, now, is_answer=is_answer)
        syn_hash = frame_hash(payload)
        if flow is not None and (flow.offer.isn, flow.offer.syn_hash) == (segment.seq, syn_hash):
            return _deliver_again(segment, flow, now)
        if len(self.rivals) and self.rivals.has(key, segment, syn_hash):
            return _deliver_syn(segment, 0)
        context = self._context
        frame = decode_syn(payload)
        peer = context.node.verify(frame.block, segment.src, now)
        source, destination = (segment.src, segment.sport), (segment.dst, segment.dport)
        address = require_source(context, TCP, source, destination, peer)
        decision, release, judged = self._judge_syn(peer, address, segment, is_answer=is_answer)
        if not decision.is_allowed:
            self._report_syn(segment.src, segment, decision, peer)
            return self._deny_syn(segment, key)
        if context.leases.suspect(peer, address, now) and mark & RELEASED:
            return DROP  # Until it is known whether the pod of the released connection lives; the SYN comes again.
        self._require_room(segment)
        if now + context.node.wall_offset_s > context.local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the identity too large, or the daemon overloaded?")
        connection = b"" if flow is not None else key + segment.seq.to_bytes(4, "big")
        context.node.use_nonce(frame.nonce, connection, address)
        context.report(Direction.INGRESS, segment.src, segment.dport, decision, peer=peer.identity)
        offer = Offer(frame.nonce, segment.seq, syn_hash, segment.dst, segment.dport)
        fresh = ResponderFlow(key, context.local, peer, offer, now + context.node.settings.timeout_s)
        fresh.release, fresh.judged = release, judged
        fresh.offered_at = now
        fresh.source = address  # Behind a masquerade several pods share the packet's.
        if mark & RELEASED or (flow is not None and not is_same_attempt(flow, segment)):
            self.rivals.add(segment, fresh, address, now)
            return _deliver_syn(segment, 0)
        evicted = self.flows.add(fresh)
        verdict = _deliver_syn(segment, mark)
        return verdict if evicted is None else verdict._replace(effects=context.give_up(*evicted))

    def _require_room(self, segment: Segment) -> None:
        """The answer must fit the initiator's interface, as far as its MSS tells."""
        mss = announced_mss(segment.options)
        length = SYN_ACK_OVERHEAD + len(self._context.local.block)
        if mss is not None and length + _MAX_OPTIONS > mss + TCP_MIN_HEADER:
            raise PeerError(Reason.IDENTITY_TOO_LARGE, f"frame of {length} bytes, the initiator's MSS is {mss}")

    def _judge_syn(self, peer: Peer | None, address: bytes, segment: Segment, *, is_answer: bool) -> Ruling:
        """Ask for ingress; where the SYN answers the pod's own, also whether the pod may reach who answers."""
        judge = self._context.judge
        ruling = judge.ingress(peer, address, segment.dport)
        if is_answer and ruling.decision.is_allowed:
            answered = judge.egress(peer, address, segment.sport)
            return ruling if answered.decision.is_allowed else answered
        return ruling

    def _report_syn(self, address: bytes, segment: Segment, decision: Decision, peer: Peer | None = None) -> None:
        direction = decision.direction
        port = segment.dport if direction is Direction.INGRESS else segment.sport
        self._context.report(direction, address, port, decision, peer=None if peer is None else peer.identity)

    def _plain_syn(
        self,
        segment: Segment,
        key: bytes,
        flow: ResponderFlow | None,
        mark: int,
        now: float,
        *,
        is_answer: bool,
    ) -> Verdict:
        context = self._context
        source, destination = (segment.src, segment.sport), (segment.dst, segment.dport)
        address, is_node = context.node.trace(TCP, source, destination)
        if is_node:
            decision, release = Decision(True, Reason.NODE, Direction.INGRESS), _RELEASE_NODE
        elif context.node.networks.must_show_identity(address):
            decision, release = Decision(False, Reason.IDENTITY_REQUIRED, Direction.INGRESS), DROP
        else:
            decision, release, _ = self._judge_syn(None, address, segment, is_answer=is_answer)
        self._report_syn(address, segment, decision)
        if not decision.is_allowed:
            return self._deny_syn(segment, key)  # A stranger's SYN ends nobody's handshake.
        if mark & RELEASED or (flow is not None and not is_same_attempt(flow, segment)):
            self.rivals.add(segment, PlainRival(key, release), address, now)
            return ACCEPT
        if flow is not None:
            self.flows.discard(flow)
        return release

    def _deny_syn(self, segment: Segment, key: bytes) -> Verdict:
        if self._context.node.deny_with is DenyWith.RESET:
            return DROP._replace(effects=(self._context.reset_remote(key, segment, Direction.INGRESS),))
        return DROP

    def syn_ack_out(self, segment: Segment, key: bytes, mark: int, now: float) -> Verdict:
        """Attach our frame and proof; a retransmission gets the same ones."""
        flow = self.answered(segment, key)
        rival = None if flow is not None and answers(flow, segment) else self.rivals.take(key, segment)
        if rival is not None:
            return self._replace_by_rival(segment, key, rival, mark, now)
        if flow is None:
            if mark & (RELEASED | NODE):
                return ACCEPT
            return self._unknown_syn_ack(segment, key)
        if segment.ack != (flow.offer.isn + 1) & _NUMBERS:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK acknowledges another SYN")
        if flow.state in (State.PROVEN, State.RELEASED) and segment.seq != flow.isn_r:
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK of another connection than the one that was proven")
        if flow.state is State.RELEASED:
            return ACCEPT  # Bare: the pod's kernel lost the ACK, or has no room yet; we lack no proof.
        return self._attach_frame(segment, flow, key, now)

    def _replace_by_rival(self, segment: Segment, key: bytes, rival: Rival, mark: int, now: float) -> Verdict:
        """Let the earlier connection of these ports end: the pod's kernel has begun another one."""
        earlier = self.flows.get(rival.key)
        effects: tuple[Settle | Inject, ...] = ()
        if earlier is not None:
            effects = self._context.settle_held(earlier, DROP)
            self.flows.discard(earlier)
        if isinstance(rival, PlainRival):
            return rival.release._replace(effects=effects)
        evicted = self.flows.add(rival)
        if evicted is not None:
            effects += self._context.give_up(*evicted)
        verdict = self._attach_frame(segment, rival, key, now)
        action = Action.FORGET if mark & OWN_MASK else Action.ACCEPT
        return verdict._replace(action=action, effects=effects)

    def _attach_frame(self, segment: Segment, flow: ResponderFlow, key: bytes, now: float) -> Verdict:
        if segment.seq != flow.isn_r:
            self._answer(segment, flow, now)
            flow.answers_from = key[-2:]
        if flow.state in (State.OFFERED, State.ANSWERED):
            flow.advance(Event.SYN_ACK_SENT)
        options = without_fast_open(segment.options)
        packet = with_options_and_payload(segment, options, flow.frame, fragmentation_of(flow.nonce_r))
        if len(packet) > self._context.mtu:
            raise PeerError(Reason.IDENTITY_TOO_LARGE, f"{len(packet)} bytes, MTU {self._context.mtu}")
        return Verdict(Action.ACCEPT, packet)

    def answered(self, segment: Segment, key: bytes) -> ResponderFlow | None:
        """Find the flow that a segment of the pod's kernel answers.

        Beside a sidecar that redirects it shows the sidecar's port here, not the one that the peer dialled: then the
        peer's address and port name the flow, and the number that the answer must have. From its SYN-ACK on, the flow
        has that one port: what the pod sends to its peer from another was judged by nobody.
        """
        named = self.flows.get(key)
        if named is not None:
            return named
        for flow in reversed(self.flows.by_remote(key)):
            if flow.answers_from and flow.answers_from != key[-2:]:
                continue
            acknowledges = bool(segment.flags & ACK) and segment.ack == (flow.offer.isn + 1) & _NUMBERS
            follows = bool(segment.flags & RST) and segment.seq == (flow.isn_r + 1) & _NUMBERS
            if acknowledges or follows:
                return flow
        return None

    def _answer(self, segment: Segment, flow: ResponderFlow, now: float) -> None:
        """Make the frame of a SYN-ACK, and keep what its repetition needs."""
        flow.answer(segment.seq, self._context.node.random(16))
        flow.options, flow.window, flow.answered_at = without_fast_open(segment.options), segment.window, now
        self.unproven.add(flow, now, now - flow.offered_at)

    def repeat_answers(self, now: float) -> tuple[Inject, ...]:
        """Repeat once the SYN-ACKs whose proof should have come by now: they, or the proofs, were lost."""
        due = self.unproven.take(now)
        return tuple(_repeat_syn_ack(flow) for flow in due if self.flows.get(flow.key) is flow)

    def _unknown_syn_ack(self, segment: Segment, key: bytes) -> Verdict:
        """A flow that an earlier daemon judged: its peer's SYN, repeated, makes it known again.

        A peer that does not repeat its SYN has had our SYN-ACK, and waits for nothing that will come: when the pod's
        kernel repeats it once more, both ends are told.
        """
        seen = (key, segment.seq)
        times = self._unknown_syn_acks.pop(seen, 0) + 1
        if times <= _TOLERATED_TIMES:
            if len(self._unknown_syn_acks) >= _MAX_UNKNOWN:
                del self._unknown_syn_acks[next(iter(self._unknown_syn_acks))]
            self._unknown_syn_acks[seen] = times
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK")
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS)
        self._context.report(Direction.INGRESS, segment.dst, segment.sport, decision, detail="ended at both sides")
        own, remote = ((segment.seq + 1) & _NUMBERS, segment.ack), (segment.ack, (segment.seq + 1) & _NUMBERS)
        return DROP._replace(effects=self._context.reset_both(key, own, remote))

    def abort(self, flow: ResponderFlow) -> tuple[Settle | Inject, ...]:
        """Give a flow up because a change of policy no longer allows it."""
        self.flows.discard(flow)
        dropped = self._context.settle_held(flow, DROP)
        if flow.state not in (State.ANSWERED, State.PROVEN):
            return dropped
        next_i, next_r = (flow.offer.isn + 1) & _NUMBERS, (flow.isn_r + 1) & _NUMBERS
        return dropped + self._context.reset_both(flow.key, (next_r, next_i), (next_i, next_r))

    def forget(self, key: bytes) -> None:
        """Forget a handshake that needs no end of its own any more."""
        flow = self.flows.get(key)
        if flow is not None:
            self.flows.discard(flow)

    def segment_in(self, flow: ResponderFlow, segment: Segment, now: float) -> Verdict:
        """Let nothing through to the pod before the initiator's proof."""
        if segment.flags & RST:
            if segment.seq != (flow.offer.isn + 1) & _NUMBERS:
                if flow.state is State.OFFERED:
                    # It answers a challenge ACK for the last connection of these ports (RFC 5961), which the pod's
                    # kernel still has; the peer sends its SYN again.
                    return bare_reset(segment)
                raise PeerError(Reason.UNKNOWN_FLOW, "RST outside the handshake")
            self.flows.discard(flow)
            return bare_reset(segment)._replace(effects=self._context.settle_held(flow, DROP))
        found = find_proof(segment.options)
        if found is not None and flow.state is not State.OFFERED:
            return self._accept_proof(segment, flow, found, now)
        match flow.state:
            case State.RELEASED:
                return flow.release
            case State.PROVEN:
                flow.advance(Event.SEGMENT_FOLLOWED)
                self._settle(flow, now)
                return flow.release
            case State.ANSWERED:
                return self._await_proof(segment, flow, now)
            case _:
                raise PeerError(Reason.UNKNOWN_FLOW, f"segment while {flow.state.name.lower()}")

    def _accept_proof(self, segment: Segment, flow: ResponderFlow, found: FoundProof, now: float) -> Verdict:
        flow.verify(found.proof)
        if flow.state is State.ANSWERED:
            flow.peer.note_round_trip(now - flow.answered_at)
        if found.is_lone:
            return self._accept_lone_proof(flow, now)
        if flow.state is not State.RELEASED:
            flow.advance(Event.PROOF_VERIFIED)
            self._settle(flow, now)
        packet = with_options_and_payload(segment, found.rest, segment.payload)
        effects = self._context.settle_held(flow, flow.release) if flow.held else ()
        return Verdict(Action.RELEASE, packet, flow.release.mark, effects=effects)

    def _settle(self, flow: ResponderFlow, now: float) -> None:
        """Remember a released flow without what only its handshake needed; its SYN is of no use any more."""
        self.flows.settle(flow)
        self._context.node.finish_nonce(flow.offer.nonce, flow.source)
        self._context.note_release(flow, flow.peer, flow.source, now)
        flow.frame = b""

    def _accept_lone_proof(self, flow: ResponderFlow, now: float) -> Verdict:
        """Consume an ACK of the other enforcer's own; what waits, or else the next segment, carries the release."""
        if flow.state is State.RELEASED:
            return TAKEN
        flow.advance(Event.LONE_PROOF_VERIFIED)
        self._context.give_index(flow)
        effects = self._context.settle_held(flow, flow.release)
        if effects:
            flow.advance(Event.SEGMENT_FOLLOWED)
            self._settle(flow, now)
        return TAKEN._replace(effects=effects)

    def _await_proof(self, segment: Segment, flow: ResponderFlow, now: float) -> Verdict:
        """Unproven: ask for the proof by our SYN-ACK again; data waits for it, a bare ACK does not."""
        effects: tuple[Inject, ...] = ()
        if now >= flow.repeat_at:
            flow.repeat_at = now + _REPEAT_S
            effects = (_repeat_syn_ack(flow),)
        if segment.data < segment.end or segment.flags & FIN:
            return self._context.hold(flow, now, effects)
        decision = Decision(False, Reason.PROOF_MISSING, Direction.INGRESS)
        self._context.report(Direction.INGRESS, segment.src, segment.dport, decision, peer=flow.peer.identity)
        return DROP._replace(effects=effects)

    def segment_out(self, flow: ResponderFlow, segment: Segment) -> Verdict:
        """Let out a refusal by the pod's own kernel; data before the proof there cannot be."""
        if flow.state is State.RELEASED:
            return flow.release
        if segment.flags & RST:
            self.flows.discard(flow)
            return bare_reset(segment)._replace(effects=self._context.settle_held(flow, DROP))
        if segment.data == segment.end:
            return ACCEPT
        raise PeerError(Reason.UNKNOWN_FLOW, f"data while {flow.state.name.lower()}")


def _deliver_syn(segment: Segment, mark: int) -> Verdict:
    """Take off the frame, and the mark of a connection that the node itself had with these ports."""
    packet = with_options_and_payload(segment, without_fast_open(segment.options), b"", NOT_TO_BE_CUT)
    return Verdict(Action.FORGET if mark & OWN_MASK else Action.ACCEPT, packet)


def _deliver_again(segment: Segment, flow: ResponderFlow, now: float) -> Verdict:
    """Let a retransmission in while the proof is still owed; after it, the SYN could only be a replay.

    To a kernel that has closed the connection it would open another, and the flow's release would stand in for a proof.
    """
    if flow.state not in (State.OFFERED, State.ANSWERED):
        raise PeerError(Reason.REPLAYED_NONCE, "the SYN of a connection that was released")
    flow.offered_at = now
    return _deliver_syn(segment, 0)


def _repeat_syn_ack(flow: ResponderFlow) -> Inject:
    """Send our SYN-ACK once more, as the pod's kernel made it."""
    half = (len(flow.key) - 4) // 2
    remote, own, (sport, dport) = flow.key[:half], flow.key[half:-4], _PORTS.unpack(flow.key[-4:])
    numbers = flow.isn_r, (flow.offer.isn + 1) & _NUMBERS
    bare = build(own, remote, (dport, sport), numbers, SYN_ACK, flow.window, flow.options)
    fragmentation = fragmentation_of(flow.nonce_r)
    return Inject(with_options_and_payload(decode_tcp(bare), flow.options, flow.frame, fragmentation))
