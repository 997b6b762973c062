# SPDX-License-Identifier: Apache-2.0
"""The two kinds of flow in a handshake, and the bounded table they are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Generic, NamedTuple, TypeVar

from enforcer_daemon.handshake.bounds import Bound, BoundHits, Evicted, FairTable
from enforcer_daemon.handshake.frames import PROOF_BYTES, SynAckFrame, SynFrame, encode_syn, encode_syn_ack
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.machine import Event, State, next_state
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import Transcript, frame_hash, initiator_proof, require_equal, responder_proof
from enforcer_daemon.model import Direction, JudgedFlow, Protocol, RuleRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP, Inject

_MAX_OF_ONE_REMOTE = 8
"""Flows of one remote address and port that are found without the pod's own port, which few have more than one of."""


_PORTS_BYTES = 4


class Flow:
    """What both kinds have in common: a state that moves by the table alone, and packets that wait for it."""

    __slots__ = ("deadline", "held", "judged", "key", "local", "release", "source", "state")

    protocol: ClassVar[Protocol] = Protocol.TCP
    direction: ClassVar[Direction] = Direction.INGRESS
    """EGRESS where the pod opens the flow."""

    def __init__(self, key: bytes, local: LocalToken, state: State, deadline: float) -> None:
        self.key = key
        self.local = local
        self.state = state
        self.deadline = deadline
        self.held: list[int] = []
        """Hold ids of queued packets, oldest first."""
        self.release = DROP
        """How the flow is released, once policy has allowed it."""
        self.judged: JudgedFlow | None = None
        """What policy allowed it by, until it is released; None where no identity counted."""
        self.source = key[: (len(key) - _PORTS_BYTES) // 2]
        """What the flow is accounted to among its kind: the peer's address."""

    @property
    def overdue(self) -> Reason:
        """Why what waits for the flow is dropped when its time is over."""
        return Reason.PROOF_MISSING

    @property
    def rules(self) -> tuple[RuleRef, ...]:
        """The policies that a denial of the flow names."""
        return ()

    def advance(self, event: Event) -> None:
        """Move by the table; raise IllegalEventError and stay where it has no entry."""
        self.state = next_state(self.state, event)


def fragmentation_of(nonce: bytes) -> bytes:
    """Give identification, flags and offset of the IPv4 packet with a nonce's frame: routers may cut it.

    The pod's kernel forbids that for a packet that it knows to be small. Pieces belong together by the identification,
    so it must differ between connections. A repetition has the same one, and is the same beyond its first piece.
    """
    return nonce[:2] + b"\x00\x00"


class InitiatorFlow(Flow):
    """A connection that the pod opens."""

    __slots__ = ("address", "again", "frame", "isn", "isn_r", "nonce", "peer", "proof")

    direction: ClassVar[Direction] = Direction.EGRESS

    def __init__(self, key: bytes, local: LocalToken, nonce: bytes, isn: int, deadline: float) -> None:
        super().__init__(key, local, State.OPENING, deadline)
        self.nonce = nonce
        self.isn = isn
        self.frame = encode_syn(SynFrame(nonce, local.block))
        self.peer: Peer | None = None
        self.address = b""
        """The peer's own address, as its enforcer states it."""
        self.proof = b""
        self.isn_r = 0
        self.again: tuple[Inject, ...] = ()
        """What to send where the peer asks for the proof again: it, and the pod's bare ACK."""

    def verify(self, payload: bytes, frame: SynAckFrame, isn_r: int, peer: Peer) -> None:
        """Check proof_r and compute proof_i; raise ProofError where it was made by another, or for another SYN."""
        key = self.local.pair_key(peer, is_initiator=True)
        transcript = Transcript(self.isn, isn_r, self.nonce, frame.nonce)
        require_equal(responder_proof(key, transcript, frame_hash(self.frame), payload), frame.proof)
        self.proof = initiator_proof(key, transcript, frame.proof)
        self.peer = peer
        self.isn_r = isn_r


class Offer(NamedTuple):
    """What the responder keeps of a verified SYN."""

    nonce: bytes
    isn: int
    syn_hash: bytes
    address: bytes
    """The pod's own address and port, as the initiator's enforcer must judge them."""
    port: int


class ResponderFlow(Flow):
    """A connection that is opened to the pod."""

    __slots__ = ("answered_at", "answers_from", "expected", "frame", "isn_r", "nonce_r", "offer", "offered_at",
                 "options", "peer", "repeat_at", "window")  # fmt: skip

    def __init__(self, key: bytes, local: LocalToken, peer: Peer, offer: Offer, deadline: float) -> None:
        super().__init__(key, local, State.OFFERED, deadline)
        self.peer = peer
        self.offer = offer
        self.nonce_r = b""
        self.isn_r = -1
        self.frame = b""
        self.expected = b""
        self.options = b""
        """What the pod's kernel offered in its SYN-ACK; its repetition must offer the same."""
        self.window = 0
        self.offered_at = 0.0
        """When the SYN was let in last, monotonic seconds: the pod's kernel answers at once."""
        self.answered_at = 0.0
        """When the SYN-ACK left first, monotonic seconds."""
        self.answers_from = b""
        """The pod's own port in that SYN-ACK, packed: beside a sidecar that redirects not the one that was dialled."""
        self.repeat_at = 0.0
        """Earliest time at which the SYN-ACK may be repeated for unproven data, monotonic seconds."""

    def answer(self, isn_r: int, nonce_r: bytes) -> bytes:
        """Give the SYN-ACK's frame; for a retransmission (same isn_r) exactly the same one."""
        if isn_r != self.isn_r:
            offer = self.offer
            self.isn_r = isn_r
            self.nonce_r = nonce_r
            key = self.local.pair_key(self.peer, is_initiator=False)
            transcript = Transcript(offer.isn, isn_r, offer.nonce, nonce_r)
            blank = SynAckFrame(nonce_r, offer.address, offer.port, bytes(PROOF_BYTES), self.local.block)
            proof = responder_proof(key, transcript, offer.syn_hash, encode_syn_ack(blank))
            self.frame = encode_syn_ack(blank._replace(proof=proof))
            self.expected = initiator_proof(key, transcript, proof)
        return self.frame

    def verify(self, proof: bytes) -> None:
        """Check proof_i; raise ProofError where it was made by another, or for another handshake."""
        require_equal(self.expected, proof)


_AnyFlow = TypeVar("_AnyFlow", bound=Flow)


class FlowTable(Generic[_AnyFlow]):
    """One endpoint's flows of a kind: unfinished up to bounds and a deadline, settled while there is room."""

    def __init__(self, settings: HandshakeLimits, hits: BoundHits) -> None:
        """Count in `hits` how often a settled flow makes room; of an unfinished one `add` tells."""
        self._open: FairTable[bytes, _AnyFlow] = FairTable(
            settings.max_half_open_flows, settings.max_half_open_flows_per_source
        )
        self._max_settled = settings.max_settled_flows
        self._hits = hits
        self._settled: dict[bytes, _AnyFlow] = {}
        self._by_remote: dict[bytes, tuple[_AnyFlow, ...]] = {}
        """The latest flows of each remote end, oldest first, by the key without the pod's own port."""

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: bytes) -> _AnyFlow | None:
        """Find a flow, unfinished or settled."""
        return self._open.get(key) or self._settled.get(key)

    def by_remote(self, key: bytes) -> tuple[_AnyFlow, ...]:
        """Find the latest flows with this remote end, whichever port of the pod each was opened to."""
        return self._by_remote.get(key[:-2], ())

    def add(self, flow: _AnyFlow) -> Evicted[_AnyFlow] | None:
        """Keep an unfinished flow; give the one that makes room for it: of its source, else of the greediest one."""
        earlier = self.get(flow.key)
        if earlier is not None:
            self._settled.pop(flow.key, None)
            self._forget_remote(earlier)
        evicted = self._open.put(flow.key, flow, flow.source)
        if evicted is not None:
            evicted.value.advance(Event.EXPIRED)
            self._forget_remote(evicted.value)
        remote = flow.key[:-2]
        self._by_remote[remote] = (*self._by_remote.get(remote, ())[1 - _MAX_OF_ONE_REMOTE :], flow)
        return evicted

    def settle(self, flow: _AnyFlow) -> None:
        """Count a released flow no longer as unfinished; the oldest settled flow makes room."""
        if self._open.pop(flow.key) is not None:
            if len(self._settled) >= self._max_settled:
                self._hits[Bound.SETTLED_FLOWS] += 1
                self._forget_remote(self._settled.pop(next(iter(self._settled))))
            self._settled[flow.key] = flow

    def discard(self, flow: _AnyFlow) -> None:
        """Forget a flow."""
        if self._open.get(flow.key) is flow:
            self._open.pop(flow.key)
        if self._settled.get(flow.key) is flow:
            del self._settled[flow.key]
        self._forget_remote(flow)

    def expire(self, now: float) -> Iterator[_AnyFlow]:
        """Take out and give the unfinished flows whose deadline has passed, oldest first."""
        while (flow := next(iter(self._open), None)) is not None and flow.deadline <= now:
            self._open.pop(flow.key)
            self._forget_remote(flow)
            yield flow

    def known(self) -> list[_AnyFlow]:
        """Give all flows, settled or not."""
        return [*self._open, *self._settled.values()]

    def _forget_remote(self, flow: _AnyFlow) -> None:
        remote = flow.key[:-2]
        left = tuple(other for other in self._by_remote.get(remote, ()) if other is not flow)
        if left:
            self._by_remote[remote] = left
        else:
            self._by_remote.pop(remote, None)
