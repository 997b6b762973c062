# SPDX-License-Identifier: Apache-2.0
"""The guard against who states the node's own address as his: pods believe it, since kubelet probes them from there.

What the node itself sends to a pod is not forwarded. So what is forwarded, or switched between two ports of a bridge
that netfilter sees, and comes from an address of the node, is forged. Linux drops such packets of IPv4 when it routes
them, those of IPv6 never, and none that a bridge switches. The hook is before source NAT, which may put the address in.

What IPVS sends on is not forwarded either: it shows the interface that it came in by in postrouting, which packets of
the node's own sockets do not. There, behind source NAT, conntrack knows what was masqueraded and what is an answer from
behind a translation; everything else under an address of the node is forged.
"""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.dataplane.guard_rules import (
    NAME,
    GuardedEndpoint,
    counted_drops,
    difference,
    drop,
    node_elements,
    node_sets,
)
from enforcer_daemon.model import IPAddress
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
_HOOK = "type filter hook forward priority -1; policy accept;"  # before other tables' filters may accept for good
_SENT_ON_HOOK = "type filter hook postrouting priority 101; policy accept;"  # source NAT is at 100
_GROUPS = {4: "224.0.0.0/4", 6: "ff00::/8"}
_FAMILIES = ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6"))


def skeleton(node_addresses: Iterable[IPAddress]) -> list[str]:
    """Return what the endpoints' rules hang on."""
    refusal = drop(Reason.SPOOFED_SOURCE)
    lines = [
        *counted_drops(TABLE, (Reason.SPOOFED_SOURCE,)),
        *node_sets(TABLE),
        f"add chain {TABLE} forwarded {{ {_HOOK} }}",
        f"add chain {TABLE} sent_on {{ {_SENT_ON_HOOK} }}",
        f"add chain {TABLE} unproven",
        # The kernel's own neighbor discovery shows the interface that it leaves by.
        f"add rule {TABLE} unproven meta l4proto {{ icmp, ipv6-icmp, igmp }} accept",
        f"add rule {TABLE} unproven meta skuid >= 0 accept",  # of a socket in this namespace
        f"add rule {TABLE} unproven ct direction reply accept",
        f"add rule {TABLE} unproven ct status snat accept",
        f"add rule {TABLE} unproven {refusal}",
    ]
    for version, kind, family in _FAMILIES:
        lines.append(f"add set {TABLE} pods{version} {{ type {kind}; }}")
        match = f"{family} saddr @node{version} {family} daddr @pods{version}"
        lines.append(f"add rule {TABLE} forwarded {match} {refusal}")
        lines.append(f"add rule {TABLE} sent_on iif != 0 {match} goto unproven")
        # Several links may have the same link-local address. It is not routed, and guard_bridge sees what is switched.
        groups = f"{family} saddr @node{version} {family} daddr {_GROUPS[version]}"
        elsewhere = "ip6 saddr != fe80::/10 " if version == 6 else ""
        lines.append(f"add rule {TABLE} forwarded {groups} {elsewhere}{refusal}")
    return lines + address_lines(node_addresses)


def address_lines(node_addresses: Iterable[IPAddress]) -> list[str]:
    """Replace the node's addresses."""
    return node_elements(TABLE, node_addresses)


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    return difference(TABLE, _elements(before), _elements(after))


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    return difference(TABLE, _elements(before), {})


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Return the endpoint's elements: all pods', isolated or not, since a forged node passes every other check too."""
    addresses = () if endpoint is None else endpoint.addresses
    return {f"pods{address.version} {address}": "" for address in addresses}
