# SPDX-License-Identifier: Apache-2.0
"""What a lab's world consists of: plain values, with defaults that give dual-stack nodes that reach one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from enforcer_daemon.model import IPAddress, IPNetwork, PodRef, Protocol
from trireme_lab.errors import ScenarioError

Manifest = Mapping[str, object]
"""A Kubernetes object as YAML gives it."""

SERVICE_NETWORKS = (ip_network("10.96.0.0/16"), ip_network("fd00:10:96::/112"))
"""Where virtual addresses of Services lie; the daemons are told so (settings key networks.virtual)."""

MAX_NODES = 200
"""The default addresses of a node carry its number in one byte."""


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A port on which a pod or a host answers with a banner and then echoes."""

    number: int
    protocol: Protocol = Protocol.TCP
    name: str = ""
    """Name for NetworkPolicy; empty: a port without a name."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node: a network namespace with an enforcer and a bridge for its pods."""

    name: str
    addresses: tuple[IPAddress, ...]
    pod_networks: tuple[IPNetwork, ...]
    is_routed: bool = False
    """Pods have addresses of any range, each with a route of its own: pod_networks are then single addresses, one for
    each pod, and no IPAM chooses."""

    @classmethod
    def numbered(cls, name: str, number: int) -> NodeSpec:
        """Return node `number` (1 to MAX_NODES) with the default addresses and pod networks of both families."""
        return cls(
            name,
            (ip_address(f"192.168.60.{10 + number}"), ip_address(f"fd00:60::{10 + number:x}")),
            (ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:244:{number:x}::/64")),
        )


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod, made by the CNI chain of its node."""

    pod: PodRef
    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[IPAddress, ...] = ()
    """Fixed addresses, asked for by the runtime capability `ips`; empty: the node's IPAM chooses."""
    ports: tuple[PortSpec, ...] = ()
    service_account: str = "default"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A machine without an enforcer."""

    name: str
    addresses: tuple[IPAddress, ...] = ()
    """May be empty only on a node's bridge, where the node's IPAM then chooses."""
    ports: tuple[PortSpec, ...] = ()
    node: str | None = None
    """Attach it to this node's pod bridge, like a pod that nobody enforces; None: attach it to the fabric."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service."""

    port: int
    target_port: int
    protocol: Protocol = Protocol.TCP
    node_port: int | None = None
    """Also answer on this port of every node's addresses."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A Service: virtual addresses that each node translates to one of the pods, or of the hosts."""

    namespace: str
    name: str
    addresses: tuple[IPAddress, ...]
    pods: tuple[PodRef, ...]
    ports: tuple[ServicePort, ...]
    external_ips: tuple[IPAddress, ...] = ()
    """Addresses that each node translates too, with masquerade; the fabric routes them to the first node."""
    hosts: tuple[str, ...] = ()
    """Names of hosts that are endpoints, as of a Service without a selector (the API server's)."""


@dataclass(frozen=True, slots=True)
class LabSpec:
    """All that exists when a lab has started."""

    nodes: tuple[NodeSpec, ...]
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Kubernetes namespaces and their labels (kubernetes.io/metadata.name is added by whoever reads them)."""
    pods: tuple[PodSpec, ...] = ()
    hosts: tuple[HostSpec, ...] = ()
    services: tuple[ServiceSpec, ...] = ()
    manifests: tuple[Manifest, ...] = ()
    """Policies that are in force before the first pod starts."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Laid over the settings that the lab gives each daemon, group by group (keys as in conf/enforcer.yaml)."""
    enforcer: bool = True
    """False: no daemons, and pods without the trireme plugin: what the network does by itself."""

    def __post_init__(self) -> None:
        _check_unique("nodes", (node.name for node in self.nodes))
        _check_unique("pods", (str(pod.pod) for pod in self.pods))
        _check_unique("hosts", (host.name for host in self.hosts))
        _check_unique("addresses", map(str, self._addresses()))
        nodes = {node.name for node in self.nodes}
        for place, node in self._attachments():
            if node not in nodes:
                raise ScenarioError(f"{place}.node: {node} is not among the nodes")
        for index, host in enumerate(self.hosts):
            if host.node is None and not host.addresses:
                raise ScenarioError(f"hosts[{index}].addresses: {host.name} needs an address, or a node")
        pods = {pod.pod for pod in self.pods}
        for index, service in enumerate(self.services):
            for number, pod in enumerate(service.pods):
                if pod not in pods:
                    raise ScenarioError(f"services[{index}].pods[{number}]: there is no pod {pod}")
            for number, address in enumerate(service.external_ips):
                if any(
                    address in network for node in self.nodes for network in (*node.pod_networks, *SERVICE_NETWORKS)
                ):
                    where = f"services[{index}].externalIPs[{number}]"
                    raise ScenarioError(f"{where}: {address} is inside the networks of pods or of Services")

    def _attachments(self) -> Iterable[tuple[str, str]]:
        """Yield who hangs on which node's bridge."""
        for index, pod in enumerate(self.pods):
            yield f"pods[{index}]", pod.node
        for index, host in enumerate(self.hosts):
            if host.node is not None:
                yield f"hosts[{index}]", host.node

    def _addresses(self) -> Iterable[IPAddress]:
        owners: tuple[tuple[IPAddress, ...], ...] = (
            *(node.addresses for node in self.nodes),
            *(pod.addresses for pod in self.pods),
            *(host.addresses for host in self.hosts),
            *(service.addresses for service in self.services),
            *(service.external_ips for service in self.services),
        )
        for addresses in owners:
            yield from addresses


def _check_unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ScenarioError(f"{what}: {name} occurs twice")
        seen.add(name)
