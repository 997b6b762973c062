# SPDX-License-Identifier: Apache-2.0
"""Segments of connections that are refused or unknown, and the RSTs that end these (RFC 9293, section 3.10.7.1)."""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.segments import successor
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.carriers import TCP
from enforcer_daemon.handshake.flowkey import FlowKey
from enforcer_daemon.model import Decision, Direction
from enforcer_daemon.packet.tcp import ACK, RST, SYN, Segment, build
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith
from enforcer_daemon.verdict import DROP, Action, Inject, Verdict

_NUMBERS = 0xFFFF_FFFF
Numbers = tuple[int, int]
"""Sequence and acknowledgment number."""


MAX_CLEARED = 1_024
"""SYNs that wait for their retransmission; the oldest is evicted, and may be held back once more."""
_MAX_UNKNOWN = 1_024
"""SYN-ACKs of unknown flows that are told apart; the oldest is evicted."""
_TOLERATED_TIMES = 1
"""Of one such SYN-ACK: kernels retransmit SYN and SYN-ACK at the same pace, so by the next one the SYN has come."""


class Strays:
    """The ends of one endpoint's connections, and what belongs to none that is known."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self._cleared: dict[FlowKey, int] = {}
        """SYNs that were held back for a RST to go first, by flow: their ISNs."""
        self._unknown_answers: dict[tuple[FlowKey, int], int] = {}

    def make_way(self, packet: Segment, key: FlowKey) -> Verdict | None:
        """Send a RST in place of the SYN, which the pod's kernel retransmits a second later.

        The mark of an earlier connection of these ports is still there: the peer ended it by RST, and conntrack keeps
        its entry for 10 s. So do the nodes on the way. There conntrack ignores the SYN, and believes the SYN-ACK only
        if that acknowledges all of it, our frame included; so the third segment would be invalid to it, which strict
        nodes drop after connect() has returned. After a RST in the SYN's own direction it begins again with the SYN
        (nf_conntrack_proto_tcp.c, "attempt to reopen a closed/aborted connection"). The peer's kernel has nothing that
        this RST could end.
        """
        if self._cleared.pop(key, None) == packet.seq:
            return None
        if len(self._cleared) >= MAX_CLEARED:
            del self._cleared[next(iter(self._cleared))]
        self._cleared[key] = packet.seq
        ports, numbers = (packet.sport, packet.dport), (packet.seq, 0)
        self._context.inject(key.ends, build(packet.src, packet.dst, ports, numbers, RST, 0), RST, numbers)
        return DROP

    def refuse(self, segment: Segment, direction: Direction) -> None:
        """Answer a denied SYN with the RST that its peer would send, if so configured."""
        if self._context.node.deny_with is DenyWith.RESET:
            if direction is Direction.EGRESS:
                self._reset_pod(segment)
            else:
                self.reset_remote(segment)

    def refuse_both(self, segment: Segment, key: FlowKey) -> Verdict:
        """Refuse a SYN-ACK to both ends: to the peer by a RST, to the pod by one in its place, if so configured."""
        self.reset_remote(segment)
        if self._context.node.deny_with is not DenyWith.RESET:
            return DROP
        ports = key.remote_port, key.own_port
        return Verdict(Action.ACCEPT, build(segment.src, segment.dst, ports, (0, segment.ack), RST | ACK, 0))

    def refuse_answer(self, segment: Segment, key: FlowKey) -> Verdict:
        """End at both sides a SYN-ACK that answers no known SYN of the pod, as after a restart of the daemon.

        Without an ACK flag: a kernel of ours that has seen the SYN-ACK before gives its connection up, one that has not
        takes no notice and retransmits its SYN (RFC 9293, section 3.10.7.3). The other way round, for a SYN-ACK of the
        pod, it would not do: to a RST against the direction of the SYN, followed by a SYN with a frame, conntrack on
        the way closes for good.
        """
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS)
        context = self._context
        context.report(Direction.INGRESS, segment.src, segment.dport, decision, TCP.protocol, detail="SYN-ACK")
        own = segment.ack, 0
        outward = build(segment.dst, segment.src, (segment.dport, segment.sport), own, RST, 0)
        context.inject(key.ends, outward, RST, own)
        ports = segment.sport, segment.dport
        context.effects.append(Inject(build(segment.src, segment.dst, ports, (successor(segment.seq), 0), RST, 0)))
        return DROP

    def end_forgotten(self, segment: Segment, key: FlowKey) -> Verdict:
        """End a connection whose SYN-ACK comes with a frame, though it was released and is remembered no more.

        The peer's enforcer never saw our proof, and we cannot make it again: both ends are told, which else would wait.
        A late copy does no harm to ends that have spoken since: the numbers are then out of their windows.
        """
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.EGRESS)
        self._context.report(
            Direction.EGRESS, segment.src, segment.sport, decision, TCP.protocol, detail="SYN-ACK after release"
        )
        next_r = successor(segment.seq)
        self.reset_both(key, (segment.ack, next_r), (next_r, segment.ack))
        return DROP

    def answer_out(self, segment: Segment, key: FlowKey) -> Verdict:
        """Wait for the SYN of a flow that an earlier daemon decided on: retransmitted, it makes the flow known again.

        A peer that does not retransmit its SYN has had our SYN-ACK, and waits for nothing that will come: when the
        pod's kernel retransmits that once more, both ends are told.
        """
        seen = key, segment.seq
        times = self._unknown_answers.pop(seen, 0) + 1
        if times <= _TOLERATED_TIMES:
            if len(self._unknown_answers) >= _MAX_UNKNOWN:
                del self._unknown_answers[next(iter(self._unknown_answers))]
            self._unknown_answers[seen] = times
            raise PeerError(Reason.UNKNOWN_FLOW, "SYN-ACK")
        decision = Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS)
        self._context.report(
            Direction.INGRESS, segment.dst, segment.sport, decision, TCP.protocol, detail="ended at both sides"
        )
        own, remote = successor(segment.seq), segment.ack
        self.reset_both(key, (own, remote), (remote, own))
        return DROP

    def segment(self, segment: Segment, direction: Direction, key: FlowKey) -> Verdict:
        """End at both sides a connection without a decision: a RST onwards in the place of its data, and one back.

        Outwards it has the pod's own ports and numbers: if policy denies everything, it would carry messages out. Stray
        segments without data are only dropped.
        """
        if segment.data == segment.end or segment.flags & RST:
            raise PeerError(Reason.UNKNOWN_FLOW, "segment without data")
        context, protocol = self._context, TCP.protocol
        decision = Decision(False, Reason.UNKNOWN_FLOW, direction)
        context.report(direction, key.remote, segment.dport, decision, protocol, detail="ended at both sides")
        ports = segment.sport, segment.dport
        onward = build(segment.src, segment.dst, ports, (segment.seq, segment.ack), RST | ACK, 0)
        if direction is Direction.INGRESS:
            self.reset_remote(segment)
            return Verdict(Action.ACCEPT, onward)
        self._reset_pod(segment)
        outbound = context.policy.outbound(segment.dst, segment.dport, protocol)
        may_leave = outbound.needs_handshake or outbound.evaluation.grant is not None
        return Verdict(Action.ACCEPT, onward) if may_leave else DROP

    def reset_both(self, key: FlowKey, own: Numbers, remote: Numbers) -> None:
        """End a flow that the enforcer gives up: a RST to the peer with the pod's own numbers, one to the pod with the
        peer's, each as the kernel at the other end would send it.
        """
        far, near = (key.remote, key.remote_port), (key.own, key.own_port)
        outward = build(near[0], far[0], (near[1], far[1]), own, RST | ACK, 0)
        self._context.inject(key.ends, outward, RST | ACK, own)
        self._context.effects.append(Inject(build(far[0], near[0], (far[1], near[1]), remote, RST | ACK, 0)))

    def _reset_pod(self, segment: Segment) -> None:
        """Answer the pod's own segment; the RST reaches the pod over its loopback."""
        self._context.effects.append(Inject(_answer(segment)[0]))

    def reset_remote(self, segment: Segment) -> None:
        """Answer the peer's segment as the pod's kernel would, and recognize the RST when it leaves."""
        packet, flags, numbers = _answer(segment)
        ends = segment.src, segment.dst, segment.sport, segment.dport
        self._context.inject(ends, packet, flags, numbers)


def _answer(segment: Segment) -> tuple[bytes, int, Numbers]:
    """Return the RST that refuses a segment, its flags and its numbers.

    It takes its number from an ACK, else it acknowledges what it refuses. A SYN's payload is a frame, which the
    sender's kernel knows nothing of, so it is not acknowledged.
    """
    if segment.flags & ACK:
        numbers, flags = (segment.ack, 0), RST
    else:
        length = 1 if segment.flags & SYN else segment.end - segment.data
        numbers, flags = (0, segment.seq + length & _NUMBERS), RST | ACK
    ports = segment.dport, segment.sport
    return build(segment.dst, segment.src, ports, numbers, flags, 0), flags, numbers
