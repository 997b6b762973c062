# SPDX-License-Identifier: Apache-2.0
"""The handshake of a flow of datagrams: the messages beside them, and the two kinds of flow (docs/protocol.md, UDP).

offer    as a SYN's frame: who sends, with a nonce         rides on the flow's first datagrams, or goes alone
answer   as a SYN-ACK's frame, with proof_r                alone
proof    proof_i                                           rides on a datagram that waited for it, or goes alone
again    "your flow is not known here, shake hands again"  alone
"""

from __future__ import annotations

import hmac
from typing import ClassVar

from enforcer_daemon.errors import FrameError
from enforcer_daemon.handshake.flows import Flow
from enforcer_daemon.handshake.frames import (
    MAGIC,
    MARKER_ID,
    PROOF_BYTES,
    PROOF_MARKER_ID,
    TYPE_ANSWER,
    TYPE_CHALLENGE,
    TYPE_OFFER,
    TYPE_PROOF,
    SynAckFrame,
    SynFrame,
    encode_proof,
    encode_syn,
    encode_syn_ack,
    frame_type,
    without_proof,
)
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.machine import DATAGRAM_TRANSITIONS, Event, State, next_state
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import frame_hash, require_equal
from enforcer_daemon.model import Decision, Direction, Protocol, RuleRef
from enforcer_daemon.packet.udp import UDPDatagram, find_option, is_marked, with_marker, with_option, without_surplus
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Verdict

RIDING_EXID = 0x5452
"""ExID of a message beside a datagram of the pod's."""
LONE_EXID = 0x5453
"""ExID of a message in a datagram of the enforcer's own, which the other enforcer consumes."""


def find_message(datagram: UDPDatagram) -> tuple[bytes, bool] | None:
    """Give a handshake's message beside a datagram, and whether it came alone; None where there is none.

    Raise FrameError for one whose envelope does not hold: it must not pass for an ordinary datagram.
    """
    if not datagram.has_surplus:
        return None
    option = find_option(datagram)
    if option is None or option.exid not in (RIDING_EXID, LONE_EXID):
        if MAGIC in datagram.packet[datagram.tail :]:
            raise FrameError(Reason.MALFORMED_FRAME, "the option round it does not hold")
        return None
    is_lone = option.exid == LONE_EXID
    if is_lone and datagram.payload:
        raise FrameError(Reason.MALFORMED_FRAME, "a message that goes alone has data beside it")
    return option.content, is_lone


def beside(datagram: UDPDatagram, message: bytes) -> bytes:
    """Write a datagram of the pod's again with a message beside it, and the marker by which rules find it.

    Raise PacketError if only the beginning of the packet is at hand, or it will be cut.
    """
    marker = PROOF_MARKER_ID if frame_type(message) == TYPE_PROOF else MARKER_ID
    return with_option(datagram, RIDING_EXID, message, marker)


def marked(datagram: UDPDatagram) -> bytes | None:
    """Write a datagram of the pod's again with the marker; None if it cannot be rewritten."""
    is_whole = datagram.tail <= len(datagram.packet) and datagram.end <= len(datagram.packet)
    return with_marker(datagram, MARKER_ID) if is_whole and not datagram.is_cut else None


def has_marker(packet: bytes) -> bool:
    """Tell whether a packet bears a marker."""
    return is_marked(packet, MARKER_ID) or is_marked(packet, PROOF_MARKER_ID)


def bare(datagram: UDPDatagram) -> bytes:
    """Write a datagram again without the message beside it and without its marker.

    What stood in the marker's place is not known: 0, which is all that an atomic datagram needs (RFC 6864).
    """
    if has_marker(datagram.packet):
        datagram = datagram._replace(packet=with_marker(datagram, 0))
    return without_surplus(datagram)


def responder_proof(key: bytes, nonces: bytes, offer_hash: bytes, answer: bytes) -> bytes:
    """Compute proof_r; the proof field of `answer` is not covered."""
    return hmac.digest(key, b"datagram-answer" + nonces + offer_hash + without_proof(answer), "sha256")[:PROOF_BYTES]


def initiator_proof(key: bytes, nonces: bytes, proof_r: bytes) -> bytes:
    """Compute proof_i."""
    return hmac.digest(key, b"datagram-proof" + nonces + proof_r, "sha256")[:PROOF_BYTES]


_UNKNOWN = Decision(False, Reason.UNIDENTIFIED_PEER, Direction.INGRESS)


class DatagramFlow(Flow):
    """What both kinds have in common: the table of states, and a message that is repeated while it is owed."""

    __slots__ = ("drained_at", "repeat_at", "repeats")

    protocol: ClassVar[Protocol] = Protocol.UDP

    def __init__(self, key: bytes, local: LocalToken, state: State, deadline: float) -> None:
        super().__init__(key, local, state, deadline)
        self.repeat_at = 0.0
        """When the enforcer's message is to be sent again, monotonic seconds."""
        self.repeats = 0
        self.drained_at = 0.0
        """Until when a released flow may stay in the queue to keep the order of its datagrams, monotonic seconds."""

    def let_go(self, now: float) -> Verdict:
        """Give the verdict for a datagram of a released flow: it takes the flow with it into the kernel."""
        return self.release if now >= self.drained_at else self.release._replace(when_drained=True)

    def advance(self, event: Event) -> None:
        """Move by the table; raise IllegalEventError and stay where it has no entry."""
        self.state = next_state(self.state, event, DATAGRAM_TRANSITIONS)


