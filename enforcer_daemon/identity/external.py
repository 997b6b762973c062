# SPDX-License-Identifier: Apache-2.0
"""Keys that others bring: certificate, key and bundle in files, kept up to date by whoever writes them.

That is an agent of the operator's (SPIFFE, cert-manager's CSI driver), or the daemon's own requests to the cluster's
signer. Nothing is ever written here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.errors import CredentialError, SettingsError
from enforcer_daemon.identity.credential import Credential, TrustBundle, decode_credential
from enforcer_daemon.identity.keystore import NodeIdentity
from enforcer_daemon.identity.private import read_private
from enforcer_daemon.settings import CredentialSource, Settings

_RENEWED_AT = 2 / 3
"""Part of a certificate's life after which the daemon asks for another: the files should have a new one by then."""


class ExternalFiles(NamedTuple):
    """Where what is given lies. Certificate and key may be one file."""

    certificate: Path
    key: Path
    trust_bundle: Path


def external_files(settings: Settings) -> ExternalFiles:
    """Return where the files are; raise ValueError if the settings do not speak of files."""
    credentials = settings.credentials
    if credentials.source is CredentialSource.KUBERNETES:
        node = settings.state_dir / "node-credential.pem"  # One file: key and certificate change in one step.
        return ExternalFiles(node, node, credentials.trust_bundle or settings.state_dir / "bundle.pem")
    certificate, key, bundle = credentials.certificate, credentials.key, credentials.trust_bundle
    if certificate is None or key is None or bundle is None:
        raise ValueError("credentials.certificate, credentials.key and credentials.trustBundle are not all set")
    return ExternalFiles(certificate, key, bundle)


def open_external_identity(settings: Settings, wall_now: float) -> NodeIdentity:
    """Read what is given; raise SettingsError, which names the file, where it cannot be used.

    An expired certificate is no fault here. It proves nothing to others, but policies by address, the node's own
    traffic and established connections need none.
    """
    files = external_files(settings)
    key = _read_key(files.key)
    credential, bundle = _read_credential(files.certificate), _read_bundle(files.trust_bundle)
    check_external(settings, key, credential, bundle, wall_now)
    return NodeIdentity(key, credential, bundle, renewal_time(credential))


def check_external_files(settings: Settings, wall_now: float) -> list[str]:
    """Return what is wrong with the files that others bring; nothing is written."""
    try:
        open_external_identity(settings, wall_now)
    except SettingsError as err:
        return [str(err)]
    return []


def renewal_time(credential: Credential) -> float:
    """Return the moment, in Unix seconds, by which a newer certificate should be there."""
    return credential.not_before + (credential.not_after - credential.not_before) * _RENEWED_AT


def check_external(
    settings: Settings, key: ec.EllipticCurvePrivateKey, credential: Credential, bundle: TrustBundle, wall_now: float
) -> None:
    """Raise SettingsError unless this is this node's certificate, for this key, and believed by this bundle."""
    where = external_files(settings).certificate
    wanted, found = (settings.trust_domain, settings.node), (credential.trust_domain, credential.node)
    if found != wanted:
        raise SettingsError(
            f"{where}: names spiffe://{found[0]}/node/{found[1]}, this node is spiffe://{wanted[0]}/node/{wanted[1]}"
        )
    if credential.public_key.public_numbers() != key.public_key().public_numbers():
        raise SettingsError(f"{where}: is not a certificate of the key in {external_files(settings).key}")
    try:
        bundle.verify(credential, min(wall_now, credential.not_after), settings.credentials.clock_leeway_s)
    except CredentialError as err:
        raise SettingsError(f"{where}: {external_files(settings).trust_bundle} does not vouch for it: {err}") from err


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise SettingsError(f"{path}: no key can be read: {err}") from err
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise SettingsError(f"{path}: is not a P-256 key")


def _read_credential(path: Path) -> Credential:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        return decode_credential(certificate.public_bytes(serialization.Encoding.DER))
    except (OSError, ValueError, CredentialError) as err:
        raise SettingsError(f"{path}: no certificate can be read: {err}") from err


def _read_bundle(path: Path) -> TrustBundle:
    try:
        return TrustBundle(x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as err:
        raise SettingsError(f"{path}: no trust bundle can be read: {err}") from err
