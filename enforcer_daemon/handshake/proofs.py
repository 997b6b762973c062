# SPDX-License-Identifier: Apache-2.0
"""Keys and MACs of the handshake (docs/protocol.md, Proofs).

pair key  PK = HKDF-SHA256(ECDH(epk_i, epk_r), salt = SHA256(token_i) | SHA256(token_r), info = version)
proof_r   = HMAC(PK, label_r | T | SHA256(offer) | answer without its proof)[:16]
proof_i   = HMAC(PK, label_i | T | proof_r)[:16]
T         = nonce_i | nonce_r, after isn_i | isn_r if the protocol has such numbers
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
from enforcer_daemon.handshake.frames import PROOF_BYTES
from enforcer_daemon.reasons import Reason

_INFO = b"trireme handshake version 1"
_NUMBERS = Struct("!II")


class ProofLabels(NamedTuple):
    """What tells the proofs of the two roles apart, and those of one protocol from those of another."""

    answer: bytes
    proof: bytes


TCP_LABELS = ProofLabels(b"syn-ack", b"ack")
UDP_LABELS = ProofLabels(b"datagram-answer", b"datagram-proof")


def transcript(numbers: tuple[int, int] | None, nonce_i: bytes, nonce_r: bytes) -> bytes:
    """Return what both proofs of one handshake cover; `numbers` are the ISNs, if the protocol has any."""
    nonces = nonce_i + nonce_r
    return nonces if numbers is None else _NUMBERS.pack(*numbers) + nonces


def pair_key(own: X25519PrivateKey, peer: bytes, token_hash_i: bytes, token_hash_r: bytes) -> bytes:
    """Derive the key that only the two enforcers can compute; raise ProofError for a peer key of low order."""
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as err:
        raise ProofError(Reason.TOKEN_MALFORMED, "epk is no usable X25519 key") from err
    return HKDF(algorithm=SHA256(), length=32, salt=token_hash_i + token_hash_r, info=_INFO).derive(shared)


def responder_proof(key: bytes, labels: ProofLabels, covered: bytes, offer_hash: bytes, answer: bytes) -> bytes:
    """Compute proof_r over the transcript, the offer and the answer's frame without its proof field."""
    return hmac.digest(key, labels.answer + covered + offer_hash + answer, "sha256")[:PROOF_BYTES]


def initiator_proof(key: bytes, labels: ProofLabels, covered: bytes, proof_r: bytes) -> bytes:
    """Compute proof_i over the transcript and proof_r."""
    return hmac.digest(key, labels.proof + covered + proof_r, "sha256")[:PROOF_BYTES]


def require_equal(expected: bytes, received: bytes) -> None:
    """Compare in constant time; raise ProofError where they differ."""
    if not hmac.compare_digest(expected, received):
        raise ProofError(Reason.PROOF_INVALID)


def frame_hash(frame: bytes) -> bytes:
    """SHA-256 of a frame or token."""
    return sha256(frame).digest()
