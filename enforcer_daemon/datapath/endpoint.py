# SPDX-License-Identifier: Apache-2.0
"""One endpoint's packets: told apart by direction and flags, handed to a side of the handshake, never raising."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from enforcer_daemon.datapath.context import EndpointContext, FlowReport, reset_local
from enforcer_daemon.datapath.datagrams import Datagrams
from enforcer_daemon.datapath.flowindex import JudgedBy, judged_by
from enforcer_daemon.datapath.initiator import Initiator
from enforcer_daemon.datapath.responder import Responder
from enforcer_daemon.datapath.rivals import Rival
from enforcer_daemon.errors import PacketError, PeerError
from enforcer_daemon.handshake.flows import Flow
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.marks import NODE, RELEASED, REPLY
from enforcer_daemon.model import Decision, Direction, JudgedFlow
from enforcer_daemon.packet.ip import IPHeader, decode_ip
from enforcer_daemon.packet.tcp import ACK, FIN, RST, SYN, SYN_ACK, TCP, Segment, build, decode_segment
from enforcer_daemon.packet.transport import decode_datagram
from enforcer_daemon.packet.udp import UDP, decode_udp_datagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, Action, Inject, Settle, Verdict

_RELEASE_NODE = Verdict(Action.RELEASE, mark=RELEASED | NODE)


class EndpointDatapath:
    """The pipeline of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self._initiator = Initiator(context)
        self._responder = Responder(context)
        self._datagrams = Datagrams(context)

    @property
    def context(self) -> EndpointContext:
        """Policy, token and reports of the endpoint."""
        return self._context

    @property
    def half_open_flows(self) -> int:
        """Unfinished handshakes, both ways."""
        return len(self._initiator.flows) + len(self._responder.flows) + len(self._datagrams)

    @property
    def held_packets(self) -> int:
        """Packets that wait for proofs."""
        return self._context.held_packets

    def process(self, packet: bytes, direction: Direction, mark: int, now: float) -> Verdict:
        """Judge one packet; `mark` is the connection's earlier release as the rules restored it, `now` monotonic.

        Whatever is wrong with the packet or its sender becomes a drop with a report, here alone.
        """
        header: IPHeader | None = None
        try:
            header = decode_ip(packet)
            if header.protocol == TCP:
                return self._segment(decode_segment(packet, header), direction, mark, now)
            if header.protocol == UDP:
                return self._datagrams.process(decode_udp_datagram(packet, header), direction, mark, now)
            return self._datagram(packet, header, direction)
        except PeerError as err:
            return self._drop(header, packet, direction, err.reason, err.detail)
        except PacketError as err:
            return self._drop(header, packet, direction, Reason.MALFORMED_PACKET, str(err))
        except Exception as err:  # noqa: BLE001 - the boundary: fails closed, is counted and logged
            return self._drop(header, packet, direction, Reason.INTERNAL_ERROR, f"{type(err).__name__}: {err}")

    def expire(self, now: float) -> tuple[Settle | Inject, ...]:
        """Give up handshakes and held packets whose time is over; call it a few times a second."""
        effects: list[Settle | Inject] = []
        for flow, settle in self._context.expire_held(now):
            effects.append(settle)
            self._context.report_flow(flow, flow.overdue)
        for table in (self._initiator.flows, self._responder.flows):
            for flow in table.expire(now):
                flow.advance(Event.EXPIRED)
                self._context.report_flow(flow, Reason.HANDSHAKE_TIMEOUT)
        return (*effects, *self._datagrams.expire(now))

    def renew_leases(self, now: float) -> tuple[Inject, ...]:
        """Return the lease messages that are due; call it a few times a second."""
        return self._context.send_leases(self._context.leases.tick(self._context.local, now))

    @property
    def repeat_at(self) -> float | None:
        """When `repeat_answers` has something to do next, monotonic seconds; None: nothing as things stand."""
        return self._responder.unproven.due_at

    def repeat_answers(self, now: float) -> tuple[Inject, ...]:
        """Repeat the SYN-ACKs whose proof should have come by now."""
        return self._responder.repeat_answers(now)

    def forget_unfinished(self, is_denied: Callable[[JudgedBy], bool]) -> tuple[Settle | Inject, ...]:
        """Give up the flows that were judged by a policy which no longer allows them, by what it judged.

        Both ends of an unfinished one are reset: connect() may have returned, and must not wait for ever. The released
        ones that are remembered are forgotten too: their next packet must not be released again.
        """

        def denied(flow: Flow | Rival) -> bool:
            return (judged := judged_by(flow)) is not None and is_denied(judged)

        effects: list[Settle | Inject] = []
        self._responder.rivals.refuse(denied)
        for side in (self._initiator, self._responder):
            for flow in side.flows.known():
                if denied(flow):
                    effects += side.abort(flow)  # type: ignore[arg-type]
        return (*effects, *self._datagrams.forget_unfinished(is_denied))

    def replace_peers(self, replaced: Callable[[JudgedFlow], JudgedFlow]) -> None:
        """Let unfinished handshakes be those of another identity of the same peer pod."""
        for flow in self._known():
            if flow.judged is not None:
                flow.judged = replaced(flow.judged)

    def judged_by(self) -> set[JudgedBy]:
        """Return what all flows that are remembered were allowed by: an index where they are released."""
        return {judged for flow in self._known() if (judged := judged_by(flow)) is not None}

    def _known(self) -> Iterator[Flow]:
        for side in (self._initiator, self._responder):
            yield from side.flows.known()
        yield from (rival for rival in self._responder.rivals.known() if isinstance(rival, Flow))
        yield from self._datagrams.known()

    def forget_opening(self) -> None:
        """Give up the connections whose SYN shows an identity that the pod no longer has.

        No answer has been judged yet: the pod's kernel repeats its SYN, which then shows the new identity.
        """
        for flow in self._initiator.flows.known():
            if flow.state is State.OPENING:
                self._initiator.flows.discard(flow)
        self._datagrams.initiator.forget_opening()

    def forget_opened(self, remote: tuple[bytes, int], own: tuple[bytes, int]) -> tuple[Settle | Inject, ...]:
        """Forget a UDP flow that the pod opened and whose release is taken back (packed addresses and ports)."""
        ports = remote[1].to_bytes(2, "big") + own[1].to_bytes(2, "big")
        return self._datagrams.forget_opened(remote[0] + own[0] + ports)

    def take_reports(self) -> list[FlowReport]:
        """Give the decisions since the last call."""
        reports, self._context.reports = self._context.reports, []
        return reports

    def _segment(self, segment: Segment, direction: Direction, mark: int, now: float) -> Verdict:
        key = _flow_key(segment, direction)
        kind = segment.flags & (SYN | ACK | RST | FIN)
        if kind == SYN:
            if direction is Direction.EGRESS:
                return self._initiator.syn_out(segment, key, mark, now)
            # Conntrack knows the pod's SYN longer than we do, and also one that an earlier daemon judged.
            is_answer = bool(mark & REPLY) or self._initiator.awaits_answer(key)
            return self._responder.syn_in(segment, key, mark & ~REPLY, now, is_answer=is_answer)
        if kind == SYN_ACK:
            if direction is Direction.INGRESS:
                return self._initiator.syn_ack_in(segment, key, mark, now)
            return self._responder.syn_ack_out(segment, key, mark, now)
        if kind & SYN:
            raise PacketError("SYN together with RST or FIN")
        return self._later_segment(segment, direction, key, mark, now)

    def _later_segment(self, segment: Segment, direction: Direction, key: bytes, mark: int, now: float) -> Verdict:
        if direction is Direction.EGRESS:
            opened = self._initiator.flows.get(key)
            if opened is not None:
                verdict = self._initiator.segment_out(opened, segment, mark, now)
                return self._released(verdict, key, self._responder)
            if self._context.is_injected(key, segment):
                return ACCEPT
            answered = self._responder.answered(segment, key)
            if answered is not None:
                return self._responder.segment_out(answered, segment)
        else:
            answered = self._responder.flows.get(key)
            if answered is not None:
                verdict = self._responder.segment_in(answered, segment, now)
                return self._released(verdict, key, self._initiator)
            opened = self._initiator.flows.get(key)
            if opened is not None:
                return self._initiator.segment_in(opened, segment)
        return self._unknown(segment, direction, key)

    def _released(self, verdict: Verdict, key: bytes, other: Initiator | Responder) -> Verdict:
        """Both ends may have opened the connection at once: what one side's handshake released, the other's will not.

        Both ends have shown who they are by then, each by its SYN's frame and by its SYN-ACK's.
        """
        if verdict.action is Action.RELEASE:
            other.forget(key)
        return verdict

    def _unknown(self, segment: Segment, direction: Direction, key: bytes) -> Verdict:
        """End at both sides a connection that nobody judged; stray segments without data are only dropped."""
        if segment.data == segment.end or segment.flags & RST:
            raise PeerError(Reason.UNKNOWN_FLOW, "segment without data")
        decision = Decision(False, Reason.UNKNOWN_FLOW, direction)
        remote = segment.src if direction is Direction.INGRESS else segment.dst
        self._context.report(direction, remote, segment.dport, decision, detail="ended at both sides")
        ports = segment.sport, segment.dport
        onward = build(segment.src, segment.dst, ports, (segment.seq, segment.ack), RST | ACK, 0)
        if direction is Direction.INGRESS:
            return Verdict(Action.ACCEPT, onward, effects=(self._context.reset_remote(key, segment, direction),))
        # The RST has the pod's own ports and numbers: where policy denies everything, it would carry messages out.
        onwards = Verdict(Action.ACCEPT, onward) if self._initiator.may_reach(segment) else DROP
        return onwards._replace(effects=(Inject(reset_local(segment)),))

    def _datagram(self, packet: bytes, header: IPHeader, direction: Direction) -> Verdict:
        """Judge what carries no identity by its address; replies follow the release of their flow."""
        datagram = decode_datagram(packet, header)
        context = self._context
        if direction is Direction.EGRESS:
            remote, is_node = datagram.dst, False
            decision, release, _ = context.judge.egress(None, remote, datagram.dport, datagram.protocol)
        else:
            context.refuse_reflection(datagram.src, datagram.dst)
            source, destination = (datagram.src, datagram.sport or 0), (datagram.dst, datagram.dport or 0)
            remote, is_node = context.node.trace(datagram.protocol, source, destination)
            decision, release, _ = context.judge.ingress(None, remote, datagram.dport, datagram.protocol)
            release = context.let_in(datagram.dst, release)
        if is_node:
            decision, release = Decision(True, Reason.NODE, Direction.INGRESS), _RELEASE_NODE
        context.report(direction, remote, datagram.dport, decision, protocol=datagram.protocol)
        return release if decision.is_allowed else DROP

    def _drop(
        self, header: IPHeader | None, packet: bytes, direction: Direction, reason: Reason, detail: str
    ) -> Verdict:
        remote, port, protocol = b"", None, 0
        if header is not None:
            remote = header.src if direction is Direction.INGRESS else header.dst
            protocol = header.protocol
            at = header.offset + 2
            if _is_syn_ack(packet, header):
                # The answer to a connection that was opened the other way, towards the port that it comes from.
                direction = Direction.EGRESS if direction is Direction.INGRESS else Direction.INGRESS
                at = header.offset
            if at + 2 <= min(header.end, len(packet)):
                port = packet[at] << 8 | packet[at + 1]
        self._context.report(
            direction, remote, port, Decision(False, reason, direction), protocol=protocol, detail=detail
        )
        return DROP


def _is_syn_ack(packet: bytes, header: IPHeader) -> bool:
    at = header.offset + 13
    return header.protocol == TCP and at < min(header.end, len(packet)) and packet[at] & SYN_ACK == SYN_ACK


def _flow_key(segment: Segment, direction: Direction) -> bytes:
    """Name a flow from the pod's side: remote address, own address, remote port, own port."""
    packet, offset = segment.packet, segment.offset
    if direction is Direction.INGRESS:
        return segment.src + segment.dst + packet[offset : offset + 4]
    return segment.dst + segment.src + packet[offset + 2 : offset + 4] + packet[offset : offset + 2]
