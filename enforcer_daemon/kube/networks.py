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
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import product
from typing import Generic, TypeVar

from enforcer_daemon.kube.ignored import WHOLE, IgnoredAddresses
from enforcer_daemon.kube.resources import NodeNetworks, ServiceAddresses
from enforcer_daemon.kube.table import Key
from enforcer_daemon.model import IPNetwork
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
        self._keys_of: dict[bytes, set[Key]] = {}
        """The Services that hold an address."""
        self.ignored = IgnoredAddresses()
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
        looked_at: dict[bytes, str] = {}
        for entry in self._holders:
            packed = entry[0]
            if packed in changed or packed in moved:
                if packed not in looked_at:
                    looked_at[packed] = self._blocked(packed)
                self._decide(entry, looked_at[packed])
        for packed, why in looked_at.items():
            for key in self._keys_of[packed]:
                self.ignored.put(key, packed, why)

    def take_change(self) -> VirtualChange:
        """Return what changed since the last time."""
        services, nodes, ports = self._in_force.take(), self._nodes.take(), self._ports.take()
        return VirtualChange(
            VirtualEntries(services[0], nodes[0], ports[0]), VirtualEntries(services[1], nodes[1], ports[1])
        )

    def refusals(self, most: int) -> list[str]:
        """Return which addresses of Services are not virtual, and why: a line for each Service, so many at most."""
        lines = [f"Service {'/'.join(key)}: {why}" for key, why in self.ignored.told(most).items()]
        more = len(self.ignored) - len(lines)
        return [*lines, f"{more} more Services with addresses that are not virtual"] if more else lines

    def __len__(self) -> int:
        return len(self._in_force.in_force)

    def _remove(self, key: Key) -> None:
        self.ignored.drop(key)
        held = self._held.pop(key, [])
        for packed, _, _ in held:
            if keys := self._keys_of.get(packed):
                keys.discard(key)
                if not keys:
                    del self._keys_of[packed]
        self._in_namespace[key[0]] -= len(held)
        if not self._in_namespace[key[0]]:
            del self._in_namespace[key[0]]
        for entry in _released(self._holders, held):
            self._in_force.discard(entry)
        for port in _released(self._port_holders, self._ports_of.pop(key, ())):
            self._ports.discard(port)

    def _grant(self, key: Key, service: ServiceAddresses) -> None:
        self._hold(key, self._allowed(key, service), service.ports)
        if service.node_ports:
            self._ports_of[key] = service.node_ports
        for port in service.node_ports:
            self._port_holders[port] += 1
            self._ports.add(port)

    def _allowed(self, key: Key, service: ServiceAddresses) -> list[bytes]:
        """Return the addresses of a Service that the operator allows."""
        found: dict[bytes, None] = {}
        ignored: dict[bytes, str] = {}
        for addresses, allowed, setting in (
            (service.external, self._external, "networks.externalIpNetworks"),
            (service.load_balancers, self._balancers, "networks.loadBalancerNetworks"),
        ):
            for packed in (address.packed for address in addresses):
                if packed in allowed and packed not in _SPECIAL:
                    found[packed] = None
                else:
                    why = "not the address of one host" if packed in allowed else f"outside {setting}"
                    ignored.setdefault(packed, why)
        for packed, why in ignored.items():
            if packed not in found:
                self.ignored.put(key, packed, why)
        return list(found)

    def _hold(self, key: Key, allowed: Iterable[bytes], ports: Iterable[NodePort]) -> None:
        """Hold these ports of allowed addresses for a Service, as far as the limits go."""
        held: list[ServicePort] = []
        blocked: dict[bytes, str] = {}
        for packed, (protocol, number) in product(allowed, ports):
            entry = packed, protocol, number
            if why := self._limit(key[0], entry):
                self.ignored.put(key, WHOLE, why)
                break
            if packed not in blocked:
                blocked[packed] = self._blocked(packed)
                self._keys_of.setdefault(packed, set()).add(key)
                self.ignored.put(key, packed, blocked[packed])
            held.append(entry)
            self._in_namespace[key[0]] += 1
            self._holders[entry] += 1
            self._decide(entry, blocked[packed])
        if held:
            self._held[key] = held

    def _limit(self, namespace: str, entry: ServicePort) -> str:
        if self._in_namespace[namespace] >= MAX_NAMESPACE_PORTS:
            return f"its namespace has {MAX_NAMESPACE_PORTS} virtual ports of addresses already"
        if len(self._holders) >= MAX_PORTS and entry not in self._holders:
            return f"the cluster has {MAX_PORTS} virtual ports of addresses already"
        return ""

    def _decide(self, entry: ServicePort, blocked: str) -> None:
        """Have a port of an address that Services hold in force, unless its address is blocked."""
        if blocked:
            self._in_force.discard(entry)
        else:
            self._in_force.add(entry)

    def _blocked(self, packed: bytes) -> str:
        """Return why no Service can make an address virtual; empty if one can."""
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
