# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: of an authority that signs nodes' credentials, and of every wrong kind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.identity.authority import Authority, issue_credential, make_authority, node_spiffe_id
from enforcer_daemon.identity.credential import Credential, decode_credential

WALL = 1_800_000_000.0
NOW = datetime.fromtimestamp(WALL, UTC)
DAY = timedelta(days=1)


def authority(trust_domain: str = "cluster.local") -> Authority:
    return make_authority(trust_domain, NOW)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def credential(
    signer: Authority,
    key: ec.EllipticCurvePrivateKey,
    node: str = "node-1",
    trust_domain: str = "cluster.local",
    lifetime: timedelta = DAY,
) -> Credential:
    name = node_spiffe_id(trust_domain, node)
    certificate = issue_credential(signer, key.public_key(), name, NOW, lifetime)
    return decode_credential(certificate.public_bytes(Encoding.DER))


def der(
    *names: str,
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | None = None,
    is_authority: bool | None = None,
) -> bytes:
    """Sign a certificate by its own fresh key, with these URIs; none: without the extension."""
    signer = new_key()
    public_key = (key or signer).public_key()
    empty = x509.Name([])
    builder = x509.CertificateBuilder(empty, empty, public_key, 1, NOW, NOW + DAY)
    if names:
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=True)
    if is_authority is not None:
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.DER)
