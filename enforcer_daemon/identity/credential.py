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
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from enforcer_daemon.errors import CredentialError
from enforcer_daemon.reasons import Reason

_NODE_ID = re.compile(r"spiffe://([a-z0-9._-]+)/node/([A-Za-z0-9._-]+)", re.ASCII)
"""The characters that SPIFFE-ID (section 2) allows in a trust domain and in a path segment."""
_TRUST_DOMAIN_ID = re.compile(r"spiffe://([a-z0-9._-]+)/?", re.ASCII)
_MAX_BYTES = 2_048
"""Of a certificate: one of a common authority has below 500, under RSA-4096 and a long name 1,100, and with the token
it must fit a packet. One that is full of names takes a millisecond for each two KiB, and anyone may send it."""
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
    """Read a certificate; raise CredentialError if it is not a P-256 certificate of exactly one node."""
    if len(der) > _MAX_BYTES:
        raise CredentialError(Reason.CREDENTIAL_INVALID, f"{len(der)} bytes, at most {_MAX_BYTES} are read")
    try:
        certificate = x509.load_der_x509_certificate(der)
        public_key = certificate.public_key()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = [ext for ext in certificate.extensions if isinstance(ext.value, x509.BasicConstraints)]
        validity = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        is_numbered = certificate.serial_number > 0
    except _UNREADABLE as err:
        raise CredentialError(Reason.CREDENTIAL_INVALID, f"{str(err)!r:.120}") from err
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise CredentialError(Reason.CREDENTIAL_INVALID, "the key is not on P-256")
    if not is_numbered:
        raise CredentialError(Reason.CREDENTIAL_INVALID, "the serial number is not positive (RFC 5280, 4.1.2.2)")
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
        """Raise ValueError for an empty bundle, which would mean nobody, and for what is no authority."""
        self.authorities = tuple(dict.fromkeys(authorities))
        if not self.authorities:
            raise ValueError("a trust bundle needs at least one authority")
        self._domains = {authority: vouched_domain(authority) for authority in self.authorities}
        self._store = Store(list(self.authorities))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrustBundle) and self._domains == other._domains

    __hash__ = None  # type: ignore[assignment]  # nothing looks a bundle up

    def verify(self, credential: Credential, wall_now: float, leeway_s: float) -> None:
        """Raise CredentialError unless an authority of this bundle signed the credential and it is valid now."""
        if wall_now > credential.not_after + leeway_s:
            late = wall_now - credential.not_after
            raise CredentialError(Reason.CREDENTIAL_EXPIRED, f"node {credential.node}, {late:.0f} s ago")
        if wall_now < credential.not_before - leeway_s:
            early = credential.not_before - wall_now
            raise CredentialError(Reason.CREDENTIAL_EXPIRED, f"node {credential.node}, begins in {early:.0f} s")
        # Within the leeway the chain is evaluated at the nearest moment at which the credential itself is valid.
        moment = datetime.fromtimestamp(min(max(wall_now, credential.not_before), credential.not_after), UTC)
        verifier = (
            PolicyBuilder()
            .store(self._store)
            .time(moment)
            .max_chain_depth(0)
            .extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=_node_policy())
            .build_client_verifier()
        )
        try:
            *_, authority = verifier.verify(credential.certificate, []).chain
        except VerificationError as err:
            self._blame_outdated_authority(credential, moment)
            raise CredentialError(Reason.CREDENTIAL_UNTRUSTED, f"node {credential.node}: {str(err)!r:.120}") from err
        vouched = self._domains[authority]
        if vouched != credential.trust_domain:
            raise CredentialError(
                Reason.CREDENTIAL_UNTRUSTED, f"an authority of {vouched} signed {credential.trust_domain}"
            )

    def _blame_outdated_authority(self, credential: Credential, moment: datetime) -> None:
        """Raise CredentialError if the one fault is that the signer is outside its own validity: time heals that."""
        for authority in self.authorities:
            is_current = authority.not_valid_before_utc <= moment <= authority.not_valid_after_utc
            if not is_current and is_issued_by(credential.certificate, authority):
                name = authority.subject.rfc4514_string()
                raise CredentialError(Reason.CREDENTIAL_EXPIRED, f"node {credential.node}: its authority {name!r:.80}")


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether the authority's key signed the certificate under the authority's name."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):  # another name; a key of another kind; another key
        return False
    return True


def vouched_domain(authority: x509.Certificate) -> str:
    """Return the one trust domain whose nodes an authority may name, which its own SPIFFE ID states.

    Raise ValueError if it states none: it could then name the nodes of every domain, and one cluster's authority
    would sign for another's pods.
    """
    subject = f"{authority.subject.rfc4514_string()!r:.120}"
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        is_authority = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except _UNREADABLE as err:
        raise ValueError(
            f"{subject}: an authority needs basic constraints and a SPIFFE ID spiffe://<trust domain> as its subject "
            f"alternative name: {err}"
        ) from err
    if not is_authority:
        raise ValueError(f"{subject}: is no authority's certificate (basic constraints say CA:FALSE)")
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("spiffe:")]
    found = _TRUST_DOMAIN_ID.fullmatch(uris[0]) if len(uris) == 1 else None
    if found is None:
        raise ValueError(f"{subject}: an authority must state exactly one SPIFFE ID spiffe://<trust domain>")
    return found[1]


def _node_policy() -> ExtensionPolicy:
    """Ask of a credential only what it must have; it travels in every handshake, so it has nothing else."""
    return (
        ExtensionPolicy.permit_all()
        .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
        .require_present(x509.KeyUsage, Criticality.CRITICAL, None)
        .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    )
