# SPDX-License-Identifier: Apache-2.0
"""The guard's sets of what Services make virtual: a pod's frames may go there, and are translated on the way.

They stand beside the configured networks, so that a Service that changes adds and deletes its elements, and no table is
made anew. Addresses count on the ports that kube-proxy translates, and so lead neither to a port of a node's own nor to
whoever else has an external address. Source: nft(8).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from enforcer_daemon.virtual import NodePort, VirtualChange, VirtualEntries

_SETS = {
    "services4": "type ipv4_addr . inet_proto . inet_service",
    "services6": "type ipv6_addr . inet_proto . inet_service",
    "nodes4": "type ipv4_addr",
    "nodes6": "type ipv6_addr",
    "nodeports": "type inet_proto . inet_service",
}
_LENGTHS = ((4, 4), (6, 16))
"""Bytes of an address of each IP version."""
INTO_NODE_PORTS = (
    "ip daddr @nodes4 meta l4proto . th dport @nodeports",
    "ip6 daddr @nodes6 meta l4proto . th dport @nodeports",
)
"""What goes to a node port of a Service; another node translates its own."""
INTO_VIRTUAL = (
    "ip daddr . meta l4proto . th dport @services4",
    "ip6 daddr . meta l4proto . th dport @services6",
    *INTO_NODE_PORTS,
)
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
        **{f"services{version}": _service_elements(entries, length) for version, length in _LENGTHS},
        **{f"nodes{version}": _addresses(entries.nodes, length) for version, length in _LENGTHS},
        "nodeports": [_port(port) for port in sorted(entries.ports)],
    }
    return [f"{verb} element {table} {name} {{ {', '.join(found)} }}" for name, found in elements.items() if found]


def _service_elements(entries: VirtualEntries, length: int) -> list[str]:
    known = sorted(entry for entry in entries.services if len(entry[0]) == length)
    return [f"{ip_address(packed)} . {_port((protocol, number))}" for packed, protocol, number in known]


def _addresses(addresses: Iterable[bytes], length: int) -> list[str]:
    return [str(ip_address(packed)) for packed in sorted(addresses) if len(packed) == length]


def _port(port: NodePort) -> str:
    protocol, number = port
    return f"{protocol.name.lower()} . {number}"
