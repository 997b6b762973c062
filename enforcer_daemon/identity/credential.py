# SPDX-License-Identifier: Apache-2.0
"""A node's credential as peers see it, and the trust bundle that it must chain to."""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from enforcer_daemon.errors import CredentialError
from enforcer_daemon.reasons import Reason

_NODE_ID = re.compile(r"spiffe://([a-z0-9._-]+)/node/([A-Za-z0-9._-]+)", re.ASCII)
"""The characters that SPIFFE-ID (section 2) allows in a trust domain and in a path segment."""
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What the X.509 library raises for certificates that it cannot read or does not support."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A node's certificate, read and checked for its form; whether to believe it is the trust bundle's word."""

    der: bytes
    key_id: str
    """Names this credential in the header of tokens: 64 bits of the certificate's SHA-256, base64url."""
    trust_domain: str
    node: str
    public_key: ec.EllipticCurvePublicKey
    not_before: float
    """Unix seconds."""
    not_after: float
    """Unix seconds."""
    certificate: x509.Certificate


def decode_credential(der: bytes) -> Credential:
    """Read a certificate; raise CredentialError where it is not a P-256 certificate of exactly one node."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        public_key = certificate.public_key()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = [ext for ext in certificate.extensions if isinstance(ext.value, x509.BasicConstraints)]
        validity = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    except _UNREADABLE as err:
        raise CredentialError(Reason.CREDENTIAL_INVALID, f"{str(err)!r:.120}") from err
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise CredentialError(Reason.CREDENTIAL_INVALID, "the key is not on P-256")
    if any(isinstance(ext.value, x509.BasicConstraints) and ext.value.ca for ext in constraints):
        raise CredentialError(Reason.CREDENTIAL_INVALID, "an authority's certificate is no node's credential")
    trust_domain, node = _node_of(names)
    key_id = urlsafe_b64encode(hashlib.sha256(der).digest()[:8]).rstrip(b"=").decode()
    return Credential(der, key_id, trust_domain, node, public_key, *validity, certificate)


def _node_of(names: x509.SubjectAlternativeName) -> tuple[str, str]:
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or len(list(names)) != 1:
        raise CredentialError(Reason.CREDENTIAL_INVALID, "must name exactly one SPIFFE ID")
    found = _NODE_ID.fullmatch(uris[0])
    if found is None:
        # As a literal and cut: these bytes are a stranger's, and the message goes to a log.
        raise CredentialError(Reason.CREDENTIAL_INVALID, f"{uris[0]!r:.120} is not spiffe://<trust domain>/node/<node>")
    return found[1], found[2]


class TrustBundle:
    """The authorities whose credentials are believed. Immutable; a rotation makes a new bundle."""

    def __init__(self, authorities: Iterable[x509.Certificate]) -> None:
        """Raise ValueError for an empty bundle: it would mean nobody, which no operator can want."""
        self.authorities = tuple(authorities)
        if not self.authorities:
            raise ValueError("a trust bundle needs at least one authority")
        self._store = Store(list(self.authorities))

    def verify(self, credential: Credential, wall_now: float, leeway_s: float) -> None:
        """Raise CredentialError unless an authority of this bundle signed the credential and it is valid now."""
        if wall_now > credential.not_after + leeway_s or wall_now < credential.not_before - leeway_s:
            raise CredentialError(Reason.CREDENTIAL_EXPIRED, f"node {credential.node}")
        # Within the leeway the chain is judged at the nearest moment at which the credential itself is valid.
        moment = min(max(wall_now, credential.not_before), credential.not_after)
        verifier = (
            PolicyBuilder()
            .store(self._store)
            .time(datetime.fromtimestamp(moment, UTC))
            .max_chain_depth(0)
            .extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=_node_policy())
            .build_client_verifier()
        )
        try:
            *_, authority = verifier.verify(credential.certificate, []).chain
        except VerificationError as err:
            raise CredentialError(Reason.CREDENTIAL_UNTRUSTED, f"node {credential.node}: {str(err)!r:.120}") from err
        vouched = _vouched_domain(authority)
        if vouched not in (None, credential.trust_domain):
            raise CredentialError(
                Reason.CREDENTIAL_UNTRUSTED, f"an authority of {vouched} signed {credential.trust_domain}"
            )


def _vouched_domain(authority: x509.Certificate) -> str | None:
    """Give the one trust domain whose nodes an authority may name (SPIFFE: its own SPIFFE ID); None: it states none."""
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return next((uri.removeprefix("spiffe://") for uri in uris if uri.startswith("spiffe://")), None)


def _node_policy() -> ExtensionPolicy:
    """Ask of a credential only what it must have; it travels in every handshake, so it has nothing else."""
    return (
        ExtensionPolicy.permit_all()
        .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
        .require_present(x509.KeyUsage, Criticality.CRITICAL, None)
        .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    )
