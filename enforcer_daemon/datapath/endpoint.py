# SPDX-License-Identifier: Apache-2.0
"""One endpoint's datapath: a packet, a timer or a change in, one Output out. Pure; `process` never raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from enforcer_daemon.datapath.context import EndpointContext, FlowReport
from enforcer_daemon.datapath.flowindex import EvaluatedBy, evaluated_by
from enforcer_daemon.datapath.tcp import TCPFlows
from enforcer_daemon.datapath.udp import UDPFlows
from enforcer_daemon.errors import PacketError, PeerError
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.session import Grant, Session
from enforcer_daemon.marks import REPLY
from enforcer_daemon.model import Decision, Direction, EvaluatedFlow
from enforcer_daemon.packet.ip import IPHeader, decode_ip
from enforcer_daemon.packet.tcp import SYN_ACK, TCP, decode_plain_segment, decode_segment
from enforcer_daemon.packet.transport import SCTP, Datagram, decode_datagram, is_init
from enforcer_daemon.packet.udp import UDP
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, Effect, Verdict


class Output(NamedTuple):
    """All that is to be done after a packet, a timer or a change."""

    verdict: Verdict = DROP
    """Of the packet; without one it means nothing."""
    effects: Sequence[Effect] = ()
    """To apply in order, after the packet's own verdict."""
    reports: Sequence[FlowReport] = ()
    """Decisions to log and count."""
    entries: Sequence[tuple[int, EvaluatedFlow]] = ()
    """New entries of the flow index, to keep for the next daemon."""
    wake_at: float | None = None
    """When to call `run_timers`, monotonic seconds; None: nothing is due as things stand."""


