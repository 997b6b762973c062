# SPDX-License-Identifier: Apache-2.0
"""Reads the settings, once at start, from one YAML file: an unknown key is an error, and so is what cannot be meant."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import yaml

from enforcer_daemon.decoding import StrictLoader, decode_group
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.settings import (
    CredentialSettings,
    CredentialSource,
    DataplaneSettings,
    HandshakeSettings,
    Settings,
)

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
_UNREADABLE = (OSError, yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What reading and parsing raise: of text that is not UTF-8, dates that do not exist, tags with nonsense (`!!int ""`),
nesting without end."""
MAX_TOKEN_LIFETIME_S = 86_400.0
"""The longest validity of a token that is accepted as a setting: that of a node's certificate by default."""
MIN_CERTIFICATE_LIFETIME_S = 5.0
MIN_REQUESTED_LIFETIME_S = 600.0
"""expirationSeconds of a CertificateSigningRequest (certificates.k8s.io/v1)."""
MIN_PACKETS_PER_S = 1_000
"""A rate below it would keep pods from what they do honestly, as many connections at once."""
MAX_PACKETS_PER_S = 1_000_000
"""The finest that hashlimit reckons with."""
_MAX_SOCKET_PATH_BYTES = 107  # unix(7): 108 with the zero byte at the end


