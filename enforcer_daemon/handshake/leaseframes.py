# SPDX-License-Identifier: Apache-2.0
"""The lease message: what two enforcers tell each other of a pair of pods (docs/protocol.md, Leases).

head with nonce 24 | echo 16 | id of the sender's token 16 | id of the receiver's token 16 | flags 1 | MAC 16 | [block]
"""

from __future__ import annotations

import hmac
from enum import IntFlag
from struct import Struct
from typing import NamedTuple

from enforcer_daemon.errors import FrameError
from enforcer_daemon.handshake.frames import NONCE_BYTES, PROOF_BYTES, TYPE_LEASE, decode_head, encode_head
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import require_equal
from enforcer_daemon.reasons import Reason

LEASE_PORT = 0x5452
"""Source and destination port of lease messages."""
ID_BYTES = 16
NO_ID = bytes(ID_BYTES)
NO_NONCE = bytes(NONCE_BYTES)
NO_MAC = bytes(PROOF_BYTES)
_BODY = Struct("!16s16s16sB16s")
_HEAD_BYTES = 24
_MAC_AT = _HEAD_BYTES + _BODY.size - PROOF_BYTES
LEASE_BYTES = _HEAD_BYTES + _BODY.size
"""Bytes of a message without an identity block."""


class LeaseFlag(IntFlag):
    """What a lease message is besides a sign of life."""

    PROBE = 1
    """Answer at once."""
    PRESENTS = 2
    """The sender's identity block follows."""
    REQUEST = 4
    """The token that the receiver named is not known: present it."""


_ALL_FLAGS = 7


class LeaseMessage(NamedTuple):
    """One message, as it is read."""

    nonce: bytes
    echo: bytes
    """The nonce that the sender last received from the receiver; NO_NONCE: none."""
    sender: bytes
    """Id of the sender's token."""
    receiver: bytes
    """Id of the receiver's token; NO_ID: the sender does not know it."""
    flags: LeaseFlag
    mac: bytes = NO_MAC
    block: bytes = b""


def token_id(token_hash: bytes) -> bytes:
    """Return what names a token in a lease message."""
    return token_hash[:ID_BYTES]


def lease_key(local: LocalToken, peer: Peer) -> bytes:
    """Derive the key of a pair's lease messages; raise ProofError for a peer key of low order.

    A lease has no initiator: the token with the lower hash counts as that.
    """
    pair_key = local.pair_key(peer, is_initiator=local.token_hash < peer.token_hash)
    return hmac.digest(pair_key, b"lease key", "sha256")


def encode_lease(message: LeaseMessage, key: bytes | None) -> bytes:
    """Write a message with its MAC; without a key it proves nothing."""
    body = _BODY.pack(message.echo, message.sender, message.receiver, message.flags, NO_MAC)
    head = encode_head(TYPE_LEASE, LEASE_BYTES + len(message.block), message.nonce)
    blank = head + body + message.block
    return blank if key is None else blank[:_MAC_AT] + _mac(key, blank) + blank[LEASE_BYTES:]


def decode_lease(payload: bytes) -> LeaseMessage:
    """Read a message; raise FrameError for anything else."""
    nonce = decode_head(payload, TYPE_LEASE)
    if len(payload) < LEASE_BYTES:
        raise FrameError(Reason.MALFORMED_FRAME, "lease message is truncated")
    echo, sender, receiver, flags, mac = _BODY.unpack_from(payload, _HEAD_BYTES)
    block = payload[LEASE_BYTES:]
    if flags & ~_ALL_FLAGS or bool(flags & LeaseFlag.PRESENTS) != bool(block):
        raise FrameError(Reason.MALFORMED_FRAME, f"lease message with flags {flags} and a block of {len(block)} bytes")
    return LeaseMessage(nonce, echo, sender, receiver, LeaseFlag(flags), mac, block)


def require_mac(payload: bytes, key: bytes) -> None:
    """Check the MAC of a message that was decoded; raise ProofError where it was made under another key."""
    require_equal(_mac(key, payload), payload[_MAC_AT:LEASE_BYTES])


def _mac(key: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, b"lease" + payload[:_MAC_AT] + payload[LEASE_BYTES:], "sha256")[:PROOF_BYTES]
