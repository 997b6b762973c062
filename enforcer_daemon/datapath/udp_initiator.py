# SPDX-License-Identifier: Apache-2.0
"""Flows of datagrams that the pod opens: show who it is, verify the answer, judge egress, prove, release.

Where policy allows the address whoever is there, datagrams leave at once with the offer beside them: a stack without an
enforcer takes no notice of it. Elsewhere, or where both do not fit one packet, the offer goes alone, and the datagrams
wait for the answer in the kernel's queue.
"""

from __future__ import annotations

from enforcer_daemon.datapath.binding import require_dialled
from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.flowindex import is_by_address
from enforcer_daemon.datapath.judging import Destination
from enforcer_daemon.errors import PeerError, TokenError
from enforcer_daemon.handshake.allowance import TokenBucket
from enforcer_daemon.handshake.bounds import Bound
from enforcer_daemon.handshake.datagrams import DatagramInitiatorFlow, bare, beside, marked
from enforcer_daemon.handshake.flows import FlowTable
from enforcer_daemon.handshake.frames import decode_again, decode_syn_ack, frame_type
from enforcer_daemon.handshake.lapse import UDP_LAPSE_S
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.marks import NODE, RELEASED, REPLY
from enforcer_daemon.model import Decision, Direction, Protocol
from enforcer_daemon.packet.udp import SURPLUS_OVERHEAD, UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

UNFINISHED_S = 3.0
"""How long a handshake may stay unfinished, seconds: longer than anything waits for it."""
REMEMBERED_S = 2.0
"""How long a released flow answers for a lost proof, seconds. After that conntrack alone knows it."""
REPEAT_S = 0.1
"""The least time before the enforcer's message is sent again, seconds; it doubles each time."""
MAX_REPEATS = 4
_MAX_LAG_S = 0.3
"""A queue that is further behind is not waited for any longer: datagrams wait for a second only."""
_PATIENCE_S = 0.2
"""How long an enforcer is waited for where policy allows the address whoever is there, seconds."""
MAX_MESSAGE_PACKET_BYTES = 4_016
"""The queue's copy of a packet: a longer one could not be read on its arrival."""
DRAIN_S = 0.05
"""How long after its release a flow may stay in the queue, seconds: its first burst passes in order, one without
end goes to the kernel all the same."""