def load_settings(path: Path, node: str | None = None) -> Settings:
    """Read the file; `node` takes the place of the file's. Raise SettingsError that names the file and the key."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506 - it is a SafeLoader
        tree = tree if tree is not None else {}
        return decode_settings({**tree, "node": node} if node and isinstance(tree, dict) else tree)
    except SettingsError as err:
        raise SettingsError(f"{path}: {err}") from err
    except _UNREADABLE as err:
        raise SettingsError(f"{path}: cannot be read: {err}") from err


def decode_settings(tree: object) -> Settings:
    """Turn the parsed file into settings; raise SettingsError that names the key at fault."""
    settings = decode_group(Settings, tree, "")
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
    if settings.log.level not in ("debug", "info", "warning", "error"):
        raise SettingsError("log.level: must be debug, info, warning or error")
    if settings.log.format not in ("json", "console"):
        raise SettingsError("log.format: must be json or console")
    longest = len(str(settings.registration.run_dir / "registration.sock").encode())
    if longest > _MAX_SOCKET_PATH_BYTES:
        raise SettingsError(
            f"registration.runDir: is too long: its sockets' paths would have {longest} bytes, the kernel takes "
            f"{_MAX_SOCKET_PATH_BYTES}"
        )
    if settings.metrics.listen is not None:
        split_listen(settings.metrics.listen)
    if not 0 <= settings.dataplane.queue_number <= 65_534:
        raise SettingsError("dataplane.queueNumber: must be 0 to 65534: the next number is used too")
    _check_cluster(settings)
    _check_bounds(settings)


def _check_cluster(settings: Settings) -> None:
    if settings.kubernetes.enabled and settings.policy_dir is not None:
        raise SettingsError("policyDir and kubernetes.enabled: policies come from one of them, not from both")
    if settings.kubernetes.placement.enabled and not settings.kubernetes.enabled:
        raise SettingsError("kubernetes.placement.enabled: needs kubernetes.enabled")


def _check_bounds(settings: Settings) -> None:
    credentials, handshake, kubernetes = settings.credentials, settings.handshake, settings.kubernetes
    positive = {
        "registration.enrolEveryS": settings.registration.enrol_every_s,
        "handshake.tokenLifetimeS": handshake.token_lifetime_s,
        "handshake.timeoutS": handshake.timeout_s,
        "handshake.maxHalfOpenFlows": handshake.max_half_open_flows,
        "handshake.maxHalfOpenFlowsPerSource": handshake.max_half_open_flows_per_source,
        "handshake.maxHeldPackets": handshake.max_held_packets,
        "handshake.maxHeldPacketsPerSource": handshake.max_held_packets_per_source,
        "handshake.maxHeldPacketsPerPod": handshake.max_held_packets_per_pod,
        "handshake.maxSettledFlows": handshake.max_settled_flows,
        "handshake.maxCachedPeers": handshake.max_cached_peers,
        "handshake.maxCachedCredentials": handshake.max_cached_credentials,
        "handshake.maxRefusedIdentities": handshake.max_refused_identities,
        "handshake.maxVerificationSources": handshake.max_verification_sources,
        "handshake.maxNonces": handshake.max_nonces,
        "handshake.maxHandshakesAgainPerS": handshake.max_handshakes_again_per_s,
        "handshake.maxOwnPackets": handshake.max_own_packets,
        "handshake.maxReports": handshake.max_reports,
        "handshake.maxVerificationsPerS": handshake.max_verifications_per_s,
        "handshake.maxTotalVerificationsPerS": handshake.max_total_verifications_per_s,
        "kubernetes.pageSize": kubernetes.page_size,
        "kubernetes.requestTimeoutS": kubernetes.request_timeout_s,
        "kubernetes.watchSilenceS": kubernetes.watch_silence_s,
        "kubernetes.maxBackoffS": kubernetes.max_backoff_s,
        "kubernetes.syncTimeoutS": kubernetes.sync_timeout_s,
        "kubernetes.admissionTimeoutS": kubernetes.admission_timeout_s,
        "kubernetes.keepEveryS": kubernetes.keep_every_s,
        "kubernetes.events.maxPerMinute": kubernetes.events.max_per_minute,
        "kubernetes.events.maxPerMinutePerObject": kubernetes.events.max_per_minute_per_object,
        "kubernetes.events.repeatS": kubernetes.events.repeat_s,
        "kubernetes.placement.maxPerS": kubernetes.placement.max_per_s,
        "kubernetes.placement.retryS": kubernetes.placement.retry_s,
        "kubernetes.placement.denialS": kubernetes.placement.denial_s,
        "dataplane.queueLength": settings.dataplane.queue_length,
        "dataplane.packetsPerTurn": settings.dataplane.packets_per_turn,
        "dataplane.receiveBufferBytes": settings.dataplane.receive_buffer_bytes,
    }
    for name, value in positive.items():
        if not value > 0:
            raise SettingsError(f"{name}: must be more than 0")
    _check_times(handshake)
    _check_rates(settings.dataplane)
    _check_lifetime(credentials)


def _check_rates(dataplane: DataplaneSettings) -> None:
    rates = {"PerSource": dataplane.max_packets_per_s_per_source, "": dataplane.max_packets_per_s}
    for name, rate in rates.items():
        if not MIN_PACKETS_PER_S <= rate <= MAX_PACKETS_PER_S:
            raise SettingsError(f"dataplane.maxPacketsPerS{name}: must be {MIN_PACKETS_PER_S} to {MAX_PACKETS_PER_S}")


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


def _check_times(handshake: HandshakeSettings) -> None:
    if handshake.token_lifetime_s > MAX_TOKEN_LIFETIME_S:
        raise SettingsError(
            f"handshake.tokenLifetimeS: must be at most {MAX_TOKEN_LIFETIME_S:g} (a day): until a token ends, it "
            "states labels that its pod may have lost, and whoever took its key can use it"
        )
    if handshake.clock_leeway_s < 0:
        raise SettingsError("handshake.clockLeewayS: must not be negative")


def _check_lifetime(credentials: CredentialSettings) -> None:
    least, why = MIN_CERTIFICATE_LIFETIME_S, "it is renewed at two thirds, and looked at once a second"
    if credentials.source is CredentialSource.KUBERNETES:
        least, why = MIN_REQUESTED_LIFETIME_S, "the API server takes no request for less"
    if credentials.certificate_lifetime_s < least:
        raise SettingsError(f"credentials.certificateLifetimeS: must be at least {least:g}: {why}")


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
