# SPDX-License-Identifier: Apache-2.0
"""Known answers of the handshake: fixed keys, nonces and time give these very bytes, which docs/protocol.md quotes.

Origin: made once by this implementation and pinned; the pair key and the proofs are computed here a second time with
nothing but the standard library and the formulas of the specification. ES256 signatures are random, so a token of the
vector is verified, not signed again.
"""

from __future__ import annotations

import hmac
import json
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509 import load_der_x509_certificate

from enforcer_daemon.handshake.datagrams import STANDALONE_EXID
from enforcer_daemon.handshake.frames import (
    SYN_ACK_OVERHEAD,
    TYPE_ANSWER,
    TYPE_OFFER,
    SynAckFrame,
    SynFrame,
    decode_block,
    decode_syn,
    decode_syn_ack,
    encode_block,
    encode_proof,
    encode_syn,
    encode_syn_ack,
    find_proof,
    proof_option,
    without_proof,
)
from enforcer_daemon.handshake.leaseframes import LEASE_PORT, decode_lease, encode_lease, require_mac
from enforcer_daemon.handshake.proofs import (
    TCP_LABELS,
    UDP_LABELS,
    frame_hash,
    initiator_proof,
    pair_key,
    responder_proof,
    transcript,
)
from enforcer_daemon.identity.credential import TrustBundle, decode_credential
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.identity.tokens import decode_token
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, encode_option

VECTOR: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "handshake" / "version-1.json").read_text()
)


def raw(*path: str) -> bytes:
    """Give the bytes of a value of the vector."""
    value = VECTOR
    for name in path:
        value = value[name]
    assert isinstance(value, str)
    return bytes.fromhex(value)


def test_the_preset_dictionary_is_that_of_version_1() -> None:
    assert sha256(TOKEN_DICTIONARY).hexdigest() == VECTOR["token_dictionary_sha256"]


@pytest.mark.parametrize("side", ["initiator", "responder"])
def test_tokens_verify_under_their_credentials_and_state_these_claims(side: str) -> None:
    credential = decode_credential(raw(side, "credential"))
    bundle = TrustBundle([load_der_x509_certificate(raw("authority"))])
    bundle.verify(credential, VECTOR["unix_time"], 0.0)
    claims = decode_token(raw(side, "token"), credential, VECTOR["unix_time"], 0.0)
    expected = VECTOR[side]["claims"]
    assert claims.ephemeral_key == raw(side, "ephemeral_public_key")
    assert str(claims.identity.pod) == expected["pod"]
    assert claims.identity.ips == tuple(map(ip_address, expected["ips"]))
    assert claims.identity.labels == expected["labels"]
    assert claims.identity.namespace_labels == expected["namespace_labels"]
    assert (claims.issued_at, claims.expires_at) == (expected["issued_at"], expected["expires_at"])


def test_both_sides_derive_the_pair_key() -> None:
    hashes = frame_hash(raw("initiator", "token")), frame_hash(raw("responder", "token"))
    for own, other in (("initiator", "responder"), ("responder", "initiator")):
        private = X25519PrivateKey.from_private_bytes(raw(own, "ephemeral_private_key"))
        assert pair_key(private, raw(other, "ephemeral_public_key"), *hashes) == raw("pair_key")


def test_the_frames_are_these_bytes() -> None:
    syn = SynFrame(raw("initiator", "nonce"), encode_block(raw("initiator", "credential"), raw("initiator", "token")))
    assert encode_syn(syn) == raw("syn_frame")
    assert decode_syn(raw("syn_frame")) == syn
    block = encode_block(raw("responder", "credential"), raw("responder", "token"))
    address = ip_address(VECTOR["responder"]["address"]).packed
    answer = SynAckFrame(raw("responder", "nonce"), address, VECTOR["responder"]["port"], raw("proof_r"), block)
    assert encode_syn_ack(answer) == raw("syn_ack_frame")
    assert decode_syn_ack(raw("syn_ack_frame")) == answer
    assert decode_block(answer.block) == (raw("responder", "credential"), raw("responder", "token"))


def test_the_proofs_are_these_bytes() -> None:
    numbers = VECTOR["initiator"]["isn"], VECTOR["responder"]["isn"]
    covered = transcript(numbers, raw("initiator", "nonce"), raw("responder", "nonce"))
    key, answer = raw("pair_key"), without_proof(raw("syn_ack_frame"))
    assert responder_proof(key, TCP_LABELS, covered, frame_hash(raw("syn_frame")), answer) == raw("proof_r")
    assert initiator_proof(key, TCP_LABELS, covered, raw("proof_r")) == raw("proof_i")
    assert proof_option(raw("proof_i"), is_standalone=False) == raw("proof_option")
    assert proof_option(raw("proof_i"), is_standalone=True) == raw("standalone_proof_option")
    found = find_proof(raw("proof_option"))
    assert found is not None
    assert found.proof == raw("proof_i")


