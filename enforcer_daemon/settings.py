# SPDX-License-Identifier: Apache-2.0
"""The model of the daemon's settings: one field for each decision that an operator can make.

A field states everything about its setting once: type, range, default, and help (the text below it). From this model
come the decoder (`settings_file.py`) and, by `make manifests`, conf/enforcer.yaml, the chart's values.schema.json and
docs/settings.md. The classes are plain frozen dataclasses, so that the core depends on values alone; pydantic reads
them at the edge. A limit that nobody can choose better than the author is no setting: see docs/threat-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Predicate

from enforcer_daemon.model import IPAddress, IPNetwork

_MAX_SECONDS = 1e9
"""Thirty years: more is a mistake."""

AbsolutePath = Annotated[Path, Predicate(Path.is_absolute)]
Seconds = Annotated[float, Gt(0), Le(_MAX_SECONDS)]


def key_of(name: str) -> str:
    """Return a field's name in the file: camelCase, with durations in `Seconds` as in the Kubernetes API."""
    stem = name.removesuffix("_s")
    head, *rest = (stem if stem == name else f"{stem}_seconds").split("_")
    return head + "".join(part.capitalize() for part in rest)


class _Group:
    """Tells pydantic how a group is decoded: without conversions, and without unknown keys."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "alias_generator": key_of,
        "allow_inf_nan": False,
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
    }


class DenyWith(Enum):
    """What a denied connection attempt sees."""

    DROP = "drop"
    RESET = "reset"


class RulesBackend(Enum):
    """How rules reach the kernel."""

    AUTO = "auto"
    NFT = "nft"
    IPTABLES = "iptables"


class CredentialSource(Enum):
    """Who certifies the node's key."""

    AUTHORITY = "authority"
    FILES = "files"
    KUBERNETES = "kubernetes"


class LogLevel(Enum):
    """The least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class CredentialSettings(_Group):
    """The node's certificate, the tokens that it signs, and the authorities that it trusts."""

    source: CredentialSource = CredentialSource.AUTHORITY
    """Who certifies the node's key. `authority`: the daemon itself, with the authority below. `files`: you provide
    certificate and key. `kubernetes`: the daemon makes a key and requests a certificate from the cluster
    (docs/keys.md#from-the-cluster)."""
    certificate: AbsolutePath | None = None
    """PEM file with the node's certificate, for source `files`. The daemon picks up a changed file."""
    key: AbsolutePath | None = None
    """PEM file with the certificate's key, for source `files`. May be the same file."""
    signer_name: str = "trireme.io/node"
    """The signer that the certificate is requested from, for source `kubernetes`."""
    bundle_config_map: str | None = None
    """ConfigMap (`NAMESPACE/NAME`) with the trust bundle in its entry `bundle.pem`, for source `kubernetes` if
    `trustBundle` is null. Null: `trireme-trust-bundle` in the namespace of the daemon's own pod (`POD_NAMESPACE`, or
    its service account's); outside a pod you must name it."""
    ca_certificate: AbsolutePath | None = None
    """PEM file with the authority that signs the node's certificate, for source `authority`. Null: the daemon makes an
    authority of its own, and the node then understands itself alone."""
    ca_key: AbsolutePath | None = None
    """PEM file with that authority's key. Set both or none."""
    trust_bundle: AbsolutePath | None = None
    """PEM file with all authorities that may sign peers, each for the one trust domain that it states (docs/keys.md).
    Null: the authority above alone. The daemon picks up a changed file."""
    certificate_lifetime_s: Annotated[float, Ge(5), Le(_MAX_SECONDS)] = 86_400.0
    """Validity of the node's certificate; renewed at two thirds. For source `kubernetes` at least 600, the minimum of
    the API server."""
    token_lifetime_s: Annotated[float, Gt(0), Le(86_400)] = 600.0
    """Validity of a pod's identity token; renewed at half. Until it ends, a token states labels that its pod may have
    lost, and a stolen key can use it."""
    clock_leeway_s: Annotated[float, Ge(0), Le(_MAX_SECONDS)] = 30.0
    """How far the clocks of two nodes may differ (docs/keys.md#clocks)."""


@dataclass(frozen=True, slots=True)
class NetworkSettings(_Group):
    """Which addresses are pods, which are Services. Must be the same on all nodes."""

    enforced: tuple[IPNetwork, ...] = ()
    """Networks whose pods have enforcers. Connections to other addresses carry no identity, and policy decides them by
    address. Empty: discovered with `kubernetes.enabled`; **otherwise no connection carries an identity**."""
    virtual: tuple[IPNetwork, ...] = ()
    """Addresses of Services, load balancers and node ports that lead to such pods. With `kubernetes.enabled` it
    replaces everything that is discovered (docs/kubernetes.md#virtual-addresses)."""
    load_balancer_networks: tuple[IPNetwork, ...] | None = None
    """Where addresses in the status of Services are trusted, with `kubernetes.enabled`. Null: everywhere, since users
    of a namespace cannot write a status. Set it to the pools of your load balancers if their controller grants
    whatever address a user asks for (`spec.loadBalancerIP`)."""
    external_ip_networks: tuple[IPNetwork, ...] = ()
    """Where `spec.externalIPs` of Services are trusted, with `kubernetes.enabled`. Empty: nowhere, since any user who
    may create a Service writes them."""
    masquerade: tuple[IPAddress, ...] = ()
    """Addresses outside the enforced networks that pods' connections may be masqueraded to, such as other nodes' if
    node ports are used. Tokens from these sources are not compared with the source address, which weakens their
    binding to addresses."""
    require_identity: bool = False
    """Deny TCP connections and UDP flows from inside the enforced networks that show no identity, even if no policy
    isolates the pod that they go to, and whatever rules by address say; the node itself excepted. Pods in excluded
    namespaces and on nodes without an enforcer then reach no enforced pod."""


