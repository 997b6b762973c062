# SPDX-License-Identifier: Apache-2.0
"""Evaluates cluster policies around NetworkPolicy: Admin tier, NetworkPolicy, Baseline tier, else allowed.

In a tier the first rule that matches decides, by priority, then name, then the written order; one that passes goes on
to what follows the tier. A peer that proved no identity, at an address that a pod may have, could be any pod: a rule
for pods may match it or not. It is allowed only if each of these possibilities is: no pod gains by hiding what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import ip_network

from enforcer_daemon.model import ClusterRuleRef, Decision, Direction, Identity, IPAddress, Protocol
from enforcer_daemon.policy.cluster_objects import (
    Action,
    AnyonePeer,
    ClusterNetworkPolicy,
    ClusterRule,
    DomainNamesPeer,
    NetworksPeer,
    NodesPeer,
    Tier,
)
from enforcer_daemon.policy.evaluate import DirectionPolicy, PortNames, port_names
from enforcer_daemon.policy.objects import TRUST_DOMAIN_LABEL, IPBlock, PodPeer, PortName
from enforcer_daemon.policy.tables import AddressSet, LabelTable, PortSet
from enforcer_daemon.reasons import Reason

MAX_COMPILED_SETS = 4_096
"""Sets of cluster policies that select some pod which stay compiled; beyond it all are compiled again."""


@dataclass(frozen=True, slots=True)
class Node:
    """What rules for nodes match: the labels of a node, and its addresses."""

    labels: Mapping[str, str]
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow as one of its ends sees it."""

    peer: Identity | None
    """None: the peer proved no identity."""
    address: IPAddress
    """Of the peer, after translation of a Service's address."""
    is_pod_address: bool
    """Whether a pod may have the address: without an identity, the peer then could be any pod."""
    port: int | None
    """The destination's; None for a protocol without ports."""
    protocol: Protocol | None


class _Match(Enum):
    """Whether a rule is for a flow."""

    NO = 0
    MAYBE = 1
    YES = 2


class _TierRule:
    """One rule of a tier, ready to be asked."""

    __slots__ = ("_addresses", "_has_names", "_is_anyone", "_numbered", "_pods", "_ports", "action", "ref")

    def __init__(self, rule: ClusterRule, ref: ClusterRuleRef, nodes: Sequence[Node]) -> None:
        self.action = rule.action
        self.ref = ref
        self._is_anyone = any(isinstance(peer, AnyonePeer) for peer in rule.peers)
        self._pods = [peer for peer in rule.peers if isinstance(peer, PodPeer)]
        blocks = [block for peer in rule.peers for block in _blocks(peer, nodes)]
        self._addresses = [AddressSet.of_blocks(version, blocks) for version in {b.network.version for b in blocks}]
        numbered = [port for port in rule.ports if not isinstance(port, PortName)]
        self._has_names = len(numbered) < len(rule.ports)
        self._ports = PortSet(rule.ports)
        self._numbered = PortSet(numbered) if numbered or not rule.ports else None
        """Of peers by address, which name no ports; None: no port of theirs is meant."""

    def match(self, flow: Flow, trust_domain: str, own_names: PortNames | None) -> _Match:
        """Return whether the rule is for a flow; `own_names` are the ports of the pod if it is the destination."""
        if self._is_anyone:
            return _Match.YES
        if any(flow.address in addresses for addresses in self._addresses) and self._is_for_address(flow):
            return _Match.YES
        if not self._pods:
            return _Match.NO
        if flow.peer is None:
            return _Match.MAYBE if flow.is_pod_address and self._could_be_for_port(flow, own_names) else _Match.NO
        if not self._ports.holds(flow.protocol, flow.port, _names(flow, own_names)):
            return _Match.NO
        return _Match.YES if any(_holds(peer, flow.peer, trust_domain) for peer in self._pods) else _Match.NO

    def _is_for_address(self, flow: Flow) -> bool:
        return self._numbered is not None and self._numbered.holds(flow.protocol, flow.port, ())

    def _could_be_for_port(self, flow: Flow, own_names: PortNames | None) -> bool:
        if own_names is None and self._has_names and flow.port is not None:
            return True  # The unknown destination may have given the port any name.
        return self._ports.holds(flow.protocol, flow.port, _names(flow, own_names))


def _blocks(peer: object, nodes: Sequence[Node]) -> Iterable[IPBlock]:
    match peer:
        case NetworksPeer():
            return [IPBlock(network) for network in peer.networks]
        case NodesPeer():
            selected = [node for node in nodes if peer.selector.matches(node.labels)]
            return [IPBlock(ip_network(address)) for node in selected for address in node.addresses]
        case _:
            return ()


def _holds(peer: PodPeer, identity: Identity, trust_domain: str) -> bool:
    if not peer.pod_selector.matches(identity.labels):
        return False
    namespaces = peer.namespace_selector
    if namespaces is not None and namespaces.names(TRUST_DOMAIN_LABEL):
        # The label is set last: a peer's claim of it must not count.
        return namespaces.matches({**identity.namespace_labels, TRUST_DOMAIN_LABEL: identity.trust_domain})
    is_own = identity.trust_domain == trust_domain
    return is_own and (namespaces is None or namespaces.matches(identity.namespace_labels))


def _names(flow: Flow, own_names: PortNames | None) -> Sequence[str]:
    if flow.port is None or flow.protocol is None:
        return ()
    if own_names is not None:
        return own_names.get((flow.protocol, flow.port), ())
    if flow.peer is None:
        return ()
    return [p.name for p in flow.peer.named_ports if p.number == flow.port and p.protocol is flow.protocol]


