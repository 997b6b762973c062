# SPDX-License-Identifier: Apache-2.0
"""An endpoint's own side of handshakes: its token as it travels, and the pair keys made with it."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.handshake.frames import encode_block
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import frame_hash, pair_key
from enforcer_daemon.identity.credential import Credential
from enforcer_daemon.identity.tokens import Claims, encode_token
from enforcer_daemon.model import Identity
from enforcer_daemon.packet.checksum import ones_sum

_MAX_PAIR_KEYS = 16_384
"""Pair keys of one token; when there are more, all are made again on need."""


class LocalToken:
    """One signed token of an endpoint with its ephemeral key. Flows pin it, so that a rotation changes nothing."""

    __slots__ = ("_key", "_pair_keys", "block", "block_sum", "expires_at", "identity", "token_hash")

    def __init__(
        self, identity: Identity, key: X25519PrivateKey, wire: bytes, credential: bytes, expires_at: float
    ) -> None:
        self.identity = identity
        self.block = encode_block(credential, wire)
        self.block_sum = ones_sum(self.block)
        """Of its 16-bit words, for the checksums of the packets that carry it."""
        self.token_hash = frame_hash(wire)
        self.expires_at = expires_at
        self._key = key
        self._pair_keys: dict[tuple[Peer, bool], bytes] = {}

    def __repr__(self) -> str:
        return f"LocalToken({self.identity.pod}, {len(self.block)} bytes, redacted)"

    def pair_key(self, peer: Peer, *, is_initiator: bool) -> bytes:
        """Give the key shared with a peer; it is derived once for each pair of tokens and role."""
        entry = (peer, is_initiator)
        key = self._pair_keys.get(entry)
        if key is None:
            hashes = (self.token_hash, peer.token_hash) if is_initiator else (peer.token_hash, self.token_hash)
            key = pair_key(self._key, peer.ephemeral_key, *hashes)
            if len(self._pair_keys) >= _MAX_PAIR_KEYS:
                self._pair_keys.clear()
            self._pair_keys[entry] = key
        return key


def sign_local_token(
    identity: Identity,
    credential: Credential,
    signing_key: ec.EllipticCurvePrivateKey,
    ephemeral_key: X25519PrivateKey,
    nonce: bytes,
    validity: tuple[float, float],
) -> LocalToken:
    """Sign a token for an identity; `validity` is its Unix seconds of issue and expiry."""
    public = ephemeral_key.public_key().public_bytes_raw()
    wire = encode_token(Claims(identity, public, *validity), nonce, credential, signing_key)
    return LocalToken(identity, ephemeral_key, wire, credential.der, validity[1])
