# SPDX-License-Identifier: Apache-2.0
"""Identity tokens: what is signed is what is read, and nothing else is."""

from __future__ import annotations

import json
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace
from ipaddress import ip_address
from struct import pack
from typing import Any

import jwt
import pytest

from enforcer_daemon.errors import IdentityTooLargeError, TokenError
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.identity.tokens import Claims, decode_token, encode_token
from enforcer_daemon.model import Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.reasons import Reason
from tests.unit.identity.certificates import WALL, authority, credential, new_key

SIGNER = authority()
KEY = new_key()
CREDENTIAL = credential(SIGNER, KEY)
IDENTITY = Identity(
    PodRef("shop", "web-0"),
    (ip_address("10.1.0.2"), ip_address("fd00::2")),
    {"app": "web", "größe": "ü"},
    {"team": "a"},
    "node-1",
    "runner",
    "cluster.local",
    (NamedPort("http", 80, Protocol.TCP), NamedPort("dns", 53, Protocol.UDP)),
)
CLAIMS = Claims(IDENTITY, bytes(range(32)), WALL, WALL + 600)
TREE: dict[str, Any] = {
    "iss": "cluster.local", "sub": "ns/shop/sa/default", "pod": "web-0", "node": "node-1", "ips": ["10.1.0.2"],
    "iat": int(WALL), "exp": int(WALL) + 600, "nonce": "AA", "epk": urlsafe_b64encode(bytes(32)).decode(),
    "labels": {}, "nsl": {},
}  # fmt: skip