@dataclass(frozen=True, slots=True)
class _TierResult:
    """What one tier says of a flow."""

    action: Action | None
    """Of the rule that decides; None: no rule matches."""
    refs: tuple[ClusterRuleRef, ...] = ()
    is_certain: bool = True
    """Whether the peer is known well enough to match the rule."""
    may_pass: bool = False
    """Whether some rule before it may pass the flow, so that what follows the tier must allow it too."""


_Tiers = dict[Tier, tuple[_TierRule, ...]]


class ClusterPolicies:
    """All cluster policies at one moment; what selects a pod is found by its labels, not by trying all."""

    def __init__(self, policies: Iterable[ClusterNetworkPolicy], nodes: Iterable[Node] = ()) -> None:
        """Raise ValueError for rules by domain names, whose addresses nothing here knows."""
        self._policies = sorted(policies, key=lambda policy: (policy.priority, policy.name))
        self._nodes = tuple(nodes)
        for policy in self._policies:
            if any(isinstance(peer, DomainNamesPeer) for rule in policy.egress for peer in rule.peers):
                raise ValueError(f"ClusterNetworkPolicy {policy.name}: domainNames cannot be evaluated")
        self._by_labels: LabelTable[int] = LabelTable(
            ((policy.subject.pod_selector, policy.subject.namespace_selector), index)
            for index, policy in enumerate(self._policies)
        )
        self._compiled: dict[tuple[int, ...], dict[Direction, _Tiers]] = {}

    def direction(self, identity: Identity, network_policy: DirectionPolicy, direction: Direction) -> ClusterDirection:
        """Return what cluster policies and the pod's NetworkPolicies say together."""
        return ClusterDirection(self._tiers_for(identity)[direction], identity, network_policy, direction)

    def _tiers_for(self, identity: Identity) -> dict[Direction, _Tiers]:
        labels, namespace_labels = identity.labels, identity.namespace_labels
        selecting = tuple(sorted(
            index
            for index in self._by_labels.find(labels, namespace_labels)
            if self._policies[index].subject.pod_selector.matches(labels)
            and self._policies[index].subject.namespace_selector.matches(namespace_labels)
        ))  # fmt: skip
        compiled = self._compiled.get(selecting)
        if compiled is None:
            if len(self._compiled) >= MAX_COMPILED_SETS:
                self._compiled.clear()
            chosen = [self._policies[index] for index in selecting]
            compiled = self._compiled[selecting] = {
                direction: {tier: self._compile(chosen, tier, direction) for tier in Tier} for direction in Direction
            }
        return compiled

    def _compile(
        self, policies: Sequence[ClusterNetworkPolicy], tier: Tier, direction: Direction
    ) -> tuple[_TierRule, ...]:
        return tuple(
            _TierRule(rule, ClusterRuleRef(tier.value, policy.name, index, rule.name, rule.action.value), self._nodes)
            for policy in policies
            if policy.tier is tier
            for index, rule in enumerate(policy.rules(direction))
        )


class ClusterDirection:
    """What cluster policies and NetworkPolicies say of one pod's flows in one direction."""

    def __init__(
        self, tiers: _Tiers, identity: Identity, network_policy: DirectionPolicy, direction: Direction
    ) -> None:
        self._tiers = tiers
        self._network_policy = network_policy
        self._direction = direction
        self._trust_domain = identity.trust_domain
        self._own_names = port_names(identity) if direction is Direction.INGRESS else None

    def evaluate(self, flow: Flow, *, explain: bool = False) -> Decision:
        """Evaluate a flow; `explain` names all rules of NetworkPolicies that allow it, not one."""
        admin = self._ask(Tier.ADMIN, flow)
        if admin.action is Action.DENY:
            return self._denial(admin)
        if admin.action is Action.ACCEPT and not admin.may_pass:
            return Decision(True, Reason.POLICY, self._direction, cluster_rules=admin.refs)
        below = self._below_admin(flow, explain=explain)
        if admin.action is Action.ACCEPT and below.is_allowed:
            return Decision(True, Reason.POLICY, self._direction, cluster_rules=admin.refs)
        passed = admin.refs if admin.action is Action.PASS else ()
        return replace(below, cluster_rules=(*passed, *below.cluster_rules)) if passed else below

    def _below_admin(self, flow: Flow, *, explain: bool) -> Decision:
        policy = self._network_policy
        decision = (policy.explain if explain else policy.evaluate)(
            flow.peer, flow.address, flow.port, flow.protocol
        )  # fmt: skip
        if policy.is_isolated:
            return decision
        baseline = self._ask(Tier.BASELINE, flow)
        if baseline.action is Action.DENY:
            return self._denial(baseline)
        if baseline.action is Action.ACCEPT:
            return Decision(True, Reason.POLICY, self._direction, cluster_rules=baseline.refs)
        return replace(decision, cluster_rules=baseline.refs) if baseline.refs else decision

    def _ask(self, tier: Tier, flow: Flow) -> _TierResult:
        may_pass = False
        for rule in self._tiers[tier]:
            match = rule.match(flow, self._trust_domain, self._own_names)
            if match is _Match.YES or (match is _Match.MAYBE and rule.action is Action.DENY):
                return _TierResult(rule.action, (rule.ref,), match is _Match.YES, may_pass)
            if match is _Match.MAYBE and rule.action is Action.PASS:
                may_pass = True
        return _TierResult(None)

    def _denial(self, result: _TierResult) -> Decision:
        reason = Reason.INGRESS_DENIED if self._direction is Direction.INGRESS else Reason.EGRESS_DENIED
        if not result.is_certain:
            reason = Reason.UNIDENTIFIED_PEER
        return Decision(False, reason, self._direction, cluster_rules=result.refs)
