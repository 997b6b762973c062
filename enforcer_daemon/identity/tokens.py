# SPDX-License-Identifier: Apache-2.0
"""Identity tokens: a pod's identity as a JWT (RFC 7519) signed by its node (ES256), with a deflated payload.

On the wire the three parts of the JWS travel as raw bytes, without base64: a quarter less of a packet that must fit
every path. The receiver restores the compact form exactly, so that the signature is over what RFC 7515 says.
"""

from __future__ import annotations

import ipaddress
import json
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from struct import Struct
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.errors import IdentityTooLargeError, TokenError
from enforcer_daemon.identity.credential import Credential
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.model import Identity, IPAddress, NamedPort, PodRef, Protocol
from enforcer_daemon.reasons import Reason

MAX_CLAIMS_BYTES = 8_192
"""Inflated size of a payload; a bomb stops here."""
_SIGNATURE_BYTES = 64
_MAX_NUMBER = 1 << 40
"""Largest integer of a claim: as Unix seconds tens of thousands of years away, and exact as a float."""
_MAX_DETAIL = 160
"""Characters of an error's message."""
_LENGTHS = Struct("!HH")
_ALGORITHM = "ES256"
_JWS = jwt.PyJWS(algorithms=[_ALGORITHM])


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token states."""

    identity: Identity
    ephemeral_key: bytes
    """Public X25519 key of the token's holder, 32 bytes."""
    issued_at: float
    """Unix seconds."""
    expires_at: float
    """Unix seconds."""