def test_the_messages_beside_datagrams_are_these_bytes() -> None:
    """The same pods, and the server on UDP port 53; each key and proof by the specification's formulas."""
    known = VECTOR["datagrams"]
    block = encode_block(raw("initiator", "credential"), raw("initiator", "token"))
    nonces = raw("initiator", "nonce") + raw("responder", "nonce")
    offer = encode_syn(SynFrame(raw("initiator", "nonce"), block), TYPE_OFFER)
    assert sha256(offer).hexdigest() == known["sha256_offer"]
    block = encode_block(raw("responder", "credential"), raw("responder", "token"))
    address = ip_address(VECTOR["responder"]["address"]).packed
    proof_r = raw("datagrams", "proof_r")
    answer = encode_syn_ack(SynAckFrame(raw("responder", "nonce"), address, 53, proof_r, block), TYPE_ANSWER)
    assert answer[:SYN_ACK_OVERHEAD].hex() == known["answer_head"]
    covered = answer[:42] + answer[58:]
    message = b"datagram-answer" + nonces + sha256(offer).digest() + covered
    assert hmac.digest(raw("pair_key"), message, "sha256")[:16] == proof_r
    assert responder_proof(raw("pair_key"), UDP_LABELS, nonces, frame_hash(offer), without_proof(answer)) == proof_r
    proof_i = hmac.digest(raw("pair_key"), b"datagram-proof" + nonces + proof_r, "sha256")[:16]
    assert initiator_proof(raw("pair_key"), UDP_LABELS, nonces, proof_r) == proof_i == raw("datagrams", "proof_i")
    assert encode_proof(raw("initiator", "nonce"), proof_i) == raw("datagrams", "proof_message")
    surplus = encode_option(UDP_HEADER, STANDALONE_EXID, raw("datagrams", "proof_message"))
    ends = ip_address("10.1.0.2").packed, address
    assert build_udp(*ends, (40_000, 53), b"", surplus) == raw("datagrams", "proof_packet")


def test_lease_messages_are_these_bytes() -> None:
    """A probe, its answer and a presentation; the key and the MACs by the specification's formulas too."""
    ids = [sha256(raw(side, "token")).digest()[:16] for side in ("initiator", "responder")]
    first, second = sorted(("initiator", "responder"), key=lambda side: sha256(raw(side, "token")).digest())
    private = X25519PrivateKey.from_private_bytes(raw(first, "ephemeral_private_key"))
    shared = private.exchange(X25519PublicKey.from_public_bytes(raw(second, "ephemeral_public_key")))
    salt = sha256(raw(first, "token")).digest() + sha256(raw(second, "token")).digest()
    pair = hmac.digest(hmac.digest(salt, shared, "sha256"), b"trireme handshake version 1\x01", "sha256")
    key = hmac.digest(pair, b"lease key", "sha256")
    assert key == raw("lease", "lease_key")
    nonces = raw("initiator", "nonce"), raw("responder", "nonce")
    block = encode_block(raw("initiator", "credential"), raw("initiator", "token"))
    for name, fields, flags, rest in (
        ("probe", (nonces[0], bytes(16), ids[0], ids[1]), 1, b""),
        ("answer", (nonces[1], nonces[0], ids[1], ids[0]), 0, b""),
        ("presentation_head", (nonces[0], bytes(16), ids[0], ids[1]), 3, block),
    ):
        length = 89 + len(rest)
        head = b"\xd3TRI\x01\x07" + length.to_bytes(2, "big") + b"".join(fields) + bytes((flags,))
        expected = head + hmac.digest(key, b"lease" + head + rest, "sha256")[:16]
        assert expected == raw("lease", name)
        message = decode_lease(expected + rest)
        require_mac(expected + rest, key)
        assert encode_lease(message, key) == expected + rest
    surplus = encode_option(UDP_HEADER, STANDALONE_EXID, raw("lease", "probe"))
    ends = ip_address("10.1.0.2").packed, ip_address("10.2.0.2").packed
    assert build_udp(*ends, (LEASE_PORT, LEASE_PORT), b"", surplus) == raw("lease", "probe_packet")


def test_the_specifications_formulas_give_the_same_key_and_proofs() -> None:
    private = X25519PrivateKey.from_private_bytes(raw("initiator", "ephemeral_private_key"))
    shared = private.exchange(X25519PublicKey.from_public_bytes(raw("responder", "ephemeral_public_key")))
    salt = sha256(raw("initiator", "token")).digest() + sha256(raw("responder", "token")).digest()
    # HKDF of RFC 5869 with one block of output: extract, then expand.
    key = hmac.digest(hmac.digest(salt, shared, "sha256"), b"trireme handshake version 1\x01", "sha256")
    assert key == raw("pair_key")
    both = b"".join(VECTOR[side]["isn"].to_bytes(4, "big") for side in ("initiator", "responder"))
    both += raw("initiator", "nonce") + raw("responder", "nonce")
    frame = raw("syn_ack_frame")
    covered = frame[:42] + frame[58:]
    message = b"syn-ack" + both + sha256(raw("syn_frame")).digest() + covered
    assert hmac.digest(key, message, "sha256")[:16] == raw("proof_r")
    assert hmac.digest(key, b"ack" + both + raw("proof_r"), "sha256")[:16] == raw("proof_i")
    assert frame[42:58] == raw("proof_r")
