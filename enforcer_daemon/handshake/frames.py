# SPDX-License-Identifier: Apache-2.0
"""The frames that ride in SYN and SYN-ACK or beside datagrams, and what carries the proof (docs/protocol.md).

SYN      magic 4 | version 1 | type 1 | length 2 | nonce 16 | identity block
SYN-ACK  magic 4 | version 1 | type 2 | length 2 | nonce 16 | address 16 | port 2 | proof 16 | identity block
identity block   credential length 2 | token length 2 | credential | token
option   kind 253 | length 20 | ExID 2 | proof 16
datagrams: types 3 (as SYN) and 4 (as SYN-ACK); 5: head | proof 16; 6: head alone, "shake hands again";
           7: see leaseframes.py; 8 (as 4): an answer that denies unless the proof shows otherwise
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from enforcer_daemon.errors import FrameError
from enforcer_daemon.packet.tcp import OPTION_EXPERIMENT_1, TCP_MAX_HEADER, TCP_MIN_HEADER, walk_options
from enforcer_daemon.reasons import Reason

MAGIC = b"\xd3TRI"
VERSION = 1
TYPE_SYN = 1
TYPE_SYN_ACK = 2
TYPE_OFFER = 3
TYPE_ANSWER = 4
TYPE_PROOF = 5
TYPE_REHANDSHAKE = 6
TYPE_LEASE = 7
TYPE_CHALLENGE = 8
"""An answer to an offer that policy denies, on a flow that is released for another: only its proof ends that release.
It is told from an answer so that a guard on the way does not take the flow for one between two enforcers."""
NONCE_BYTES = 16
PROOF_BYTES = 16
MARKER_ID = 0x5452
"""IPv4 identification (with DONT_FRAGMENT, so it has no other use: RFC 6864) or IPv6 flow label of a datagram that
carries a piggybacked message: nft cannot compute where the surplus area begins."""
PROOF_MARKER_ID = 0x5453
"""In its place if the message is a proof, which an enforcer makes only for an answer that it verified."""

_HEAD = Struct("!4sBBH16s")
_ANSWER = Struct("!16sH16s")
_LENGTHS = Struct("!HH")
_MAPPED = b"\0" * 10 + b"\xff\xff"
"""Before an IPv4 address that travels as an IPv6 address (RFC 4291, section 2.5.5.2)."""
SYN_OVERHEAD = _HEAD.size
SYN_ACK_OVERHEAD = _HEAD.size + _ANSWER.size
MAX_FRAME_BYTES = 9_000
"""A jumbo packet; no frame can be larger than one packet."""

PROOF_OPTION_BYTES = 20
PROOF_EXID = b"\x54\x52"
"""ExID (RFC 6994) of a proof that rides on a segment of the pod's kernel."""
STANDALONE_PROOF_EXID = b"\x54\x53"
"""ExID of a proof in an ACK of the enforcer's own, which the other enforcer consumes."""
_MAX_OPTIONS_BYTES = TCP_MAX_HEADER - TCP_MIN_HEADER


class SynFrame(NamedTuple):
    """What the initiator's enforcer says in the SYN."""

    nonce: bytes
    block: bytes
    """Identity block: the key under which a verified peer is remembered."""


class SynAckFrame(NamedTuple):
    """What the responder's enforcer says in the SYN-ACK."""

    nonce: bytes
    address: bytes
    """The responder's own address and port, packed (4 or 16 bytes): behind a Service they are not what was dialed."""
    port: int
    proof: bytes
    block: bytes


def encode_block(credential: bytes, token: bytes) -> bytes:
    """Join what identifies a pod; it is the same for all connections until the token rotates."""
    return _LENGTHS.pack(len(credential), len(token)) + credential + token


def decode_block(block: bytes) -> tuple[bytes, bytes]:
    """Split an identity block into credential and token; raise FrameError where its lengths contradict each other."""
    if len(block) < _LENGTHS.size:
        raise FrameError(Reason.MALFORMED_FRAME, "identity block is truncated")
    credential_length, token_length = _LENGTHS.unpack_from(block)
    token_at = _LENGTHS.size + credential_length
    if token_at + token_length != len(block):
        raise FrameError(Reason.MALFORMED_FRAME, "identity block lengths contradict each other")
    return block[_LENGTHS.size : token_at], block[token_at:]


def encode_syn(frame: SynFrame, kind: int = TYPE_SYN) -> bytes:
    """Write the frame of a SYN, or of the datagram that opens a flow."""
    return _HEAD.pack(MAGIC, VERSION, kind, _HEAD.size + len(frame.block), frame.nonce) + frame.block


def decode_syn(payload: bytes, kind: int = TYPE_SYN) -> SynFrame:
    """Read such a frame; raise FrameError for anything else."""
    nonce = decode_head(payload, kind)
    return SynFrame(nonce, payload[_HEAD.size :])


def encode_syn_ack(frame: SynAckFrame, kind: int = TYPE_SYN_ACK) -> bytes:
    """Write the frame of a SYN-ACK, or of the answer to a datagram's frame."""
    head = _HEAD.pack(MAGIC, VERSION, kind, SYN_ACK_OVERHEAD + len(frame.block), frame.nonce)
    return head + _ANSWER.pack(_mapped(frame.address), frame.port, frame.proof) + frame.block


