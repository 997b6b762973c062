# SPDX-License-Identifier: Apache-2.0
"""Flows of datagrams that are opened to the pod: verify the offer, judge ingress, answer, await the proof, release.

Datagrams wait in the kernel's queue until the proof is there. One of a flow that nobody knows, as after a loss of
state, waits likewise, and its sender's enforcer is asked to shake hands again.
"""

from __future__ import annotations

import math
from dataclasses import replace

from enforcer_daemon.datapath.binding import require_source
from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.udp_initiator import (
    DRAIN_S,
    MAX_REPEATS,
    REMEMBERED_S,
    REPEAT_S,
    UNFINISHED_S,
    Allowance,
)
from enforcer_daemon.errors import PeerError, ProofError, TokenError
from enforcer_daemon.handshake.bounds import Bound
from enforcer_daemon.handshake.datagrams import DatagramResponderFlow
from enforcer_daemon.handshake.flows import FlowTable
from enforcer_daemon.handshake.frames import TYPE_OFFER, decode_proof, decode_syn, encode_again
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.marks import NODE, OWN_MASK, RELEASED, REPLY
from enforcer_daemon.model import Decision, Direction, Protocol
from enforcer_daemon.packet.udp import UDPDatagram, without_surplus
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

_MAX_ANSWERS_AGAIN = 2 * MAX_REPEATS
"""Answers to one offer that comes alone: to its sender's repeats and some that the network makes. More is a replay."""
_MAX_HELD_ASKED = 8
"""Datagrams of such a flow that wait."""
_RELEASE_NODE = Verdict(Action.RELEASE, mark=RELEASED | NODE)