class DatagramInitiator:
    """The initiating side of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        settings = context.node.settings
        self.flows: FlowTable[DatagramInitiatorFlow] = FlowTable(settings, context.node.bound_hits)
        self._waiting: dict[bytes, DatagramInitiatorFlow] = {}
        """Flows for which something is to be done when their time comes."""
        self._again = TokenBucket(settings.max_handshakes_again_per_s, context.node.bound_hits, Bound.HANDSHAKES_AGAIN)
        self._lag_s = 0.0
        """How long an offer waited in the pod's queue lately, seconds; its answer waits there as long."""

    def find(self, key: bytes, now: float) -> DatagramInitiatorFlow | None:
        """Find a flow; a released one is remembered for a short time only."""
        flow = self.flows.get(key)
        if flow is not None and flow.deadline <= now:
            self.flows.discard(flow)
            return None
        return flow

    def datagram_out(self, datagram: UDPDatagram, key: bytes, now: float) -> Verdict:
        """Let a datagram out: with our offer, or after the answer, into the enforced networks; by address elsewhere."""
        flow = self.find(key, now)
        if flow is not None:
            if flow.state is not State.RELEASED:
                return self._let_wait(datagram, flow, now)
            return self._go_on(datagram, flow, now) if now < flow.doubted_until else flow.let_go(now)
        judge, dst, dport = self._context.judge, datagram.dst, datagram.dport
        destination = self._context.node.networks.destination(dst, dport, Protocol.UDP)
        decision, release, _ = judge.egress(None, dst, dport, Protocol.UDP)
        if destination is Destination.EXTERNAL:
            self._context.report(Direction.EGRESS, dst, dport, decision, protocol=Protocol.UDP)
            return release if decision.is_allowed else DROP
        if not judge.could_allow_egress(destination, dst, dport, Protocol.UDP):
            denied = Decision(False, Reason.EGRESS_DENIED, Direction.EGRESS, decision.rules)
            self._context.report(Direction.EGRESS, dst, dport, denied, protocol=Protocol.UDP)
            return DROP
        flow, effects = self._open(key, now)
        flow.is_external_allowed = decision.is_allowed
        verdict = self._let_wait(datagram, flow, now)
        return verdict._replace(effects=effects + verdict.effects)

    def _open(self, key: bytes, now: float) -> tuple[DatagramInitiatorFlow, tuple[Settle | Inject, ...]]:
        context = self._context
        if now + context.node.wall_offset_s > context.local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the daemon overloaded?")
        flow = DatagramInitiatorFlow(key, context.local, context.node.random(16), now, now + UNFINISHED_S)
        evicted = self.flows.add(flow)
        return flow, () if evicted is None else context.give_up(*evicted)

    def _let_wait(self, datagram: UDPDatagram, flow: DatagramInitiatorFlow, now: float) -> Verdict:
        is_first = not flow.has_waiting()
        if flow.is_external_allowed and is_first:
            if self._has_room(datagram, flow.offer):
                flow.is_shown = True
                return Verdict(Action.ACCEPT, beside(datagram, flow.offer))
            if flow.is_overdue:
                return self._without_room(datagram, flow, now)
        effects: tuple[Inject, ...] = ()
        if is_first:
            self._await_answer(flow, now)
            if not flow.is_shown:
                effects = (self._context.send_message(flow.key, flow.offer),)
        verdict = self._context.hold(flow, now, effects)
        if len(flow.waiting) >= len(flow.held):
            flow.waiting = {hold_id: found for hold_id, found in flow.waiting.items() if hold_id in flow.held}
        flow.waiting[verdict.hold_id] = datagram
        return verdict

    def _go_on(self, datagram: UDPDatagram, flow: DatagramInitiatorFlow, now: float) -> Verdict:
        """Let a datagram of a fresh pod out to a peer that showed no identity.

        The peer may be a pod that still has the flow of whoever had the address before: its enforcer sees no plain
        datagram of that. So each carries the offer, as long as the address is fresh.
        """
        flow.deadline = now + UDP_LAPSE_S
        if self._has_room(datagram, flow.offer):
            return Verdict(Action.ACCEPT, beside(datagram, flow.offer), flow.release.mark)
        return self._without_room(datagram, flow, now)

    def _without_room(self, datagram: UDPDatagram, flow: DatagramInitiatorFlow, now: float) -> Verdict:
        """Let a datagram out for which nobody answered, and which has no room for the offer."""
        if now >= self._context.fresh_until:
            return ACCEPT
        effects: tuple[Inject, ...] = ()
        if now - flow.offered_at >= _PATIENCE_S:
            flow.offered_at = now
            effects = (self._context.send_message(flow.key, flow.offer),)
        return Verdict(Action.ACCEPT, marked(datagram), effects=effects)

    def _has_room(self, datagram: UDPDatagram, message: bytes) -> bool:
        length = datagram.end + 1 + SURPLUS_OVERHEAD + len(message)
        is_writable = not datagram.has_surplus and not datagram.is_cut
        return is_writable and length <= min(self._context.mtu, MAX_MESSAGE_PACKET_BYTES)

    def _await_answer(self, flow: DatagramInitiatorFlow, now: float) -> None:
        """Send the offer again after a time that grows, or do without an answer where policy allows that."""
        flow.repeats, flow.offered_at = 0, now
        flow.repeat_at = now + (_PATIENCE_S if flow.is_external_allowed else REPEAT_S + 2 * self._lag_s)
        self._waiting[flow.key] = flow

    def offer_out(self, message: bytes, key: bytes, now: float) -> None:
        """See an offer that goes alone leave: only now can the answer be on its way, and it has to wait like the offer.

        Whoever did not wait for it would add to a queue that is behind already, with an offer and an answer a time.
        """
        flow = self._waiting.get(key)
        if flow is None or flow.repeats or flow.is_external_allowed or message != flow.offer:
            return
        self._lag_s = min(max(now - flow.offered_at, 0.0), _MAX_LAG_S)
        flow.repeat_at = now + self._lag_s + REPEAT_S

    def answer_in(self, datagram: UDPDatagram, message: bytes, key: bytes, mark: int, now: float) -> Verdict:
        """Verify who answers, judge egress, prove, and release what waits; the answer itself ends here."""
        flow = self.find(key, now)
        if flow is None:
            raise PeerError(Reason.UNKNOWN_FLOW, "an answer to no offer")
        context = self._context
        answer = decode_syn_ack(message, frame_type(message))
        peer = context.node.verify(answer.block, datagram.src, now)
        require_dialled(context, answer, peer, (datagram.src, datagram.sport), Protocol.UDP)
        flow.verify(message, answer, peer)
        decision, release, judged = context.judge.egress(peer, answer.address, answer.port, Protocol.UDP)
        if flow.state is State.OPENING or not decision.is_allowed:
            context.report(
                Direction.EGRESS, answer.address, answer.port, decision, protocol=Protocol.UDP, peer=peer.identity
            )
        if not decision.is_allowed:
            self._forget(flow)
            return Verdict(Action.CONSUME, effects=context.settle_held(flow, DROP))
        flow.release, flow.judged = release, judged
        flow.doubted_until = 0.0
        if flow.state is State.OPENING:
            self._settle(flow, Event.ANSWER_VERIFIED, now)
        context.note_release(flow, peer, answer.address, now)
        if flow.held:  # What waits goes first, and takes the flow with it.
            return TAKEN._replace(effects=self._let_go(flow, flow.proof, flow.let_go(now), now))
        effects = (context.send_message(flow.key, flow.proof),)
        when_drained = not mark & RELEASED and now < flow.drained_at
        return Verdict(Action.CONSUME, mark=flow.release.mark, effects=effects, when_drained=when_drained)

    def _settle(self, flow: DatagramInitiatorFlow, event: Event, now: float) -> None:
        flow.advance(event)
        self._waiting.pop(flow.key, None)
        self.flows.settle(flow)
        flow.deadline, flow.drained_at = now + REMEMBERED_S, now + DRAIN_S

    def _let_go(
        self, flow: DatagramInitiatorFlow, proof: bytes, last: Verdict, now: float
    ) -> tuple[Settle | Inject, ...]:
        """Let what waits leave in order, the oldest beside the proof or after it; the last has a verdict of its own.

        Without an answer each that has room carries the offer: a plain one would be judged by its address.
        """
        waiting, flow.waiting = flow.waiting, {}
        held = [settle.hold_id for settle in self._context.settle_held(flow, ACCEPT)]
        effects: list[Settle | Inject] = []
        is_unanswered, is_fresh = flow.state is State.OPENING, now < self._context.fresh_until
        is_doubted = is_unanswered or now < flow.doubted_until
        for n, hold_id in enumerate(held):
            datagram = waiting.get(hold_id)
            verdict = last if n + 1 == len(held) else ACCEPT
            if datagram is None:  # It came in: on its own, while nobody has answered, it proves nothing.
                effects.append(Settle(hold_id, DROP if is_unanswered else verdict))
                continue
            message = flow.offer if is_doubted else proof
            if message and self._has_room(datagram, message):
                verdict = verdict._replace(payload=beside(datagram, message))
            elif proof:
                effects.append(self._context.send_message(flow.key, proof))
            elif is_doubted and is_fresh:
                verdict = verdict._replace(payload=marked(datagram))
            proof = b""
            effects.append(Settle(hold_id, verdict))
        if proof:
            effects.append(self._context.send_message(flow.key, proof))
        return tuple(effects)

    def datagram_in(self, datagram: UDPDatagram, flow: DatagramInitiatorFlow, now: float) -> Verdict:
        """Let in what comes back without an identity: from an address that policy allows, or once somebody showed one.

        An answer can overtake the other enforcer's, so the address is not taken for the peer at once.
        """
        if now < flow.doubted_until:
            flow.deadline = now + UDP_LAPSE_S
            return Verdict(Action.ACCEPT, mark=flow.release.mark)
        if flow.state is State.RELEASED:
            return flow.let_go(now)
        decision, release, _ = self._context.judge.egress(None, datagram.src, datagram.sport, Protocol.UDP)
        if not decision.is_allowed:
            return self._context.hold(flow, now)
        is_first, flow.release = flow.release is DROP, release
        if now - flow.opened_at < _PATIENCE_S:
            if flow.key not in self._waiting:
                flow.repeat_at = flow.opened_at + _PATIENCE_S
                self._waiting[flow.key] = flow
            return Verdict(Action.ACCEPT, mark=release.mark) if is_first else ACCEPT
        effects = self._take_as_address(flow, now)
        if now < flow.doubted_until:
            return Verdict(Action.ACCEPT, mark=release.mark, effects=effects)
        return release._replace(effects=effects)

    def _take_as_address(self, flow: DatagramInitiatorFlow, now: float) -> tuple[Settle | Inject, ...]:
        """Nobody showed an identity: the peer is its address, which policy allows."""
        remote, port = flow.source, int.from_bytes(flow.key[-4:-2], "big")
        decision, flow.release, _ = self._context.judge.egress(None, remote, port, Protocol.UDP)
        self._context.report(Direction.EGRESS, remote, port, decision, protocol=Protocol.UDP)
        if not decision.is_allowed:
            self._forget(flow)
            return self._context.settle_held(flow, DROP)
        self._settle(flow, Event.TAKEN_AS_ADDRESS, now)
        if now < self._context.fresh_until:
            flow.doubted_until, flow.deadline = self._context.fresh_until, now + UDP_LAPSE_S
            return self._let_go(flow, b"", ACCEPT, now)
        return self._let_go(flow, b"", flow.let_go(now), now)

    def again_in(self, message: bytes, key: bytes, mark: int, now: float) -> Verdict:
        """Shake hands again for a flow that the pod opened and that was released here, while it goes on.

        Who asks proves nothing, so asking gains nothing: at most a handshake, and those are counted.
        """
        decode_again(message)
        flow = self.find(key, now)
        if flow is not None and now < flow.doubted_until:
            # The peer is a pod after all, and has not seen an offer: it would have answered.
            return (
                TAKEN._replace(effects=(self._context.send_message(key, flow.offer),))
                if self._again.take(now)
                else DROP
            )
        if mark & (RELEASED | NODE | REPLY) != RELEASED | REPLY:
            raise PeerError(Reason.UNKNOWN_FLOW, "a request to shake hands again for no flow of the pod's")
        if self._is_under_way(key, now):
            return DROP
        effects = self._offer_again(key, now)
        return TAKEN._replace(effects=effects) if effects else DROP

    def doubted_in(self, datagram: UDPDatagram, key: bytes, mark: int, now: float) -> Verdict:
        """Let a marked datagram without a message into a released flow of the pod's only after another handshake.

        Its marker is there by chance, or a guard put it in, since a pod that has the address only now sends likewise.
        """
        if is_by_address(mark):
            return accepted_bare(datagram)
        flow = self.find(key, now)
        if flow is not None and flow.state is not State.RELEASED:
            # Not as an answer of an address without an enforcer: that would release the flow by its address.
            decision = self._context.judge.egress(None, datagram.src, datagram.sport, Protocol.UDP).decision
            return accepted_bare(datagram) if decision.is_allowed else self._context.hold(flow, now)
        if self._is_under_way(key, now):
            return accepted_bare(datagram)
        effects = self._offer_again(key, now)
        opened = self.flows.get(key)
        if opened is None:
            raise PeerError(Reason.UNKNOWN_FLOW, "a marked datagram, and no handshake can tell whose it is")
        return self._context.hold(opened, now, effects)

    def _is_under_way(self, key: bytes, now: float) -> bool:
        """Tell whether a handshake is under way or just over; forget one that is over."""
        flow = self.find(key, now)
        if flow is None:
            return False
        if flow.state is not State.RELEASED or now < flow.drained_at:
            return True
        self._forget(flow)
        return False

    def _offer_again(self, key: bytes, now: float) -> tuple[Settle | Inject, ...]:
        """Begin a handshake for a flow that is released; return nothing where none may be begun."""
        address, port = key[: (len(key) - 4) // 2], int.from_bytes(key[-4:-2], "big")
        destination = self._context.node.networks.destination(address, port, Protocol.UDP)
        if destination is Destination.EXTERNAL:
            return ()
        if not self._context.judge.could_allow_egress(destination, address, port, Protocol.UDP):
            return ()  # A release that policy forbids ends by the change of policy.
        if not self._again.take(now):
            return ()
        flow, effects = self._open(key, now)
        self._await_answer(flow, now)
        return (*effects, self._context.send_message(key, flow.offer))

    def expire(self, now: float) -> tuple[Settle | Inject, ...]:
        """Send offers again, give up waiting for enforcers that need not be there, and forget what took too long."""
        effects: list[Settle | Inject] = []
        for flow in [flow for flow in self._waiting.values() if flow.repeat_at <= now]:
            effects += self._overdue(flow, now)
        for flow in self.flows.expire(now):
            flow.advance(Event.EXPIRED)
            self._waiting.pop(flow.key, None)
            if not flow.is_external_allowed:
                self._context.report_flow(flow, Reason.HANDSHAKE_TIMEOUT)
        return tuple(effects)

    def _overdue(self, flow: DatagramInitiatorFlow, now: float) -> tuple[Settle | Inject, ...]:
        if flow.is_external_allowed:
            if flow.release is not DROP:
                return self._take_as_address(flow, now)
            # Nothing came back at all: they may be too large to carry the offer, and the peer without an enforcer.
            del self._waiting[flow.key]
            flow.is_overdue = True
            return self._let_go(flow, b"", ACCEPT, now)
        if flow.repeats >= MAX_REPEATS or not flow.has_waiting():
            del self._waiting[flow.key]
            return ()
        flow.repeats += 1
        flow.repeat_at = now + REPEAT_S * 2**flow.repeats + 2 * self._lag_s
        return (self._context.send_message(flow.key, flow.offer),)

    def abort(self, flow: DatagramInitiatorFlow) -> tuple[Settle | Inject, ...]:
        """Give a flow up because a change of policy no longer allows it."""
        self._forget(flow)
        return self._context.settle_held(flow, DROP)

    def forget_opening(self) -> None:
        """Give up the flows that show an identity which the pod no longer has; what waits is dropped in its time."""
        for flow in self.flows.known():
            if flow.state is State.OPENING:
                self._forget(flow)

    def _forget(self, flow: DatagramInitiatorFlow) -> None:
        self.flows.discard(flow)
        self._waiting.pop(flow.key, None)


def accepted_bare(datagram: UDPDatagram) -> Verdict:
    return ACCEPT._replace(payload=bare(datagram)) if datagram.has_surplus else ACCEPT