def wire_of(payload: bytes, header: dict[str, Any] | None = None, dictionary: bytes = TOKEN_DICTIONARY) -> bytes:
    """Sign any payload as this node would."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary)
    return wire_of_packed(deflate.compress(payload) + deflate.flush(), header)


def wire_of_packed(packed: bytes, header: dict[str, Any] | None = None) -> bytes:
    fields = {"kid": CREDENTIAL.key_id, "zip": "DEF", **(header or {})}
    compact = jwt.PyJWS().encode(packed, KEY, algorithm="ES256", headers=fields)
    parts = [urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in compact.split(".")]
    return pack("!HH", len(parts[0]), len(parts[1])) + b"".join(parts)


def tree_with(**claims: Any) -> bytes:
    return json.dumps({**TREE, **claims}).encode()


def reason_of(wire: bytes, wall_now: float = WALL) -> Reason:
    with pytest.raises(TokenError) as caught:
        decode_token(wire, CREDENTIAL, wall_now, 30.0)
    return caught.value.reason


def test_what_was_signed_is_read() -> None:
    found = decode_token(encode_token(CLAIMS, b"nonce", CREDENTIAL, KEY), CREDENTIAL, WALL, 30.0)
    assert (found.ephemeral_key, found.issued_at, found.expires_at) == (bytes(range(32)), WALL, WALL + 600)
    for field in ("pod", "ips", "labels", "namespace_labels", "node", "service_account", "trust_domain", "named_ports"):
        assert getattr(found.identity, field) == getattr(IDENTITY, field)


def test_a_uid_is_stated_only_where_there_is_one() -> None:
    named = replace(CLAIMS, identity=replace(IDENTITY, uid="6d4cf56d-0001"))
    sizes = []
    for claims in (CLAIMS, named):
        wire = encode_token(claims, b"nonce", CREDENTIAL, KEY)
        assert decode_token(wire, CREDENTIAL, WALL, 30.0).identity.uid == claims.identity.uid
        sizes.append(len(wire))
    assert sizes[0] < sizes[1]


def test_fourteen_common_labels_leave_room_in_a_packet() -> None:
    labels = {
        "app.kubernetes.io/name": "checkout", "app.kubernetes.io/instance": "checkout-prod",
        "app.kubernetes.io/version": "v2.14.1", "app.kubernetes.io/component": "api",
        "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/managed-by": "Helm",
        "helm.sh/chart": "checkout-2.14.1", "pod-template-hash": "6d4cf56db6", "app": "checkout", "team": "payments",
        "tier": "backend", "env": "prod", "version": "v1", "release": "stable",
    }  # fmt: skip
    wire = encode_token(replace(CLAIMS, identity=replace(IDENTITY, labels=labels)), bytes(9), CREDENTIAL, KEY)
    assert len(CREDENTIAL.der) + len(wire) < 1_200


def test_a_changed_byte_anywhere_is_refused_with_a_reason_that_says_so() -> None:
    wire = encode_token(CLAIMS, b"nonce", CREDENTIAL, KEY)
    allowed = {Reason.TOKEN_MALFORMED, Reason.TOKEN_SIGNATURE, Reason.CREDENTIAL_MISMATCH}
    for at in range(len(wire)):
        for bit in (0x01, 0x80):
            changed = wire[:at] + bytes((wire[at] ^ bit,)) + wire[at + 1 :]
            assert reason_of(changed) in allowed


def test_a_cut_or_longer_token_is_malformed() -> None:
    wire = encode_token(CLAIMS, b"nonce", CREDENTIAL, KEY)
    for end in range(len(wire)):
        assert reason_of(wire[:end]) is Reason.TOKEN_MALFORMED
    assert reason_of(wire + b"\0") is Reason.TOKEN_MALFORMED


def test_expiry_and_the_future_are_judged_with_the_leeway() -> None:
    wire = encode_token(CLAIMS, b"nonce", CREDENTIAL, KEY)
    decode_token(wire, CREDENTIAL, WALL + 629, 30.0)
    decode_token(wire, CREDENTIAL, WALL - 29, 30.0)
    assert reason_of(wire, WALL + 631) is Reason.TOKEN_EXPIRED
    assert reason_of(wire, WALL - 31) is Reason.TOKEN_NOT_YET_VALID


def test_a_token_under_another_nodes_credential_is_a_mismatch() -> None:
    other_key = new_key()
    other = credential(SIGNER, other_key, "node-2")
    wire = encode_token(CLAIMS, b"nonce", CREDENTIAL, KEY)
    with pytest.raises(TokenError) as caught:
        decode_token(wire, other, WALL, 30.0)
    assert caught.value.reason is Reason.CREDENTIAL_MISMATCH
    # Node 2 signs a token that says node 1.
    with pytest.raises(TokenError) as caught:
        decode_token(encode_token(CLAIMS, b"nonce", other, other_key), other, WALL, 30.0)
    assert caught.value.reason is Reason.CREDENTIAL_MISMATCH


def test_a_token_of_another_trust_domain_is_a_mismatch() -> None:
    assert reason_of(wire_of(tree_with(iss="other.example"))) is Reason.CREDENTIAL_MISMATCH


def test_another_key_with_the_right_key_id_is_a_wrong_signature() -> None:
    assert reason_of(encode_token(CLAIMS, b"nonce", CREDENTIAL, new_key())) is Reason.TOKEN_SIGNATURE


@pytest.mark.parametrize("algorithm", ["none", "HS256", "ES384", 7, None])
def test_any_other_algorithm_is_refused(algorithm: object) -> None:
    header = json.dumps({"alg": algorithm, "kid": CREDENTIAL.key_id, "zip": "DEF"}).encode()
    assert reason_of(pack("!HH", len(header), 1) + header + b"x" + bytes(64)) is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize("header", [b"", b"[]", b"\xff\xfe", b"{", b"[" * 60_000])
def test_a_header_that_is_no_object_is_malformed(header: bytes) -> None:
    assert reason_of(pack("!HH", len(header), 0) + header + bytes(64)) is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize(
    "header", [{"zip": "GZIP"}, {"crit": ["exp"]}, {"b64": False}], ids=["other-zip", "critical", "detached"]
)
def test_headers_that_ask_for_more_are_malformed(header: dict[str, Any]) -> None:
    assert reason_of(wire_of(tree_with(), header)) is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "web"}, {"sub": "ns//sa/x"}, {"sub": "ns/a/sb/x"}, {"sub": 7}, {"pod": None}, {"ips": "10.1.0.2"},
        {"ips": ["10.1.0.256"]}, {"ips": [7]}, {"iat": "now"}, {"iat": True}, {"exp": 1.5}, {"exp": -1},
        {"exp": 10**400}, {"epk": "AA"}, {"epk": 7}, {"epk": "é"}, {"labels": []}, {"labels": {"a": 1}},
        {"nsl": {"a": None}}, {"ports": [["http", 80]]}, {"ports": [7]}, {"ports": [["http", 80, 1]]},
        {"ports": [[7, 80, 6]]}, {"ports": [["http", 0, 6]]}, {"ports": [["http", 65_536, 6]]}, {"node": ["node-1"]},
        {"iss": None}, {"labels": {"a": "\ud800"}}, {"nsl": {"\udc00": "a"}}, {"pod": "\ud800"}, {"ips": ["fe80::1%a"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_claim_of_another_type_or_range_is_malformed(claims: dict[str, Any]) -> None:
    assert reason_of(wire_of(tree_with(**claims))) is Reason.TOKEN_MALFORMED


def test_a_message_quotes_little_of_the_peer() -> None:
    with pytest.raises(TokenError) as caught:
        decode_token(wire_of(tree_with(ips=["1" * 5_000])), CREDENTIAL, WALL, 30.0)
    assert len(caught.value.detail) <= 160


@pytest.mark.parametrize("missing", sorted(set(TREE) - {"nonce"}))
def test_a_missing_claim_is_malformed(missing: str) -> None:
    tree = {name: value for name, value in TREE.items() if name != missing}
    assert reason_of(wire_of(json.dumps(tree).encode())) is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize("payload", [b"[]", b"7", b"null", b"\xff", b"[" * 8_000], ids=lambda text: repr(text[:4]))
def test_a_payload_that_is_no_object_is_malformed(payload: bytes) -> None:
    assert reason_of(wire_of(payload)) is Reason.TOKEN_MALFORMED


def test_an_inflate_bomb_stops_at_the_bound() -> None:
    assert reason_of(wire_of(b" " * 50_000_000)) is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize("packed", [b"", b"\xff\xff", b"\x00\x01"])
def test_what_does_not_inflate_is_malformed(packed: bytes) -> None:
    assert reason_of(wire_of_packed(packed)) is Reason.TOKEN_MALFORMED


def test_bytes_after_the_deflate_stream_are_malformed() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(tree_with()) + deflate.flush()
    decode_token(wire_of_packed(packed), CREDENTIAL, WALL, 30.0)
    assert reason_of(wire_of_packed(packed + b"x")) is Reason.TOKEN_MALFORMED


def test_claims_that_no_peer_would_read_are_not_signed() -> None:
    labels = {f"example.org/label-{n}": "x" * 63 for n in range(1_000)}
    with pytest.raises(IdentityTooLargeError, match="shop/web-0"):
        encode_token(replace(CLAIMS, identity=replace(IDENTITY, labels=labels)), b"n", CREDENTIAL, KEY)