class DatagramResponder:
    """The responding side of one endpoint."""

    def __init__(self, context: EndpointContext) -> None:
        self._context = context
        settings = context.node.settings
        self.flows: FlowTable[DatagramResponderFlow] = FlowTable(settings, context.node.bound_hits)
        # As many as can be asked in the time for which such a flow is remembered, and at once before.
        self._max_asked = math.ceil(settings.max_handshakes_again_per_s * (1 + UNFINISHED_S))
        asked = replace(settings, max_half_open_flows=self._max_asked, max_half_open_flows_per_source=self._max_asked)
        self._asked: FlowTable[DatagramResponderFlow] = FlowTable(asked, context.node.bound_hits)
        self._waiting: dict[bytes, DatagramResponderFlow] = {}
        """Flows with datagrams that wait for a proof."""
        self._asking = Allowance(settings.max_handshakes_again_per_s, context.node.bound_hits)

    def __len__(self) -> int:
        return len(self.flows) + len(self._asked)

    def find(self, key: bytes, now: float) -> DatagramResponderFlow | None:
        """Find a flow; a released one is remembered for a short time only."""
        flow = self.flows.get(key) or self._asked.get(key)
        if flow is not None and flow.deadline <= now:
            self._forget(flow)
            return None
        return flow

    def offer_in(self, datagram: UDPDatagram, found: tuple[bytes, bool], key: bytes, mark: int, now: float) -> Verdict:
        """Verify and judge an offer, and answer it; the datagram that it rides on waits for the proof."""
        message, is_lone = found
        offer = decode_syn(message, TYPE_OFFER)
        flow = self.find(key, now)
        if flow is not None and flow.nonce_i == offer.nonce:
            return self._offered_again(datagram, flow, is_lone, now)
        context = self._context
        peer = context.node.verify(offer.block, datagram.src, now)
        source, destination = (datagram.src, datagram.sport), (datagram.dst, datagram.dport)
        address = require_source(context, Protocol.UDP, source, destination, peer)
        decision, release = context.judge.ingress(peer, address, datagram.dport, Protocol.UDP)
        if not decision.is_allowed:
            self._report(datagram, decision, peer)
            # Whoever has the address now is not who the flow was released for.
            return Verdict(Action.CONSUME) if mark & RELEASED else DROP
        if now + context.node.wall_offset_s > context.local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the identity too large, or the daemon overloaded?")
        is_under_way = flow is not None and flow.state is State.ANSWERED
        context.node.use_nonce(offer.nonce, b"" if is_under_way else key, address)
        self._report(datagram, decision, peer)
        flow, effects = self._begin(flow, key, now)
        flow.accept(message, offer.nonce, peer, destination, context.node.random(16))
        flow.release, flow.source = release, address
        evicted = self.flows.add(flow)
        if evicted is not None:
            self._waiting.pop(evicted.value.key, None)
            effects += context.give_up(*evicted)
        verdict = self._keep(datagram, flow, is_lone, now)
        if is_lone and mark & RELEASED and mark & OWN_MASK & ~REPLY != release.mark:
            verdict = Verdict(Action.CONSUME)
        answer = context.send_message(key, flow.answer)
        return verdict._replace(effects=(*effects, answer, *verdict.effects))

    def _begin(
        self, flow: DatagramResponderFlow | None, key: bytes, now: float
    ) -> tuple[DatagramResponderFlow, tuple[Settle | Inject, ...]]:
        """Give the flow of a new handshake; what waited because we asked for it goes on waiting."""
        effects: tuple[Settle | Inject, ...] = ()
        if flow is not None:
            self._forget(flow)
            if flow.state is State.ASKED:
                flow.local, flow.deadline = self._context.local, now + UNFINISHED_S
                self._await(flow, now)
                return flow, effects
            effects = self._context.settle_held(flow, DROP)
        return DatagramResponderFlow(key, self._context.local, now + UNFINISHED_S), effects

    def _offered_again(self, datagram: UDPDatagram, flow: DatagramResponderFlow, is_lone: bool, now: float) -> Verdict:
        """The flow's next datagram carries the offer too; one that comes alone asks for the answer again."""
        if flow.state is not State.ANSWERED:
            raise PeerError(Reason.REPLAYED_NONCE, "the offer of a flow that was released")
        if is_lone:
            if flow.answered_again >= _MAX_ANSWERS_AGAIN:
                raise PeerError(Reason.REPLAYED_NONCE, "an offer that was answered often enough")
            flow.answered_again += 1
            return TAKEN._replace(effects=(self._context.send_message(flow.key, flow.answer),))
        return self._keep(datagram, flow, is_lone, now)

    def _keep(self, datagram: UDPDatagram, flow: DatagramResponderFlow, is_lone: bool, now: float) -> Verdict:
        if is_lone:
            return TAKEN
        verdict = self._hold(datagram, flow, now)
        self._await(flow, now)
        return verdict

    def _hold(self, datagram: UDPDatagram, flow: DatagramResponderFlow, now: float) -> Verdict:
        verdict = self._context.hold(flow, now)
        if len(flow.waiting) >= len(flow.held):
            flow.waiting = {hold_id: found for hold_id, found in flow.waiting.items() if hold_id in flow.held}
        flow.waiting[verdict.hold_id] = datagram
        return verdict

    def _await(self, flow: DatagramResponderFlow, now: float) -> None:
        if flow.key not in self._waiting:
            flow.repeats = 0
            flow.repeat_at = now + REPEAT_S
            self._waiting[flow.key] = flow

    def proof_in(self, datagram: UDPDatagram, found: tuple[bytes, bool], key: bytes, mark: int, now: float) -> Verdict:
        """Release the flow, and what waits for it in order, once the initiator's enforcer has proven itself."""
        message, is_lone = found
        nonce, proof = decode_proof(message)
        flow = self.find(key, now)
        if flow is None or flow.state is State.ASKED:
            if is_lone:
                raise PeerError(Reason.UNKNOWN_FLOW, "a proof of no handshake")
            verdict = self.plain_in(datagram, key, now)
            if verdict.action is Action.RELEASE:
                return verdict._replace(payload=without_surplus(datagram))
            return verdict
        if nonce != flow.nonce_i:
            raise ProofError(Reason.PROOF_INVALID, "of another handshake")
        flow.verify(proof)
        if flow.state is State.RELEASED:
            if is_lone:
                return Verdict(Action.CONSUME, mark=flow.release.mark)
            raise PeerError(Reason.REPLAYED_NONCE, "the proof of a flow that was released")
        flow.advance(Event.PROOF_VERIFIED)
        self._waiting.pop(key, None)
        self.flows.settle(flow)
        flow.deadline, flow.drained_at = now + REMEMBERED_S, now + DRAIN_S
        if is_lone:
            if flow.held:
                return TAKEN._replace(effects=self._let_go(flow, now))
            return Verdict(Action.CONSUME, mark=flow.release.mark, when_drained=not mark & RELEASED)
        if not flow.held:
            return flow.let_go(now)._replace(payload=without_surplus(datagram))
        # Others came before it: it takes its place behind them.
        own = self._context.next_hold_id()
        flow.waiting[own] = datagram
        return Verdict(Action.HOLD, hold_id=own, effects=self._let_go(flow, now, (own,)))

    def _let_go(
        self, flow: DatagramResponderFlow, now: float, own: tuple[int, ...] = ()
    ) -> tuple[Settle | Inject, ...]:
        """Let what waits go on in order, as the pod's peer sent it; the last one takes the flow with it."""
        waiting, flow.waiting = flow.waiting, {}
        held = [*(settle.hold_id for settle in self._context.settle_held(flow, ACCEPT)), *own]
        effects: list[Settle | Inject] = []
        for n, hold_id in enumerate(held):
            datagram = waiting[hold_id]
            bare = without_surplus(datagram) if datagram.has_surplus else None
            verdict = flow.let_go(now) if n + 1 == len(held) else ACCEPT
            effects.append(Settle(hold_id, verdict._replace(payload=bare)))
        return tuple(effects)

    def datagram_in(self, datagram: UDPDatagram, flow: DatagramResponderFlow, now: float) -> Verdict:
        """Let a datagram of a known flow wait for the proof."""
        if flow.state is State.RELEASED:
            return flow.let_go(now)
        if flow.state is State.ASKED:
            if len(flow.held) >= _MAX_HELD_ASKED:
                raise PeerError(Reason.HOLD_QUEUE_FULL, "of a flow that is not known")
            return self._hold(datagram, flow, now)
        return self._keep(datagram, flow, False, now)

    def plain_in(self, datagram: UDPDatagram, key: bytes, now: float) -> Verdict:
        """Judge a datagram without an identity by its address; one from the enforced networks may have lost its own."""
        context = self._context
        source, destination = (datagram.src, datagram.sport), (datagram.dst, datagram.dport)
        address, is_node = context.node.trace(Protocol.UDP, source, destination)
        if is_node:
            decision, release = Decision(True, Reason.NODE, Direction.INGRESS), _RELEASE_NODE
        elif context.node.networks.must_show_identity(address):
            decision, release = Decision(False, Reason.IDENTITY_REQUIRED, Direction.INGRESS), DROP
        else:
            decision, release = context.judge.ingress(None, address, datagram.dport, Protocol.UDP)
        if not decision.is_allowed and self._may_ask(datagram, now):
            return self._ask_again(datagram, key, decision, now)
        context.report(Direction.INGRESS, address, datagram.dport, decision, protocol=Protocol.UDP)
        return release if decision.is_allowed else DROP

    def is_own_address(self, address: bytes) -> bool:
        """Tell whether the pod's enforcer can answer for an address: not for one of a group."""
        return any(own.packed == address for own in self._context.local.identity.ips)

    def _may_ask(self, datagram: UDPDatagram, now: float) -> bool:
        """Only of a pod that has shown an identity before: another's application would get an empty datagram."""
        is_known = self._context.judge.has_met(datagram.src) and self.is_own_address(datagram.dst)
        if is_known and len(self._asked) >= self._max_asked:
            self._context.node.bound_hits[Bound.HANDSHAKES_AGAIN] += 1
            return False
        return is_known and self._asking.take(now)

    def _ask_again(self, datagram: UDPDatagram, key: bytes, refusal: Decision, now: float) -> Verdict:
        """Let a datagram wait for a handshake; `refusal` is what becomes of it where none comes."""
        context = self._context
        flow = DatagramResponderFlow(key, context.local, now + UNFINISHED_S)
        flow.refusal = refusal
        self._asked.add(flow)
        again = context.send_message(key, encode_again(context.node.random(16)))
        return self._hold(datagram, flow, now)._replace(effects=(again,))

    def expire(self, now: float) -> tuple[Settle | Inject, ...]:
        """Send answers again for which datagrams wait, and forget handshakes that took too long."""
        effects: list[Settle | Inject] = []
        for flow in [flow for flow in self._waiting.values() if flow.repeat_at <= now]:
            if flow.repeats >= MAX_REPEATS or not flow.held or flow.state is not State.ANSWERED:
                del self._waiting[flow.key]
                continue
            flow.repeats += 1
            flow.repeat_at = now + REPEAT_S * 2**flow.repeats
            effects.append(self._context.send_message(flow.key, flow.answer))
        for flow in self.flows.expire(now):
            flow.advance(Event.EXPIRED)
            self._waiting.pop(flow.key, None)
            self._context.report_flow(flow, Reason.HANDSHAKE_TIMEOUT)
        for flow in self._asked.expire(now):
            flow.advance(Event.EXPIRED)
        return tuple(effects)

    def abort(self, flow: DatagramResponderFlow) -> tuple[Settle | Inject, ...]:
        """Give a flow up because a change of policy no longer allows it."""
        self._forget(flow)
        return self._context.settle_held(flow, DROP)

    def _forget(self, flow: DatagramResponderFlow) -> None:
        self.flows.discard(flow)
        self._asked.discard(flow)
        self._waiting.pop(flow.key, None)

    def _report(self, datagram: UDPDatagram, decision: Decision, peer: Peer) -> None:
        self._context.report(
            Direction.INGRESS, datagram.src, datagram.dport, decision, protocol=Protocol.UDP, peer=peer.identity
        )
