# SPDX-License-Identifier: Apache-2.0
"""A certificate authority of the cluster: making one, and issuing the credential of a node.

A credential names its node by a SPIFFE ID in the subject alternative name, spiffe://<trust domain>/node/<node>, and is
kept small, because it travels in every handshake: no subject, no key identifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BACKDATING = timedelta(minutes=5)
"""So that a node whose clock is a little behind accepts a fresh certificate."""


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority that can sign: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()}, key redacted)"


def make_authority(trust_domain: str, now: datetime, lifetime: timedelta = timedelta(days=3650)) -> Authority:
    """Make a key and a self-signed P-256 certificate that vouches for the nodes of this one trust domain."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"trireme {trust_domain}"[:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATING)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def issue_credential(
    authority: Authority,
    public_key: ec.EllipticCurvePublicKey,
    spiffe_id: str,
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    """Sign a node's certificate; its validity ends no later than the authority's."""
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATING)
        .not_valid_after(min(now + lifetime, authority.certificate.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)]), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .sign(authority.key, hashes.SHA256())
    )


def node_spiffe_id(trust_domain: str, node: str) -> str:
    """Return the SPIFFE ID of a node."""
    return f"spiffe://{trust_domain}/node/{node}"


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
