# SPDX-License-Identifier: Apache-2.0
"""Which networks hold enforced pods, and which addresses lead to them, from what the cluster says of itself. Pure.

What the settings name is not discovered: `networks.enforced` stands in for the nodes' podCIDRs, `networks.virtual` for
all that is virtual. What only administrators and controllers write (podCIDRs, ServiceCIDRs) is believed as it is. What
a Service states is earned: an address counts only where the operator allows it and where no pod or node is, and a
node's address only on node ports in use. kube-proxy translates what is dialled there to a pod, or refuses it, so an
identity that is sent there stays in the cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import islice
from typing import Generic, TypeVar

from enforcer_daemon.kube.resources import NodeNetworks, ServiceAddresses
from enforcer_daemon.kube.table import Key
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.prefixes import PrefixSet
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.virtual import NodePort, VirtualChange, VirtualEntries

MAX_NAMESPACE_ADDRESSES = 1_024
"""Addresses that the Services of one namespace make virtual, each Service's counted by itself."""
MAX_ADDRESSES = 16_384
"""The same of the cluster. About 3 MiB, and as many elements in the guard's sets."""
_EVERYWHERE = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

T = TypeVar("T")


def discover(
    configured: NetworkSettings, nodes: Iterable[NodeNetworks], service_cidrs: Iterable[tuple[IPNetwork, ...]]
) -> NetworkSettings:
    """Return the networks in force; what Services add is told by VirtualAddresses."""
    enforced = configured.enforced or _collapsed(network for node in nodes for network in node.pod_cidrs)
    virtual = configured.virtual or _collapsed(network for cidrs in service_cidrs for network in cidrs)
    return replace(configured, enforced=enforced, virtual=virtual)


def missing_networks(configured: NetworkSettings, node: str, nodes: Iterable[NodeNetworks]) -> str:
    """Say why this node's own pods are in no enforced network; empty where they are."""
    if configured.enforced or any(found.name == node and found.pod_cidrs for found in nodes):
        return ""
    return f"node {node} has no podCIDRs: set networks.enforced to the networks of the cluster's pods"


class VirtualAddresses:
    """What Services make virtual; a change of one costs what that Service states, and no other is looked at.

    Only a change of the pods' networks or of the nodes' addresses, which no user of a namespace can make, looks at all.
    """

    def __init__(self, configured: NetworkSettings) -> None:
        self._external = PrefixSet(configured.external_ip_networks)
        balancers = configured.load_balancer_networks
        self._balancers = PrefixSet(_EVERYWHERE if balancers is None else balancers)
        self._enforced: tuple[IPNetwork, ...] = ()
        self._pods = PrefixSet()
        self._services: dict[Key, ServiceAddresses] = {}
        """Those that state anything."""
        self._granted: dict[Key, list[bytes]] = {}
        self._in_namespace: Counter[str] = Counter()
        self._holders: Counter[bytes] = Counter()
        """Services that were granted an address."""
        self._port_holders: Counter[NodePort] = Counter()
        self._refused: dict[Key, str] = {}
        self._addresses: _Tracked[bytes] = _Tracked()
        self._nodes: _Tracked[bytes] = _Tracked()
        self._ports: _Tracked[NodePort] = _Tracked()

    def put(self, key: Key, service: ServiceAddresses | None) -> None:
        """Take over a Service as it is now; None: it is gone."""
        self._withdraw(key)
        if service is not None and (service.external or service.load_balancers or service.node_ports):
            self._services[key] = service
            self._grant(key, service)

    def set_networks(self, networks: NetworkSettings, nodes: Iterable[NodeNetworks]) -> None:
        """Take over where pods and nodes are; addresses there are none of a Service's."""
        addresses = {address.packed for node in nodes for address in node.addresses}
        if networks.enforced == self._enforced and addresses == self._nodes.in_force:
            return
        self._enforced, self._pods = networks.enforced, PrefixSet(networks.enforced)
        self._nodes.become(addresses)
        for key, service in list(self._services.items()):
            self.put(key, service)

    def take_change(self) -> VirtualChange:
        """Return what changed since the last time."""
        addresses, nodes, ports = self._addresses.take(), self._nodes.take(), self._ports.take()
        return VirtualChange(
            VirtualEntries(addresses[0], nodes[0], ports[0]), VirtualEntries(addresses[1], nodes[1], ports[1])
        )

    def refusals(self, most: int) -> list[str]:
        """Say of Services what is not believed, and why, of so many at most."""
        return [f"Service {'/'.join(key)}: {why}" for key, why in islice(self._refused.items(), most)]

    def __len__(self) -> int:
        return len(self._addresses.in_force)

    def _withdraw(self, key: Key) -> None:
        service = self._services.pop(key, None)
        if service is None:
            return
        self._refused.pop(key, None)
        granted = self._granted.pop(key, [])
        self._in_namespace[key[0]] -= len(granted)
        if not self._in_namespace[key[0]]:
            del self._in_namespace[key[0]]
        for address in _released(self._holders, granted):
            self._addresses.discard(address)
        for port in _released(self._port_holders, service.node_ports):
            self._ports.discard(port)

    def _grant(self, key: Key, service: ServiceAddresses) -> None:
        granted = []
        stated = [(address, True) for address in service.external]
        stated += [(address, False) for address in service.load_balancers]
        for address, is_external in stated:
            if why := self._why_not(key[0], address, is_external):
                self._refused.setdefault(key, f"{address} is not virtual: {why}")
                continue
            packed = address.packed
            granted.append(packed)
            self._in_namespace[key[0]] += 1
            self._holders[packed] += 1
            self._addresses.add(packed)
        if granted:
            self._granted[key] = granted
        for port in service.node_ports:
            self._port_holders[port] += 1
            self._ports.add(port)

    def _why_not(self, namespace: str, address: IPAddress, is_external: bool) -> str:
        packed = address.packed
        if packed not in (self._external if is_external else self._balancers):
            return f"outside networks.{'externalIpNetworks' if is_external else 'loadBalancerNetworks'}"
        if _is_special(address):
            return "no address of a single host"
        if packed in self._pods:
            return "inside the pods' networks"
        if packed in self._nodes.in_force:
            return "a node's own address"
        if self._in_namespace[namespace] >= MAX_NAMESPACE_ADDRESSES:
            return f"its namespace has {MAX_NAMESPACE_ADDRESSES} virtual addresses already"
        if packed not in self._holders and len(self._holders) >= MAX_ADDRESSES:
            return f"the cluster has {MAX_ADDRESSES} virtual addresses already"
        return ""


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


def _is_special(address: IPAddress) -> bool:
    return (
        address.is_unspecified
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or (address.version == 4 and address.is_reserved)
    )


def _collapsed(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    known = set(networks)
    fours = [network for network in known if isinstance(network, IPv4Network)]
    sixes = [network for network in known if isinstance(network, IPv6Network)]
    return (*collapse_addresses(fours), *collapse_addresses(sixes))
