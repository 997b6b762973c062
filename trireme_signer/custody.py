# SPDX-License-Identifier: Apache-2.0
"""The authorities' keys in a Secret, and the bundle of their certificates where nodes find it.

The Secret has, for each authority, an entry `<time of its making>.crt` and, while it signs or is going to, `.key`. One
with `tls.crt` and `tls.key` is an operator's own authority: it is used as it is, and never replaced; `bundle.pem` in it
then says whom nodes believe.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.identity.authority import Authority
from enforcer_daemon.identity.credential import TrustBundle, vouched_domain
from trireme_signer.rotation import Authorities, Keeper, Schedule, advance

ROTATE_BEFORE = "trireme.io/replace-authorities-made-before"
"""Annotation of the Secret: an RFC 3339 time; authorities made before it are replaced, by the usual steps."""
_OWN_CERTIFICATE, _OWN_KEY, _OWN_BUNDLE = "tls.crt", "tls.key", "bundle.pem"


class CustodyError(EnforcerError):
    """The Secret cannot be used as it is; nothing is signed, and nothing in it is changed."""


@dataclass(frozen=True, slots=True)
class Custody:
    """What the Secret says."""

    authorities: Authorities
    data: Mapping[str, str]
    """What the Secret should hold: base64 by entry."""


def read_custody(
    data: Mapping[str, str], annotations: Mapping[str, str], trust_domain: str, schedule: Schedule, now: datetime
) -> Custody:
    """Return the authorities in force now, and what is to be kept of them; raise CustodyError."""
    plain = {name: _decoded(name, value) for name, value in data.items()}
    if _OWN_CERTIFICATE in plain or _OWN_KEY in plain:
        return Custody(_own(plain, trust_domain), data)
    names = sorted(name.removesuffix(".crt") for name in plain if name.endswith(".crt"))
    kept = [_keeper(plain, name, trust_domain) for name in names]
    authorities = advance(kept, trust_domain, schedule, now, _moment(annotations.get(ROTATE_BEFORE)))
    return Custody(authorities, _entries(authorities))


def bundle_pem(authorities: Authorities) -> str:
    """Return the certificates that nodes believe, as PEM."""
    return "".join(_certificate_pem(certificate).decode() for certificate in authorities.bundle)


def _own(plain: Mapping[str, bytes], trust_domain: str) -> Authorities:
    for name in (_OWN_CERTIFICATE, _OWN_KEY):
        if name not in plain:
            raise CustodyError(f"{name}: is missing")
    signer = _keeper(plain, "tls", trust_domain)
    assert signer.key is not None  # noqa: S101 - it is there, or not even this would be reached
    try:
        bundle = x509.load_pem_x509_certificates(plain[_OWN_BUNDLE]) if _OWN_BUNDLE in plain else [signer.certificate]
        TrustBundle(bundle)
    except ValueError as err:
        raise CustodyError(f"{_OWN_BUNDLE}: {err}") from err
    if signer.certificate not in bundle:
        raise CustodyError(f"{_OWN_BUNDLE}: does not have the authority in {_OWN_CERTIFICATE}")
    trusted = [signer, *(Keeper(certificate, None) for certificate in bundle if certificate != signer.certificate)]
    return Authorities(tuple(trusted), Authority(signer.certificate, signer.key))


def _keeper(plain: Mapping[str, bytes], name: str, trust_domain: str) -> Keeper:
    try:
        certificate = x509.load_pem_x509_certificate(plain[f"{name}.crt"])
        domain = vouched_domain(certificate)
    except ValueError as err:
        raise CustodyError(f"{name}.crt: no authority can be read: {err}") from err
    if domain != trust_domain:
        raise CustodyError(f"{name}.crt: is an authority of trust domain {domain}, not {trust_domain}")
    pem = plain.get(f"{name}.key")
    if pem is None:
        return Keeper(certificate, None)
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise CustodyError(f"{name}.key: no key can be read: {err}") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CustodyError(f"{name}.key: is not the key of {name}.crt")
    return Keeper(certificate, key)


def _entries(authorities: Authorities) -> dict[str, str]:
    found: dict[str, bytes] = {}
    for keeper in authorities.kept:
        name = f"{keeper.made_at:%Y%m%dT%H%M%SZ}-{keeper.certificate.serial_number % 0x10000:04x}"
        found[f"{name}.crt"] = _certificate_pem(keeper.certificate)
        if keeper.key is not None:
            found[f"{name}.key"] = keeper.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
    return {name: base64.b64encode(value).decode() for name, value in found.items()}


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _decoded(name: str, value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (ValueError, TypeError) as err:
        raise CustodyError(f"{name}: {err}") from err


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise CustodyError(f"annotation {ROTATE_BEFORE}: {err}") from err
    if moment.tzinfo is None:
        raise CustodyError(f"annotation {ROTATE_BEFORE}: {text} has no time zone")
    return moment