class DatagramInitiatorFlow(DatagramFlow):
    """A flow that the pod opens."""

    __slots__ = (
        "doubted_until",
        "is_external_allowed",
        "is_overdue",
        "is_shown",
        "nonce",
        "offer",
        "offered_at",
        "opened_at",
        "proof",
        "waiting",
    )

    direction: ClassVar[Direction] = Direction.EGRESS

    @property
    def overdue(self) -> Reason:
        """Nobody answered."""
        return Reason.HANDSHAKE_TIMEOUT

    def __init__(self, key: bytes, local: LocalToken, nonce: bytes, now: float, deadline: float) -> None:
        super().__init__(key, local, State.OPENING, deadline)
        self.nonce = nonce
        self.offer = encode_syn(SynFrame(nonce, local.block), TYPE_OFFER)
        self.proof = b""
        """The message that carries proof_i, once the answer is verified."""
        self.opened_at = self.offered_at = now
        self.doubted_until = 0.0
        """Until when the flow is not given to the kernel by its peer's address alone, monotonic seconds."""
        self.is_external_allowed = False
        """Whether policy lets the pod reach this address whoever is there: then its datagrams need not wait."""
        self.is_overdue = False
        """Whether an answer was waited for in vain: what policy allows by address then waits no longer."""
        self.is_shown = False
        """Whether a datagram left with the offer beside it."""
        self.waiting: dict[int, UDPDatagram] = {}
        """Datagrams of the pod's own that wait, by hold id; some may have been dropped meanwhile."""

    def has_waiting(self) -> bool:
        """Tell whether a datagram of the pod's own waits; what is held beside it came in before the answer."""
        return any(hold_id in self.held for hold_id in self.waiting)

    def verify(self, message: bytes, answer: SynAckFrame, peer: Peer) -> None:
        """Check proof_r and compute proof_i; raise ProofError where it was made by another, or for another offer."""
        key = self.local.pair_key(peer, is_initiator=True)
        nonces = self.nonce + answer.nonce
        require_equal(responder_proof(key, nonces, frame_hash(self.offer), message), answer.proof)
        self.proof = encode_proof(self.nonce, initiator_proof(key, nonces, answer.proof))


class DatagramResponderFlow(DatagramFlow):
    """A flow that is opened to the pod."""

    __slots__ = ("answer", "answered_again", "expected", "nonce_i", "peer", "refusal", "waiting")

    direction: ClassVar[Direction] = Direction.INGRESS

    @property
    def overdue(self) -> Reason:
        """What was asked for an identity showed none, or what showed one did not prove it."""
        return Reason.PROOF_MISSING if self.state is not State.ASKED else self.refusal.reason

    @property
    def rules(self) -> tuple[RuleRef, ...]:
        """The policies that denied the peer while it was an address."""
        return self.refusal.rules if self.state is State.ASKED else ()

    def __init__(self, key: bytes, local: LocalToken, deadline: float) -> None:
        super().__init__(key, local, State.ASKED, deadline)
        self.refusal = _UNKNOWN
        """What became of the flow by its peer's address alone."""
        self.nonce_i = b""
        self.peer: Peer | None = None
        self.answer = b""
        self.answered_again = 0
        """How often the answer was sent again for the same offer."""
        self.waiting: dict[int, UDPDatagram] = {}
        """Datagrams that wait, by hold id; some may have been dropped meanwhile."""
        self.expected = b""

    def accept(
        self,
        offer: bytes,
        nonce_i: bytes,
        peer: Peer,
        end: tuple[bytes, int],
        nonce_r: bytes,
        *,
        is_denied: bool = False,
    ) -> None:
        """Make the answer to a verified offer; `end` is the pod's own address and port."""
        kind = TYPE_CHALLENGE if is_denied else TYPE_ANSWER
        key = self.local.pair_key(peer, is_initiator=False)
        nonces = nonce_i + nonce_r
        blank = SynAckFrame(nonce_r, *end, bytes(PROOF_BYTES), self.local.block)
        proof = responder_proof(key, nonces, frame_hash(offer), encode_syn_ack(blank, kind))
        self.answer = encode_syn_ack(blank._replace(proof=proof), kind)
        self.expected = initiator_proof(key, nonces, proof)
        self.nonce_i, self.answered_again = nonce_i, 0
        self.peer = peer
        self.advance(Event.OFFER_VERIFIED)

    def verify(self, proof: bytes) -> None:
        """Check proof_i; raise ProofError where it was made by another, or for another handshake."""
        require_equal(self.expected, proof)
