# SPDX-License-Identifier: Apache-2.0
"""Keys and MACs of the handshake (docs/protocol.md, Proofs).

pair key  PK = HKDF-SHA256(ECDH(epk_i, epk_r), salt = SHA256(token_i) | SHA256(token_r), info = version)
proof_r   = HMAC(PK, "syn-ack" | isn_i | isn_r | nonce_i | nonce_r | SHA256(SYN frame) | SYN-ACK frame w/o proof)[:16]
proof_i   = HMAC(PK, "ack" | isn_i | isn_r | nonce_i | nonce_r | proof_r)[:16]
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from struct import Struct
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from enforcer_daemon.errors import ProofError
from enforcer_daemon.handshake.frames import PROOF_BYTES, without_proof
from enforcer_daemon.reasons import Reason

_INFO = b"trireme handshake version 1"
_NUMBERS = Struct("!II")


class Transcript(NamedTuple):
    """What both proofs of one handshake cover."""

    isn_i: int
    isn_r: int
    nonce_i: bytes
    nonce_r: bytes

    def encode(self) -> bytes:
        """Give the bytes that both MACs begin with, after their label."""
        return _NUMBERS.pack(self.isn_i, self.isn_r) + self.nonce_i + self.nonce_r


def pair_key(own: X25519PrivateKey, peer: bytes, token_hash_i: bytes, token_hash_r: bytes) -> bytes:
    """Derive the key that only the two enforcers can compute; raise ProofError for a peer key of low order."""
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as err:
        raise ProofError(Reason.TOKEN_MALFORMED, "epk is no usable X25519 key") from err
    return HKDF(algorithm=SHA256(), length=32, salt=token_hash_i + token_hash_r, info=_INFO).derive(shared)


def responder_proof(key: bytes, transcript: Transcript, syn_hash: bytes, syn_ack_frame: bytes) -> bytes:
    """Compute proof_r; the proof field of `syn_ack_frame` is not covered."""
    message = b"syn-ack" + transcript.encode() + syn_hash + without_proof(syn_ack_frame)
    return hmac.digest(key, message, "sha256")[:PROOF_BYTES]


def initiator_proof(key: bytes, transcript: Transcript, proof_r: bytes) -> bytes:
    """Compute proof_i."""
    return hmac.digest(key, b"ack" + transcript.encode() + proof_r, "sha256")[:PROOF_BYTES]


def require_equal(expected: bytes, received: bytes) -> None:
    """Compare in constant time; raise ProofError where they differ."""
    if not hmac.compare_digest(expected, received):
        raise ProofError(Reason.PROOF_INVALID)


def frame_hash(frame: bytes) -> bytes:
    """SHA-256 of a frame or token."""
    return sha256(frame).digest()
