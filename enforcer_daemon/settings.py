# SPDX-License-Identifier: Apache-2.0
"""The daemon's settings: frozen values by concern, read once at start from one YAML file; an unknown key is an error.

The names in the file are these fields in camelCase, grouped as the classes are: see conf/enforcer.yaml for an example
with every key.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import yaml

from enforcer_daemon.decoding import StrictLoader, decode_group
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.model import IPAddress, IPNetwork

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


@dataclass(frozen=True, slots=True)
class CredentialSettings:
    """Where the node's key comes from, and whom it trusts."""

    source: CredentialSource = CredentialSource.AUTHORITY
    """authority: the daemon signs with the authority below; files: others bring key and certificate; kubernetes: the
    daemon asks the cluster by CertificateSigningRequest."""
    certificate: Path | None = None
    """PEM of this node's certificate, with source files; followed."""
    key: Path | None = None
    """PEM of its key, with source files; may be the same file."""
    signer_name: str = "trireme.io/node"
    """Who is asked to sign, with source kubernetes."""
    bundle_config_map: str | None = None
    """Namespace and name of the ConfigMap with the trust bundle (entry bundle.pem), with source kubernetes where
    trust_bundle is unset; unset: trireme-trust-bundle in the namespace that the daemon's own pod is in."""
    ca_certificate: Path | None = None
    """PEM of the authority that signs this node's certificate; unset: the daemon makes one in its state directory."""
    ca_key: Path | None = None
    """PEM of that authority's key; set both or none."""
    trust_bundle: Path | None = None
    """PEM with every authority that peers may be signed by; unset: the authority above alone."""
    certificate_lifetime_s: float = 86_400.0
    """Validity of the node's certificate, seconds; renewed at two thirds."""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What lies where: addresses decide only whether a handshake is attempted and what may rewrite an address."""

    enforced: tuple[IPNetwork, ...] = ()
    """Networks whose pods have enforcers; a SYN to any other address carries no frame and is judged by address."""
    virtual: tuple[IPNetwork, ...] = ()
    """Addresses of Services, load balancers and node ports: the pod that answers has another address than was dialled.
    A SYN to them carries a frame."""
    masquerade: tuple[IPAddress, ...] = ()
    """Foreign addresses that pods' connections may be masqueraded to; their tokens' addresses are then not compared
    with the source. Weakens the binding of tokens to addresses for exactly these sources."""
    require_identity: bool = False
    """Whether connections from inside the enforced networks must show an identity also where no policy isolates the pod
    that they go to. Off: pods without an enforcer (excluded namespaces, nodes not yet set up) reach such pods."""


@dataclass(frozen=True, slots=True)
class HandshakeSettings:
    """Bounds and lifetimes of the handshake."""

    token_lifetime_s: float = 600.0
    """Validity of an identity token, seconds; a new one is signed at half of it. At most a day: until it ends, a token
    states labels that its pod may have lost."""
    clock_leeway_s: float = 30.0
    """How far the clocks of two nodes may differ, seconds."""
    timeout_s: float = 75.0
    """How long a handshake may stay unfinished; longer than a kernel retries its SYN-ACK (63 s)."""
    max_half_open_flows: int = 16_384
    """Unfinished handshakes of one endpoint and direction; beyond it the oldest one of the peer with most is given
    up."""
    max_half_open_flows_per_source: int = 2_048
    """Unfinished handshakes of one endpoint with one peer's address; beyond it the oldest of them is given up. At
    2,048 connections a second each has still a second."""
    max_held_packets: int = 64
    """Packets of one flow that wait for its proof."""
    max_held_packets_per_source: int = 256
    """Packets of one peer that wait for proofs; beyond it the oldest is dropped."""
    max_held_packets_per_pod: int = 1_024
    """Packets of one endpoint that wait for proofs; beyond it the oldest one of the peer with most is dropped. A
    quarter of the kernel queue's length."""
    max_cached_peers: int = 16_384
    """Verified tokens that a node remembers."""
    max_verifications_per_s: float = 200.0
    """Signature checks that one source address can cause in a second (burst: the same number)."""
    max_total_verifications_per_s: float = 1_000.0
    """Signature checks that the node makes in a second (burst: the same number), about a third of a core. Half is kept
    for peers of known nodes or from known addresses, half of that for peers of both."""


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    """The sockets of the plugin and of operators."""

    run_dir: Path = Path("/run/trireme")
    """Sockets, registry and the plugin's queue of deletions: same lifetime as a network namespace (0700)."""
    excluded_namespaces: tuple[str, ...] = ()
    """Kubernetes namespaces whose pods are not enforced at all."""
    require_labels: bool = False
    """Whether a pod of which no labels are known is refused. Off: it starts, and policies that select by label do not
    reach it until its Pod manifest comes."""
    delete_queue_dir: Path | None = None
    """Where the plugin leaves deletions while the daemon is down; unset: run_dir/deletions."""
    cni_results_dir: Path | None = None
    """The runtime's records of its pods (libcni's cache), to find those started without the plugin; unset: not done."""
    enrol_every_s: float = 30.0
    """How often such pods are looked for after the start, seconds."""


