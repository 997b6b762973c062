# SPDX-License-Identifier: Apache-2.0
"""Handshake messages of one endpoint's datagrams: alone, beside what waited, and taken off what waited."""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.errors import FrameError
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID, bare, beside, marked
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.leases import Outgoing
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.model import Protocol
from enforcer_daemon.packet.udp import SURPLUS_OVERHEAD, UDP_HEADER, UDPDatagram, build_udp, encode_option
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

MAX_MESSAGE_PACKET_BYTES = 4_016
"""The queue's copy of a packet: a longer one could not be read on its arrival."""
Held = dict[int, UDPDatagram | None]
"""Packets that wait, oldest first, by hold id."""


class Messages:
    """What one endpoint's enforcer says beside datagrams."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context

    def send(self, key: FlowKey, content: bytes) -> None:
        """Send a message alone, in a datagram of our own from the pod to the flow's other end.

        It does not count in the pod's conntrack: while a datagram is held, it would open the flow the wrong way round.
        """
        surplus = encode_option(UDP_HEADER, STANDALONE_EXID, content)
        packet = build_udp(key.own, key.remote, (key.own_port, key.remote_port), b"", surplus)
        self._context.note_message(key.ends, content)
        self._context.effects.append(Inject(packet, is_untracked=True))

    def send_leases(self, messages: list[Outgoing]) -> None:
        """Send lease messages from the pod's addresses."""
        for own, remote, content in messages:
            self.send(FlowKey(remote, own, LEASE_PORT, LEASE_PORT, Protocol.UDP, Role.INITIATOR), content)

    def has_room(self, datagram: UDPDatagram, message: bytes) -> bool:
        """Tell whether a message fits beside a datagram that can still be rewritten."""
        length = datagram.end + 1 + SURPLUS_OVERHEAD + len(message)
        is_writable = not datagram.has_surplus and not datagram.is_gso
        return is_writable and length <= min(self._context.mtu, MAX_MESSAGE_PACKET_BYTES)

    def receive_lease(self, datagram: UDPDatagram, content: bytes, now: float) -> Verdict:
        """Take in what a peer's enforcer says of all flows of a pair."""
        if (datagram.sport, datagram.dport) != (LEASE_PORT, LEASE_PORT):
            raise FrameError(Reason.MALFORMED_FRAME, "lease message on other ports")
        context = self._context
        ends = datagram.src, datagram.dst
        self.send_leases(
            context.leases.receive(content, ends, lambda block: context.node.verify(block, datagram.src, now), now)
        )
        return TAKEN

    def establish(self, session: Session, proof: bytes, last: Verdict, now: float) -> None:
        """Let what waits leave in order, the oldest beside the proof or after it; the last has a verdict of its own.

        Without an answer each that has room carries the offer: a plain one would be evaluated by its address.
        """
        held, effects = self._context.take_held(session), self._context.effects
        is_unanswered = session.state is State.UNANSWERED
        is_doubted, is_fresh = is_unanswered or session.state is State.DOUBTED, now < self._context.fresh_until
        message = session.frame if is_doubted else proof
        for n, (hold_id, datagram) in enumerate(held.items(), 1):
            verdict = last if n == len(held) else ACCEPT
            if datagram is None:  # It came in: without an answer it proves nothing.
                effects.append(Settle(hold_id, DROP if is_unanswered else verdict))
                continue
            if message and self.has_room(datagram, message):
                verdict = verdict._replace(payload=beside(datagram, message))
            elif proof:
                self.send(session.key, proof)
            elif is_doubted and is_fresh:
                verdict = verdict._replace(payload=marked(datagram))
            if proof:
                message = proof = b""
            effects.append(Settle(hold_id, verdict))
        if proof:
            self.send(session.key, proof)

    def admit(self, held: Held, last: Verdict) -> None:
        """Let what waits go on in order, as the pod's peer sent it; the last one may take the flow with it."""
        for n, (hold_id, datagram) in enumerate(held.items(), 1):
            verdict = last if n == len(held) else ACCEPT
            payload = bare(datagram) if datagram is not None and datagram.has_surplus else None
            self._context.effects.append(Settle(hold_id, verdict._replace(payload=payload)))


def accepted_bare(datagram: UDPDatagram) -> Verdict:
    """Let a datagram pass without what stands behind its data."""
    return Verdict(Action.ACCEPT, bare(datagram)) if datagram.has_surplus else ACCEPT
