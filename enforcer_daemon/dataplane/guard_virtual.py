# SPDX-License-Identifier: Apache-2.0
"""The guard's sets of what Services make virtual: a pod's frames may go there, and are translated on the way.

Single addresses and ports in sets of their own, beside the configured networks, so that a Service that changes adds and
deletes its elements, and no table is made anew. A node's address counts on node ports alone, and so never leads to a
port of the node's own. Source: nft(8).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from enforcer_daemon.virtual import NodePort, VirtualChange, VirtualEntries

_SETS = {
    "services4": "type ipv4_addr",
    "services6": "type ipv6_addr",
    "nodes4": "type ipv4_addr",
    "nodes6": "type ipv6_addr",
    "nodeports": "type inet_proto . inet_service",
}
INTO_NODE_PORTS = (
    "ip daddr @nodes4 meta l4proto . th dport @nodeports",
    "ip6 daddr @nodes6 meta l4proto . th dport @nodeports",
)
"""What goes to a node port of a Service; another node translates its own."""
INTO_VIRTUAL = ("ip daddr @services4", "ip6 daddr @services6", *INTO_NODE_PORTS)
"""What goes to a virtual address of a Service."""


def skeleton(table: str, entries: VirtualEntries) -> list[str]:
    """Make the sets with these entries."""
    lines = [f"add set {table} {name} {{ {kind}; }}" for name, kind in _SETS.items()]
    return lines + _element_lines("add", table, entries)


def change_lines(table: str, change: VirtualChange) -> list[str]:
    """Bring a change to the sets: what is removed is there, what is added may be."""
    return _element_lines("delete", table, change.removed) + _element_lines("add", table, change.added)


def _element_lines(verb: str, table: str, entries: VirtualEntries) -> list[str]:
    elements = {
        **_by_family("services", entries.addresses),
        **_by_family("nodes", entries.nodes),
        "nodeports": [_port_element(port) for port in sorted(entries.ports)],
    }
    return [f"{verb} element {table} {name} {{ {', '.join(found)} }}" for name, found in elements.items() if found]


def _by_family(prefix: str, addresses: Iterable[bytes]) -> dict[str, list[str]]:
    known = sorted(addresses)
    return {
        f"{prefix}{version}": [str(ip_address(packed)) for packed in known if len(packed) == length]
        for version, length in ((4, 4), (6, 16))
    }


def _port_element(port: NodePort) -> str:
    protocol, number = port
    return f"{protocol.name.lower()} . {number}"