@dataclass(frozen=True, slots=True)
class EventSettings:
    """Events of the cluster about denied flows, refused policies and identities that do not fit."""

    enabled: bool = True
    """Whether they are made, where the world comes from the API server."""
    max_per_minute: float = 12.0
    """Requests about Events that the node makes in a minute (burst: the same number); more are counted only."""
    max_per_minute_per_object: float = 4.0
    """The same about one pod or policy."""
    repeat_s: float = 60.0
    """The shortest time between two updates of one Event's count, seconds."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Whether the pods that other nodes' tokens name are looked up in the cluster."""

    enabled: bool = False
    """Off by default: it costs each node a look-up for each pod that its own talk to, and each token some 30 bytes.
    Set it on all nodes: tokens without a UID are compared by name alone."""
    max_per_s: float = 10.0
    """Look-ups of the node in a second."""
    retry_s: float = 5.0
    """After this time a pod that was not found is looked up once more before that counts, seconds."""
    denial_s: float = 3_600.0
    """How long a node that claimed other nodes' pods is not believed, seconds."""


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """The cluster's API as the source of policies, namespaces, pods and networks."""

    enabled: bool = False
    """Whether the daemon's world comes from the API server; policyDir must then be unset."""
    kubeconfig: Path | None = None
    """How to reach the API server, and as whom; unset: the pod's service account."""
    watch_services: bool = True
    """Whether Services are watched for external and load balancer addresses and node ports. Off, or with
    networks.virtual set: they are not."""
    page_size: int = 500
    """Objects in one answer to a list."""
    request_timeout_s: float = 30.0
    """Silence after which a list is given up, seconds."""
    watch_silence_s: float = 150.0
    """Silence after which a watch is opened anew, seconds; the API server sends a bookmark about every 60, but only of
    a kind that changed since it started."""
    max_backoff_s: float = 30.0
    """The longest wait before the API server is asked again, seconds."""
    sync_timeout_s: float = 10.0
    """How long a start waits for the API server before what was kept on disk is put in force, seconds."""
    admission_timeout_s: float = 5.0
    """How long a registration waits for a pod that is not known yet, seconds; less than the plugin's 10."""
    keep_every_s: float = 5.0
    """The shortest time between two writings of what is in force to disk, seconds."""
    events: EventSettings = field(default_factory=EventSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)


@dataclass(frozen=True, slots=True)
class DataplaneSettings:
    """Rules and queues."""

    rules_backend: RulesBackend = RulesBackend.AUTO
    """auto: nft where the kernel has the nft queue expression, else iptables."""
    queue_number: int = 47_474
    """NFQUEUE number inside each pod's network namespace; the next number counts what exceeds the two rates below."""
    max_packets_per_s_per_source: int = 4_000
    """Packets of one source address that are queued in a second, in one direction: SYNs and SYN-ACKs, and separately
    the rest of what is queued. As many may come at once; beyond it the kernel drops. More than one enforcer judges."""
    max_packets_per_s: int = 8_000
    """The same for all sources of what comes to one pod together."""
    queue_length: int = 4_096
    """Packets that wait in one endpoint's queue; beyond it the kernel drops."""
    packets_per_turn: int = 16
    """Packets of one endpoint before the next endpoint has its turn; an eighth of it where more wait all the time."""
    receive_buffer_bytes: int = 4 * 1024 * 1024
    """Socket buffer of one queue; beyond it the kernel drops. Both are counted."""
    sysctl_dir: Path = Path("/proc/sys/net")
    """Where conntrack's settings in the pods' namespaces are set; in a container, where the node's are mounted, since
    its own cannot be written."""


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """Metrics over the network, beside the operators' socket."""

    listen: str | None = None
    """address:port where GET /metrics is answered over HTTP to anybody who can reach it, as 127.0.0.1:9475 or
    [::1]:9475; unset: no port is opened."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is written to standard error."""

    level: str = "info"
    """debug (a line a decision), info (a line a change or denial), warning or error."""
    format: str = "json"
    """json, or console for people."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the daemon can be told."""

    node: str
    """This node's name; it is part of the certificate and of every token."""
    trust_domain: str = "cluster.local"
    """Name of the cluster in certificates and tokens (SPIFFE trust domain)."""
    state_dir: Path = Path("/var/lib/trireme")
    """Keys and certificates (0700)."""
    policy_dir: Path | None = None
    """Directory of Kubernetes YAML or JSON (NetworkPolicy, Namespace, Pod), watched for change."""
    deny_with: DenyWith = DenyWith.DROP
    """drop: the client times out; reset: it is refused at once."""
    credentials: CredentialSettings = field(default_factory=CredentialSettings)
    networks: NetworkSettings = field(default_factory=NetworkSettings)
    handshake: HandshakeSettings = field(default_factory=HandshakeSettings)
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    dataplane: DataplaneSettings = field(default_factory=DataplaneSettings)
    log: LogSettings = field(default_factory=LogSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)


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
        "handshake.maxCachedPeers": handshake.max_cached_peers,
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
    """Give the address and port of metrics.listen; raise SettingsError."""
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