def encode_token(claims: Claims, nonce: bytes, credential: Credential, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign the claims; `nonce` makes each token different from every other.

    Raise IdentityTooLargeError for claims that no peer would read.
    """
    payload = json.dumps(_claims_to_json(claims, nonce), separators=(",", ":"), ensure_ascii=False).encode()
    if len(payload) > MAX_CLAIMS_BYTES:
        raise IdentityTooLargeError(
            f"identity of {claims.identity.pod} takes {len(payload)} bytes, a token has room for {MAX_CLAIMS_BYTES}"
        )
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, TOKEN_DICTIONARY)
    packed = deflate.compress(payload) + deflate.flush()
    compact = _JWS.encode(packed, key, algorithm=_ALGORITHM, headers={"kid": credential.key_id, "zip": "DEF"})
    header, body, signature = (_unbase64(part) for part in compact.encode().split(b"."))
    return _LENGTHS.pack(len(header), len(body)) + header + body + signature


def decode_token(wire: bytes, credential: Credential, wall_now: float, leeway_s: float) -> Claims:
    """Verify a token under a credential that the bundle vouches for; raise TokenError with the reason if it fails."""
    header, body, signature = _split(wire)
    fields = _json_object(header)
    if fields.get("alg") != _ALGORITHM or fields.get("zip") != "DEF":
        raise TokenError(Reason.TOKEN_MALFORMED, "header must say alg ES256 and zip DEF")
    if fields.get("kid") != credential.key_id:
        raise TokenError(Reason.CREDENTIAL_MISMATCH, f"token names key {fields.get('kid')!r:.40}")
    compact = b".".join(urlsafe_b64encode(part).rstrip(b"=") for part in (header, body, signature))
    try:
        packed = _JWS.decode(compact, credential.public_key, algorithms=[_ALGORITHM])
    except jwt.InvalidSignatureError as err:
        raise TokenError(Reason.TOKEN_SIGNATURE, f"node {credential.node}") from err
    except jwt.InvalidTokenError as err:
        raise TokenError(Reason.TOKEN_MALFORMED, str(err)) from err
    claims = _claims_from_json(_json_object(_inflate(packed)), credential)
    if wall_now > claims.expires_at + leeway_s:
        raise TokenError(Reason.TOKEN_EXPIRED, f"{claims.identity.pod}, {wall_now - claims.expires_at:.0f} s ago")
    if wall_now < claims.issued_at - leeway_s:
        raise TokenError(Reason.TOKEN_NOT_YET_VALID, f"{claims.identity.pod}, in {claims.issued_at - wall_now:.0f} s")
    return claims


def _claims_to_json(claims: Claims, nonce: bytes) -> dict[str, Any]:
    identity = claims.identity
    tree: dict[str, Any] = {
        "iss": identity.trust_domain,
        "sub": f"ns/{identity.pod.namespace}/sa/{identity.service_account}",
        "pod": identity.pod.name,
        "node": identity.node,
        "ips": [str(ip) for ip in identity.ips],
        "iat": int(claims.issued_at),
        "exp": int(claims.expires_at),
        "nonce": urlsafe_b64encode(nonce).rstrip(b"=").decode(),
        "epk": urlsafe_b64encode(claims.ephemeral_key).rstrip(b"=").decode(),
        "labels": dict(sorted(identity.labels.items())),
        "nsl": dict(sorted(identity.namespace_labels.items())),
    }
    if identity.uid:
        tree["uid"] = identity.uid
    if identity.named_ports:
        tree["ports"] = [[port.name, port.number, port.protocol.value] for port in identity.named_ports]
    return tree


def _claims_from_json(tree: dict[str, Any], credential: Credential) -> Claims:
    try:
        trust_domain, node = _text(tree["iss"]), _text(tree["node"])
        if (trust_domain, node) != (credential.trust_domain, credential.node):
            raise TokenError(Reason.CREDENTIAL_MISMATCH, f"token is for node {node!r:.80}")
        _, namespace, _, service_account = _subject(tree["sub"])
        ephemeral_key = _unbase64(_text(tree["epk"]).encode())
        if len(ephemeral_key) != 32:
            raise ValueError("epk must have 32 bytes")
        identity = Identity(
            pod=PodRef(namespace, _text(tree["pod"])),
            ips=tuple(_address(ip) for ip in _list(tree["ips"])),
            labels=_labels(tree["labels"]),
            namespace_labels=_labels(tree["nsl"]),
            node=credential.node,
            service_account=service_account,
            trust_domain=credential.trust_domain,
            named_ports=tuple(_named_port(*port) for port in _list(tree.get("ports", []))),
            uid=_text(tree.get("uid", "")),
        )
        return Claims(identity, ephemeral_key, _number(tree["iat"]), _number(tree["exp"]))
    except (KeyError, ValueError, TypeError) as err:
        # Cut: the message may quote the peer, and goes to a log.
        raise TokenError(Reason.TOKEN_MALFORMED, f"{type(err).__name__}: {err}"[:_MAX_DETAIL]) from err


def _split(wire: bytes) -> tuple[bytes, bytes, bytes]:
    if len(wire) < _LENGTHS.size:
        raise TokenError(Reason.TOKEN_MALFORMED, "truncated")
    header_length, body_length = _LENGTHS.unpack_from(wire)
    body_at = _LENGTHS.size + header_length
    signature_at = body_at + body_length
    if len(wire) != signature_at + _SIGNATURE_BYTES:
        raise TokenError(Reason.TOKEN_MALFORMED, "lengths contradict each other")
    return wire[_LENGTHS.size : body_at], wire[body_at:signature_at], wire[signature_at:]


def _inflate(packed: bytes) -> bytes:
    inflate = zlib.decompressobj(-15, TOKEN_DICTIONARY)
    try:
        payload = inflate.decompress(packed, MAX_CLAIMS_BYTES)
    except zlib.error as err:
        raise TokenError(Reason.TOKEN_MALFORMED, str(err)) from err
    if not inflate.eof or inflate.unused_data:
        raise TokenError(Reason.TOKEN_MALFORMED, f"payload is not one DEFLATE stream of up to {MAX_CLAIMS_BYTES} bytes")
    return payload


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise TokenError(Reason.TOKEN_MALFORMED, str(err)) from err
    if not isinstance(tree, dict):
        raise TokenError(Reason.TOKEN_MALFORMED, "not a JSON object")
    return tree


def _unbase64(text: bytes) -> bytes:
    return urlsafe_b64decode(text + b"=" * (-len(text) % 4))


def _subject(value: object) -> list[str]:
    parts = _text(value).split("/")
    if len(parts) != 4 or parts[0] != "ns" or parts[2] != "sa" or not parts[1]:
        raise ValueError("sub must be ns/<namespace>/sa/<service account>")
    return parts


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    value.encode()  # ValueError for half of a surrogate pair, which JSON can spell
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("not an integer")
    if not 0 <= value <= _MAX_NUMBER:
        raise ValueError("integer out of range")
    return float(value)


def _labels(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError("labels must map strings to strings")
    return {_text(key): _text(item) for key, item in value.items()}


def _address(value: object) -> IPAddress:
    text = _text(value)
    if "%" in text:
        raise ValueError("an address with a zone is known on one node only")
    return ipaddress.ip_address(text)


def _named_port(name: object, number: object, protocol: object) -> NamedPort:
    port = int(_number(number))
    if not 1 <= port <= 65_535:
        raise ValueError("port out of range")
    return NamedPort(_text(name), port, Protocol(int(_number(protocol))))
