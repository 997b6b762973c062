# SPDX-License-Identifier: Apache-2.0
"""Settings that have no effect, or more than can be meant, because of other settings. Pure.

What has no effect at all is an error: an operator who wrote it relies on it. What is harmless, or may be meant, is a
warning: at start, in `triremectl status`, and by `--check-config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from enforcer_daemon.model import IPNetwork
from enforcer_daemon.settings import CredentialSettings, CredentialSource, NetworkSettings, Settings
from enforcer_daemon.virtual import NO_HOST

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
"""RFC 1123 label, as the API server requires of a namespace's name."""
_NEEDS_CLUSTER = "has no effect without kubernetes.enabled"


def errors_of(settings: Settings) -> Iterator[str]:
    """Yield each setting that has no effect, and why; each line begins with the key."""
    for key, networks in _pools(settings.networks):
        yield from _pool_errors(key, networks, settings)
    yield from _identity_errors(settings)
    if settings.kubernetes.kubeconfig is not None and not settings.kubernetes.enabled:
        yield f"kubernetes.kubeconfig: {_NEEDS_CLUSTER}"
    yield from _credential_errors(settings.credentials)
    for index, name in enumerate(settings.registration.excluded_namespaces):
        if not _NAMESPACE.fullmatch(name):
            key = f"registration.excludedNamespaces[{index}]"
            yield f'{key}: "{name}" has no effect: no namespace can have this name'


def warnings_of(settings: Settings) -> Iterator[str]:
    """Yield what the operator should look at; each line begins with the key."""
    networks = settings.networks
    yield from _wide(networks)
    if networks.virtual:
        for key, pool in _pools(networks):
            if pool is not None:
                yield f"{key}: has no effect, since networks.virtual replaces what Services state, and covers it"
    for network in networks.enforced:
        if _covers(networks.virtual, network):
            yield (
                f"networks.enforced: {network} is within networks.virtual, which takes precedence: pods there are "
                "dialed as Services are, and networks.requireIdentity does not apply to them"
            )
    if not settings.kubernetes.enabled:
        if not (networks.enforced or networks.virtual):
            yield (
                "networks.enforced and networks.virtual: both are empty, so no connection carries an identity, and "
                "policies decide by address alone"
            )
        if settings.policy_dir is None:
            yield "policyDir: is null without kubernetes.enabled, so there are no policies, and no pod is isolated"
    yield from _lifetime_warnings(settings.credentials)


def _pools(networks: NetworkSettings) -> Iterator[tuple[str, tuple[IPNetwork, ...] | None]]:
    """Yield the networks where addresses of Services count; None: the default."""
    yield "networks.externalIpNetworks", networks.external_ip_networks or None
    yield "networks.loadBalancerNetworks", networks.load_balancer_networks


def _pool_errors(key: str, pool: tuple[IPNetwork, ...] | None, settings: Settings) -> Iterator[str]:
    networks = settings.networks
    if pool is None:
        return
    if not settings.kubernetes.enabled:
        yield f"{key}: {_NEEDS_CLUSTER}"
    elif networks.virtual:
        missing = [str(network) for network in pool if not _covers(networks.virtual, network)]
        if missing:
            verb = ("is", "it is") if len(missing) == 1 else ("are", "they are")
            yield (
                f"{key}: has no effect, since networks.virtual replaces what Services state; {', '.join(missing)} "
                f"{verb[0]} not in networks.virtual, so {verb[1]} not virtual"
            )
    elif not settings.kubernetes.watch_services:
        yield f"{key}: has no effect with kubernetes.watchServices false: no Service is read"
    else:
        for index, network in enumerate(pool):
            if why := _why_never_virtual(network, networks.enforced):
                yield f"{key}[{index}]: {network} has no effect: {why}"


def _why_never_virtual(network: IPNetwork, enforced: Iterable[IPNetwork]) -> str:
    if _covers(enforced, network):
        return "an address inside networks.enforced is a pod's, whatever a Service states"
    if _covers(NO_HOST, network):
        return "it holds no address of a single host outside (loopback, link-local, multicast, reserved)"
    return ""


def _identity_errors(settings: Settings) -> Iterator[str]:
    networks = settings.networks
    if not networks.require_identity:
        return
    key = "networks.requireIdentity"
    if not networks.enforced and not settings.kubernetes.enabled:
        yield f"{key}: has no effect without networks.enforced (or kubernetes.enabled, to discover them)"
    if networks.enforced and all(_covers(networks.virtual, network) for network in networks.enforced):
        yield (
            f"{key}: has no effect, since all of networks.enforced is within networks.virtual, which takes precedence"
        )


def _credential_errors(credentials: CredentialSettings) -> Iterator[str]:
    bundle = "credentials.bundleConfigMap: has no effect with credentials"
    if credentials.source is not CredentialSource.KUBERNETES:
        other = credentials.source.value
        if credentials.bundle_config_map is not None:
            yield f"{bundle}.source {other}"
        if credentials.signer_name != CredentialSettings().signer_name:
            yield f"credentials.signerName: has no effect with credentials.source {other}"
    elif credentials.bundle_config_map is not None and credentials.trust_bundle is not None:
        yield f"{bundle}.trustBundle, which takes precedence"


def _lifetime_warnings(credentials: CredentialSettings) -> Iterator[str]:
    token, certificate = credentials.token_lifetime_s, credentials.certificate_lifetime_s
    if credentials.source is CredentialSource.FILES:
        if certificate != CredentialSettings().certificate_lifetime_s:
            yield (
                "credentials.certificateLifetimeSeconds: has no effect with credentials.source files: the file's "
                "certificate states its validity"
            )
    elif token > certificate:
        yield (
            f"credentials.tokenLifetimeSeconds: {token:g} has no effect beyond credentials.certificateLifetimeSeconds "
            f"({certificate:g}): a token ends with the certificate that signs it"
        )


def _wide(networks: NetworkSettings) -> Iterator[str]:
    """Warn of networks that hold every address of a family."""
    meanings = {
        "enforced": "is every {} address: pods send their identity to hosts outside the cluster too",
        "virtual": "is every {} address: pods send their identity to hosts outside the cluster too",
        "externalIpNetworks": "allows every {} address: any user who may create a Service decides where pods of all "
        "namespaces send their identity",
        "loadBalancerNetworks": "restricts nothing in {}",
    }
    lists = (
        networks.enforced,
        networks.virtual,
        networks.external_ip_networks,
        networks.load_balancer_networks or (),
    )
    for (key, meaning), found in zip(meanings.items(), lists, strict=True):
        for network in found:
            if network.prefixlen == 0:
                yield f"networks.{key}: {network} {meaning.format(f'IPv{network.version}')}"


def _covers(networks: Iterable[IPNetwork], inner: IPNetwork) -> bool:
    """Return whether every address of `inner` is in one of the networks."""
    if isinstance(inner, IPv4Network):
        return any(map(inner.subnet_of, collapse_addresses(n for n in networks if isinstance(n, IPv4Network))))
    return any(map(inner.subnet_of, collapse_addresses(n for n in networks if isinstance(n, IPv6Network))))
