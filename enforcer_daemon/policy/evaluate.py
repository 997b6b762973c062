# SPDX-License-Identifier: Apache-2.0
"""Judges flows of one pod in one direction: what its policies allow is the union of all their rules, and no more.

A flow is allowed between two pods if the sender's egress and the receiver's ingress both allow it; each end judges its
own direction, on the other end's verified identity and observed address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from enforcer_daemon.model import (
    Decision,
    Direction,
    Identity,
    IPAddress,
    IPNetwork,
    Protocol,
    RuleRef,
)
from enforcer_daemon.policy.objects import (
    EVERYTHING,
    TRUST_DOMAIN_LABEL,
    IPBlock,
    NetworkPolicy,
    PodPeer,
    PortMatch,
    PortName,
    Selector,
)
from enforcer_daemon.policy.tables import LabelTable, NetworkSet, NetworkTable, PortTable
from enforcer_daemon.reasons import Reason


@dataclass(frozen=True, slots=True)
class AddressRule:
    """What a direction allows whoever the peer is: a form that kernel rules can be made of."""

    network: IPNetwork | None = None
    """None: every address of both families."""
    excepts: tuple[IPNetwork, ...] = ()
    protocol: Protocol | None = None
    """None: every protocol."""
    ports: tuple[int, int] | None = None
    """First and last destination port; None: every port."""


@dataclass(frozen=True, slots=True)
class _PodGroup:
    """The rules whose peers are one and the same set of pods, however many policies they come from."""

    peer: PodPeer
    namespace: str
    """The policies' own."""
    names_trust_domain: bool
    ports: PortTable[Decision] = field(default_factory=PortTable)

    def holds(self, peer: Identity, trust_domain: str) -> bool:
        if not self.peer.pod_selector.matches(peer.labels):
            return False
        selector = self.peer.namespace_selector
        if self.names_trust_domain and selector is not None:
            # The label is set last: a peer's claim of it must not count.
            return selector.matches({**peer.namespace_labels, TRUST_DOMAIN_LABEL: peer.trust_domain})
        if peer.trust_domain != trust_domain:
            return False
        return peer.pod.namespace == self.namespace if selector is None else selector.matches(peer.namespace_labels)


@dataclass(frozen=True, slots=True)
class _BlockGroup:
    """The rules of one ipBlock."""

    excepts: NetworkSet
    ports: PortTable[Decision] = field(default_factory=PortTable)


class CompiledRules:
    """The rules of the policies that isolate some pods in one direction; shared by all pods that the same ones select.

    A look-up costs no more with many policies than with one, as long as their selectors or ports tell them apart.
    """

    def __init__(self, policies: Sequence[NetworkPolicy], direction: Direction) -> None:
        self.direction = direction
        self.isolating = tuple(RuleRef(p.namespace, p.name) for p in policies if p.rules(direction) is not None)
        reason = Reason.INGRESS_DENIED if direction is Direction.INGRESS else Reason.EGRESS_DENIED
        self.denial = Decision(False, reason, direction, self.isolating)
        self.unidentified = Decision(False, Reason.UNIDENTIFIED_PEER, direction, self.isolating)
        self.anyone: PortTable[Decision] = PortTable()
        self.any_pod: PortTable[Decision] = PortTable()
        """The ports of all rules for pods, whichever: for what could be, before the peer is known."""
        self.any_block: PortTable[Decision] = PortTable()
        self.by_address: list[tuple[IPBlock | None, tuple[PortMatch, ...]]] = []
        """Each rule by address alone; None: any address."""
        self._pod_groups: dict[PodPeer, _PodGroup] = {}
        self._block_groups: dict[IPBlock, _BlockGroup] = {}
        for policy in policies:
            for index, rule in enumerate(policy.rules(direction) or ()):
                decision = Decision(True, Reason.POLICY, direction, (RuleRef(policy.namespace, policy.name, index),))
                for peer in rule.peers or (None,):
                    self._add(policy.namespace, peer, rule.ports, decision)
        self.pods = LabelTable((_filing_selectors(group), group) for group in self._pod_groups.values())
        self._blocks: NetworkTable[list[_BlockGroup]] = NetworkTable(list)
        for block, group in self._block_groups.items():
            self._blocks.at(block.network).append(group)

    def _add(
        self, namespace: str, peer: PodPeer | IPBlock | None, ports: tuple[PortMatch, ...], decision: Decision
    ) -> None:
        if isinstance(peer, PodPeer):
            if peer not in self._pod_groups:
                selector = peer.namespace_selector
                crosses = selector is not None and selector.names(TRUST_DOMAIN_LABEL)
                self._pod_groups[peer] = _PodGroup(peer, namespace, crosses)
            self._pod_groups[peer].ports.add(ports, decision)
            self.any_pod.add(ports, decision)
            return
        self.by_address.append((peer, ports))
        if peer is None:
            self.anyone.add(ports, decision)
            return
        if peer not in self._block_groups:
            self._block_groups[peer] = _BlockGroup(NetworkSet(peer.excepts))
        self._block_groups[peer].ports.add(ports, decision)
        self.any_block.add(ports, decision)

    def tables_at(self, address: IPAddress) -> Iterator[PortTable[Decision]]:
        """Give the rules that hold for an address, whoever is there."""
        yield self.anyone
        for groups in self._blocks.find(address):
            for group in groups:
                if address not in group.excepts:
                    yield group.ports

    def tables_of(self, peer: Identity, trust_domain: str) -> Iterator[PortTable[Decision]]:
        """Give the rules that hold for a pod, wherever it is, as seen from a pod of `trust_domain`."""
        for group in self.pods.find(peer.labels, peer.namespace_labels):
            if group.holds(peer, trust_domain):
                yield group.ports


