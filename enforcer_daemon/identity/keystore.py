# SPDX-License-Identifier: Apache-2.0
"""The node's own key and certificate on disk, and where they come from in standalone mode: a local authority.

Files in the state directory (0700), each 0600: node.key and node.pem; ca.key and ca.pem where no operator's authority
is configured. All are PEM. Each certificate has a key of its own: with a new one, a new key is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.errors import CredentialError, SettingsError
from enforcer_daemon.identity.authority import (
    BACKDATING,
    Authority,
    issue_credential,
    make_authority,
    node_spiffe_id,
)
from enforcer_daemon.identity.credential import Credential, TrustBundle, decode_credential, is_issued_by, vouched_domain
from enforcer_daemon.identity.private import read_private
from enforcer_daemon.replacement import replace_file
from enforcer_daemon.settings import Settings

_KEY, _CERTIFICATE = "node.key", "node.pem"
_RENEW_AT = 2 / 3
"""Part of a certificate's life after which it is issued anew."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What this node signs with, and whom it trusts."""

    key: ec.EllipticCurvePrivateKey
    credential: Credential
    bundle: TrustBundle
    renew_at: float
    """Unix seconds at which the certificate should be issued anew: at two thirds of its life, or at its end where the
    authority ends then and a new one would last no longer."""

    def __repr__(self) -> str:
        return f"NodeIdentity({self.credential.node}, key redacted)"


def open_node_identity(settings: Settings, wall_now: float) -> NodeIdentity:
    """Read the node's key and certificate, or make what is missing, outdated or of another authority.

    Creates the state directory and writes files in it; raises SettingsError if an operator's file cannot be used,
    and OSError where the state directory cannot. After an error all files are as they were.
    """
    state = settings.state_dir
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        state.chmod(0o700)
    except OSError as err:
        raise SettingsError(f"stateDir: {state}: cannot be used: {err.strerror}") from err
    now = datetime.fromtimestamp(wall_now, UTC)
    authority = _open_authority(settings, now)
    _require_own_domain(settings, authority)
    bundle = _read_bundle(settings, authority)
    stored = _read_identity(settings, authority, bundle, wall_now)
    return stored if stored is not None else _issue_identity(settings, authority, bundle, now)


def check_files(settings: Settings) -> list[str]:
    """Return what is wrong with the files that the settings name, one sentence each; nothing is written."""
    credentials = settings.credentials
    if credentials.ca_certificate is None or credentials.ca_key is None:
        return []
    try:
        authority = _read_authority(credentials.ca_certificate, credentials.ca_key)
        _require_own_domain(settings, authority)
        _read_bundle(settings, authority)
    except SettingsError as err:
        return [str(err)]
    return []


def _require_own_domain(settings: Settings, authority: Authority) -> None:
    """Raise SettingsError if the authority vouches for another trust domain: nobody would believe what it signs."""
    path = settings.credentials.ca_certificate
    try:
        domain = vouched_domain(authority.certificate)
    except ValueError as err:
        raise SettingsError(f"credentials.caCertificate: {path or settings.state_dir / 'ca.pem'}: {err}") from err
    if domain != settings.trust_domain:
        remedy = "" if path else f"; move it and {settings.state_dir}/ca.key away to have others made"
        raise SettingsError(
            f"trustDomain: is {settings.trust_domain}, but the authority in {path or settings.state_dir / 'ca.pem'} "
            f"vouches for {domain} alone{remedy}"
        )


