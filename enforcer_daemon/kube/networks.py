# SPDX-License-Identifier: Apache-2.0
"""Which networks hold enforced pods, and which addresses lead to them, from what the cluster says of itself. Pure.

What the settings name is not discovered: `networks.enforced` stands in for the nodes' podCIDRs, `networks.virtual` for
all that is virtual. What only administrators and controllers write (podCIDRs, ServiceCIDRs) is believed as it is. What
a Service states is earned: an address counts only where the operator allows it and where no pod or node is, on the
Service's ports, and a node's address only on node ports in use. kube-proxy translates what is dialed there to a pod,
or refuses it, so an identity that is sent there stays in the cluster; any other port it leaves alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address
from itertools import islice, product
from typing import Generic, TypeVar

from enforcer_daemon.kube.resources import NodeNetworks, ServiceAddresses
from enforcer_daemon.kube.table import Key
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.prefixes import PrefixSet
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.virtual import NO_HOST, NodePort, ServicePort, VirtualChange, VirtualEntries

MAX_NAMESPACE_PORTS = 1_024
"""Ports of addresses that the Services of one namespace make virtual, each Service's counted by itself."""
MAX_PORTS = 16_384
"""The same of the cluster, the same port of an address counted once; as many elements have the guard's sets."""
_EVERYWHERE = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
_SPECIAL = PrefixSet(NO_HOST)

T = TypeVar("T")


def discover(
    configured: NetworkSettings, nodes: Iterable[NodeNetworks], service_cidrs: Iterable[tuple[IPNetwork, ...]]
) -> NetworkSettings:
    """Return the networks in force; what Services add is told by VirtualAddresses."""
    enforced = configured.enforced or _collapsed(network for node in nodes for network in node.pod_cidrs)
    virtual = configured.virtual or _collapsed(network for cidrs in service_cidrs for network in cidrs)
    return replace(configured, enforced=enforced, virtual=virtual)


def missing_networks(configured: NetworkSettings, node: str, nodes: Iterable[NodeNetworks]) -> str:
    """Return why this node's own pods are in no enforced network; empty if they are."""
    if configured.enforced or any(found.name == node and found.pod_cidrs for found in nodes):
        return ""
    return f"node {node} has no podCIDRs: set networks.enforced to the networks of the cluster's pods"


