# SPDX-License-Identifier: Apache-2.0
"""The networks in force: what lies at an address that a pod dials, or that dials a pod."""

from __future__ import annotations

from enum import IntEnum

from enforcer_daemon.enums import with_plain_members
from enforcer_daemon.model import Protocol
from enforcer_daemon.prefixes import PrefixSet
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.virtual import NodePort, ServicePort, VirtualChange

_MAX_DESTINATIONS = 16_384
"""Remembered classes of addresses."""


@with_plain_members
class Destination(IntEnum):
    """What lies at an address that the pod dials."""

    EXTERNAL = 0
    ENFORCED = 1
    VIRTUAL = 2


class Networks:
    """The networks in force, asked for the class of an address. Shared by the endpoints of a node.

    The class by configured networks is remembered for each address. What Services add or take away is looked up beside
    it, so a change of theirs costs what it changes, and no other address is classed anew.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        self._known: dict[bytes, Destination] = {}
        self._services: set[ServicePort] = set()
        self._nodes: set[bytes] = set()
        self._ports: set[NodePort] = set()
        self.changes = 0
        """How often the classes of addresses have changed, so that what was decided by them is decided again."""
        self.replace(settings)

    def replace(self, settings: NetworkSettings) -> None:
        """Class addresses by other networks from now on; what Services made virtual stays."""
        self._enforced = PrefixSet(settings.enforced)
        self._virtual = PrefixSet(settings.virtual)
        self.masquerade = frozenset(address.packed for address in settings.masquerade)
        self.require_identity = settings.require_identity
        self._known.clear()
        self.changes += 1

    def change_virtual(self, change: VirtualChange) -> None:
        """Take over what Services make virtual beside the configured networks, or no longer do."""
        added, removed = change
        self.changes += 1
        self._services.difference_update(removed.services)
        self._services.update(added.services)
        self._nodes.difference_update(removed.nodes)
        self._nodes.update(added.nodes)
        self._ports.difference_update(removed.ports)
        self._ports.update(added.ports)

    def destination(self, packed: bytes, port: int | None = None, protocol: Protocol = Protocol.TCP) -> Destination:
        """Return the class of an address that is dialed; a Service's and a node's are virtual on their ports alone.

        A configured virtual network may lie inside an enforced one; what a Service lists there stays a pod's address.
        """
        if packed in self._nodes and (protocol, port) in self._ports:
            return Destination.VIRTUAL
        configured = self._by_networks(packed)
        if configured is Destination.EXTERNAL and port is not None and (packed, protocol, port) in self._services:
            return Destination.VIRTUAL
        return configured

    def must_show_identity(self, packed: bytes) -> bool:
        """Tell whether a connection from there needs an identity, whatever policy says, and whatever Services list."""
        return self.require_identity and self._by_networks(packed) is Destination.ENFORCED

    def _by_networks(self, packed: bytes) -> Destination:
        known = self._known.get(packed)
        if known is None:
            if len(self._known) >= _MAX_DESTINATIONS:
                self._known.clear()
            known = self._known[packed] = self._classify(packed)
        return known

    def _classify(self, packed: bytes) -> Destination:
        if packed in self._virtual:
            return Destination.VIRTUAL
        return Destination.ENFORCED if packed in self._enforced else Destination.EXTERNAL
