# SPDX-License-Identifier: Apache-2.0
"""The guard against who states the node's own address as his: pods believe it, since kubelet probes them from there.

What the node itself sends to a pod is not forwarded. So what is forwarded, or switched between two ports of a bridge
that netfilter sees, and comes from an address of the node, is forged. Linux drops such packets of IPv4 when it routes
them, those of IPv6 never, and none that a bridge switches. The hook is before source NAT, which may put the address in.
"""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.dataplane.guard_rules import NAME, GuardedEndpoint, counted_drops, difference, drop, listed
from enforcer_daemon.model import IPAddress
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
_HOOK = "type filter hook forward priority -1; policy accept;"  # before other tables' filters may accept for good
_FAMILIES = ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6"))


def skeleton(node_addresses: Iterable[IPAddress]) -> list[str]:
    """Give what the endpoints' rules hang on."""
    lines = [*counted_drops(TABLE, (Reason.SPOOFED_SOURCE,)), f"add chain {TABLE} forwarded {{ {_HOOK} }}"]
    for version, kind, family in _FAMILIES:
        lines += [f"add set {TABLE} {name}{version} {{ type {kind}; }}" for name in ("node", "pods")]
        match = f"{family} saddr @node{version} {family} daddr @pods{version}"
        lines.append(f"add rule {TABLE} forwarded {match} {drop(Reason.SPOOFED_SOURCE)}")
    return lines + address_lines(node_addresses)


def address_lines(node_addresses: Iterable[IPAddress]) -> list[str]:
    """Replace the node's addresses."""
    known, lines = sorted(node_addresses, key=int), []
    for version, _, _ in _FAMILIES:
        lines.append(f"flush set {TABLE} node{version}")
        if found := [address for address in known if address.version == version]:
            lines.append(f"add element {TABLE} node{version} {listed(found)}")
    return lines


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    return difference(TABLE, _elements(before), _elements(after))


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    return difference(TABLE, _elements(before), {})


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Give the endpoint's elements: all pods', isolated or not, since a forged node passes every other check too."""
    addresses = () if endpoint is None else endpoint.addresses
    return {f"pods{address.version} {address}": "" for address in addresses}
