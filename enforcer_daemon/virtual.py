# SPDX-License-Identifier: Apache-2.0
"""What Services make virtual beyond the configured networks, as changes: ports of single addresses, and node ports.

A change is as large as what changed, so that whoever holds a copy (the datapath, the guard) pays for that alone.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from enforcer_daemon.model import IPNetwork, Protocol

NO_HOST: tuple[IPNetwork, ...] = (
    *map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")),
    *map(IPv6Network, ("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8")),
)
"""This host, link-local, multicast, reserved (RFC 6890), and IPv4-mapped IPv6: no Service makes them virtual."""
NodePort = tuple[Protocol, int]
ServicePort = tuple[bytes, Protocol, int]
"""A packed address, and a port of it that kube-proxy translates."""


class VirtualEntries(NamedTuple):
    """What is virtual; any other port of these addresses is not."""

    services: frozenset[ServicePort] = frozenset()
    """Load balancer and external addresses of Services, on their ports."""
    nodes: frozenset[bytes] = frozenset()
    """Packed addresses of nodes: virtual on the node ports below."""
    ports: frozenset[NodePort] = frozenset()

    def union(self, other: VirtualEntries) -> VirtualEntries:
        """Return what is in one of them."""
        return VirtualEntries(self.services | other.services, self.nodes | other.nodes, self.ports | other.ports)

    def difference(self, other: VirtualEntries) -> VirtualEntries:
        """Return what is not in the other."""
        return VirtualEntries(self.services - other.services, self.nodes - other.nodes, self.ports - other.ports)

    def intersection(self, other: VirtualEntries) -> VirtualEntries:
        """Return what is in both."""
        return VirtualEntries(self.services & other.services, self.nodes & other.nodes, self.ports & other.ports)


NOTHING_VIRTUAL = VirtualEntries()


class VirtualChange(NamedTuple):
    """What is virtual from now on, and what no longer is."""

    added: VirtualEntries = NOTHING_VIRTUAL
    removed: VirtualEntries = NOTHING_VIRTUAL

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return not any((*self.added, *self.removed))

    def applied_to(self, entries: VirtualEntries) -> VirtualEntries:
        """Return the entries after the change."""
        return entries.difference(self.removed).union(self.added)

    def beyond(self, entries: VirtualEntries) -> VirtualChange:
        """Return the part of the change that is one where these entries are in force."""
        return VirtualChange(self.added.difference(entries), self.removed.intersection(entries))