def _issue_identity(settings: Settings, authority: Authority, bundle: TrustBundle, now: datetime) -> NodeIdentity:
    """Make a key and have it certified; both are kept on disk."""
    end = authority.certificate.not_valid_after_utc
    if end <= now:
        path = settings.credentials.ca_certificate or settings.state_dir / "ca.pem"
        raise SettingsError(f"credentials.caCertificate: {path}: the authority has expired ({end:%Y-%m-%d %H:%M:%SZ})")
    key = ec.generate_private_key(ec.SECP256R1())
    lifetime = timedelta(seconds=settings.credentials.certificate_lifetime_s)
    name = node_spiffe_id(settings.trust_domain, settings.node)
    certificate = issue_credential(authority, key.public_key(), name, now, lifetime)
    credential = decode_credential(certificate.public_bytes(serialization.Encoding.DER))
    _require_trusted(bundle, credential, settings, now.timestamp())
    # A crash between the two leaves a certificate of another key, which the next start replaces.
    replace_file(settings.state_dir / _KEY, key_pem(key))
    replace_file(settings.state_dir / _CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    return NodeIdentity(key, credential, bundle, _renew_at(credential, authority))


def _renew_at(credential: Credential, authority: Authority) -> float:
    if credential.not_after >= authority.certificate.not_valid_after_utc.timestamp():
        return credential.not_after
    issued_at = credential.not_before + BACKDATING.total_seconds()
    return issued_at + (credential.not_after - issued_at) * _RENEW_AT


def _require_trusted(bundle: TrustBundle, credential: Credential, settings: Settings, wall_now: float) -> None:
    """Raise SettingsError if this node would not believe itself: its peers would not, either."""
    try:
        bundle.verify(credential, wall_now, settings.credentials.clock_leeway_s)
    except CredentialError as err:
        raise SettingsError(f"credentials.trustBundle: does not vouch for this node's own certificate: {err}") from err


def _read_identity(
    settings: Settings, authority: Authority, bundle: TrustBundle, wall_now: float
) -> NodeIdentity | None:
    """Return the stored certificate where it can still be used, None if a new one must be issued."""
    key = _read_key(settings.state_dir / _KEY)
    if key is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate((settings.state_dir / _CERTIFICATE).read_bytes())
        credential = decode_credential(certificate.public_bytes(serialization.Encoding.DER))
        bundle.verify(credential, wall_now, 0.0)
    except (FileNotFoundError, ValueError, CredentialError):
        return None
    is_ours = (
        credential.public_key.public_numbers() == key.public_key().public_numbers()
        and (credential.trust_domain, credential.node) == (settings.trust_domain, settings.node)
        and credential.not_after - credential.not_before <= settings.credentials.certificate_lifetime_s + 600
        and is_issued_by(certificate, authority.certificate)
    )
    identity = NodeIdentity(key, credential, bundle, _renew_at(credential, authority))
    return identity if is_ours and wall_now < identity.renew_at else None


def _open_authority(settings: Settings, now: datetime) -> Authority:
    credentials = settings.credentials
    if credentials.ca_certificate is not None and credentials.ca_key is not None:
        return _read_authority(credentials.ca_certificate, credentials.ca_key)
    certificate_path, key_path = settings.state_dir / "ca.pem", settings.state_dir / "ca.key"
    if not certificate_path.exists() or not key_path.exists():
        authority = make_authority(settings.trust_domain, now)
        replace_file(key_path, key_pem(authority.key))
        replace_file(certificate_path, authority.certificate.public_bytes(serialization.Encoding.PEM))
    return _read_authority(certificate_path, key_path)


def _read_authority(certificate_path: Path, key_path: Path) -> Authority:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = serialization.load_pem_private_key(read_private(key_path), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise SettingsError(f"credentials: {certificate_path} and {key_path}: {err}") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"credentials.caKey: {key_path} is not an elliptic curve key")
    if certificate.public_key() != key.public_key():
        raise SettingsError(f"credentials.caKey: {key_path} is not the key of {certificate_path}")
    return Authority(certificate, key)


def _read_bundle(settings: Settings, authority: Authority) -> TrustBundle:
    path = settings.credentials.trust_bundle
    if path is None:
        try:
            return TrustBundle([authority.certificate])
        except ValueError as err:
            raise SettingsError(f"credentials.caCertificate: {err}") from err
    try:
        return TrustBundle(x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as err:
        raise SettingsError(f"credentials.trustBundle: {path}: {err}") from err


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise SettingsError(f"{path} is not a P-256 key; move it away to have a new one made")


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM (PKCS #8, not encrypted)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