def decode_syn_ack(payload: bytes, kind: int = TYPE_SYN_ACK) -> SynAckFrame:
    """Read such a frame; raise FrameError for anything else."""
    nonce = decode_head(payload, kind)
    if len(payload) < SYN_ACK_OVERHEAD:
        raise FrameError(Reason.MALFORMED_FRAME, "SYN-ACK frame is truncated")
    address, port, proof = _ANSWER.unpack_from(payload, _HEAD.size)
    return SynAckFrame(nonce, _unmapped(address), port, proof, payload[SYN_ACK_OVERHEAD:])


def without_proof(payload: bytes) -> bytes:
    """Give the SYN-ACK's frame as the proof covers it: all bytes but the proof's own."""
    return payload[: SYN_ACK_OVERHEAD - PROOF_BYTES] + payload[SYN_ACK_OVERHEAD:]


def answer_head(kind: int, nonce: bytes, end: tuple[bytes, int], block: bytes) -> bytes:
    """Write an answer's frame as far as its proof, which the block follows; `end` is the responder's own."""
    address, port = end
    head = _HEAD.pack(MAGIC, VERSION, kind, SYN_ACK_OVERHEAD + len(block), nonce)
    return head + (address if len(address) == 16 else _MAPPED + address) + port.to_bytes(2, "big")


def is_frame(payload: bytes) -> bool:
    """Tell a handshake frame, well formed or not, from any other data."""
    return payload[:4] == MAGIC


def encode_proof(nonce: bytes, proof: bytes) -> bytes:
    """Write the message that proves a datagram's frame, which the nonce names."""
    return _HEAD.pack(MAGIC, VERSION, TYPE_PROOF, _HEAD.size + PROOF_BYTES, nonce) + proof


def decode_proof(payload: bytes) -> tuple[bytes, bytes]:
    """Read nonce and proof; raise FrameError for anything else."""
    nonce = decode_head(payload, TYPE_PROOF)
    if len(payload) != _HEAD.size + PROOF_BYTES:
        raise FrameError(Reason.MALFORMED_FRAME, f"proof of {len(payload) - _HEAD.size} bytes")
    return nonce, payload[_HEAD.size :]


def encode_again(nonce: bytes) -> bytes:
    """Write the request to shake hands again; the nonce only tells one from another."""
    return _HEAD.pack(MAGIC, VERSION, TYPE_REHANDSHAKE, _HEAD.size, nonce)


def decode_again(payload: bytes) -> bytes:
    """Read its nonce; raise FrameError for anything else."""
    nonce = decode_head(payload, TYPE_REHANDSHAKE)
    if len(payload) != _HEAD.size:
        raise FrameError(Reason.MALFORMED_FRAME, "more than the head")
    return nonce


def encode_head(kind: int, length: int, nonce: bytes) -> bytes:
    """Write the head of a message of a kind, whose whole length is given."""
    return _HEAD.pack(MAGIC, VERSION, kind, length, nonce)


def frame_type(payload: bytes) -> int:
    """Give the type of what begins as a frame; raise FrameError where it is cut off before."""
    if len(payload) < _HEAD.size:
        raise FrameError(Reason.MALFORMED_FRAME, "truncated")
    return payload[5]


def decode_head(payload: bytes, expected_type: int) -> bytes:
    """Read a head and return its nonce; raise FrameError if it is of another kind or states another length."""
    if len(payload) < _HEAD.size:
        raise FrameError(Reason.MALFORMED_FRAME, "truncated")
    magic, version, kind, length, nonce = _HEAD.unpack_from(payload)
    if magic != MAGIC:
        raise FrameError(Reason.MALFORMED_FRAME, "no magic")
    if version != VERSION:
        raise FrameError(Reason.FRAME_VERSION, f"version {version}, this enforcer speaks {VERSION}")
    if kind != expected_type:
        raise FrameError(Reason.MALFORMED_FRAME, f"type {kind} where {expected_type} belongs")
    if length != len(payload) or length > MAX_FRAME_BYTES:
        raise FrameError(Reason.MALFORMED_FRAME, f"says {length} bytes, has {len(payload)}")
    return bytes(nonce)


def _mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else _MAPPED + address


def _unmapped(address: bytes) -> bytes:
    return address[12:] if address[:12] == _MAPPED else address


def proof_option(proof: bytes, *, is_standalone: bool) -> bytes:
    """Write the option that carries a proof."""
    exid = STANDALONE_PROOF_EXID if is_standalone else PROOF_EXID
    return bytes((OPTION_EXPERIMENT_1, PROOF_OPTION_BYTES)) + exid + proof


def has_room(options: bytes) -> bool:
    """Tell whether the proof's option fits beside these."""
    return len(options) + PROOF_OPTION_BYTES <= _MAX_OPTIONS_BYTES


class FoundProof(NamedTuple):
    """A proof found among a segment's options."""

    proof: bytes
    is_standalone: bool
    rest: bytes
    """The options without it, still a multiple of 4 bytes."""


def find_proof(options: bytes) -> FoundProof | None:
    """Find the proof's option, if there is one."""
    if OPTION_EXPERIMENT_1 not in options:
        return None
    for kind, at, length in walk_options(options):
        exid = options[at + 2 : at + 4]
        if kind == OPTION_EXPERIMENT_1 and length == PROOF_OPTION_BYTES and exid in (PROOF_EXID, STANDALONE_PROOF_EXID):
            rest = options[:at] + options[at + length :]
            return FoundProof(options[at + 4 : at + length], exid == STANDALONE_PROOF_EXID, rest)
    return None
