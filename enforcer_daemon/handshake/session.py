# SPDX-License-Identifier: Apache-2.0
"""One handshake, for every protocol and both roles: its state, its proofs, and its timer. No I/O, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from enforcer_daemon.handshake.carriers import CarrierFacts
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import SynAckFrame, answer_head, encode_head, without_proof
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.machine import TRANSITIONS, Event, IllegalEventError, State, next_state
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import frame_hash, initiator_proof, require_equal, responder_proof, transcript
from enforcer_daemon.model import Decision, EvaluatedFlow
from enforcer_daemon.packet.checksum import ones_sum
from enforcer_daemon.packet.tcp import Segment
from enforcer_daemon.packet.udp import UDPDatagram
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP, Inject, Verdict

NEVER = math.inf
_HEAD_BYTES = 24


class Grant:
    """How the flows that one decision allows are released. Shared by them all."""

    __slots__ = ("entry", "evaluated", "number", "verdict")

    def __init__(self, verdict: Verdict, evaluated: EvaluatedFlow | None = None) -> None:
        self.verdict = verdict
        """Bears the number of its entry in the flow index since the last flow of it was proven."""
        self.evaluated = evaluated
        """What policy allowed; None if it was an address alone."""
        self.number = 0
        self.entry: EvaluatedFlow | None = None
        """The entry of the flow index under this number, if it has had one."""


@dataclass(slots=True, eq=False, repr=False)
class Session:
    """A handshake of one flow, and what is remembered of the flow after it.

    Packets wait in `held` by hold id; those that the session itself will send on, or take a message off, with their
    content. Sessions are told apart by object; what they hold is secret, so they have no text.
    """

    key: FlowKey
    facts: CarrierFacts
    local: LocalToken
    state: State
    deadline: float
    """When the session ends, or is remembered no longer, monotonic seconds."""
    grant: Grant | None = None
    """How policy allows the flow to be released; None: it does not, or has not been asked."""
    release: Verdict | None = None
    """How the flow is released, since it has been proven."""
    peer: Peer | None = None
    address: bytes = b""
    """The peer's own address, as its token states it."""
    nonce_i: bytes = b""
    nonce_r: bytes = b""
    isn_i: int = 0
    isn_r: int = -1
    frame: bytes = b""
    """Our offer or answer."""
    frame_sum: int = 0
    """Of its 16-bit words."""
    offer_hash: bytes = b""
    proof: bytes = b""
    """proof_i: made by the initiator, expected by the responder."""
    wake_at: float = NEVER
    """When the session's timer is due, monotonic seconds."""
    tries: int = 0
    """How often our message was retransmitted."""
    answers: int = 0
    """How often our answer was sent because the offer came again."""
    opened_at: float = 0.0
    """When the offer was made, or let in last, monotonic seconds: the pod's kernel answers a SYN at once."""
    sent_at: float = 0.0
    """When our message was sent last, or the first SYN-ACK with it, monotonic seconds."""
    asked_at: float = -math.inf
    """When the proof was asked for because unproven data came, monotonic seconds."""
    drained_at: float = 0.0
    """Until when a released flow may stay in the queue to keep the order of its packets, monotonic seconds."""
    doubted_until: float = 0.0
    """Until when a DOUBTED flow is kept from the kernel, monotonic seconds."""
    is_address_allowed: bool = False
    """Whether policy allows the dialed address with any pod there: packets then need not wait for its identity."""
    refusal: Decision | None = None
    """Why the packet for which the sender was ASKED to rehandshake is not allowed by its address."""
    resend: tuple[Inject, ...] = ()
    """What to send if the peer asks for the proof again: the proof, and the pod's bare ACK."""
    answer: Segment | None = None
    """The pod's SYN-ACK, until the proof has come."""
    answer_port: int | None = None
    """The pod's port in its SYN-ACK: beside a sidecar that redirects not the one that was dialed."""
    alias: FlowKey | None = None
    """The key of the flow with that port, unless another flow has it."""
    name: tuple[bytes, bytes, int, int | bytes] | None = None
    """Under which a responder's handshake is found by the offer's ISN or nonce."""
    source: bytes = b""
    """What the session is accounted to: the peer's address."""
    held: dict[int, UDPDatagram | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = self.key.remote

    def advance(self, event: Event) -> None:
        """Move by the table; raise IllegalEventError and stay if it has no entry."""
        self.state = TRANSITIONS[self.state].get(event) or next_state(self.state, event)

    @property
    def allowed_by(self) -> int | EvaluatedFlow | None:
        """Return the mark of a released flow, or what an unfinished one is allowed by; None if nothing allows it."""
        if self.release is not None:
            return self.release.mark
        if self.grant is None:
            return None
        return self.grant.evaluated or self.grant.verdict.mark

    @property
    def has_waiting(self) -> bool:
        """Whether packets of the pod's own wait; what came in before the answer may wait with them."""
        return any(packet is not None for packet in self.held.values())

    @property
    def overdue(self) -> Decision:
        """Return why packets that waited too long are dropped."""
        if self.state is State.ASKED and self.refusal is not None:
            return self.refusal
        is_initiator = self.key.role is Role.INITIATOR
        return Decision(False, self.facts.unheard if is_initiator else Reason.PROOF_MISSING, self.key.direction)

    def establish(self, now: float) -> Verdict:
        """Return the verdict for a packet of a released flow: it takes the flow with it into the kernel."""
        release = self.release or DROP
        return release if now >= self.drained_at else release._replace(when_drained=True)

    # The initiator's side.

    def offer(self, nonce: bytes, isn: int) -> None:
        """Make the offer."""
        block = self.local.block
        self.nonce_i, self.isn_i = nonce, isn
        head = encode_head(self.facts.offer_type, _HEAD_BYTES + len(block), nonce)
        self.frame, self.frame_sum = head + block, ones_sum(head) + self.local.block_sum

    def verify_answer(self, payload: bytes, answer: SynAckFrame, isn_r: int, peer: Peer) -> None:
        """Verify proof_r and compute proof_i; raise ProofError if another made it, or for another offer."""
        key, labels = self.local.pair_key(peer, is_initiator=True), self.facts.labels
        covered = self._transcript(isn_r, answer.nonce)
        require_equal(
            responder_proof(key, labels, covered, frame_hash(self.frame), without_proof(payload)), answer.proof
        )
        self.proof = initiator_proof(key, labels, covered, answer.proof)
        self.isn_r, self.peer, self.address = isn_r, peer, answer.address

    # The responder's side.

    def accept(self, frame: bytes, nonce: bytes, isn: int, peer: Peer, source: bytes) -> None:
        """Take over a verified offer of a peer at its own address."""
        self.nonce_i, self.isn_i, self.offer_hash, self.answers = nonce, isn, frame_hash(frame), 0
        self.peer, self.address, self.source = peer, source, source

    def make_answer(self, isn_r: int, nonce_r: bytes) -> None:
        """Make the answer, and the proof that is expected for it."""
        peer, facts, local = self.peer, self.facts, self.local
        if peer is None:
            raise IllegalEventError("an answer to no offer")
        kind = facts.answer_type if self.grant is not None else facts.challenge_type
        key, covered = local.pair_key(peer, is_initiator=False), self._transcript(isn_r, nonce_r)
        head = answer_head(kind or facts.answer_type, nonce_r, (self.key.own, self.key.own_port), local.block)
        proof = responder_proof(key, facts.labels, covered, self.offer_hash, head + local.block)
        head += proof
        self.frame, self.frame_sum = head + local.block, ones_sum(head) + local.block_sum
        self.proof = initiator_proof(key, facts.labels, covered, proof)
        self.isn_r, self.nonce_r = isn_r, nonce_r

    def verify_proof(self, proof: bytes) -> None:
        """Verify proof_i; raise ProofError if another made it, or for another handshake."""
        require_equal(self.proof, proof)

    def _transcript(self, isn_r: int, nonce_r: bytes) -> bytes:
        return transcript((self.isn_i, isn_r) if self.facts.has_numbers else None, self.nonce_i, nonce_r)
