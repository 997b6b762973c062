# SPDX-License-Identifier: Apache-2.0
"""Evaluates flows of one pod in one direction: what its policies allow is the union of all their rules, and no more.

A flow is allowed between two pods if the sender's egress and the receiver's ingress both allow it; each end evaluates
its own direction, on the other end's verified identity and observed address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, Protocol, RuleRef
from enforcer_daemon.policy.address_rules import AddressRule, rules_of, united
from enforcer_daemon.policy.limits import address_rules_problem
from enforcer_daemon.policy.objects import (
    EVERYTHING,
    TRUST_DOMAIN_LABEL,
    IPBlock,
    NetworkPolicy,
    PodPeer,
    PortMatch,
    Selector,
)
from enforcer_daemon.policy.tables import AddressSet, LabelTable, NetworkTable, PortSet, PortTable
from enforcer_daemon.reasons import Reason

PortNames = Mapping[tuple[Protocol, int], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _PodGroup:
    """The rules that name one and the same set of pods, however many policies they come from."""

    peer: PodPeer
    namespace: str
    """The policies' own."""
    names_trust_domain: bool
    rules: set[int] = field(default_factory=set)

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


class _Rule(NamedTuple):
    """One rule of a policy."""

    decision: Decision
    ports: PortSet
    blocks: tuple[AddressSet, ...] | None
    """For each family that it has blocks of; None: any address."""

    def holds_address(self, address: IPAddress) -> bool:
        return self.blocks is None or any(address in blocks for blocks in self.blocks)


_TRIED = 8
"""So many rules of a peer are tried one by one; of more, the ports' index is asked which come into question."""
MAX_REMEMBERED_PEERS = 1_024
MAX_REMEMBERED_GROUPS = 65_536
"""Peers, and groups of all peers, that are remembered by one set of rules; beyond, all are found again. To find the
groups of a peer may mean to try each selector of a namespace, which must not happen for each of the peer's flows."""
MAX_NAMINGS = 16
"""Ways in which the pods of one set of rules name their ports, of which the rules by address are kept."""


class KernelRules(NamedTuple):
    """The rules by address that the kernel is given."""

    rules: tuple[AddressRule, ...]
    """None if there are more than the kernel is given."""
    problem: str


