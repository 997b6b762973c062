# SPDX-License-Identifier: Apache-2.0
"""Reads the settings, once at start, from one YAML file: an unknown key is an error, and so is what cannot be meant."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from pydantic import TypeAdapter

from enforcer_daemon.decoding import decode
from enforcer_daemon.documents import DocumentError, read_document
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.settings import CredentialSettings, CredentialSource, Settings
from enforcer_daemon.settings_effects import errors_of

SETTINGS: TypeAdapter[Settings] = TypeAdapter(Settings)
"""The model, as pydantic reads it."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
_MIN_REQUESTED_LIFETIME_S = 600.0
"""expirationSeconds of a CertificateSigningRequest (certificates.k8s.io/v1)."""
_MAX_SOCKET_PATH_BYTES = 107  # unix(7): 108 with the zero byte at the end


def load_settings(path: Path, node: str | None = None) -> Settings:
    """Read the file; `node` takes the place of the file's. Raise SettingsError that names the file and the key."""
    try:
        tree = read_document(path.read_text(encoding="utf-8"))
    except DocumentError as err:
        raise SettingsError(f"{path}:{err.line}: {err}") from err
    except (OSError, ValueError) as err:
        raise SettingsError(f"{path}: cannot be read: {err}") from err
    tree = {} if tree is None else tree
    try:
        return decode_settings({**tree, "node": node} if node and isinstance(tree, dict) else tree)
    except SettingsError as err:
        raise SettingsError(f"{path}: {err}") from err


def decode_settings(tree: object) -> Settings:
    """Turn the parsed file into settings; raise SettingsError that names the key at fault."""
    settings = decode(SETTINGS, tree)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    credentials = settings.credentials
    if (credentials.ca_certificate is None) != (credentials.ca_key is None):
        raise SettingsError("credentials.caCertificate and credentials.caKey: set both or none")
    _check_source(credentials, settings.kubernetes.enabled)
    for key, name in (("node", settings.node), ("trustDomain", settings.trust_domain)):
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{key}: must be a DNS name in lower case: it is part of the certificate")
    longest = len(str(settings.registration.run_dir / "registration.sock").encode())
    if longest > _MAX_SOCKET_PATH_BYTES:
        raise SettingsError(
            f"registration.runDir: is too long: its sockets' paths would have {longest} bytes, the kernel takes "
            f"{_MAX_SOCKET_PATH_BYTES}"
        )
    if settings.metrics.listen is not None:
        split_listen(settings.metrics.listen)
    _check_cluster(settings)
    _check_lifetime(settings.credentials)
    if errors := list(errors_of(settings)):
        raise SettingsError("; ".join(errors))


def _check_cluster(settings: Settings) -> None:
    if settings.kubernetes.enabled and settings.policy_dir is not None:
        raise SettingsError("policyDir and kubernetes.enabled: policies come from one of them, not from both")
    if settings.kubernetes.verify_placement and not settings.kubernetes.enabled:
        raise SettingsError("kubernetes.verifyPlacement: needs kubernetes.enabled")


def split_listen(text: str) -> tuple[str, int]:
    """Return the address and port of metrics.listen; raise SettingsError."""
    address, _, port = text.rpartition(":")
    is_bracketed = address.startswith("[") and address.endswith("]")
    try:
        found = ipaddress.ip_address(address[1:-1] if is_bracketed else address)
        if is_bracketed != (found.version == 6) or not port.isdecimal() or not 1 <= int(port) <= 65_535:
            raise ValueError(text)
    except ValueError as err:
        raise SettingsError("metrics.listen: must be address:port, as 127.0.0.1:9475 or [::1]:9475") from err
    return str(found), int(port)


def _check_lifetime(credentials: CredentialSettings) -> None:
    is_requested = credentials.source is CredentialSource.KUBERNETES
    if is_requested and credentials.certificate_lifetime_s < _MIN_REQUESTED_LIFETIME_S:
        raise SettingsError(
            f"credentials.certificateLifetimeSeconds: must be at least {_MIN_REQUESTED_LIFETIME_S:g} with "
            "credentials.source kubernetes: the API server accepts no request for less"
        )


def _check_source(credentials: CredentialSettings, has_cluster: bool) -> None:
    """Refuse keys that another source would need: somebody believes that they count."""
    if credentials.source is CredentialSource.KUBERNETES and not has_cluster:
        raise SettingsError("credentials.source: kubernetes needs kubernetes.enabled")
    bundle = credentials.bundle_config_map
    if bundle is not None and not re.fullmatch(r"[a-z0-9-]+/[a-z0-9.-]+", bundle, re.ASCII):
        raise SettingsError("credentials.bundleConfigMap: must be NAMESPACE/NAME")
    given = {"certificate": credentials.certificate, "key": credentials.key}
    authority = {"caCertificate": credentials.ca_certificate, "caKey": credentials.ca_key}
    wanted = {**given, "trustBundle": credentials.trust_bundle} if credentials.source is CredentialSource.FILES else {}
    unwanted = authority if credentials.source is not CredentialSource.AUTHORITY else {}
    for name, path in {**unwanted, **(given if credentials.source is not CredentialSource.FILES else {})}.items():
        if path is not None:
            raise SettingsError(
                f"credentials.{name}: has no meaning with credentials.source {credentials.source.value}"
            )
    for name, path in wanted.items():
        if path is None:
            raise SettingsError(f"credentials.{name}: is required with credentials.source files")