def _filing_selectors(group: _PodGroup) -> tuple[Selector, Selector]:
    namespaces = group.peer.namespace_selector or EVERYTHING
    if group.names_trust_domain:
        # That label is not among the peer's namespace labels, so nothing can be found by it.
        namespaces = Selector(tuple(r for r in namespaces.requirements if r.key != TRUST_DOMAIN_LABEL))
    return group.peer.pod_selector, namespaces


PortNames = Mapping[tuple[Protocol, int], tuple[str, ...]]


class DirectionPolicy:
    """What policy says of one pod's flows in one direction."""

    __slots__ = ("_allows_all", "_own_names", "_rules", "_trust_domain")

    def __init__(self, rules: CompiledRules, identity: Identity) -> None:
        self._rules = rules
        self._trust_domain = identity.trust_domain
        # For ingress the pod itself is the destination that gives ports their names.
        self._own_names = port_names(identity) if rules.direction is Direction.INGRESS else None
        self._allows_all = None if rules.isolating else Decision(True, Reason.NOT_ISOLATED, rules.direction)

    @property
    def is_isolated(self) -> bool:
        """Whether any policy selects the pod for this direction; if none does, everything is allowed."""
        return self._allows_all is None

    @property
    def isolating(self) -> tuple[RuleRef, ...]:
        """The policies that isolate the pod, by name."""
        return self._rules.isolating

    def is_same(self, other: DirectionPolicy) -> bool:
        """Tell whether both were compiled from the very same policies for the same pod, so that they judge alike."""
        return (self._rules, self._own_names, self._trust_domain) == (
            other._rules,
            other._own_names,
            other._trust_domain,
        )

    def judge(self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None) -> Decision:
        """Judge a flow with a peer at the address that was observed; an allowance names one rule that allows it.

        `peer` None: nobody proved an identity there, so only rules by address count. `port` is the destination's, after
        translation. `port` None: a flow of a protocol without ports, which only rules without ports allow.
        """
        if self._allows_all is not None:
            return self._allows_all
        for decision in self._allowing(peer, address, port, protocol):
            return decision
        return self._rules.unidentified if peer is None else self._rules.denial

    def explain(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Decision:
        """Judge as `judge` does, but name every rule that allows the flow; its cost grows with their number."""
        first = self.judge(peer, address, port, protocol)
        if self._allows_all is not None or not first.is_allowed:
            return first
        rules = {rule for decision in self._allowing(peer, address, port, protocol) for rule in decision.rules}
        return Decision(True, first.reason, first.direction, tuple(sorted(rules)))

    def _allowing(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Iterator[Decision]:
        names: Sequence[str] = ()
        if protocol is not None and port is not None:
            if self._own_names is not None:
                names = self._own_names.get((protocol, port), ())
            elif peer is not None:
                names = [p.name for p in peer.named_ports if p.number == port and p.protocol is protocol]
        if peer is not None:
            for table in self._rules.tables_of(peer, self._trust_domain):
                yield from table.find(protocol, port, names)
        for table in self._rules.tables_at(address):
            yield from table.find(protocol, port, names)

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol | None) -> bool:
        """Tell whether any rule could allow some peer there, before its identity is known.

        `address` None: a virtual address was dialled, and the pod behind it has an address and a port that are not
        known yet; `port` then does not count either. `port` None: not known yet.
        """
        rules = self._rules
        if self._allows_all is not None:
            return True
        if address is None:
            tables = iter((rules.any_pod, rules.anyone, rules.any_block))
            return any(table.could_hold(protocol, None) for table in tables)
        if rules.any_pod.could_hold(protocol, port):
            return True
        return any(table.could_hold(protocol, port) for table in rules.tables_at(address))

    def address_rules(self) -> tuple[AddressRule, ...]:
        """Give what is allowed by address alone, each once; if the pod is not isolated, one rule that allows all.

        Named ports are numbers here: for ingress the pod's own; for egress there are none, since an address without an
        identity names no ports.
        """
        if self._allows_all is not None:
            return (AddressRule(),)
        found: dict[AddressRule, None] = {}
        for block, ports in self._rules.by_address:
            network, excepts = (None, ()) if block is None else (block.network, block.excepts)
            if not ports:
                found[AddressRule(network, excepts)] = None
            for port in ports:
                for span in self._spans(port):
                    found[AddressRule(network, excepts, port.protocol, span)] = None
        return tuple(found)

    def _spans(self, port: PortMatch) -> list[tuple[int, int] | None]:
        if not isinstance(port, PortName):
            return [None if port.is_all else (port.first, port.last)]
        return [
            (number, number)
            for (protocol, number), names in (self._own_names or {}).items()
            if protocol is port.protocol and port.name in names
        ]


def port_names(identity: Identity) -> PortNames:
    """Give the names of a pod's ports by protocol and number; one port may have several."""
    names: dict[tuple[Protocol, int], tuple[str, ...]] = {}
    for port in identity.named_ports:
        key = (port.protocol, port.number)
        if port.name not in names.get(key, ()):
            names[key] = (*names.get(key, ()), port.name)
    return names


@dataclass(frozen=True, slots=True)
class PodPolicy:
    """The policies that select one pod."""

    identity: Identity
    ingress: DirectionPolicy
    egress: DirectionPolicy

    def direction(self, direction: Direction) -> DirectionPolicy:
        """Give one direction's policy."""
        return self.ingress if direction is Direction.INGRESS else self.egress