class CompiledRules:
    """The rules of the policies that isolate some pods in one direction; shared by all pods that the same ones select.

    A rule has a number. A peer, an address and a port each give sets of numbers, and what is in a set of the peer's
    and in one of the port's allows the flow. So everything here is as large as the policies, and a look-up costs no
    more with many policies than with one, as long as their selectors or ports tell them apart: the smaller set is
    walked.
    """

    def __init__(self, policies: Sequence[NetworkPolicy], direction: Direction) -> None:
        self.direction = direction
        self.isolating = tuple(RuleRef(p.namespace, p.name) for p in policies if p.rules(direction) is not None)
        reason = Reason.INGRESS_DENIED if direction is Direction.INGRESS else Reason.EGRESS_DENIED
        self.denial = Decision(False, reason, direction, self.isolating)
        self.unidentified = Decision(False, Reason.UNIDENTIFIED_PEER, direction, self.isolating)
        self._rules: list[_Rule] = []
        self._ports = PortTable()
        self._any_pod = PortTable()
        """The ports of all rules for pods, whichever: for what could be, before the peer is known."""
        self._anyone: set[int] = set()
        self._pod_groups: dict[PodPeer, _PodGroup] = {}
        self._networks: NetworkTable[set[int]] = NetworkTable(set)
        """The rules with a block of a network; whether its exceptions hold an address, the rule knows."""
        port_sets: dict[tuple[PortMatch, ...], PortSet] = {}
        for policy in policies:
            for index, rule in enumerate(policy.rules(direction) or ()):
                decision = Decision(True, Reason.POLICY, direction, (RuleRef(policy.namespace, policy.name, index),))
                ports = port_sets.get(rule.ports)
                if ports is None:
                    ports = port_sets[rule.ports] = PortSet(rule.ports)
                self._add(policy.namespace, rule.peers, ports, decision)
        self._pods = LabelTable((_filing_selectors(group), group) for group in self._pod_groups.values())
        self._groups_of: dict[Identity, tuple[_PodGroup, ...]] = {}
        self._remembered = 0
        self._kernel_rules: dict[frozenset[tuple[object, ...]], KernelRules] = {}

    def _add(self, namespace: str, peers: tuple[PodPeer | IPBlock, ...], ports: PortSet, decision: Decision) -> None:
        number = len(self._rules)
        blocks = [peer for peer in peers if isinstance(peer, IPBlock)]
        for block in blocks:
            self._networks.at(block.network).add(number)
        families = sorted({block.network.version for block in blocks})
        sets = tuple(AddressSet.of_blocks(version, blocks) for version in families)
        self._rules.append(_Rule(decision, ports, sets if peers else None))
        self._ports.add(ports, number)
        if not peers:
            self._anyone.add(number)
        for peer in peers:
            if isinstance(peer, PodPeer):
                group = self._pod_groups.get(peer)
                if group is None:
                    selector = peer.namespace_selector
                    crosses = selector is not None and selector.names(TRUST_DOMAIN_LABEL)
                    group = self._pod_groups[peer] = _PodGroup(peer, namespace, crosses)
                group.rules.add(number)
        if len(blocks) < len(peers):
            self._any_pod.add(ports, number)

    def allowing_pod(
        self, peer: Identity, trust_domain: str, port: int | None, protocol: Protocol | None, names: Sequence[str]
    ) -> Iterator[Decision]:
        """Yield what allows a pod, wherever it is, as seen from a pod of `trust_domain`."""
        for group in self._find_groups(peer, trust_domain):
            for rule in self._with_port(group.rules, port, protocol, names):
                yield rule.decision

    def allowing_address(
        self, address: IPAddress, port: int | None, protocol: Protocol | None, names: Sequence[str]
    ) -> Iterator[Decision]:
        """Yield what allows an address, whoever is there."""
        for rule in self._with_port(self._anyone, port, protocol, names):
            yield rule.decision
        for numbers in self._networks.find(address):
            for rule in self._with_port(numbers, port, protocol, names):
                if rule.holds_address(address):
                    yield rule.decision

    def _with_port(
        self, numbers: set[int], port: int | None, protocol: Protocol | None, names: Sequence[str]
    ) -> Iterator[_Rule]:
        rules = self._rules
        if len(numbers) <= _TRIED:
            for number in numbers:
                if rules[number].ports.holds(protocol, port, names):
                    yield rules[number]
            return
        for found in self._ports.find(protocol, port, names):
            fewer, more = (found, numbers) if len(found) < len(numbers) else (numbers, found)
            for number in fewer:
                if number in more:
                    yield rules[number]

    def _find_groups(self, peer: Identity, trust_domain: str) -> tuple[_PodGroup, ...]:
        known = self._groups_of.get(peer)
        if known is None:
            found = self._pods.find(peer.labels, peer.namespace_labels)
            known = tuple(group for group in found if group.holds(peer, trust_domain))
            self._remembered += len(known)
            if len(self._groups_of) >= MAX_REMEMBERED_PEERS or self._remembered > MAX_REMEMBERED_GROUPS:
                self._groups_of.clear()
                self._remembered = len(known)
            self._groups_of[peer] = known
        return known

    @property
    def names_pods(self) -> bool:
        """Whether any rule has pods as peers."""
        return bool(self._pod_groups)

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol | None) -> bool:
        """Return whether any rule could allow some peer there; None: not known yet."""
        if address is None:
            return self._ports.could_hold(protocol, None)
        if self._any_pod.could_hold(protocol, port):
            return True
        for numbers in (self._anyone, *self._networks.find(address)):
            for possible in self._ports.possible(protocol, port):
                fewer, more = (numbers, possible) if len(numbers) < len(possible) else (possible, numbers)
                if any(number in more and self._rules[number].holds_address(address) for number in fewer):
                    return True
        return False

    def kernel_rules(self, own_names: PortNames) -> KernelRules:
        """Return what is allowed by address alone, each once, if the pod's own ports have these names."""
        by_name: dict[tuple[Protocol, str], list[int]] = {}
        if self._ports.has_names:
            for (protocol, number), names in own_names.items():
                for name in names:
                    by_name.setdefault((protocol, name), []).append(number)
        key = frozenset((protocol, name, *numbers) for (protocol, name), numbers in by_name.items())
        known = self._kernel_rules.get(key)
        if known is None:
            found = (
                allowed
                for rule in self._rules
                for blocks in ((None,) if rule.blocks is None else rule.blocks)
                for allowed in rules_of(blocks, rule.ports, by_name)
            )
            if len(self._kernel_rules) >= MAX_NAMINGS:
                self._kernel_rules.clear()
            rules = united(found)
            problem = address_rules_problem(rules, self.direction, self.isolating)
            known = self._kernel_rules[key] = KernelRules(() if problem else rules, problem)
        return known