class EndpointDatapath:
    """The datapath of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self._tcp = TCPFlows(context)
        self._udp = UDPFlows(context)
        self._carriers = self._tcp, self._udp

    @property
    def half_open_flows(self) -> int:
        """Unfinished handshakes, both ways."""
        tables = sum(map(len, self._context.tables.values()))
        return tables + len(self._udp.rehandshakes.asked) + len(self._udp.responder.rivals)

    @property
    def held_packets(self) -> int:
        """Packets that wait for proofs."""
        return self._context.held_packets

    def process(self, packet: bytes, direction: Direction, mark: int, now: float) -> Output:
        """Evaluate one packet; `mark` is the connection's earlier release as the rules restored it, `now` monotonic.

        Whatever is wrong with the packet or its sender becomes a drop with a report, here alone.
        """
        try:
            segment = decode_plain_segment(packet)
            if segment is not None:
                verdict = self._tcp.process(segment, direction, mark, now)
            else:
                verdict = self._evaluate(packet, decode_ip(packet), direction, mark, now)
        except PeerError as err:
            verdict = self._drop(packet, direction, err.reason, err.detail)
        except PacketError as err:
            verdict = self._drop(packet, direction, Reason.MALFORMED_PACKET, str(err))
        except Exception as err:  # noqa: BLE001 - the boundary: fails closed, is counted and logged
            verdict = self._drop(packet, direction, Reason.INTERNAL_ERROR, f"{type(err).__name__}: {err}")
        return self._output(verdict)

    def _evaluate(self, packet: bytes, header: IPHeader, direction: Direction, mark: int, now: float) -> Verdict:
        if header.protocol == TCP:
            return self._tcp.process(decode_segment(packet, header), direction, mark, now)
        if header.protocol == UDP:
            return self._udp.process(packet, header, direction, mark, now)
        return self._other(packet, header, direction, mark)

    def run_timers(self, now: float, read_until: float = math.inf) -> Output:
        """Retransmit what was lost, end what took too long, and renew leases.

        `read_until` is when the packets read last arrived, if they waited: what a flow waits for may be among those not
        read yet, so nothing ends later than that. Call it when the last Output wants it, and a few times a second.
        """
        context, ends_at = self._context, min(now, read_until)
        context.expire_held(ends_at)
        for session in context.timers.take(now):
            carrier = self._tcp if session.facts is self._tcp.facts else self._udp
            carrier.on_timer(session, now)
        for carrier in self._carriers:
            for side in (carrier.initiator, carrier.responder):
                for session in side.sessions.expired(ends_at):
                    side.expire(session)
            carrier.responder.expire_rivals(ends_at)
        for session in self._udp.rehandshakes.asked.expired(ends_at):
            context.end(self._udp.rehandshakes.asked, session, Event.EXPIRED)
        self._udp.messages.send_leases(context.leases.tick(context.local, now))
        return self._output(DROP)

    def end_denied(self, is_denied: Callable[[EvaluatedBy], bool]) -> Output:
        """End the flows that were decided by a policy which no longer allows them, by what it allowed.

        Both ends of an unfinished connection are reset. The released flows that are remembered end too: their next
        packet must not be released again.
        """

        def denied(session: Session) -> bool:
            return (allowed := evaluated_by(session)) is not None and is_denied(allowed)

        for carrier in self._carriers:
            carrier.responder.end_denied_rivals(denied)
            for side in (carrier.initiator, carrier.responder):
                for session in filter(denied, side.sessions.known()):
                    carrier.abort(session)
        return self._output(DROP)

    def end_opening(self) -> Output:
        """End the handshakes whose offer shows an identity that the pod no longer has.

        No answer has been evaluated yet: the pod sends again, and then shows the new identity.
        """
        for carrier in self._carriers:
            carrier.initiator.end_opening()
        return self._output(DROP)

    def end_opened(self, remote: tuple[bytes, int], own: tuple[bytes, int]) -> Output:
        """End a UDP flow that the pod opened and whose release is taken back (packed addresses and ports)."""
        key = FlowKey(remote[0], own[0], remote[1], own[1], UDP, Role.INITIATOR)
        table = self._udp.initiator.sessions
        session = table.get(key)
        if session is not None and session.state in (State.RELEASED, State.DOUBTED):
            self._context.end(table, session, Event.TAKEN_BACK)
        return self._output(DROP)

    def replace_peers(self, replaced: Callable[[EvaluatedFlow], EvaluatedFlow]) -> None:
        """Let unfinished handshakes be those of another identity of the same peer pod."""
        for session in self.sessions():
            grant = session.grant
            if session.release is None and grant is not None and grant.evaluated is not None:
                session.grant = Grant(grant.verdict, replaced(grant.evaluated))

    def evaluated_by(self) -> set[EvaluatedBy]:
        """Return what all flows that are remembered were allowed by: an index if they are released."""
        return {allowed for session in self.sessions() if (allowed := evaluated_by(session)) is not None}

    def sessions(self) -> Iterator[Session]:
        """Yield all sessions, those that rival with another among them."""
        for table in self._context.tables.values():
            yield from table.known()
        for carrier in self._carriers:
            yield from carrier.responder.rivals.known()

    def _output(self, verdict: Verdict) -> Output:
        context = self._context
        effects, reports, fresh = context.effects, context.reports, context.policy.flows.fresh
        if effects:
            context.effects = []
        if reports:
            context.reports = []
        entries = context.policy.flows.take_fresh() if fresh else ()
        return Output(verdict, effects, reports, entries, context.timers.next_at if context.timers.is_set else None)

    def _other(self, packet: bytes, header: IPHeader, direction: Direction, mark: int) -> Verdict:
        """Decide on what carries no identity by its address; replies follow the release of their flow."""
        datagram = decode_datagram(packet, header)
        context, protocol, port = self._context, datagram.protocol, datagram.dport
        if direction is Direction.EGRESS:
            remote = datagram.dst
            evaluation = context.policy.outbound(remote, port, protocol).evaluation
            if evaluation.grant is None and protocol == SCTP:
                return self._sctp_behind(_opened_by(datagram), is_init=is_init(packet, header))
        else:
            context.refuse_reflection(datagram.src, datagram.dst)
            if mark & REPLY:  # Of a flow that is not released yet: its first packet was let out.
                return self._sctp_behind(_answered_by(datagram), is_init=False)
            remote, evaluation = context.policy.inbound(datagram, protocol)
        context.report(direction, remote, port, evaluation.decision, protocol)
        if evaluation.grant is None:
            return DROP
        release = evaluation.grant.verdict
        return release if direction is Direction.EGRESS else context.admit(datagram.dst, release)

    def _sctp_behind(self, key: FlowKey, *, is_init: bool) -> Verdict:
        """Decide on an association that the pod opens by what is behind the virtual address that it dials.

        The node knows that once it has sent the INIT on, so an INIT leaves if a rule allows SCTP to any address.
        """
        policy = self._context.policy
        if is_init and policy.may_lead_to_allowed(key):
            return ACCEPT
        evaluation, remote, port, detail = policy.answered(key)
        self._context.report(Direction.EGRESS, remote, port, evaluation.decision, key.protocol, detail=detail)
        return DROP if evaluation.grant is None else evaluation.grant.verdict

    def _drop(self, packet: bytes, direction: Direction, reason: Reason, detail: str) -> Verdict:
        remote, port, protocol = b"", None, 0
        with suppress(PacketError):
            header = decode_ip(packet)
            remote = header.src if direction is Direction.INGRESS else header.dst
            protocol = header.protocol
            at = header.offset + 2
            if _is_syn_ack(packet, header):
                # The answer to a connection that was opened the other way, towards the port that it comes from.
                direction = Direction.EGRESS if direction is Direction.INGRESS else Direction.INGRESS
                at = header.offset
            if at + 2 <= min(header.end, len(packet)):
                port = packet[at] << 8 | packet[at + 1]
        self._context.report(direction, remote, port, Decision(False, reason, direction), protocol, detail=detail)
        return DROP


def _is_syn_ack(packet: bytes, header: IPHeader) -> bool:
    at = header.offset + 13
    return header.protocol == TCP and at < min(header.end, len(packet)) and packet[at] & SYN_ACK == SYN_ACK


def _opened_by(datagram: Datagram) -> FlowKey:
    """Return the flow that the pod opens with a datagram."""
    src, dst, protocol, sport, dport = datagram
    return FlowKey(dst, src, dport or 0, sport or 0, protocol, Role.INITIATOR)


def _answered_by(datagram: Datagram) -> FlowKey:
    """Return the flow of the pod's that a datagram answers."""
    src, dst, protocol, sport, dport = datagram
    return FlowKey(src, dst, sport or 0, dport or 0, protocol, Role.INITIATOR)