class VirtualAddresses:
    """What Services make virtual; a change of one costs what that Service states, and no other is looked at.

    Addresses that the operator allows are held by the Services that state them; of these, those where a pod or a node
    is are blocked. When pods' networks or nodes change, which no user of a namespace can cause, only addresses in what
    changed are looked at again.
    """

    def __init__(self, configured: NetworkSettings) -> None:
        self._external = PrefixSet(configured.external_ip_networks)
        balancers = configured.load_balancer_networks
        self._balancers = PrefixSet(_EVERYWHERE if balancers is None else balancers)
        self._enforced: frozenset[IPNetwork] = frozenset()
        self._pods = PrefixSet()
        self._held: dict[Key, list[ServicePort]] = {}
        self._in_namespace: Counter[str] = Counter()
        self._holders: Counter[ServicePort] = Counter()
        """How many Services hold a port of an address."""
        self._ports_of: dict[Key, tuple[NodePort, ...]] = {}
        self._port_holders: Counter[NodePort] = Counter()
        self._refused: dict[Key, str] = {}
        self._in_force: _Tracked[ServicePort] = _Tracked()
        self._nodes: _Tracked[bytes] = _Tracked()
        self._ports: _Tracked[NodePort] = _Tracked()

    def put(self, key: Key, service: ServiceAddresses | None) -> None:
        """Take over a Service as it is now; None: it is gone."""
        self._remove(key)
        if service is not None and (service.external or service.load_balancers or service.node_ports):
            self._grant(key, service)

    def set_networks(self, networks: NetworkSettings, nodes: Iterable[NodeNetworks]) -> None:
        """Take over where pods and nodes are; addresses there are none of a Service's."""
        enforced = frozenset(networks.enforced)
        addresses = {address.packed for node in nodes for address in node.addresses}
        moved, changed = PrefixSet(enforced ^ self._enforced), addresses ^ self._nodes.in_force
        if enforced == self._enforced and not changed:
            return
        self._enforced, self._pods = enforced, PrefixSet(enforced)
        self._nodes.become(addresses)
        for entry in self._holders:
            if entry[0] in changed or entry[0] in moved:
                self._decide(entry)

    def take_change(self) -> VirtualChange:
        """Return what changed since the last time."""
        services, nodes, ports = self._in_force.take(), self._nodes.take(), self._ports.take()
        return VirtualChange(
            VirtualEntries(services[0], nodes[0], ports[0]), VirtualEntries(services[1], nodes[1], ports[1])
        )

    def refusals(self, most: int) -> list[str]:
        """Say of Services what is not believed, and why, of so many at most."""
        return [f"Service {'/'.join(key)}: {why}" for key, why in islice(self._refusals(), most)]

    def _refusals(self) -> Iterator[tuple[Key, str]]:
        yield from self._refused.items()
        if len(self) == len(self._holders):
            return
        for key, held in self._held.items():
            for packed in dict.fromkeys(packed for packed, _, _ in held):
                if why := self._blocked(packed):
                    yield key, f"{ip_address(packed)} is not virtual: {why}"

    def __len__(self) -> int:
        return len(self._in_force.in_force)

    def _remove(self, key: Key) -> None:
        self._refused.pop(key, None)
        held = self._held.pop(key, [])
        self._in_namespace[key[0]] -= len(held)
        if not self._in_namespace[key[0]]:
            del self._in_namespace[key[0]]
        for entry in _released(self._holders, held):
            self._in_force.discard(entry)
        for port in _released(self._port_holders, self._ports_of.pop(key, ())):
            self._ports.discard(port)

    def _grant(self, key: Key, service: ServiceAddresses) -> None:
        held: list[ServicePort] = []
        allowed = self._allowed(key, service.external, self._external, "networks.externalIpNetworks")
        allowed += self._allowed(key, service.load_balancers, self._balancers, "networks.loadBalancerNetworks")
        for packed, (protocol, number) in product(allowed, service.ports):
            entry = packed, protocol, number
            if why := self._limit(key[0], entry):
                self._refused[key] = why
                break
            held.append(entry)
            self._in_namespace[key[0]] += 1
            self._holders[entry] += 1
            self._decide(entry)
        if held:
            self._held[key] = held
        if service.node_ports:
            self._ports_of[key] = service.node_ports
        for port in service.node_ports:
            self._port_holders[port] += 1
            self._ports.add(port)

    def _allowed(self, key: Key, addresses: Iterable[IPAddress], allowed: PrefixSet, setting: str) -> list[bytes]:
        """Return those of these addresses that the operator allows."""
        found = []
        for address in addresses:
            packed = address.packed
            if packed in allowed and packed not in _SPECIAL:
                found.append(packed)
            else:
                why = "not the address of one host" if packed in allowed else f"outside {setting}"
                self._refused.setdefault(key, f"{address} is not virtual: {why}")
        return found

    def _limit(self, namespace: str, entry: ServicePort) -> str:
        if self._in_namespace[namespace] >= MAX_NAMESPACE_PORTS:
            return f"not all is virtual: its namespace has {MAX_NAMESPACE_PORTS} virtual ports of addresses already"
        if len(self._holders) >= MAX_PORTS and entry not in self._holders:
            return f"not all is virtual: the cluster has {MAX_PORTS} virtual ports of addresses already"
        return ""

    def _decide(self, entry: ServicePort) -> None:
        """Have a port of an address that Services hold in force, or not."""
        if self._blocked(entry[0]):
            self._in_force.discard(entry)
        else:
            self._in_force.add(entry)

    def _blocked(self, packed: bytes) -> str:
        if packed in self._nodes.in_force:
            return "a node's own address"
        return "inside the pods' networks" if packed in self._pods else ""


class _Tracked(Generic[T]):
    """A set, and what changed in it since that was last asked for."""

    def __init__(self) -> None:
        self.in_force: set[T] = set()
        self._added: set[T] = set()
        self._removed: set[T] = set()

    def add(self, item: T) -> None:
        """Add an item, if it is not there."""
        if item not in self.in_force:
            self.in_force.add(item)
            _move(item, self._removed, self._added)

    def discard(self, item: T) -> None:
        """Take an item away, if it is there."""
        if item in self.in_force:
            self.in_force.discard(item)
            _move(item, self._added, self._removed)

    def become(self, wanted: set[T]) -> None:
        """Hold exactly these items."""
        for item in self.in_force - wanted:
            self.discard(item)
        for item in wanted - self.in_force:
            self.add(item)

    def take(self) -> tuple[frozenset[T], frozenset[T]]:
        """Return what was added and what was removed."""
        found = frozenset(self._added), frozenset(self._removed)
        self._added.clear()
        self._removed.clear()
        return found


def _move(item: T, undone: set[T], done: set[T]) -> None:
    """Note a change: it takes back an opposite one that nobody has heard of, or is one of its own."""
    if item in undone:
        undone.discard(item)
    else:
        done.add(item)


def _released(holders: Counter[T], items: Iterable[T]) -> list[T]:
    """Take one holder from each item; return those that have none left."""
    left = []
    for item in items:
        holders[item] -= 1
        if not holders[item]:
            del holders[item]
            left.append(item)
    return left


def _collapsed(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    known = set(networks)
    fours = [network for network in known if isinstance(network, IPv4Network)]
    sixes = [network for network in known if isinstance(network, IPv6Network)]
    return (*collapse_addresses(fours), *collapse_addresses(sixes))
