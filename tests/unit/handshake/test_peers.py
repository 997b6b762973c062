# SPDX-License-Identifier: Apache-2.0
"""Peers: verified once, remembered, charged to their source, forgotten with the bundle."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import encode_block
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.identity.credential import Credential, TrustBundle
from enforcer_daemon.identity.tokens import Claims, encode_token
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.reasons import Reason
from tests.unit.identity.certificates import WALL, authority, credential, new_key

SOURCE = b"\x0a\x01\x00\x02"
SIGNER = authority()
KEY = new_key()
CREDENTIAL = credential(SIGNER, KEY)


def block(name: str = "web", issued: float = WALL) -> bytes:
    return signed_block(name, issued, CREDENTIAL, KEY)


def signed_block(name: str, issued: float, signer: Credential, key: EllipticCurvePrivateKey) -> bytes:
    identity = Identity(PodRef("shop", name), (ip_address("10.1.0.2"),), {}, {}, "node-1")
    wire = encode_token(Claims(identity, bytes(32), issued, issued + 600), b"n", signer, key)
    return encode_block(signer.der, wire)


def verifier(**options: float) -> PeerVerifier:
    return PeerVerifier(TrustBundle([SIGNER.certificate]), HandshakeLimits(**options))  # type: ignore[arg-type]


def reason_of(verifier: PeerVerifier, wire: bytes, now: float = 1.0, wall: float = WALL) -> Reason:
    with pytest.raises(PeerError) as caught:
        verifier.verify(wire, SOURCE, now, wall)
    return caught.value.reason


def test_a_known_block_costs_no_second_verification() -> None:
    known, wire = verifier(), block()
    peer = known.verify(wire, SOURCE, 1.0, WALL)
    assert known.verify(wire, SOURCE, 1.0, WALL) is peer
    assert known.verifications == 1
    assert peer.addresses == {SOURCE}
    assert str(peer) == "Peer(shop/web on node-1)"


def test_a_known_peer_ends_with_its_token() -> None:
    known, wire = verifier(), block()
    known.verify(wire, SOURCE, 1.0, WALL)
    known.verify(wire, SOURCE, 1.0, WALL + 629)
    assert reason_of(known, wire, wall=WALL + 631) is Reason.TOKEN_EXPIRED
    assert reason_of(known, wire, wall=WALL + 631) is Reason.TOKEN_EXPIRED
    assert known.verifications == 2


def test_a_known_credential_ends_with_its_validity() -> None:
    known = verifier()
    known.verify(block(), SOURCE, 1.0, WALL)
    late = CREDENTIAL.not_after + 31
    assert reason_of(known, block("late", late), wall=late) is Reason.CREDENTIAL_EXPIRED


def test_what_time_cannot_heal_is_refused_without_a_second_look() -> None:
    known, wire = verifier(), block()
    bad = wire[:-1] + bytes((wire[-1] ^ 1,))
    for _ in range(3):
        assert reason_of(known, bad) is Reason.TOKEN_SIGNATURE
    assert known.verifications == 1


def test_a_token_from_the_future_may_become_valid() -> None:
    known, wire = verifier(), block(issued=WALL + 100)
    assert reason_of(known, wire) is Reason.TOKEN_NOT_YET_VALID
    assert known.verify(wire, SOURCE, 1.0, WALL + 100).identity.pod.name == "web"


def acquainted(**options: float) -> PeerVerifier:
    """Make a verifier that has seen good tokens of the source's, and of the other one's, node long ago."""
    known = verifier(**options)
    known.verify(block("first"), SOURCE, 0.0, WALL)
    return known


def test_a_source_has_its_own_rate() -> None:
    known = acquainted(max_verifications_per_s=2.0)
    for name in "ab":
        known.verify(block(name), SOURCE, 1.0, WALL)
    assert reason_of(known, block("c")) is Reason.VERIFY_RATE
    known.verify(block("c"), b"\x0a\x01\x00\x03", 1.0, WALL)
    known.verify(block("d"), SOURCE, 1.5, WALL)
    assert reason_of(known, block("e"), now=1.6) is Reason.VERIFY_RATE


def test_a_rate_below_one_a_second_allows_one_now_and_then() -> None:
    known = acquainted(max_verifications_per_s=0.5)
    known.verify(block("a"), SOURCE, 1.0, WALL)
    assert reason_of(known, block("b"), now=2.0) is Reason.VERIFY_RATE
    known.verify(block("b"), SOURCE, 4.0, WALL)


def test_another_bundle_forgets_what_was_verified_under_the_old_one() -> None:
    known, wire, other = verifier(), block(), authority()
    known.verify(wire, SOURCE, 1.0, WALL)
    known.replace_bundle(TrustBundle([other.certificate]))
    assert reason_of(known, wire) is Reason.CREDENTIAL_UNTRUSTED
    known.replace_bundle(TrustBundle([other.certificate, SIGNER.certificate]))
    known.verify(wire, SOURCE, 1.0, WALL)


def test_a_credential_that_nobody_signed_costs_one_look_whatever_tokens_come_with_it() -> None:
    known, stranger = verifier(), credential(authority(), KEY)
    for n in range(5):
        assert reason_of(known, encode_block(stranger.der, b"token %d" % n)) is Reason.CREDENTIAL_UNTRUSTED
        assert reason_of(known, encode_block(b"no certificate", b"token %d" % n)) is Reason.CREDENTIAL_INVALID
    assert known.verifications == 2


def test_tables_stay_bounded_and_what_they_lose_is_counted() -> None:
    known = verifier(max_cached_peers=3, max_refused_identities=3, max_verification_sources=3)
    for n in range(10):
        source = bytes((10, 0, 0, n))
        known.verify(block(f"web-{n}"), source, 1.0, WALL)
        for bad in (encode_block(b"garbage-%d" % n, b""), encode_block(CREDENTIAL.der, b"garbage-%d" % n)):
            with pytest.raises(PeerError):
                known.verify(bad, source, 1.0, WALL)
    assert len(known._peers) == len(known._refused) == len(known._refused_credentials) == 3
    assert len(known._credentials) == 1
    assert {len(sources) for sources in known._allowance._sources} <= {0, 1, 3}
    assert known.limit_hits[Limit.CACHED_PEERS] >= 7
    assert known.limit_hits[Limit.REFUSED_IDENTITIES] == 14
    assert known.limit_hits[Limit.VERIFICATION_SOURCES] >= 7


def test_the_memory_of_credentials_is_bounded() -> None:
    """A node whose credential was forgotten is verified again."""
    known, key = verifier(max_cached_credentials=1), new_key()
    other = credential(SIGNER, key)
    for name in ("web-1", "web-2"):
        known.verify(block(name), SOURCE, 1.0, WALL)
        known.verify(signed_block(name, WALL, other, key), SOURCE, 1.0, WALL)
    assert list(known._credentials) == [other.der]
    assert known.limit_hits[Limit.CACHED_CREDENTIALS] == 3