@dataclass(frozen=True, slots=True)
class RegistrationSettings(_Group):
    """How pods come to the daemon."""

    run_dir: AbsolutePath = Path("/run/trireme")
    """Sockets, records of pods and queued deletions. Must be the conflist's `runDir`."""
    excluded_namespaces: tuple[str, ...] = ()
    """Kubernetes namespaces whose pods are not enforced. If the list has changed at a start, running pods lose their
    rules or get them."""
    require_labels: bool = False
    """Refuse a pod whose labels are unknown (no Pod manifest in `policyDir`, none from the runtime): ADD fails and says
    so. Otherwise the pod starts, policies that select by label do not reach it, and `triremectl status` names it."""
    cni_results_dir: AbsolutePath | None = None
    """The runtime's records of its pods, usually `/var/lib/cni/results`. The daemon discovers pods that started without
    the plugin there, and enforces them (docs/registration.md#pods-that-started-without-the-plugin). Null: it does
    not, and they are not enforced."""


@dataclass(frozen=True, slots=True)
class KubernetesSettings(_Group):
    """The cluster's API server as the source of policies, namespaces, pods and networks."""

    enabled: bool = False
    """Take policies, namespaces, pods and networks from the API server (docs/kubernetes.md); `policyDir` must be
    null."""
    kubeconfig: AbsolutePath | None = None
    """How to reach the API server, and as whom. Null: the pod's service account."""
    watch_services: bool = True
    """Watch Services for external and load balancer addresses and node ports. Has no effect if `networks.virtual` is
    set."""
    send_events: bool = True
    """Send Events about denied flows, refused policies and identities that are too large
    (docs/kubernetes.md#events)."""
    verify_placement: bool = False
    """Look up whether the pods that other nodes' tokens name are on these nodes (docs/kubernetes.md#placement): one
    request for each pod that this node's pods talk to, and some 30 bytes in each token. Must be the same on all
    nodes."""


@dataclass(frozen=True, slots=True)
class DataplaneSettings(_Group):
    """Rules and queues in the pods' network namespaces."""

    rules_backend: RulesBackend = RulesBackend.AUTO
    """`nft`, `iptables`, or `auto`: nft if the kernel has the nft queue expression."""
    syn_rate_limit_per_source: Annotated[int, Ge(1_000), Le(1_000_000)] = 4_000
    """SYNs and SYN-ACKs per second from one source address that reach a pod's enforcer, in each direction, with a burst
    of one second's worth. All sources of a pod together may send twice as many. Of handshake messages twice as many
    pass, of other packets that are queued three times. The kernel drops and counts the rest. Established flows are
    neither queued nor counted. The default is about as many connections as one enforcer can handle; raise it if many
    clients share one source address."""


@dataclass(frozen=True, slots=True)
class LogSettings(_Group):
    """What is written to standard error: JSON, or aligned text if standard error is a terminal."""

    level: LogLevel = LogLevel.INFO
    """`debug` (a line for each decision), `info` (a line for each change or denial), `warning` or `error`."""


@dataclass(frozen=True, slots=True)
class MetricsSettings(_Group):
    """Metrics over the network, in addition to the operators' socket."""

    listen: str | None = None
    """`ADDRESS:PORT` of `GET /metrics` over HTTP, as `127.0.0.1:9475` or `[::1]:9475`, open to all who reach it. Null:
    no port is opened."""


@dataclass(frozen=True, slots=True)
class Settings(_Group):
    """Everything that the daemon can be told."""

    node: str
    """This node's name, in its certificate and in every token: a DNS name in lower case. `--node` and `TRIREME_NODE`
    take precedence."""
    trust_domain: str = "cluster.local"
    """The cluster's name in certificates and tokens (SPIFFE trust domain)."""
    state_dir: AbsolutePath = Path("/var/lib/trireme")
    """Keys, certificates and the last good version of each policy (0700)."""
    policy_dir: AbsolutePath | None = None
    """Directory of manifests (NetworkPolicy, Namespace, Pod), watched for changes (docs/policy.md). Null: no policies,
    so no pod is isolated. If the directory does not exist, the daemon does not start."""
    deny_with: DenyWith = DenyWith.DROP
    """What a denied connection sees: `drop` (a timeout) or `reset` (a refusal)."""
    credentials: CredentialSettings = field(default_factory=CredentialSettings)
    networks: NetworkSettings = field(default_factory=NetworkSettings)
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    dataplane: DataplaneSettings = field(default_factory=DataplaneSettings)
    log: LogSettings = field(default_factory=LogSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
