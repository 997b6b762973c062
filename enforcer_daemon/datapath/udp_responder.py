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
from enforcer_daemon.datapath.flowindex import is_by_address
from enforcer_daemon.datapath.udp_initiator import (
    DRAIN_S,
    MAX_REPEATS,
    REMEMBERED_S,
    REPEAT_S,
    UNFINISHED_S,
    accepted_bare,
)
from enforcer_daemon.errors import PeerError, ProofError, TokenError
from enforcer_daemon.handshake.allowance import TokenBucket
from enforcer_daemon.handshake.bounds import Bound, FairTable
from enforcer_daemon.handshake.datagrams import DatagramResponderFlow, bare
from enforcer_daemon.handshake.flows import FlowTable
from enforcer_daemon.handshake.frames import TYPE_OFFER, decode_proof, decode_syn, encode_again
from enforcer_daemon.handshake.machine import Event, State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.marks import NODE, RELEASED
from enforcer_daemon.model import Decision, Direction, Protocol
from enforcer_daemon.packet.udp import UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict

_MAX_ANSWERS_AGAIN = 2 * MAX_REPEATS
"""Answers to one offer that comes alone: to its sender's repeats and some that the network makes. More is a replay."""
_MAX_RIVALS, _MAX_RIVALS_PER_SOURCE = 1_024, 64
"""Handshakes for flows that are under way or released, in all and of one peer's address."""
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
        bounds = settings.max_half_open_flows, settings.max_half_open_flows_per_source
        self._rivals: FairTable[bytes, DatagramResponderFlow] = FairTable(
            min(bounds[0], _MAX_RIVALS), min(bounds[1], _MAX_RIVALS_PER_SOURCE)
        )
        """Handshakes for flows that are under way or released, by flow and nonce.

        An offer proves nothing, so it ends nothing: it is answered, and only its proof takes the other's place.
        """
        self._waiting: dict[DatagramResponderFlow, None] = {}
        """Flows with datagrams that wait for a proof."""
        self._delayed: dict[DatagramResponderFlow, None] = {}
        """Flows whose answer waits until it is known whether another pod still has the peer's address."""
        self._challenging = TokenBucket(
            settings.max_handshakes_again_per_s, context.node.bound_hits, Bound.HANDSHAKES_AGAIN
        )
        self._asking = TokenBucket(settings.max_handshakes_again_per_s, context.node.bound_hits, Bound.HANDSHAKES_AGAIN)

    def __len__(self) -> int:
        return len(self.flows) + len(self._asked) + len(self._rivals)

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
        known = self._named(key, offer.nonce, now)
        if known is not None:
            return self._offered_again(datagram, known, is_lone, now)
        context = self._context
        peer = context.node.verify(offer.block, datagram.src, now)
        source, destination = (datagram.src, datagram.sport), (datagram.dst, datagram.dport)
        address = require_source(context, Protocol.UDP, source, destination, peer)
        decision, release, judged = context.judge.ingress(peer, address, datagram.dport, Protocol.UDP)
        is_released = bool(mark & RELEASED)
        if not decision.is_allowed and not is_released:
            self._report(datagram, decision, peer)
            return DROP
        if is_released and not self._challenging.take(now):
            return DROP
        if now + context.node.wall_offset_s > context.local.expires_at:
            raise TokenError(Reason.TOKEN_EXPIRED, "our own; is the identity too large, or the daemon overloaded?")
        context.node.use_nonce(offer.nonce, key, address)
        self._report(datagram, decision, peer)
        flow, is_rival = self._begin(key, is_released, now)
        is_denied = not decision.is_allowed
        flow.accept(message, offer.nonce, peer, destination, context.node.random(16), is_denied=is_denied)
        flow.release, flow.source = release if decision.is_allowed else DROP, address
        flow.judged = judged
        effects = self._add(flow, is_rival)
        if context.leases.suspect(peer, address, now):
            self._delayed[flow] = None
        else:
            effects += (context.send_message(key, flow.answer),)
        verdict = self._keep(datagram, flow, is_lone, now) if decision.is_allowed else DROP
        return verdict._replace(effects=effects + verdict.effects)

    def _named(self, key: bytes, nonce: bytes, now: float) -> DatagramResponderFlow | None:
        """Find the handshake with a nonce."""
        flow = self.find(key, now)
        if flow is not None and flow.nonce_i == nonce:
            return flow
        rival = self._rivals.get(key + nonce)
        return rival if rival is not None and rival.deadline > now else None

    def _begin(self, key: bytes, is_released: bool, now: float) -> tuple[DatagramResponderFlow, bool]:
        """Return the flow of a new handshake, and whether it is a rival of another or of a released flow.

        What waited because we asked for it goes on waiting.
        """
        earlier = self.find(key, now)
        if earlier is not None and earlier.state is State.ASKED and not is_released:
            self._forget(earlier)
            earlier.local, earlier.deadline = self._context.local, now + UNFINISHED_S
            self._await(earlier, now)
            return earlier, False
        flow = DatagramResponderFlow(key, self._context.local, now + UNFINISHED_S)
        return flow, earlier is not None or is_released

    def _add(self, flow: DatagramResponderFlow, is_rival: bool) -> tuple[Settle | Inject, ...]:
        evicted = self._rivals.put(flow.key + flow.nonce_i, flow, flow.source) if is_rival else self.flows.add(flow)
        if evicted is None:
            return ()
        self._waiting.pop(evicted.value, None)
        return self._context.give_up(*evicted)

    def _take_place(self, flow: DatagramResponderFlow, now: float) -> tuple[Settle | Inject, ...]:
        """Let a rival that has proven itself take the place of an earlier handshake or flow."""
        if self._rivals.pop(flow.key + flow.nonce_i) is None:
            return ()
        earlier = self.find(flow.key, now)
        effects: tuple[Settle | Inject, ...] = ()
        if earlier is not None:
            self._forget(earlier)
            if earlier.state is State.ASKED and flow.release.mark:  # What waited because we asked for this proof.
                effects = self._accept_held(earlier)
            else:
                effects = self._context.settle_held(earlier, DROP)
        return effects + self._add(flow, False)

    def _accept_held(self, flow: DatagramResponderFlow) -> tuple[Settle, ...]:
        held = self._context.settle_held(flow, ACCEPT)
        return tuple(Settle(each.hold_id, accepted_bare(flow.waiting[each.hold_id])) for each in held)

    def _offered_again(self, datagram: UDPDatagram, flow: DatagramResponderFlow, is_lone: bool, now: float) -> Verdict:
        """The flow's next datagram carries the offer too; one that comes alone asks for the answer again."""
        if flow.state is not State.ANSWERED:
            raise PeerError(Reason.REPLAYED_NONCE, "the offer of a flow that was released")
        if is_lone and flow in self._delayed:
            return TAKEN
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
        if flow not in self._waiting:
            flow.repeats = 0
            flow.repeat_at = now + REPEAT_S
            self._waiting[flow] = None

    def proof_in(self, datagram: UDPDatagram, found: tuple[bytes, bool], key: bytes, mark: int, now: float) -> Verdict:
        """Release the flow, and what waits for it in order, once the initiator's enforcer has proven itself."""
        message, is_lone = found
        nonce, proof = decode_proof(message)
        flow = self._named(key, nonce, now)
        if flow is None:
            return self._stray_proof(datagram, key, is_lone, mark, now)
        flow.verify(proof)
        if flow.state is State.RELEASED:
            if is_lone:
                return Verdict(Action.CONSUME, mark=flow.release.mark)
            raise PeerError(Reason.REPLAYED_NONCE, "the proof of a flow that was released")
        effects = self._take_place(flow, now)
        if not flow.release.mark:
            # Whoever has the address now is not who the flow was released for, and may not have it.
            self._forget(flow)
            return Verdict(Action.CONSUME, effects=effects)
        flow.advance(Event.PROOF_VERIFIED)
        self._waiting.pop(flow, None)
        self.flows.settle(flow)
        if flow.peer is not None:
            self._context.note_release(flow, flow.peer, flow.source, now)
        flow.deadline, flow.drained_at = now + REMEMBERED_S, now + DRAIN_S
        verdict = self._release(datagram, flow, is_lone, mark, now)
        return verdict._replace(effects=effects + verdict.effects)

    def _release(
        self, datagram: UDPDatagram, flow: DatagramResponderFlow, is_lone: bool, mark: int, now: float
    ) -> Verdict:
        """Release a flow with the datagram that brought its proof, and with what waits for it."""
        if is_lone:
            if flow.held:
                return TAKEN._replace(effects=self._let_go(flow, now))
            return Verdict(Action.CONSUME, mark=flow.release.mark, when_drained=not mark & RELEASED)
        if not flow.held:
            return flow.let_go(now)._replace(payload=bare(datagram))
        # Others came before it: it takes its place behind them.
        own = self._context.next_hold_id()
        flow.waiting[own] = datagram
        return Verdict(Action.HOLD, hold_id=own, effects=self._let_go(flow, now, (own,)))

    def _stray_proof(self, datagram: UDPDatagram, key: bytes, is_lone: bool, mark: int, now: float) -> Verdict:
        """Judge a datagram with the proof of a handshake that is not known, or known no longer."""
        earlier = self.find(key, now)
        if earlier is not None and earlier.state is not State.ASKED:
            raise ProofError(Reason.PROOF_INVALID, "of another handshake")
        if is_lone:
            raise PeerError(Reason.UNKNOWN_FLOW, "a proof of no handshake")
        if mark & RELEASED:
            return self.doubted_in(datagram, key, mark, now)
        verdict = self.plain_in(datagram, key, now)
        if verdict.action is Action.RELEASE:
            return verdict._replace(payload=bare(datagram))
        return verdict

    def _let_go(
        self, flow: DatagramResponderFlow, now: float, own: tuple[int, ...] = ()
    ) -> tuple[Settle | Inject, ...]:
        """Let what waits go on in order, as the pod's peer sent it; the last one takes the flow with it."""
        waiting, flow.waiting = flow.waiting, {}
        held = [*(settle.hold_id for settle in self._context.settle_held(flow, ACCEPT)), *own]
        effects: list[Settle | Inject] = []
        for n, hold_id in enumerate(held):
            datagram = waiting[hold_id]
            payload = bare(datagram) if datagram.has_surplus else None
            verdict = flow.let_go(now) if n + 1 == len(held) else ACCEPT
            effects.append(Settle(hold_id, verdict._replace(payload=payload)))
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
        context.refuse_reflection(datagram.src, datagram.dst)
        source, destination = (datagram.src, datagram.sport), (datagram.dst, datagram.dport)
        address, is_node = context.node.trace(Protocol.UDP, source, destination)
        if is_node:
            decision, release = Decision(True, Reason.NODE, Direction.INGRESS), _RELEASE_NODE
        elif context.node.networks.must_show_identity(address):
            decision, release = Decision(False, Reason.IDENTITY_REQUIRED, Direction.INGRESS), DROP
        else:
            decision, release, _ = context.judge.ingress(None, address, datagram.dport, Protocol.UDP)
        if not decision.is_allowed and self._may_ask(datagram, now):
            return self._ask_again(datagram, key, decision, now)
        context.report(Direction.INGRESS, address, datagram.dport, decision, protocol=Protocol.UDP)
        return context.let_in(datagram.dst, release) if decision.is_allowed else DROP

    def doubted_in(self, datagram: UDPDatagram, key: bytes, mark: int, now: float) -> Verdict:
        """Let a marked datagram without a message that holds into a released flow only after another handshake.

        Its marker is there by chance, or a pod that has the address only now put it in: its enforcer is asked.
        """
        if is_by_address(mark):
            return accepted_bare(datagram)
        flow = self.find(key, now)
        if flow is not None and flow.state is not State.RELEASED:
            return self.datagram_in(datagram, flow, now)
        if flow is not None:
            if now < flow.drained_at:  # The proof was just now.
                return accepted_bare(datagram)
            self._forget(flow)
        if not self._may_ask(datagram, now):
            raise PeerError(Reason.UNKNOWN_FLOW, "a marked datagram, and no handshake can tell whose it is")
        return self._ask_again(datagram, key, Decision(False, Reason.UNKNOWN_FLOW, Direction.INGRESS), now)

    def _may_ask(self, datagram: UDPDatagram, now: float) -> bool:
        """Only of a pod that has shown an identity before: another's application would get an empty datagram."""
        is_known = self._context.judge.has_met(datagram.src) and self._context.is_own_address(datagram.dst)
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
        for flow in [flow for flow in self._waiting if flow.repeat_at <= now]:
            if flow.repeats >= MAX_REPEATS or not flow.held or flow.state is not State.ANSWERED:
                del self._waiting[flow]
                continue
            flow.repeats += 1
            flow.repeat_at = now + REPEAT_S * 2**flow.repeats
            if flow not in self._delayed:
                effects.append(self._context.send_message(flow.key, flow.answer))
        for flow in [flow for flow in self._delayed if not self._context.leases.is_suspected(flow.source)]:
            del self._delayed[flow]
            if flow.state is State.ANSWERED and flow.deadline > now:
                effects.append(self._context.send_message(flow.key, flow.answer))
        for flow in self.flows.expire(now):
            flow.advance(Event.EXPIRED)
            self._waiting.pop(flow, None)
            self._context.report_flow(flow, Reason.HANDSHAKE_TIMEOUT)
        while (rival := next(iter(self._rivals), None)) is not None and rival.deadline <= now:
            self._rivals.pop(rival.key + rival.nonce_i)
            self._waiting.pop(rival, None)
            rival.advance(Event.EXPIRED)
        for flow in self._asked.expire(now):
            flow.advance(Event.EXPIRED)
        return tuple(effects)

    def abort(self, flow: DatagramResponderFlow) -> tuple[Settle | Inject, ...]:
        """Give a flow up because a change of policy no longer allows it."""
        self._forget(flow)
        return self._context.settle_held(flow, DROP)

    def known(self) -> list[DatagramResponderFlow]:
        """Return all flows, rivals among them, but for those of which another handshake was asked."""
        return [*self.flows.known(), *self._rivals]

    def forget_rivals(self) -> tuple[Settle | Inject, ...]:
        """Give up the handshakes of which policy allowed or denied each; an offer that is repeated begins another."""
        effects: tuple[Settle | Inject, ...] = ()
        for rival in list(self._rivals):
            self._rivals.pop(rival.key + rival.nonce_i)
            self._waiting.pop(rival, None)
            effects += self._context.settle_held(rival, DROP)
        return effects

    def _forget(self, flow: DatagramResponderFlow) -> None:
        self.flows.discard(flow)
        self._asked.discard(flow)
        self._waiting.pop(flow, None)

    def _report(self, datagram: UDPDatagram, decision: Decision, peer: Peer) -> None:
        self._context.report(
            Direction.INGRESS, datagram.src, datagram.dport, decision, protocol=Protocol.UDP, peer=peer.identity
        )
