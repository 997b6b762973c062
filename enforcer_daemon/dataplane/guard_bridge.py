# SPDX-License-Identifier: Apache-2.0
"""The guard on bridges: a neighbor passes neither for a pod nor for the node, in whatever form it sends.

The chains see every frame, fragments too, whether or not netfilter's IP hooks see bridged packets (bridge-nf). A frame
under a pod's address comes in by the pod's own port. A frame that is switched to a pod's port comes from another port,
so it is none of the node's, whatever its destination is: the pod, a group, all, or a link-local address. Frames with a
VLAN tag are not switched to pods, which send none either: a receiver takes off tags that number no VLAN, and what is
inside them would not be seen here.
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
    sender_elements,
    sender_sets,
)
from enforcer_daemon.model import IPAddress
from enforcer_daemon.reasons import Reason

TABLE = f"bridge {NAME}"
_PRIORITY = -300  # bridge-nf is at 0 and above
_TAGGED = "{ 8021q, 8021ad }"


def skeleton(node_addresses: Iterable[IPAddress], *, on_links: bool) -> list[str]:
    """Return what the endpoints' elements hang on; `on_links`: guard_spoofing has checked what registered pods send."""
    lines = [
        *counted_drops(TABLE, (Reason.SPOOFED_SOURCE, Reason.NOT_IP)),
        *sender_sets(TABLE),
        *node_sets(TABLE),
        f"add set {TABLE} ports {{ type ifname; }}",
        f"add chain {TABLE} arrived {{ type filter hook prerouting priority {_PRIORITY}; policy accept; }}",
        f"add chain {TABLE} switched {{ type filter hook forward priority {_PRIORITY}; policy accept; }}",
        *(f"add rule {TABLE} {chain} iifname @ports accept" for chain in ("arrived", "switched") if on_links),
        f"add rule {TABLE} switched meta protocol {_TAGGED} oifname @ports {drop(Reason.NOT_IP)}",
    ]
    for version, family in ((4, "ip"), (6, "ip6")):
        sender = f"{family} saddr @linked{version} {family} saddr . iifname != @homes{version}"
        node = f"{family} saddr @node{version} oifname @ports"
        lines.append(f"add rule {TABLE} arrived {sender} {drop(Reason.SPOOFED_SOURCE)}")
        lines.append(f"add rule {TABLE} switched {node} {drop(Reason.SPOOFED_SOURCE)}")
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
    names = () if endpoint is None else endpoint.links.names
    return sender_elements(endpoint, with_devices=False) | {f'ports "{name}"': "" for name in names}
