# SPDX-License-Identifier: Apache-2.0
"""The guard's check of who arrives under a pod's address: the pod's own traffic comes by the pod's own link alone.

A host outside can send under the address of any pod, and to the parts of the guard and the pod's rules that come later
it would be the pod itself. So the first hook of the node's IP stack compares source address and input interface. A
bridge port shows as its bridge there; which port it was, guard_bridge compares.
"""

from __future__ import annotations

from enforcer_daemon.dataplane.guard_rules import (
    NAME,
    GuardedEndpoint,
    difference,
    drop,
    sender_elements,
    sender_sets,
)
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
_HOOK = "type filter hook prerouting priority -300; policy accept;"  # before conntrack, so that nothing is left behind


def skeleton() -> list[str]:
    """Return what the endpoints' elements hang on; the drop is guard_forged's."""
    lines = [*sender_sets(TABLE)]
    lines += [
        f"add set {TABLE} selves{v} {{ type {kind} . {kind}; }}" for v, kind in ((4, "ipv4_addr"), (6, "ipv6_addr"))
    ]
    lines += [f"add chain {TABLE} arrived {{ {_HOOK} }}"]
    for version, family in ((4, "ip"), (6, "ip6")):
        match = f"{family} saddr @linked{version} {family} saddr . iifname != @homes{version}"
        # By lo come the node's own sockets: a transparent proxy speaks under the addresses of pods.
        lines.append(f'add rule {TABLE} arrived {match} iifname != "lo" {drop(Reason.SPOOFED_SOURCE)}')
    return lines


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    return difference(TABLE, _elements(before), _elements(after))


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    return difference(TABLE, _elements(before), {})


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    found = sender_elements(endpoint, with_devices=True)
    if endpoint is not None and found:
        # Source and destination of what a pod sends to itself: its source is the pod's for sure.
        found |= {f"selves{address.version} {address} . {address}": "" for address in endpoint.addresses}
    return found
