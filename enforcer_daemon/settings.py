# SPDX-License-Identifier: Apache-2.0
"""The daemon's settings: frozen values by concern. `settings_file` reads and checks them.

The names in the file are these fields in camelCase, grouped as the classes are: see conf/enforcer.yaml for an example
with every key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from enforcer_daemon.model import IPAddress, IPNetwork


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
    A SYN to them carries a frame. With kubernetes.enabled, set it to replace all that is discovered."""
    load_balancer_networks: tuple[IPNetwork, ...] | None = None
    """Where addresses that load balancers' controllers write into the status of Services are believed; unset:
    everywhere, since users of a namespace cannot write a status. Narrow it to the load balancers' pools where a
    controller grants whatever address a user asks for (spec.loadBalancerIP)."""
    external_ip_networks: tuple[IPNetwork, ...] = ()
    """Where spec.externalIPs of Services are believed. Nowhere by default: whoever may create a Service writes them."""
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
    max_settled_flows: int = 4_096
    """Released flows of one endpoint and direction that are remembered a while, to answer for a lost proof."""
    max_cached_peers: int = 16_384
    """Verified tokens that a node remembers."""
    max_cached_credentials: int = 16_384
    """Other nodes' verified credentials that a node remembers."""
    max_refused_identities: int = 4_096
    """Identity blocks that a node remembers as refused, and as many credentials."""
    max_verification_sources: int = 4_096
    """Sources of each rank whose allowance for signature checks a node remembers."""
    max_nonces: int = 65_536
    """Nonces that a node remembers against replays."""
    max_handshakes_again_per_s: float = 64.0
    """Handshakes of UDP flows that are shaken hands for again, of one endpoint in a second: it asks for so many, and
    begins so many because it was asked (burst: the same number). A flow needs one after a loss of state only."""
    max_own_packets: int = 4_096
    """Packets of the enforcer's own on their way through one endpoint's queue; of those beyond it the oldest is not
    known again, and does not leave. As many as a full queue has answers."""
    max_reports: int = 1_024
    """Decisions of one endpoint that wait to be logged; those beyond it are counted only."""
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
    """How long a node that claimed another node's pod, or a claim of a pod that is not there, is denied, seconds."""


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
    """SYNs and SYN-ACKs of one source address that are queued in a second, in one direction; handshakes' messages twice
    as many, of the rest of what is queued three times. As many may come at once; beyond it the kernel drops. About as
    many connections as one enforcer makes."""
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
