# SPDX-License-Identifier: Apache-2.0
"""The request for a node's certificate: PKCS #10 (RFC 2986), as the node makes it and as a signer reads it.

It says as little as the certificate will: a P-256 key and one SPIFFE ID. All else that it could ask for is refused,
so that nothing unexpected can be signed.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_MAX_BYTES = 4_096
"""Of a request as PEM; one of a node has below 500."""
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.AttributeNotFound,
)


def make_request(key: ec.EllipticCurvePrivateKey, spiffe_id: str) -> bytes:
    """Return the request for a certificate of this key under this SPIFFE ID, as PEM."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes, spiffe_id: str) -> ec.EllipticCurvePublicKey:
    """Return the key that a request is for; raise ValueError unless it asks for this SPIFFE ID alone, and signs it.

    That it says so itself: the request is signed by the key that it names (proof of possession).
    """
    if len(pem) > _MAX_BYTES:
        raise ValueError(f"the request has {len(pem)} bytes, at most {_MAX_BYTES} are read")
    try:
        request = x509.load_pem_x509_csr(pem)
        key, is_signed, names = request.public_key(), request.is_signature_valid, list(request.extensions)
        subject, attributes = request.subject, list(request.attributes)
    except (*_UNREADABLE, InvalidSignature) as err:
        raise ValueError(f"the request cannot be read: {str(err)!r:.120}") from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key must be on P-256")
    if not is_signed:
        raise ValueError("the request is not signed by its own key")
    if len(subject) > 0:
        raise ValueError(f"the subject must be empty, it is {subject.rfc4514_string()!r:.120}")
    if len(attributes) > 1 or len(names) != 1 or not isinstance(names[0].value, x509.SubjectAlternativeName):
        raise ValueError("the request must have one extension, the subject alternative name")
    if list(names[0].value) != [x509.UniformResourceIdentifier(spiffe_id)]:
        found = ", ".join(str(name.value) for name in names[0].value)
        raise ValueError(f"the subject alternative name must be {spiffe_id} alone, it is {found!r:.200}")
    return key
