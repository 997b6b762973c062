# SPDX-License-Identifier: Apache-2.0
"""The values that all parts of the enforcer share: pods, identities, decisions. No behavior beyond their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from enforcer_daemon.enums import with_plain_members
from enforcer_daemon.reasons import Reason

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


@with_plain_members
class Direction(Enum):
    """Which way a packet or a rule goes, seen from the pod."""

    INGRESS = "ingress"
    EGRESS = "egress"

    # Members are single objects and key the counters of the hot path; Enum's own hash is that of the name, in Python.
    __hash__ = object.__hash__


@with_plain_members
class Protocol(IntEnum):
    """The protocols that a NetworkPolicy can name; the value is the IP protocol number."""

    TCP = 6
    UDP = 17
    SCTP = 132


def protocol_name(number: int) -> str:
    """Name an IP protocol for people: TCP, UDP, SCTP, ICMP, ICMPv6, or its number."""
    return _PROTOCOL_NAMES.get(number) or f"protocol {number}"


_PROTOCOL_NAMES = {protocol.value: protocol.name for protocol in Protocol} | {1: "ICMP", 58: "ICMPv6"}


@dataclass(frozen=True, slots=True, order=True)
class PodRef:
    """A pod by name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class NamedPort:
    """A container port that has a name."""

    name: str
    number: int
    protocol: Protocol


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """Who a pod is: what its token states and what policy evaluates. Compared by object, so that it can key a cache."""

    pod: PodRef
    ips: tuple[IPAddress, ...]
    labels: Mapping[str, str]
    namespace_labels: Mapping[str, str]
    node: str
    service_account: str = "default"
    trust_domain: str = "cluster.local"
    named_ports: tuple[NamedPort, ...] = ()
    uid: str = ""
    """The cluster's name for this very pod; empty if nobody compares it."""


@dataclass(frozen=True, slots=True)
class EvaluatedFlow:
    """What flows with one peer were evaluated by: those that are released under one index have it in common."""

    direction: Direction
    """EGRESS where the pod opened the flow."""
    peer: Identity
    address: IPAddress
    """Of the peer, as it was evaluated: behind a Service conntrack has another."""
    port: int
    """The responder's own; 0 stands for all ports beyond those that one peer may have entries for."""
    protocol: Protocol


@dataclass(frozen=True, slots=True, order=True)
class RuleRef:
    """One rule of one NetworkPolicy: the policy and the rule's index in its direction."""

    namespace: str
    policy: str
    rule: int | None = None
    """Index in spec.ingress or spec.egress; None if the policy as a whole isolates the pod."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.policy}" + ("" if self.rule is None else f"[{self.rule}]")


@dataclass(frozen=True, slots=True, order=True)
class ClusterRuleRef:
    """One rule of one ClusterNetworkPolicy, with what it does."""

    tier: str
    policy: str
    rule: int
    """Index in spec.ingress or spec.egress."""
    name: str
    """Empty if the rule has none."""
    action: str

    def __str__(self) -> str:
        name = f' "{self.name}"' if self.name else ""
        return f"cluster policy {self.tier}/{self.policy} rule {self.rule}{name} ({self.action})"


@dataclass(frozen=True, slots=True)
class Decision:
    """What policy says of one flow in one direction, and by which policies and rules."""

    is_allowed: bool
    reason: Reason
    direction: Direction
    rules: tuple[RuleRef, ...] = field(default=())
    """The rules that allow the flow; for a denial, the policies that isolate the pod."""
    cluster_rules: tuple[ClusterRuleRef, ...] = field(default=())
    """The rules of cluster policies that passed the flow on or decide it, in the order in which they are asked."""


@dataclass(frozen=True, slots=True, order=True)
class AttachmentId:
    """One interface of one sandbox, as the CNI runtime names it. The key of all state of an endpoint."""

    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.container_id}/{self.ifname}"


@dataclass(frozen=True, slots=True, order=True)
class NetnsId:
    """A network namespace, as the kernel tells one from another (stat of its nsfs file)."""

    device: int
    inode: int