def _filing_selectors(group: _PodGroup) -> tuple[Selector, Selector]:
    namespaces = group.peer.namespace_selector or EVERYTHING
    if group.names_trust_domain:
        # That label is not among the peer's namespace labels, so nothing can be found by it.
        namespaces = Selector(tuple(r for r in namespaces.requirements if r.key != TRUST_DOMAIN_LABEL))
    return group.peer.pod_selector, namespaces


class DirectionPolicy:
    """What policy says of one pod's flows in one direction."""

    __slots__ = ("_allows_all", "_own_names", "_problem", "_rules", "_trust_domain")

    def __init__(self, rules: CompiledRules, identity: Identity) -> None:
        self._rules = rules
        self._trust_domain = identity.trust_domain
        # For ingress the pod itself is the destination that gives ports their names.
        self._own_names = port_names(identity) if rules.direction is Direction.INGRESS else None
        self._allows_all = None if rules.isolating else Decision(True, Reason.NOT_ISOLATED, rules.direction)
        self._problem: str | None = None

    @property
    def is_isolated(self) -> bool:
        """Whether any policy selects the pod for this direction; if none does, everything is allowed."""
        return self._allows_all is None

    @property
    def names_pods(self) -> bool:
        """Whether the identity of a peer can make a difference: a rule names pods, or no policy isolates the pod."""
        return self._allows_all is not None or self._rules.names_pods

    @property
    def isolating(self) -> tuple[RuleRef, ...]:
        """The policies that isolate the pod, by name."""
        return self._rules.isolating

    @property
    def problem(self) -> str:
        """Which limit the rules by address exceed, and by which policies; empty if none."""
        if self._problem is None:  # Asked for every flow and every second; the rules may keep no more namings.
            self._problem = "" if self._allows_all is not None else self._kernel_rules().problem
        return self._problem

    def is_same(self, other: DirectionPolicy) -> bool:
        """Return whether both were compiled from the very same policies for the same pod, so that they evaluate
        alike."""
        return (self._rules, self._own_names, self._trust_domain) == (
            other._rules,
            other._own_names,
            other._trust_domain,
        )

    def evaluate(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Decision:
        """Evaluate a flow with a peer at the address that was observed; an allowance names one rule that allows it.

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
        """Evaluate as `evaluate` does, but name every rule that allows the flow; its cost grows with their number."""
        first = self.evaluate(peer, address, port, protocol)
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
            yield from self._rules.allowing_pod(peer, self._trust_domain, port, protocol, names)
        if self._own_names is None and self.problem:
            return  # Egress: the guard lets none of it leave the node, so it is denied here, with a reason.
        yield from self._rules.allowing_address(address, port, protocol, names)

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol | None) -> bool:
        """Return whether any rule could allow some peer there, before its identity is known.

        `address` None: a virtual address was dialed, and the pod behind it has an address and a port that are not
        known yet; `port` then does not count either. `port` None: not known yet.
        """
        return self._allows_all is not None or self._rules.could_allow(address, port, protocol)

    def address_rules(self) -> tuple[AddressRule, ...]:
        """Return what is allowed by address alone, each once; if the pod is not isolated, one rule that allows all.

        Named ports are numbers here: for ingress the pod's own; for egress there are none, since an address without an
        identity names no ports.
        """
        if self._allows_all is not None:
            return (AddressRule(),)
        return self._kernel_rules().rules

    def _kernel_rules(self) -> KernelRules:
        return self._rules.kernel_rules(self._own_names or {})


def port_names(identity: Identity) -> PortNames:
    """Return the names of a pod's ports by protocol and number; one port may have several."""
    names: dict[tuple[Protocol, int], dict[str, None]] = {}
    for port in identity.named_ports:
        names.setdefault((port.protocol, port.number), {})[port.name] = None
    return {key: tuple(found) for key, found in names.items()}


@dataclass(frozen=True, slots=True)
class PodPolicy:
    """The policies that select one pod."""

    identity: Identity
    ingress: DirectionPolicy
    egress: DirectionPolicy

    @property
    def problems(self) -> tuple[str, ...]:
        """Which limits the pod's policies exceed."""
        return tuple(problem for problem in (self.ingress.problem, self.egress.problem) if problem)

    def direction(self, direction: Direction) -> DirectionPolicy:
        """Return one direction's policy."""
        return self.ingress if direction is Direction.INGRESS else self.egress
