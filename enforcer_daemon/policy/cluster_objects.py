# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicy as policy sees it: rules in their written order, with what is not understood already closed.

Source: policy.networking.k8s.io/v1alpha2 of network-policy-api v0.2.0. A rule with a peer that is not understood is
replaced by what the API asks for: one that accepts gets no peers, one that denies or passes denies everyone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from enforcer_daemon.model import Direction, IPNetwork
from enforcer_daemon.policy.objects import PodPeer, PortMatch, Selector


class Channel(Enum):
    """Which of the two published CRDs is installed."""

    STANDARD = "standard"
    EXPERIMENTAL = "experimental"


class Tier(Enum):
    """When a policy is asked: before NetworkPolicy, or after it."""

    ADMIN = "Admin"
    BASELINE = "Baseline"


class Action(Enum):
    """What the first matching rule does; PASS skips the rest of the tier."""

    ACCEPT = "Accept"
    DENY = "Deny"
    PASS = "Pass"  # noqa: S105 - the word of the API


@dataclass(frozen=True, slots=True)
class NetworksPeer:
    """Destinations by address, pods included."""

    networks: tuple[IPNetwork, ...]


@dataclass(frozen=True, slots=True)
class NodesPeer:
    """Addresses of nodes (experimental channel)."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class DomainNamesPeer:
    """Addresses behind domain names (experimental channel); a leading `*.` stands for one or more labels."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnyonePeer:
    """Every peer: what a rule denies that is not understood."""


ClusterPeer = PodPeer | NetworksPeer | NodesPeer | DomainNamesPeer | AnyonePeer
"""The namespace selector of a PodPeer is never None here."""


@dataclass(frozen=True, slots=True)
class ClusterRule:
    """One entry of spec.ingress or spec.egress."""

    action: Action
    peers: tuple[ClusterPeer, ...]
    """Any of these; empty: nobody, the rule never matches."""
    ports: tuple[PortMatch, ...] = ()
    """Any of these; empty: every port of every protocol. A named port is here once for each protocol."""
    name: str = ""
    is_understood: bool = True
    """Whether the rule is as written; else it has a peer of an unknown form."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The pods that a policy is for; never pods on their node's network."""

    namespace_selector: Selector
    pod_selector: Selector


@dataclass(frozen=True, slots=True)
class ClusterNetworkPolicy:
    """One ClusterNetworkPolicy."""

    name: str
    tier: Tier
    priority: int
    """0 to 1000; the lower number is asked first."""
    subject: Subject
    ingress: tuple[ClusterRule, ...] = ()
    egress: tuple[ClusterRule, ...] = ()

    def rules(self, direction: Direction) -> tuple[ClusterRule, ...]:
        """Return the rules of one direction, in their written order."""
        return self.ingress if direction is Direction.INGRESS else self.egress
