# SPDX-License-Identifier: Apache-2.0
"""One endpoint's UDP: datagrams told apart by direction and message, and handed to a side of the handshake."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.flowindex import JudgedBy, judged_by
from enforcer_daemon.datapath.udp_initiator import DatagramInitiator
from enforcer_daemon.datapath.udp_responder import DatagramResponder
from enforcer_daemon.errors import FrameError, PeerError
from enforcer_daemon.handshake.datagrams import bare, find_message, has_marker
from enforcer_daemon.handshake.flows import Flow
from enforcer_daemon.handshake.frames import (
    TYPE_AGAIN,
    TYPE_ANSWER,
    TYPE_CHALLENGE,
    TYPE_LEASE,
    TYPE_OFFER,
    TYPE_PROOF,
    frame_type,
)
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.marks import CUT, NODE, RELEASED, REPLY, UNSUMMED
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import UDPDatagram, decode_udp
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Inject, Settle, Verdict


class Datagrams:
    """Both sides of the handshakes of one endpoint's flows of datagrams."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        self.initiator = DatagramInitiator(context)
        self.responder = DatagramResponder(context)

    def __len__(self) -> int:
        """Return the number of unfinished handshakes."""
        return len(self.initiator.flows) + len(self.responder)

    def process(self, datagram: UDPDatagram, direction: Direction, mark: int, now: float) -> Verdict:
        """Judge one datagram; raise PeerError or PacketError where it does not hold."""
        if mark & (UNSUMMED | CUT):
            datagram = datagram._replace(is_unsummed=bool(mark & UNSUMMED), is_cut=bool(mark & CUT))
        found = find_message(datagram)
        key = _flow_key(datagram, direction)
        if direction is Direction.EGRESS:
            return self._out(datagram, found, key, mark, now)
        if found is not None:
            return self._message_in(datagram, found, key, mark, now)
        return self._in(datagram, key, mark, now)

    def _out(
        self, datagram: UDPDatagram, found: tuple[bytes, bool] | None, key: bytes, mark: int, now: float
    ) -> Verdict:
        if found is not None:
            content, is_lone = found
            if is_lone and self._context.is_own_message(key, content):
                self.initiator.offer_out(content, key, now)
                return ACCEPT
            raise FrameError(Reason.MALFORMED_FRAME, "a message that the pod made itself")
        answered = self.responder.find(key, now)
        if answered is not None and answered.state is State.RELEASED:
            return answered.let_go(now)
        if mark & REPLY and self.initiator.find(key, now) is None:
            raise PeerError(Reason.UNKNOWN_FLOW, "a reply in a flow that is not released")
        return self.initiator.datagram_out(datagram, key, now)

    def _message_in(
        self, datagram: UDPDatagram, found: tuple[bytes, bool], key: bytes, mark: int, now: float
    ) -> Verdict:
        content, is_lone = found
        if not self._context.is_own_address(datagram.dst):
            if is_lone:
                return DROP
            # To a group or to all: nobody can answer for its address.
            return self._in(decode_udp(bare(datagram)), key, mark, now)
        match frame_type(content):
            case kind if kind == TYPE_OFFER:
                return self.responder.offer_in(datagram, found, key, mark, now)
            case kind if kind == TYPE_PROOF:
                return self.responder.proof_in(datagram, found, key, mark, now)
            case kind if kind in (TYPE_ANSWER, TYPE_CHALLENGE) and is_lone:
                return self.initiator.answer_in(datagram, content, key, mark, now)
            case kind if kind == TYPE_AGAIN and is_lone:
                return self.initiator.again_in(content, key, mark, now)
            case kind if kind == TYPE_LEASE and is_lone:
                return self._lease_in(datagram, content, now)
            case kind:
                raise FrameError(Reason.MALFORMED_FRAME, f"type {kind} beside a datagram")

    def _lease_in(self, datagram: UDPDatagram, content: bytes, now: float) -> Verdict:
        """Take in what a peer's enforcer says of all flows of a pair."""
        if (datagram.sport, datagram.dport) != (LEASE_PORT, LEASE_PORT):
            raise FrameError(Reason.MALFORMED_FRAME, "lease message on other ports")
        context = self._context
        answers = context.leases.receive(
            content, (datagram.src, datagram.dst), lambda block: context.node.verify(block, datagram.src, now), now
        )
        return TAKEN._replace(effects=context.send_leases(answers))

    def _in(self, datagram: UDPDatagram, key: bytes, mark: int, now: float) -> Verdict:
        if mark & (RELEASED | NODE):
            if has_marker(datagram.packet):
                side = self.initiator if mark & REPLY else self.responder
                return side.doubted_in(datagram, key, mark, now)
            raise FrameError(Reason.MALFORMED_FRAME, "looks like a message to the kernel's rules, and is none")
        answered = self.responder.find(key, now)
        if answered is not None:
            return self.responder.datagram_in(datagram, answered, now)
        opened = self.initiator.find(key, now)
        if opened is not None:
            return self.initiator.datagram_in(datagram, opened, now)
        if mark & REPLY:
            raise PeerError(Reason.UNKNOWN_FLOW, "a reply in a flow that is not released")
        return self.responder.plain_in(datagram, key, now)

    def expire(self, now: float) -> tuple[Settle | Inject, ...]:
        """Repeat what may have been lost, and give up what took too long; call it a few times a second."""
        return self.initiator.expire(now) + self.responder.expire(now)

    def known(self) -> Iterator[Flow]:
        """Return all flows that are remembered, unfinished or not."""
        yield from self.initiator.flows.known()
        yield from self.responder.known()

    def forget_unfinished(self, is_denied: Callable[[JudgedBy], bool]) -> tuple[Settle | Inject, ...]:
        """Give up the flows that were judged by a policy which no longer allows them, by what they were judged by."""
        effects: list[Settle | Inject] = []
        for side in (self.initiator, self.responder):
            for flow in side.flows.known():
                if (judged := judged_by(flow)) is not None and is_denied(judged):
                    effects += side.abort(flow)  # type: ignore[arg-type]
        return (*effects, *self.responder.forget_rivals())

    def forget_opened(self, key: bytes) -> tuple[Settle | Inject, ...]:
        """Forget a flow that the pod opened, whose release is taken back: its next datagram begins a handshake."""
        flow = self.initiator.flows.get(key)
        return () if flow is None or flow.state is not State.RELEASED else self.initiator.abort(flow)


def _flow_key(datagram: UDPDatagram, direction: Direction) -> bytes:
    """Name a flow from the pod's side: remote address, own address, remote port, own port."""
    packet, offset = datagram.packet, datagram.offset
    if direction is Direction.INGRESS:
        return datagram.src + datagram.dst + packet[offset : offset + 4]
    return datagram.dst + datagram.src + packet[offset + 2 : offset + 4] + packet[offset : offset + 2]
