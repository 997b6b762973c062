# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as policy sees them: typed values, already checked, with every default filled in.

Field names follow the API reference (https://kubernetes.io/docs/reference/kubernetes-api/policy-resources/
network-policy-v1/), but the meanings of absent and empty lists are settled here once: a rule without peers is for
anyone, a rule without ports for every port of every protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol as Protocol_

from enforcer_daemon.model import Direction, IPAddress, IPNetwork, NamedPort, PodRef, Protocol

LAST_PORT = 65_535
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
"""Label that the API server puts on every namespace, with its name."""
TRUST_DOMAIN_LABEL = "trireme.io/trust-domain"
"""Label that every peer's namespace carries here, from the peer's verified trust domain and never from its claims."""


class Operator(Enum):
    """How a requirement compares a label; the value is the word of the API."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on labels; an entry of matchLabels is an IN with one value."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Return whether the labels meet it; NOT_IN holds also where the key is absent."""
        match self.operator:
            case Operator.IN:
                return labels.get(self.key) in self.values
            case Operator.NOT_IN:
                return labels.get(self.key) not in self.values
            case Operator.EXISTS:
                return self.key in labels
            case Operator.DOES_NOT_EXIST:
                return self.key not in labels


@dataclass(frozen=True, slots=True)
class Selector:
    """Requirements that must all hold; without any it selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether an object with these labels is selected."""
        for requirement in self.requirements:  # noqa: SIM110 - a generator costs more than the whole loop
            if not requirement.holds(labels):
                return False
        return True

    def names(self, key: str) -> bool:
        """Return whether any requirement is about this label."""
        return any(requirement.key == key for requirement in self.requirements)


EVERYTHING = Selector()


@dataclass(frozen=True, slots=True)
class IPBlock:
    """Addresses: a network less its exceptions. It never matches the other address family."""

    network: IPNetwork
    excepts: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class PodPeer:
    """Pods by labels, in namespaces by labels."""

    pod_selector: Selector
    namespace_selector: Selector | None = None
    """None: the policy's own namespace."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Destination ports of one protocol, both ends included."""

    protocol: Protocol
    first: int = 0
    last: int = LAST_PORT

    @property
    def is_all(self) -> bool:
        """Whether the range holds every port of its protocol."""
        return self.first == 0 and self.last == LAST_PORT


@dataclass(frozen=True, slots=True)
class PortName:
    """A destination port by its name, which each destination pod resolves for itself."""

    protocol: Protocol
    name: str


Peer = IPBlock | PodPeer
PortMatch = PortRange | PortName


@dataclass(frozen=True, slots=True)
class Rule:
    """What one entry of spec.ingress or spec.egress allows."""

    peers: tuple[Peer, ...] = ()
    """Any of these; empty: anyone, addresses outside the cluster included."""
    ports: tuple[PortMatch, ...] = ()
    """Any of these; empty: every port of every protocol."""


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """One NetworkPolicy; a direction that its types do not name isolates nobody and has no rules here."""

    namespace: str
    name: str
    pod_selector: Selector = EVERYTHING
    ingress: tuple[Rule, ...] | None = ()
    """None: the policy does not isolate its pods for ingress. Empty: it isolates them and allows nothing."""
    egress: tuple[Rule, ...] | None = None
    """None: the policy does not isolate its pods for egress. Empty: it isolates them and allows nothing."""

    size: int = field(default=0, compare=False)
    """Bytes that it is stored in (`limits`); 0 of one that stands in for others."""

    def rules(self, direction: Direction) -> tuple[Rule, ...] | None:
        """Return the rules of one direction; None if the policy does not isolate in it."""
        return self.ingress if direction is Direction.INGRESS else self.egress

    def load(self) -> NetworkPolicy:
        """Return it: it is decoded."""
        return self

    def unload(self) -> None:
        """Do nothing: it has no other form."""


class AnyPolicy(Protocol_):
    """A policy, decoded or yet to be."""

    @property
    def namespace(self) -> str:
        """Where it is."""

    @property
    def name(self) -> str:
        """What it is called there."""

    @property
    def size(self) -> int:
        """Bytes that it takes while it is not decoded; 0: not known."""

    def load(self) -> NetworkPolicy:
        """Return it decoded."""

    def unload(self) -> None:
        """Give the decoded form up, if there is another."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace and its labels; kubernetes.io/metadata.name is always among them."""

    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pod:
    """What policy needs of a pod. The rest of its manifest is not read."""

    ref: PodRef
    labels: Mapping[str, str]
    service_account: str = "default"
    named_ports: tuple[NamedPort, ...] = ()
    """Of its containers and its restartable init containers (sidecars), which run and listen beside them."""
    ips: tuple[IPAddress, ...] = ()
    """From status.podIPs; empty if the manifest has no status."""
    node: str = ""
    is_on_host_network: bool = False
    is_finished: bool = False
    """Phase Succeeded or Failed: its address may already be another pod's."""
    uid: str = ""
    """What the runtime calls it, where the source knows that: the UID, or a static pod's config hash."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service."""

    name: str
    number: int
    protocol: Protocol
    target: int | str
    """The pod's port, or the name that the pod gives it."""

    def __str__(self) -> str:
        return f"{self.protocol.name} {self.number}{f' ({self.name})' if self.name else ''}"


@dataclass(frozen=True, slots=True)
class Service:
    """What decides which pods are behind an address. For `triremectl simulate` alone."""

    namespace: str
    name: str
    selector: Mapping[str, str]
    """Labels of its pods; empty: somebody else writes its endpoints."""
    addresses: tuple[IPAddress, ...] = ()
    """Of the cluster and of load balancers."""
    external_ips: tuple[IPAddress, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    is_external_name: bool = False

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
