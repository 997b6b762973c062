# SPDX-License-Identifier: Apache-2.0
"""Peers whose identity was verified: asymmetric cryptography once for each token, a look-up for each connection.

The ladder of checks, cheapest first: the exact identity block is known; it, or its credential, is known to be bad; a
verification may still be made for this source; the signatures. Every table is bounded; the oldest entry makes room.
"""

from __future__ import annotations

from typing import TypeVar

from enforcer_daemon.errors import CredentialError, PeerError, TokenError
from enforcer_daemon.handshake.fairtable import Limit, no_hits
from enforcer_daemon.handshake.frames import decode_block
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.proofs import frame_hash
from enforcer_daemon.handshake.signaturebudget import SignatureBudget
from enforcer_daemon.identity.credential import Credential, TrustBundle, decode_credential
from enforcer_daemon.identity.tokens import Claims, decode_token
from enforcer_daemon.model import Identity
from enforcer_daemon.reasons import Reason

_BAD_CREDENTIALS = frozenset({Reason.CREDENTIAL_INVALID, Reason.CREDENTIAL_UNTRUSTED})
_REFUSALS_FOR_GOOD = frozenset(
    {
        Reason.CREDENTIAL_MISMATCH,
        Reason.TOKEN_MALFORMED,
        Reason.TOKEN_SIGNATURE,
        Reason.TOKEN_EXPIRED,
    }
)
"""Reasons that the passing of time cannot heal, so that the same bytes need no second look under the same bundle."""

_Value = TypeVar("_Value")


class Peer:
    """A pod at the other end, as its verified token states it. Compared by object: it keys caches."""

    __slots__ = ("addresses", "ephemeral_key", "identity", "issued_at", "not_after", "round_trip_s", "token_hash")

    def __init__(self, claims: Claims, token: bytes, credential: Credential) -> None:
        self.identity: Identity = claims.identity
        self.addresses = frozenset(address.packed for address in claims.identity.ips)
        self.ephemeral_key = claims.ephemeral_key
        self.token_hash = frame_hash(token)
        self.issued_at = claims.issued_at
        self.not_after = min(claims.expires_at, credential.not_after)
        self.round_trip_s = 0.0
        """How long it takes from our SYN-ACK to its proof, smoothed; 0 where that is not known yet."""

    def note_round_trip(self, took_s: float) -> None:
        """Take another handshake into account: a shorter one at once, since a longer one may have been a loss."""
        known = self.round_trip_s
        self.round_trip_s = took_s if not known or took_s < known else known + (took_s - known) / 8

    def __repr__(self) -> str:
        return f"Peer({self.identity.pod} on {self.identity.node})"


class PeerVerifier:
    """Turns identity blocks into peers, for all endpoints of a node."""

    def __init__(self, bundle: TrustBundle, settings: HandshakeLimits) -> None:
        self._bundle = bundle
        self._settings = settings
        self.limit_hits = no_hits()
        """How often each bound of the node's endpoints was reached."""
        self._allowance = SignatureBudget(settings, self.limit_hits)
        self._peers: dict[bytes, Peer] = {}
        self._refused: dict[bytes, PeerError] = {}
        self._refused_credentials: dict[bytes, PeerError] = {}
        self._credentials: dict[bytes, Credential] = {}
        self.verifications = 0
        """Signature checks so far."""

    def replace_bundle(self, bundle: TrustBundle) -> None:
        """Trust another set of authorities from now on; what was verified under the old one is forgotten."""
        self._bundle = bundle
        for table in (self._peers, self._refused, self._refused_credentials, self._credentials):
            table.clear()

    def known(self, block: bytes, wall_now: float) -> Peer | None:
        """Return the peer of a block that was verified before; raise TokenError if it has expired since."""
        peer = self._peers.get(block)
        if peer is not None and wall_now > peer.not_after + self._settings.clock_leeway_s:
            del self._peers[block]
            raise TokenError(Reason.TOKEN_EXPIRED, str(peer.identity.pod))
        return peer

    def verify(self, block: bytes, source: bytes, now: float, wall_now: float, *, is_pod: bool = True) -> Peer:
        """Give the peer of an identity block; raise PeerError with the reason where it does not hold.

        `source` is the packed address that the work is charged to, `is_pod` whether it lies in the pods' networks.
        """
        peer = self.known(block, wall_now)
        if peer is not None:
            return peer
        der, token = decode_block(block)
        is_known = der in self._credentials
        block_hash, der_hash = frame_hash(block), b"" if is_known else frame_hash(der)
        _raise_cached_refusal(self._refused.get(block_hash))
        _raise_cached_refusal(self._refused_credentials.get(der_hash))
        self._allowance.take(source, is_pod=is_pod, is_credential_known=is_known, now=now)
        try:
            peer = self._verify_signatures(der, token, wall_now)
        except PeerError as err:
            if err.reason in _BAD_CREDENTIALS:
                self._remember_refused(self._refused_credentials, der_hash, err)
            elif err.reason in _REFUSALS_FOR_GOOD:
                self._remember_refused(self._refused, block_hash, err)
            raise
        if source in peer.addresses:
            self._allowance.trust(source)
        self._remember(self._peers, block, peer, self._settings.max_cached_peers, Limit.CACHED_PEERS)
        return peer

    def _verify_signatures(self, der: bytes, token: bytes, wall_now: float) -> Peer:
        leeway_s = self._settings.clock_leeway_s
        self.verifications += 1
        credential = self._credentials.get(der)
        if credential is None:
            credential = decode_credential(der)
            self._bundle.verify(credential, wall_now, leeway_s)
            bound = self._settings.max_cached_credentials
            self._remember(self._credentials, der, credential, bound, Limit.CACHED_CREDENTIALS)
        elif wall_now > credential.not_after + leeway_s:
            raise CredentialError(Reason.CREDENTIAL_EXPIRED, f"node {credential.node}")
        return Peer(decode_token(token, credential, wall_now, leeway_s), token, credential)

    def _remember_refused(self, table: dict[bytes, PeerError], key: bytes, err: PeerError) -> None:
        refusal = PeerError(err.reason, err.detail)  # Without the trace, which holds what was looked at.
        self._remember(table, key, refusal, self._settings.max_refused_identities, Limit.REFUSED_IDENTITIES)

    def _remember(self, table: dict[bytes, _Value], key: bytes, value: _Value, bound: int, name: Limit) -> None:
        if len(table) >= bound and key not in table:
            del table[next(iter(table))]
            self.limit_hits[name] += 1
        table[key] = value


def _raise_cached_refusal(refusal: PeerError | None) -> None:
    if refusal is not None:
        raise PeerError(refusal.reason, refusal.detail)
